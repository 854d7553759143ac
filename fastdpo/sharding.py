"""Weights sharded over processes, by FSDP2 or by DeepSpeed's ZeRO-3: call such a model, and read or change its tensors.

    DDP, ZeRO-1, ZeRO-2   each process has all weights
    FSDP2, ZeRO-3         each process has a shard of each tensor, from the moment the trainer is made

A sharded model gathers its weights layer by layer when it is called. So all processes must call it equally often, and
must read its tensors together.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or is_in_zero3(model)


def is_in_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded a model."""
    return any(map(_in_zero3, model.parameters()))


# Before training


def shard_policy(accelerator: Accelerator, model: Any) -> None:
    """Shard the policy in place as training would, so that it can be called before; do nothing without FSDP2."""
    if not accelerator.is_fsdp2:
        return
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:  # accelerate's rounds log-probs to 16 bits, and sums of gradients
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    if plugin.transformer_cls_names_to_wrap is None:  # accelerate stops at a name of a part that the model lacks
        names = {type(module).__name__ for module in model.modules()}
        layers = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in layers if name in names]
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False  # otherwise training would wrap the layers a second time
    fsdp2_prepare_model(accelerator, model)
    accelerator._models.append(model)  # so that an evaluation before training takes it as it is


@contextmanager
def callable_policy(trainer: Any) -> Iterator[None]:
    """Inside the block, the policy of a trainer can be called although DeepSpeed has no engine for training it yet.

    ZeRO-3 shards the weights at the beginning of the first block, for good. Without DeepSpeed this does nothing.
    """
    accelerator, model = trainer.accelerator, trainer.model
    stage = zero_stage(accelerator)
    if stage is None or trainer.deepspeed is not None:
        yield
        return
    engine = engine_without_optimizer(trainer, model) if stage == 3 else None
    model.to(accelerator.device)
    # transformers evaluates a model that it finds here as it is; it would make an engine that can't be trained
    trainer.deepspeed = model
    accelerator._models.append(model)
    try:
        yield
    finally:
        trainer.deepspeed = None
        accelerator._models.remove(model)
        if engine is not None:
            engine.destroy()  # removes its hooks


def forget_engine(trainer: Any) -> None:
    """Let a trainer that has trained with DeepSpeed train again, with a new engine and optimizer."""
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
        trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_wrapped = trainer.model


@contextmanager
def running_no_pickles(trainer: Any) -> Iterator[None]:
    """Inside the block, torch's restricted unpickler reads the checkpoints of DeepSpeed, which asks for the other."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def zero_stage(of: Any) -> int | None:
    """Return the stage of ZeRO, or None without DeepSpeed, of an `Accelerator` or a `fastdpo.DPOConfig`."""
    plugin = getattr(of, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.deepspeed_config["zero_optimization"]["stage"])


def engine_without_optimizer(trainer: Any, model: nn.Module) -> Any:
    """Return an engine of ZeRO-3 that only calls a model: it shards the weights in place, and its hooks gather them."""
    import deepspeed

    found = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    found.trainer_config_finalize(trainer.args, model, 1)  # the sizes that are "auto", as training will set them
    config = copy.deepcopy(found.config)
    config["zero_optimization"].pop("offload_optimizer", None)
    return deepspeed.initialize(model=model, config=config)[0]


def dtype_of_deepspeed(args: Any) -> torch.dtype | None:
    """Return the 16-bit dtype in which DeepSpeed keeps the weights that a run's models compute with, if it does.

    Args:
        args: a `fastdpo.DPOConfig`.
    """
    if zero_stage(args) is None:
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def cast_for_deepspeed(model: nn.Module, args: Any) -> None:
    """Cast the weights as DeepSpeed's engine will, so that what is computed before training equals what training would.

    Buffers keep their dtype.
    """
    if (dtype := dtype_of_deepspeed(args)) is None:
        return
    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.float16, torch.bfloat16) and not _in_zero3(parameter):
            parameter.data = parameter.data.to(dtype)


def gather_together(module: nn.Module, args: Any) -> None:
    """Let ZeRO-3 gather all weights inside a module when it is called, because it reads them without their layers.

    ZeRO-3 itself gathers the weights of a layer that is called. It would notice other uses in training only.
    """
    if zero_stage(args) != 3:
        return
    import deepspeed

    for parameter in module.parameters():
        deepspeed.zero.register_external_parameter(module, parameter)


def copy_model(model: Any) -> Any:
    """Return `copy.deepcopy(model)`, also of a model that ZeRO-3 sharded as it was loaded."""
    twin = copy.deepcopy(model)
    for parameter, own in zip(model.parameters(), twin.parameters(), strict=True):
        if _in_zero3(parameter):
            own.data = whole(parameter)
            parameter.convert_to_zero_parameters(param_list=[own])
    return twin


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward: until then `parameters()` returns these copies.

    An optimizer or a fingerprint must not see the copies, because their changes are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# Tensors


def _in_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole of a tensor that may be sharded."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded, detached; all processes must call this."""
    if _in_zero3(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, detached, in the same memory; the tensor itself if it is not sharded.

    A shard of ZeRO-3 is flat, and the last ones may end with padding. It is to be read only: layers may keep a copy.
    """
    if _in_zero3(tensor):
        shard: Tensor = tensor.ds_tensor.detach()  # type: ignore[attr-defined]
        return shard
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Return the tensors of which a quantised one is made, such as torchao's, in a fixed order; else the tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names: Any = tensor.__tensor_flatten__()[0]
    for name in names:
        yield from plain_parts(getattr(tensor, name))


def largest(number: int, device: torch.device) -> int:
    """Return the largest number that any process gives; all must call this. The device is that of collectives."""
    found = torch.tensor([number], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """Return in all processes what the first one decides, or raise its error; all must call this.

    With FSDP's `cpu_ram_efficient_loading`, only the first process of a machine has a model's weights before training.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@torch.no_grad()
def set_whole(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter that may be sharded to a whole value that all processes have."""
    if _in_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        return
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@torch.no_grad()
def change(parameter: Tensor, other: Tensor, new: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Set a parameter to `new(parameter, other)`, elementwise, of two tensors that are sharded alike or not at all."""
    if _in_zero3(parameter):
        set_whole(parameter, new(whole(parameter), whole(other)))
    else:
        mine = local(parameter)
        mine.copy_(new(mine, local(other).to(mine.device)))


def whole_state(model: nn.Module, *, keep: bool, wanted: Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """Return a model's state on the CPU, with whole tensors; all processes must call this if it is sharded.

    Args:
        model: the model.
        keep: whether this process wants the state; otherwise its tensors are empty.
        wanted: says of a name and a tensor, which may be a shard, whether it is to be in the state.
    """
    found: dict[int, Tensor] = {}  # tensors that are one in the model stay one
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if wanted(name, tensor):
            if id(tensor) not in found:
                value = whole(tensor)
                found[id(tensor)] = value.cpu() if keep else value.new_empty(0)
            state[name] = found[id(tensor)]
    return state


def plain_name(name: str) -> str:
    """Return the name of a tensor without what FSDP's activation checkpointing adds to it."""
    return name.replace("_checkpoint_wrapped_module.", "")

"""Weights that FSDP2 shards over processes: shard a policy before training, and read or change sharded tensors.

A sharded model gathers its weights layer by layer when it is called. So all processes must call it equally often, and
must read its tensors together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


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
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False  # otherwise training would wrap the layers a second time
    fsdp2_prepare_model(accelerator, model)
    accelerator._models.append(model)  # so that an evaluation before training takes it as it is


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward: until then `parameters()` returns these copies.

    An optimizer or a fingerprint must not see the copies, because their changes are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded, detached; all processes must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, detached, in the same memory; the tensor itself if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def plain_name(name: str) -> str:
    """Return the name of a tensor without what FSDP's activation checkpointing adds to it."""
    return name.replace("_checkpoint_wrapped_module.", "")

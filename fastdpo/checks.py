"""Checks that refuse or stop a training: how it runs and loads, its first loss, and losses or gradients not finite."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

logger = logging.getLogger("fastdpo")

LN_2_AT_FIRST = ("sigmoid", "robust", "sigmoid_norm")
"""Objectives whose loss is ln 2 if policy and reference are equal, for every beta and label_smoothing."""


_SPLITS = {"tp": "tensor parallelism", "cp": "context parallelism", "sp": "sequence parallelism"}
"""The kinds of accelerate's ParallelismConfig that split layers or sequences, instead of batches."""


def check_parallelism(trainer: Trainer) -> None:
    """Refuse what gives wrong results or is untested: DataParallel, FSDP 1, splits of layers or sequences.

    Raises:
        ValueError: the run uses one of them; the message names it and what to use instead.
    """
    args: Any = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process, and transformers would use DataParallel, which is not supported; "
            "start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if args.save_on_each_node and args.world_size > 1:
        raise ValueError(
            "save_on_each_node=True is not supported, because a checkpoint is written once, with a manifest of all its "
            "files; leave it out, and give an output_dir that all machines share"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        logger.warning(
            "torchrun keeps its store when it starts the processes again, and they may look in it for processes that "
            "are gone; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, as examples/launch/torchrun.sh does"
        )
    if trainer.is_deepspeed_enabled and (trainer.optimizer is not None or trainer.lr_scheduler is not None):
        raise ValueError(
            "optimizers=... has no effect with DeepSpeed, which makes its own; leave it out, and set optim, "
            "learning_rate and lr_scheduler_type"
        )
    sizes = getattr(trainer.accelerator, "parallelism_config", None)
    for name, kind in _SPLITS.items():
        if (size := getattr(sizes, f"{name}_size", 1)) > 1:
            raise ValueError(
                f"parallelism_config {name}_size={size} ({kind}) is not supported, because a packed batch is not split "
                f"over processes; set {name}_size=1, and dp_shard_size={size} to shard the model with FSDP2 instead"
            )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "a model that from_pretrained(tp_plan=...) or (distributed_config=...) has split over processes is not "
            "supported; load it without, and set fsdp_config={'version': 2, ...} to shard it"
        )
    if not trainer.is_fsdp_enabled:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and args.world_size > 1:
            logger.warning("accelerate leaves FSDP out on the CPU, so each process has all weights (DDP)")
        return
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP version 1 is not supported; set `fsdp_version: 2` in accelerate's YAML (which means 1 if it is left "
            "out; `accelerate to-fsdp2` converts a file), or fsdp_config={'version': 2, ...}"
        )
    for name in ("activation_offloading", "torch_compile"):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported with FSDP yet; leave it out, or use DDP")


_DEEPSPEED_CHANGES = (
    *("amp", "torch_autocast", "progressive_layer_drop", "compression_training", "hybrid_engine", "compile"),
    *("elasticity", "data_efficiency", "curriculum_learning", "sparse_attention", "autotuning"),
)
"""Sections of DeepSpeed's config that change what is computed or when it steps, if they are enabled."""


def check_deepspeed(args: Any) -> None:
    """Refuse settings of DeepSpeed that are untested or contradict the config, and complete those that are unset.

    Args:
        args: a `fastdpo.DPOConfig`. DeepSpeed's settings are in its plugin, wherever they came from.

    Raises:
        ValueError: the message names the setting, its value and what to set instead.
    """
    if (plugin := getattr(args, "deepspeed_plugin", None)) is None:
        return
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    if (stage := zero.get("stage", 0)) not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's zero_optimization stage is {stage}; set 1, 2 or 3, or leave DeepSpeed out to train with DDP"
        )
    for name, ours in (("optimizer", "optim, learning_rate and weight_decay"), ("scheduler", "lr_scheduler_type")):
        if name in config:
            raise ValueError(f"take {name!r} out of DeepSpeed's config: {ours} of fastdpo choose it")
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("DeepSpeed's tensor_parallel is not supported; take it out, and set stage 3 to shard layers")
    if config.get("sequence_parallel_size", 1) > 1:
        raise ValueError(
            "DeepSpeed's sequence_parallel_size is not supported, because a packed batch is not split over processes; "
            "take it out"
        )
    for name in _DEEPSPEED_CHANGES:
        section = config.get(name)
        if section and (
            not isinstance(section, dict)
            or section.get(*(("deepcompile",) if name == "compile" else ("enabled", True)))
        ):
            raise ValueError(f"DeepSpeed's {name!r} is not supported; take it out of its config")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ValueError("DeepSpeed's offload_param to nvme is not supported; set device: cpu, or none")
    for name in ("torch_compile", *(("activation_offloading",) if stage == 3 else ())):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported with DeepSpeed's ZeRO-{stage} yet; leave it out")
    if args.bf16 or args.fp16:
        config.setdefault("bf16" if args.bf16 else "fp16", {"enabled": True})
    if args.bf16:
        # otherwise ZeRO-1 and ZeRO-2 would make the step of a gradient that is not finite, and report a norm of 1
        config["bf16"]["check_grad_overflow"] = True
    batch = args.per_device_train_batch_size
    values = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": batch,
        "train_batch_size": batch * args.gradient_accumulation_steps * args.world_size,
        "gradient_clipping": args.max_grad_norm,
        "bf16": args.bf16,
        "fp16": args.fp16,
    }
    names = {"train_micro_batch_size_per_gpu": "per_device_train_batch_size", "gradient_clipping": "max_grad_norm"}
    for name, ours in values.items():
        given = config.get(name)
        given = given.get("enabled", False) if isinstance(given, dict) else given
        if given not in (None, "auto", ours):
            raise ValueError(
                f"DeepSpeed's {name} is {given}, but fastdpo's {names.get(name, name)} makes it {ours}; set the first "
                "to auto, or both alike"
            )
    config.setdefault("gradient_clipping", args.max_grad_norm)  # DeepSpeed has a default of its own


# Bounds for (float32, 16 bits). Precomputed values come from other batches, in which 16-bit numbers round differently.
_ONLINE = (1e-6, 1e-3)


_PRECOMPUTED = (1e-4, 3e-2)


def first_loss_is_known(
    loss_type: Sequence[str],
    *,
    ref_is_policy: bool,
    loss_weights: Sequence[float] | None = None,
    columns: Sequence[str] = (),
    use_weighting: bool = False,
) -> bool:
    """Return whether the first loss, before any update, must be ln 2.

    Args:
        loss_type: the objectives of the run; the first loss is known for one objective of `LN_2_AT_FIRST` alone.
        ref_is_policy: the reference was made from the policy: a copy by `resolve_reference`, a new adapter switched
            off, or a copy of the adapter. False if the user passed a reference model or adapter.
        loss_weights: weights of the objectives; 1 each if None.
        columns: columns of the dataset; `weight` and `margin` change the loss.
        use_weighting: WPO's weights are on, which scale the loss.
    """
    return (
        len(loss_type) == 1
        and loss_type[0] in LN_2_AT_FIRST
        and ref_is_policy
        and list(loss_weights or (1.0,)) == [1.0]
        and not use_weighting
        and not {"weight", "margin"} & set(columns)
    )


def check_first_loss(
    losses: Tensor,
    scaled_logps: Tensor,
    dtype: torch.dtype,
    *,
    precomputed: bool = False,
    compiled: bool = False,
    router: str = "",
) -> None:
    """Raise unless the mean loss of the first batch is ln 2; call this only if `first_loss_is_known`.

    Args:
        losses: `[B]`, losses of the first batch, before any update. Reading them waits for the device, once per run.
        scaled_logps: beta times the log-probs of the responses, `[R]`. Sums over long responses round, and policy and
            reference may run different implementations of the head, so the allowed error is at least float32's epsilon
            times the largest of them.
        dtype: dtype of the forward: autocast's if it is on, else the weights'.
        precomputed: the reference values come from the dataset or the cache.
        router: why the model's router may be the cause; "" if it has none.
        compiled: torch.compile made other code for the policy, which has gradients, than for the reference; in 16 bits
            it rounds elsewhere.

    Raises:
        ValueError: the loss is not ln 2; the message says by how much, and names the usual causes.
    """
    loss, largest_reward = torch.stack((losses.detach().mean(), scaled_logps.detach().abs().max().float())).tolist()
    bound = (_PRECOMPUTED if precomputed or compiled else _ONLINE)[dtype in (torch.bfloat16, torch.float16)]
    bound = max(bound, largest_reward * torch.finfo(torch.float32).eps)
    if abs(loss - math.log(2)) < bound:  # a loss that is NaN fails too
        return
    causes = (
        "dropout or another random layer is on (disable_dropout=False), or the model's forward depends on train() or "
        "eval(), or the adapter's initialisation changed the base weights or is not the identity"
    )
    if precomputed:
        causes = (
            "the precomputed reference values belong to another model, to other token ids (another tokenizer, template "
            f"or max_length) or to another precision; or {causes}"
        )
    causes = f"{router}; or {causes}" if router else causes
    raise ValueError(
        f"the first loss is {loss:.7f}, but policy and reference are the same model, so it must be ln 2 = "
        f"{math.log(2):.7f} within {bound:.1g} in {str(dtype).removeprefix('torch.')}. The reference is not what it "
        f"seems: {causes}. Nothing has been trained."
    )


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None if all are finite.

    Quantised tensors are left out. It waits for the device once, and needs no memory of the tensors' size.
    """
    names: list[str] = []
    largest: list[Tensor] = []
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            names.append(name)
            norm = torch.linalg.vector_norm(tensor.detach(), math.inf).float()
            largest.append(norm.to(largest[0].device if largest else None))
    if not largest or (finite := torch.isfinite(torch.stack(largest))).all():
        return None
    return names[int(finite.int().argmin())]


def check_best_metric(name: str | None, evaluated: Iterable[str]) -> None:
    """Raise `ValueError` if `metric_for_best_model` is none of the metrics of an evaluation in training."""
    metrics = [metric.removeprefix("eval_") for metric in evaluated]
    if name is not None and name.removeprefix("eval_") not in metrics:
        raise ValueError(f"metric_for_best_model must be one of {', '.join(metrics)}, got {name!r}")


class NonFiniteGuard:
    """Stop training at the first loss or gradient norm that is not finite.

    On the CPU it raises at once, before the backward or the optimizer step. On an accelerator the result of each check
    is copied to the host asynchronously and read once it has arrived, one or two steps later; `check_now` waits.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.Event | None, Callable[[], str]]] = []

    def watch(self, value: Tensor, what: Callable[[], str]) -> None:
        """Check the scalar `value`, now or once it has reached the host; `what()` names it in the error."""
        finite = torch.isfinite(value.detach())
        event = None
        if finite.device.type != "cpu":
            finite = finite.to("cpu", non_blocking=True)
            event = torch.Event(value.device)
            event.record()
        self._pending.append((finite, event, what))
        self._raise(wait=False)

    def check_now(self) -> None:
        """Wait for the results of all checks, as before anything is written to disk."""
        self._raise(wait=True)

    def _raise(self, *, wait: bool) -> None:
        while self._pending:
            finite, event, what = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._pending.pop(0)
            if not finite:
                raise FloatingPointError(
                    f"{what()} is not finite. Training stopped, and no weight that is not finite was saved. Usual "
                    "causes: a learning rate too high, fp16 overflow (use bf16), or weights that were not finite "
                    "to begin with."
                )


def stay_on_cpu(args: Any) -> None:
    """Say in a `fastdpo.DPOConfig` that there is no accelerator, if there is none.

    Raises:
        ValueError: DeepSpeed is to run, and can't on this machine or without a launcher.
    """
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        _check_device_of_deepspeed(args)
    if torch.accelerator.is_available():
        return
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # accelerate leaves FSDP out, so all must load the weights
    args.dataloader_pin_memory = False  # torch would warn that there is no device to copy to
    # otherwise bf16 would be refused, and accelerate would take each of several processes for the only one
    args.use_cpu = True


def _check_device_of_deepspeed(args: Any) -> None:
    if args.use_cpu or not torch.accelerator.is_available():
        raise ValueError(
            "accelerate runs DeepSpeed on GPUs only; leave deepspeed out for a trial on the CPU, which trains with DDP"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "DeepSpeed needs a launcher, also for one GPU: start the script with `torchrun --nproc-per-node 1`, "
            "`accelerate launch` or `deepspeed`"
        )


def leave_checkpointing_to_fsdp(args: Any) -> None:
    """Switch `activation_checkpointing` off if FSDP's settings do the same; transformers takes only one of them.

    Args:
        args: a `fastdpo.DPOConfig`. FSDP's settings are in it, or in the environment, where `accelerate launch` puts
            those of its YAML.
    """
    if (given := getattr(args, "fsdp_plugin_args", None)) is not None:
        checkpoints = bool(given.get("activation_checkpointing"))
    else:
        names = ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING")
        checkpoints = all(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    if checkpoints and getattr(args, name):
        logger.info("gradient_checkpointing is off, because FSDP's activation_checkpointing does the same")
        setattr(args, name, False)


def load_once_with_fsdp(args: Any) -> None:
    """Let the first process of each machine alone read a model, if `fsdp_config` has `cpu_ram_efficient_loading`.

    transformers looks for that in the environment, where accelerate would put it after the model is loaded.
    """
    given = getattr(args, "fsdp_plugin_args", None) or {}
    if given.get("cpu_ram_efficient_loading") and torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_FSDP"] = "true"


def check_loading(args: Any, given: Any) -> None:
    """Let each process read its own data, and let copies from pinned memory to the GPU run asynchronously.

    Args:
        args: a `fastdpo.DPOConfig`, whose `accelerator_config` this completes.
        given: `accelerator_config` as the user wrote it; a `non_blocking` that it sets is kept.
    """
    loading: Any = args.accelerator_config
    if loading.dispatch_batches:
        raise ValueError(
            "accelerator_config dispatch_batches=True cuts the tensors of a batch into equal rows, but the tensors "
            "of a packed batch differ in length; leave it out, and each process reads its part of the data itself"
        )
    loading.dispatch_batches = False
    chosen = given is not None and not (isinstance(given, dict) and "non_blocking" not in given)
    if not chosen and args.dataloader_pin_memory and not args.use_cpu and torch.cuda.is_available():
        loading.non_blocking = True

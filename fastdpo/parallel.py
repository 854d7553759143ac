"""Several processes: what is supported, and where the reference goes."""

from typing import Any

from accelerate import Accelerator
from transformers import Trainer


def check_parallelism(trainer: Trainer) -> None:
    """Refuse what would compute something else, or is not known to work: DataParallel, DeepSpeed, FSDP version 1.

    Raises:
        ValueError: names it and what to use instead.
    """
    args: Any = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process, which DataParallel would drive; start the script with "
            "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is not supported yet; use one process per GPU (DDP), or FSDP2")
    if not trainer.is_fsdp_enabled:
        return
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_config={'version': 2, ...}")
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported with FSDP yet; leave it out, or use DDP")


def prepare_reference(accelerator: Accelerator, ref_model: Any) -> Any:
    """The frozen reference on its device, sharded as the policy will be."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, ref_model).eval()
    return accelerator.prepare_model(ref_model, evaluation_mode=True)

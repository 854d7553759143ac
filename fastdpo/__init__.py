"""Direct Preference Optimization without the logits: Triton kernels, packed batches and a thin trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.compat.patch_trl import patch_trl, unpatch_trl
    from fastdpo.compat.preference_losses import (
        FusedLinearCPOLoss,
        FusedLinearDPOLoss,
        FusedLinearKTOLoss,
        FusedLinearORPOLoss,
        FusedLinearSimPOLoss,
    )
    from fastdpo.config import DPOConfig
    from fastdpo.data.packing import shared_prefix_batch
    from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
    from fastdpo.loss.batch_loss import DPOOutput, dpo_loss
    from fastdpo.scoring import score
    from fastdpo.trainer import DPOTrainer

__version__ = "0.2.0"
__all__ = [
    "DPOConfig",
    "DPOOutput",
    "DPOTrainer",
    "FusedLinearCPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "dpo_loss",
    "linear_logprobs",
    "linear_logprobs_with_stats",
    "patch_trl",
    "score",
    "shared_prefix_batch",
    "unpatch_trl",
]

_HOME = {
    "DPOConfig": "config",
    "DPOOutput": "loss.batch_loss",
    "DPOTrainer": "trainer",
    "FusedLinearCPOLoss": "compat.preference_losses",
    "FusedLinearDPOLoss": "compat.preference_losses",
    "FusedLinearKTOLoss": "compat.preference_losses",
    "FusedLinearORPOLoss": "compat.preference_losses",
    "FusedLinearSimPOLoss": "compat.preference_losses",
    "dpo_loss": "loss.batch_loss",
    "linear_logprobs": "head.linear_logprobs",
    "linear_logprobs_with_stats": "head.linear_logprobs",
    "patch_trl": "compat.patch_trl",
    "score": "scoring",
    "shared_prefix_batch": "data.packing",
    "unpatch_trl": "compat.patch_trl",
}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    # names are imported on first use: the head and the loss need only torch, the trainer all of transformers
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

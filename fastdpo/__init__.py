"""Direct Preference Optimization without the logits: Triton kernels, packed batches and a thin trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.logprobs import linear_logprobs, linear_logprobs_with_stats
    from fastdpo.loss import DPOOutput, dpo_loss
    from fastdpo.packing import shared_prefix_batch
    from fastdpo.scoring import score
    from fastdpo.trainer import DPOTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOConfig",
    "DPOOutput",
    "DPOTrainer",
    "dpo_loss",
    "linear_logprobs",
    "linear_logprobs_with_stats",
    "score",
    "shared_prefix_batch",
]

_HOME = {
    "DPOConfig": "config",
    "DPOOutput": "loss",
    "DPOTrainer": "trainer",
    "dpo_loss": "loss",
    "linear_logprobs": "logprobs",
    "linear_logprobs_with_stats": "logprobs",
    "score": "scoring",
    "shared_prefix_batch": "packing",
}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    # imported on first use: the op and the loss need torch alone, the trainer all of transformers
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

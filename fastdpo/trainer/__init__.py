"""The trainer: models and data prepared once, then transformers' loop over packed steps."""

from fastdpo.trainer.dpo_trainer import DPOTrainer

__all__ = ["DPOTrainer"]

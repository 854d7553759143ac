"""Every objective trains, and is over the optimizer step whatever its micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.options import kind_of_loss
from tests.helpers.trainers import (
    data_for,
    losses,
    tiny_llama,
    weights,
)

OPTIONS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}, "ipo": {"beta": 1.0}}


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name} | OPTIONS.get(name, {}) for name in OBJECTIVES),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"loss_type": "hinge", "use_weighting": True},
    ],
    ids=str,
)
def test_micro_batches_equal_one_batch(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Also where their sizes differ: the last one holds half as many examples. The reference is another model."""
    data = data_for(kind_of_loss(settings["loss_type"] if isinstance(settings.get("loss_type"), str) else "sigmoid"))
    common = settings | {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "data": data}
    whole = make(per_device_train_batch_size=12, **common)
    split = make(per_device_train_batch_size=8, gradient_accumulation_steps=2, **common)
    start = weights(tiny_llama())
    for trainer in (whole, split):
        trainer._first_loss_is_known = False  # for the reference is made another
        if trainer.ref_model is not None:
            with torch.no_grad():
                trainer.ref_model.lm_head.weight.mul_(1.05)
        trainer.train()
    assert losses(whole)[0] == pytest.approx(losses(split)[0], rel=1e-6, abs=1e-6)
    moved, moved_split = (weights(trainer.model) - start for trainer in (whole, split))
    assert moved.norm() > 1e-4
    assert (moved - moved_split).norm() < 2e-5 * moved.norm()

"""`activation_offloading` moves what the backward pass needs, and changes no number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.trainer import offloading as module
from tests.helpers.trainers import losses, make_trainer, weights


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Treat the CPU as a device from which tensors are moved, and count the elements of each."""
    counts: list[int] = []
    empty = torch.empty

    def counting(shape: Any, **options: Any) -> Tensor:
        if "pin_memory" in options:
            counts.append(int(torch.Size(shape).numel()))
        return empty(shape, **options)

    monkeypatch.setattr(module, "HOST", "nowhere")
    monkeypatch.setattr(module, "SMALLEST", 64)
    monkeypatch.setattr(module.torch, "empty", counting)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_stays_the_same_to_the_bit(tmp_path: Path, copied: list[int], checkpointing: bool) -> None:
    settings = {"gradient_checkpointing": checkpointing, "max_steps": 3}
    plain = make_trainer(tmp_path, **settings)
    plain.train()
    assert not copied
    moved = make_trainer(tmp_path, activation_offloading=True, **settings)
    moved.train()
    assert copied
    assert losses(moved) == losses(plain)
    assert torch.equal(weights(moved.model), weights(plain.model))


def test_weights_and_small_tensors_stay(copied: list[int]) -> None:
    layer = torch.nn.Linear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    with module.offloading(layer):
        y = layer(x).exp()  # saves x, a view of the weight, and y, which has few elements
    assert copied == [x.numel()]
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (layer(x).exp() @ layer.weight).detach())

"""The comparator itself: it must see what a global tolerance misses."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.accuracy import assert_as_accurate


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def gradients(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient of logits [N, V] with respect to the log-probabilities: exact, in low precision, and a good answer."""
    logits = torch.randn(16, 500, dtype=torch.float64)
    onehot = torch.eye(500, dtype=torch.float64)[:16]
    exact = onehot - logits.softmax(-1)
    same_dtype = onehot.to(request.param) - logits.to(request.param).softmax(-1)
    return exact.to(request.param), same_dtype, exact


def test_accepts_a_correctly_rounded_gradient(gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_as_accurate(*gradients, "dlogits")


def test_rejects_a_zero_gradient(gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    actual, same_dtype, exact = gradients
    with pytest.raises(AssertionError, match="dlogits: slice"):
        assert_as_accurate(torch.zeros_like(actual), same_dtype, exact, "dlogits")


def test_rejects_a_softmax_tail_three_times_too_large(gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    actual, same_dtype, exact = gradients
    targets = torch.arange(16)
    wrong = 3 * actual
    wrong[targets, targets] = actual[targets, targets]
    assert (wrong - exact).abs().max() < 0.2, "an absolute tolerance would not see it"
    with pytest.raises(AssertionError, match="dlogits: slice"):
        assert_as_accurate(wrong, same_dtype, exact, "dlogits")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rejects_what_is_not_finite(gradients: tuple[Tensor, Tensor, Tensor], value: float) -> None:
    actual, same_dtype, exact = gradients
    actual[3, 7] = value
    with pytest.raises(AssertionError, match="dlogits: not finite"):
        assert_as_accurate(actual, same_dtype, exact, "dlogits")


def test_rejects_another_shape(gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    actual, same_dtype, exact = gradients
    with pytest.raises(AssertionError, match="dlogits: shape"):
        assert_as_accurate(actual[:, :1], same_dtype, exact, "dlogits")

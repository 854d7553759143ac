"""How close is close enough: PyTorch's own rounding sets the bar, slice by slice."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, same_dtype: Tensor, exact: Tensor, name: str, slack: float = 2.0) -> None:
    """Assert that `actual` is as close to `exact` as PyTorch gets in the same dtype.

    For every axis, each slice along it must satisfy

        |actual - exact| <= slack * (|same_dtype - exact| + eps * |exact|)      (L2 norms)

    `exact` is the reference in float64; `same_dtype` is the reference in the dtype under test. Slices matter: a
    gradient of logits is ~1 at the target and ~1/V elsewhere, so one global tolerance would let the whole softmax
    tail be wrong.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.double()
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float32:
        eps = 1e-6  # exp() turns ulps of x into |x| ulps
    for dim in range(exact.ndim):
        error, bar, scale = (t.norm(dim=dim) for t in (actual.double() - exact, same_dtype.double() - exact, exact))
        budget = slack * (bar + eps * scale)
        worst = (error - budget).argmax()
        assert (error <= budget).all(), (
            f"{name}: slice {int(worst)} along axis {dim} is off by {error.flatten()[worst]:.2e}, "
            f"budget {budget.flatten()[worst]:.2e} (PyTorch: {bar.flatten()[worst]:.2e})"
        )

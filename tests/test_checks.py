"""fastdpo.checks: the stop at what is not finite."""

import math

import pytest
import torch

from fastdpo.checks import NonFiniteGuard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_stops(value: float, device: torch.device) -> None:
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(1.0, device=device), lambda: "the first loss")

    def watch_second() -> None:
        guard.watch(torch.tensor(value, device=device), lambda: "the second loss")
        guard.check_now()  # on a GPU the verdict may still be on its way

    with pytest.raises(FloatingPointError, match="the second loss is not finite"):
        watch_second()


def test_an_error_is_worded_only_when_needed(device: torch.device) -> None:
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(0.0, device=device), lambda: pytest.fail("worded for nothing"))
    guard.check_now()

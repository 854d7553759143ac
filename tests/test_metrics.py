"""fastdpo.metrics: sums on the device, and the stop at what is not finite."""

import math

import pytest
import torch
from accelerate import Accelerator

from fastdpo.metrics import NonFiniteGuard, RunningSums


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=not torch.cuda.is_available())


def test_means_weigh_every_element_the_same(accelerator: Accelerator, device: torch.device) -> None:
    sums = RunningSums()
    sums.add("reward", torch.tensor([1.0, 2.0, 3.0], device=device))
    sums.add("reward", torch.tensor([10.0], device=device))
    sums.add("share", torch.tensor([True, False, True], device=device), torch.tensor(8, device=device))
    sums.add_number("tokens", 5)
    sums.add_number("tokens", 7, 2.0)
    assert sums.read(accelerator) == {"reward": (16.0, 4.0), "share": (2.0, 8.0), "tokens": (12.0, 3.0)}
    assert sums.read(accelerator) == {}


def test_sums_of_16_bit_values_are_taken_in_32(accelerator: Accelerator, device: torch.device) -> None:
    sums = RunningSums()
    for _ in range(2):
        sums.add("x", torch.full((4096,), 1.0, dtype=torch.bfloat16, device=device))
    assert sums.read(accelerator)["x"] == (8192.0, 8192.0)


def test_sums_hold_no_graph(device: torch.device) -> None:
    sums = RunningSums()
    sums.add("x", torch.ones(2, requires_grad=True, device=device) * 2)
    assert not any(entry.requires_grad for entry in sums._on_device.values())


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

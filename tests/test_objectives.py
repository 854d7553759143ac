"""fastdpo.objectives against float64 transcriptions of the formulas and numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from fastdpo import dpo_loss


def sigmoid_in_float64(c: float, r: float, ref_c: float, ref_r: float, beta: float, e: float) -> float:
    """Eq. 3 of the cDPO note, one pair at a time, without any of PyTorch."""
    z = beta * ((c - ref_c) - (r - ref_r))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


@pytest.fixture
def logps() -> Tensor:
    return (30 * torch.randn(4, 16)).double()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2], ids=["dpo", "cdpo"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_sigmoid_equals_its_formula(logps: Tensor, beta: float, label_smoothing: float) -> None:
    out = dpo_loss(*logps, beta=beta, label_smoothing=label_smoothing)
    exact = [sigmoid_in_float64(*pair, beta, label_smoothing) for pair in logps.T.tolist()]
    torch.testing.assert_close(out.losses, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    in_fp32 = dpo_loss(*logps.float(), beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(in_fp32.losses.double(), out.losses, rtol=1e-5, atol=1e-6)


def test_gradient_of_sigmoid_is_minus_beta_sigmoid_of_minus_margin(logps: Tensor) -> None:
    logps.requires_grad_()
    dpo_loss(*logps, beta=0.1).losses.sum().backward()
    c, r, ref_c, ref_r = logps.detach()
    weight = 0.1 * torch.sigmoid(-0.1 * (c - ref_c - r + ref_r))
    torch.testing.assert_close(logps.grad, torch.stack([-weight, weight, weight, -weight]))


def test_worked_by_hand() -> None:
    # log-ratios: chosen [0, 1], rejected [0, -1]; beta 0.5 -> margins [0, 1]
    out = dpo_loss(
        torch.tensor([-3.0, -4.0]),
        torch.tensor([-5.0, -7.0]),
        torch.tensor([-3.0, -5.0]),
        torch.tensor([-5.0, -6.0]),
        beta=0.5,
    )
    torch.testing.assert_close(out.losses, torch.tensor([math.log(2), math.log1p(math.exp(-1))]))
    torch.testing.assert_close(out.chosen_rewards, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(out.rejected_rewards, torch.tensor([0.0, -0.5]))


def test_policy_equal_to_reference_costs_ln_2() -> None:
    logps = -300 * torch.rand(2, 64)
    out = dpo_loss(*logps, *logps, beta=0.3)
    assert (out.losses - math.log(2)).abs().max() < 1e-6


def test_margins_of_a_thousand_nats_stay_finite() -> None:
    out = dpo_loss(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), *torch.zeros(2, 2), beta=0.1)
    torch.testing.assert_close(out.losses, torch.tensor([0.0, 1000.0]))


def test_rewards_are_detached(logps: Tensor) -> None:
    out = dpo_loss(*logps.requires_grad_(), beta=0.1)
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"beta": -0.1}, "beta must be a positive number, got -0.1"),
        ({"beta": math.nan}, "beta must be a positive number, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\), got -0.1"),
        ({"loss_type": "sigmod"}, "loss_type 'sigmod' is unknown: did you mean 'sigmoid'"),
        ({"loss_type": "zzz"}, "loss_type 'zzz' is unknown: choose from 'sigmoid', 'hinge'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_setting_is_named(bad: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*torch.zeros(4, 1), **bad)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"ref_rejected_logps must be \[B\].*got \[2\], chosen_logps \[3\]"):
        dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(2))

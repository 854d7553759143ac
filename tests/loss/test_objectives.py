"""fastdpo.loss.objectives against transcriptions of the papers' formulas in 50 digits, and numbers worked by hand."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from fastdpo import dpo_loss
from fastdpo.loss.objectives import DIVERGENCES, OBJECTIVES, apo_zero_unpaired, kto, plackett_luce
from fastdpo.loss.options import PARAMETERS, kind_of_loss
from tests.helpers.accuracy import assert_as_accurate

mp.dps = 50
SMOOTHING, ALPHA, TAU, GAMMA = 0.1, 0.4, 0.2, 0.7


def s(x: mpf) -> mpf:
    return 1 / (1 + mp.exp(-x))


def ls(x: mpf) -> mpf:
    return mp.log(s(x))


def smoothed(z: mpf, e: mpf) -> mpf:
    return -(1 - e) * ls(z) - e * ls(-z)


# f'(t) of the ratio t = pi / pi_ref
DIVERGENCE_TRUTHS: dict[str, Callable[[mpf], mpf]] = {
    "reverse_kl": lambda t: mp.log(t),
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: mp.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (mpf(ALPHA) - 1) - 1) / (mpf(ALPHA) - 1),
}


def odds(logp: mpf, n: mpf) -> mpf:
    p = mp.exp(logp / n)
    return p / (1 - p)


# of log pi and log pi_ref of both, their lengths, beta, label smoothing e and the divergence's f'
TRUTHS: dict[str, Callable[..., mpf]] = {
    "sigmoid": lambda w, l, rw, rl, nw, nl, b, e, f: smoothed(b * (f(mp.exp(w - rw)) - f(mp.exp(l - rl))), e),
    "hinge": lambda w, l, rw, rl, nw, nl, b, e, f: max(mpf(0), 1 - b * (f(mp.exp(w - rw)) - f(mp.exp(l - rl)))),
    "ipo": lambda w, l, rw, rl, nw, nl, b, e, f: (f(mp.exp(w - rw)) / nw - f(mp.exp(l - rl)) / nl - 1 / (2 * b)) ** 2,
    "exo_pair": lambda w, l, rw, rl, nw, nl, b, e, f: exo(b * (f(mp.exp(w - rw)) - f(mp.exp(l - rl))), e),
    "nca_pair": lambda w, l, rw, rl, nw, nl, b, e, f: -ls(b * (w - rw)) - ls(-b * (w - rw)) / 2 - ls(-b * (l - rl)) / 2,
    "robust": lambda w, l, rw, rl, nw, nl, b, e, f: (
        -(
            (1 - e) * ls(b * (f(mp.exp(w - rw)) - f(mp.exp(l - rl))))
            - e * ls(b * (f(mp.exp(l - rl)) - f(mp.exp(w - rw))))
        )
        / (1 - 2 * e)
    ),
    "bco_pair": lambda w, l, rw, rl, nw, nl, b, e, f: -ls(b * (w - rw)) - ls(-b * (l - rl)),
    "sppo_hard": lambda w, l, rw, rl, nw, nl, b, e, f: (w - rw - 1 / (2 * b)) ** 2 + (l - rl + 1 / (2 * b)) ** 2,
    "apo_zero": lambda w, l, rw, rl, nw, nl, b, e, f: 1 - s(b * (w - rw)) + s(b * (l - rl)),
    "apo_down": lambda w, l, rw, rl, nw, nl, b, e, f: s(b * (w - rw)) + 1 - s(b * (w - rw - l + rl)),
    "discopop": lambda w, l, rw, rl, nw, nl, b, e, f: discopop(b * (f(mp.exp(w - rw)) - f(mp.exp(l - rl)))),
    "sigmoid_norm": lambda w, l, rw, rl, nw, nl, b, e, f: -ls(b * (f(mp.exp(w - rw)) / nw - f(mp.exp(l - rl)) / nl)),
    "simpo": lambda w, l, rw, rl, nw, nl, b, e, f: smoothed(b * w / nw - b * l / nl - mpf(GAMMA), e),
    "cpo": lambda w, l, rw, rl, nw, nl, b, e, f: smoothed(b * (w - l), e),
    "orpo": lambda w, l, rw, rl, nw, nl, b, e, f: -b * ls(mp.log(odds(w, nw) / odds(l, nl))),
}


def exo(z: mpf, e: mpf) -> mpf:
    return s(z) * mp.log(s(z) / (1 - e)) + s(-z) * mp.log(s(-z) / e)


def discopop(z: mpf) -> mpf:
    m = s(z / mpf(TAU))
    return -ls(z) * (1 - m) + mp.exp(-z) * m


def options(name: str, divergence: str = "reverse_kl") -> dict[str, Any]:
    reads = PARAMETERS[name]
    chosen: dict[str, Any] = {"loss_type": name}
    chosen |= {"label_smoothing": SMOOTHING} if "label_smoothing" in reads else {}
    chosen |= {"discopop_tau": TAU} if "discopop_tau" in reads else {}
    chosen |= {"simpo_gamma": GAMMA} if "simpo_gamma" in reads else {}
    chosen |= {"cpo_alpha": 0.0} if name == "cpo" else {}  # the likelihood terms are in test_loss.py
    chosen |= {"f_divergence_type": divergence} if divergence != "reverse_kl" else {}
    return chosen | ({"f_alpha_divergence_coef": ALPHA} if divergence == "alpha_divergence" else {})


def truth(name: str, divergence: str, logps: Tensor, lengths: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Losses [B] and their gradient [4, B], float64."""
    losses, gradients = [], []
    e = mpf(SMOOTHING) if "label_smoothing" in PARAMETERS[name] else mpf(0)
    for pair, (nw, nl) in zip(logps.T.tolist(), lengths.T.tolist(), strict=True):

        def loss(*x: mpf, nw: float = nw, nl: float = nl) -> mpf:
            return TRUTHS[name](*x, mpf(nw), mpf(nl), mpf(beta), e, DIVERGENCE_TRUTHS[divergence])

        point = tuple(map(mpf, pair))
        losses.append(float(loss(*point)))
        partial = [tuple(int(i == k) for i in range(4)) for k in range(4)]
        gradients.append([float(mpmath.diff(loss, point, n)) for n in partial])
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64).T


def evaluate(name: str, divergence: str, logps: Tensor, lengths: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The same by `dpo_loss` in the dtype of `logps`; ORPO's likelihood term taken off."""
    logps = logps.clone().requires_grad_()
    reference_free = not PARAMETERS[name] & {"z", "chosen_scores", "chosen_logratios"}
    refs = (None, None) if reference_free else logps[2:]
    out = dpo_loss(
        *logps[:2],
        *refs,
        beta=beta,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **options(name, divergence),
    )
    losses = out.losses + logps[0] / lengths[0].mean() if name == "orpo" else out.losses
    return losses.detach(), torch.autograd.grad(losses.sum(), logps)[0]


def random_pairs(scale: float = 8.0) -> tuple[Tensor, Tensor]:
    """Log-probs [4, B] and lengths [2, B], exact in float32: ragged, log-ratios of about `scale` nats."""
    lengths = torch.randint(1, 30, (2, 12)).double()
    ref = -3 * lengths
    logps = (ref + scale * torch.randn(2, 12).double()).clamp(max=-0.25)
    return torch.cat((logps, ref)).float().double(), lengths


COVERED = [(name, "reverse_kl") for name in TRUTHS]
COVERED += [
    (name, divergence)
    for name in TRUTHS
    if PARAMETERS[name] & {"z", "chosen_scores"}
    for divergence in DIVERGENCES
    if divergence != "reverse_kl"
]


@pytest.mark.parametrize(("name", "divergence"), COVERED)
def test_value_and_gradient_equal_the_formula(name: str, divergence: str) -> None:
    scale = 8.0 if divergence == "reverse_kl" else 2.0
    logps, lengths = random_pairs(scale)
    exact, exact_gradient = truth(name, divergence, logps, lengths, 0.3)
    losses, gradient = evaluate(name, divergence, logps, lengths, 0.3)
    torch.testing.assert_close(losses, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-12, atol=1e-12)
    in_fp32, gradient = evaluate(name, divergence, logps.float(), lengths.float(), 0.3)
    torch.testing.assert_close(in_fp32.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


def test_every_objective_of_pairs_has_its_formula_here_or_in_test_loss() -> None:
    pairs = {name for name in OBJECTIVES if kind_of_loss(name) == "preference"}
    assert pairs - set(TRUTHS) == {"aot", "aot_unpaired", "sft"}
    assert set(DIVERGENCE_TRUTHS) == set(DIVERGENCES)


@pytest.mark.parametrize("name", TRUTHS)
def test_margins_of_a_thousand_nats_stay_finite_and_exact(name: str) -> None:
    far = torch.tensor([-1.0, -1001.0, -2001.0]).double()
    logps = torch.cartesian_prod(far, far, far[1:], far[1:]).T
    lengths = torch.full((2, logps.shape[1]), 7.0).double()
    exact, exact_gradient = truth(name, "reverse_kl", logps, lengths, 0.3)
    losses, gradient = evaluate(name, "reverse_kl", logps.float(), lengths.float(), 0.3)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(TRUTHS.keys() - {"orpo"}))  # from whose gradient `evaluate` takes another one
def test_the_gradient_of_a_saturated_loss_keeps_its_digits(name: str) -> None:
    """Where a loss is flat, float32 has the digits of a gradient of 1e-8, or of 1e-22."""
    ratios = torch.tensor([-170.0, -61.5, 61.5, 170.0]).double()
    ref = torch.full((2, 16), -500.0).double()
    logps = torch.cat((ref + torch.cartesian_prod(ratios, ratios).T, ref))
    lengths = torch.tensor([[9.0], [7.0]]).double().expand(2, 16)
    _, exact = truth(name, "reverse_kl", logps, lengths, 0.3)
    _, gradient = evaluate(name, "reverse_kl", logps.float(), lengths.float(), 0.3)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_of_a_saturated_divergence_keeps_its_digits(name: str) -> None:
    x = torch.tensor([-61.5, -17.0, -1.01, -0.99, -1e-3, 0.0, 0.3, 17.0, 61.5])
    found = []
    for point in (x.requires_grad_(), x.detach().double().requires_grad_()):
        scores = DIVERGENCES[name](point, ALPHA)
        found += [scores, *torch.autograd.grad(scores.sum(), point)]
    torch.testing.assert_close(found[0].double(), found[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), found[3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "sigmoid_norm"])
def test_divergences_stay_finite_at_a_thousand_nats(name: str, divergence: str) -> None:
    far = torch.tensor([-1.0, -1001.0, -2001.0])
    logps = torch.cartesian_prod(far, far, far, far).T
    for values in evaluate(name, divergence, logps, torch.full((2, 81), 7.0), 0.3):
        assert values.isfinite().all()


def test_orpo_of_a_certain_response_is_finite() -> None:
    """Where float32 says p = 1, the odds are those of the largest number below 1."""
    logps = torch.tensor([[0.0, -1e-9, -5.0, 0.0], [-5.0, -5.0, 0.0, 0.0]])
    losses, gradient = evaluate("orpo", "reverse_kl", torch.cat((logps, logps)), torch.ones(2, 4), 1.0)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    log_odds = -math.log(torch.finfo(torch.float32).eps)
    assert losses[2].item() == pytest.approx(log_odds + 5 + math.log1p(-math.exp(-5)), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logps, lengths = random_pairs()
    logps = logps.to(dtype)
    for name in ("sigmoid", "ipo", "sppo_hard"):
        losses, _ = evaluate(name, "reverse_kl", logps, lengths.to(dtype), 0.3)
        expected, _ = evaluate(name, "reverse_kl", logps.float(), lengths.float(), 0.3)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=0, atol=0)


# Ranked and labelled responses


def ranked(counts: list[int], K: int) -> tuple[Tensor, Tensor]:
    """Log-ratios and mask [B, K], float64; arbitrary numbers where there is no response."""
    mask = torch.arange(K) < torch.tensor(counts)[:, None]
    return 5 * torch.randn(len(counts), K).double(), mask


def test_plackett_luce_equals_its_formula() -> None:
    logratios, mask = ranked([2, 3, 4, 5, 5], 5)
    logratios.requires_grad_()
    losses = plackett_luce(logratios, mask, 0.3)
    (gradient,) = torch.autograd.grad(losses.sum(), logratios)
    for row, present, loss, slope in zip(logratios.tolist(), mask, losses, gradient, strict=True):
        K = int(present.sum())

        def truth(*z: mpf, K: int = K) -> mpf:
            b = mpf(0.3)
            return -mp.log(
                mp.fprod(mp.exp(b * z[k]) / mp.fsum(mp.exp(b * z[j]) for j in range(k, K)) for k in range(K))
            )

        point = tuple(map(mpf, row[:K]))
        assert loss.item() == pytest.approx(float(truth(*point)), rel=1e-12)
        for k in range(K):
            exact = float(mpmath.diff(truth, point, tuple(int(i == k) for i in range(K))))
            assert slope[k].item() == pytest.approx(exact, abs=1e-12)
        assert not slope[K:].any()


def test_a_missing_rank_is_left_out() -> None:
    logratios, _ = ranked([4], 4)
    mask = torch.tensor([[True, False, True, True]])
    without = plackett_luce(logratios[mask][None], torch.ones(1, 3, dtype=torch.bool), 0.3)
    torch.testing.assert_close(plackett_luce(logratios, mask, 0.3), without, rtol=1e-12, atol=0)


def test_plackett_luce_of_two_is_dpo() -> None:
    logratios = torch.cat((8 * torch.randn(40, 2), torch.tensor([[1e3, -1e3], [-1e3, 1e3], [0.0, 0.0]]))).double()
    z = 0.3 * (logratios[:, 0] - logratios[:, 1])
    losses = plackett_luce(logratios, torch.ones(43, 2, dtype=torch.bool), 0.3)
    torch.testing.assert_close(losses, OBJECTIVES["sigmoid"](z, 0.0), rtol=1e-14, atol=1e-15)


def test_plackett_luce_at_a_thousand_nats_is_finite_in_float32() -> None:
    logratios = torch.tensor([[1e3, 0.0, -1e3], [-1e3, 0.0, 1e3], [1e3, 1e3, 1e3]], requires_grad=True)
    losses = plackett_luce(logratios, torch.ones(3, 3, dtype=torch.bool), 1.0)
    torch.testing.assert_close(losses, torch.tensor([0.0, 3000.0, math.log(6)]))
    (gradient,) = torch.autograd.grad(losses.sum(), logratios)
    assert gradient.isfinite().all()


def test_saturated_ranks_and_labels_have_gradients_with_all_their_digits() -> None:
    ranks = torch.tensor([[19.0, 0.0, -20.0], [-19.0, 0.0, 20.0]])  # where float64 has the digits in any case
    logratios, label = torch.tensor([-18.0, 18.0, -20.0, 20.0]), torch.tensor([True, False, False, True])
    mask = torch.ones(2, 3, dtype=torch.bool)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = ranks.to(dtype).requires_grad_(), logratios.to(dtype).requires_grad_()
        losses = plackett_luce(a, mask, 1.0).sum() + kto(b, label, torch.zeros(1), 1.0, 1.0, 1.0).sum()
        gradients.append(torch.autograd.grad(losses, (a, b)))
    for actual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kl", [0.0, 2.5])
@pytest.mark.parametrize("scale", [5.0, 1000.0])
def test_kto_equals_its_formula(kl: float, scale: float) -> None:
    logratios = (scale * torch.randn(12)).double().requires_grad_()
    label = torch.arange(12) % 3 > 0
    losses = kto(logratios, label, torch.tensor(kl), 0.3, 1.25, 0.5)
    unpaired = apo_zero_unpaired(logratios, label, 0.3, 1.25, 0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), logratios)
    for i, (x, yes) in enumerate(zip(logratios.tolist(), label.tolist(), strict=True)):

        def truth(x: mpf, z0: float = kl, yes: bool = yes) -> mpf:
            v = s(mpf(0.3) * (x - z0)) if yes else s(mpf(0.3) * (z0 - x))
            return (mpf(1.25) if yes else mpf(0.5)) * (1 - v)

        assert losses[i].item() == pytest.approx(float(truth(mpf(x))), abs=1e-14)
        assert gradient[i].item() == pytest.approx(float(mpmath.diff(truth, mpf(x))), abs=1e-14)
        assert unpaired[i].item() == pytest.approx(float(truth(mpf(x), 0.0)), abs=1e-14)


# dpo_loss


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


OF_BETA_ALONE = [
    name
    for name, read in PARAMETERS.items()
    if "beta" in read and kind_of_loss(name) == "preference" and name not in ("ipo", "sppo_hard", "orpo", "cpo")
]


@pytest.mark.parametrize("name", OF_BETA_ALONE)
def test_with_beta_0_a_loss_does_not_depend_on_the_policy(name: str) -> None:
    logps, lengths = random_pairs()
    logps.requires_grad_()
    of = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    read = logps[: 2 if name == "simpo" else 4]  # it has no reference
    out = dpo_loss(*read, loss_type=name, beta=0.0, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **of)
    assert out.losses.isfinite().all()
    (gradient,) = torch.autograd.grad(out.losses.sum(), logps)
    assert not gradient.any()


def test_a_loss_of_weight_0_adds_nothing() -> None:
    logps, lengths = random_pairs()
    both = dpo_loss(*logps, loss_type=["sigmoid", "sft"], loss_weights=[1, 0], chosen_lengths=lengths[0])
    torch.testing.assert_close(both.losses, dpo_loss(*logps).losses, rtol=0, atol=0)


def test_policy_equal_to_reference_costs_ln_2() -> None:
    logps = -300 * torch.rand(2, 64)
    out = dpo_loss(*logps, *logps, beta=0.3)
    assert (out.losses - math.log(2)).abs().max() < 1e-6


def test_rewards_are_detached() -> None:
    out = dpo_loss(*torch.randn(4, 5, requires_grad=True), beta=0.1)
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


def test_float32_is_as_accurate_as_the_formula_in_float32() -> None:
    logps, _ = random_pairs()
    z = 0.3 * (logps[0] - logps[2] - logps[1] + logps[3])
    naive = -(0.3 * (logps[0] - logps[2] - logps[1] + logps[3]).float()).sigmoid().log()
    ours = dpo_loss(*logps.float(), beta=0.3).losses
    assert_as_accurate(ours, naive, -torch.nn.functional.logsigmoid(z), "losses")


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_sorts_the_batch(loss_type: str) -> None:
    logps = 5 * torch.randn(4, 9).double()
    w, l, ref_w, ref_l = logps
    pairs = (w - l, ref_w - ref_l) if loss_type == "aot" else (w - ref_w, l - ref_l)
    delta = pairs[0].sort().values - pairs[1].sort().values
    losses = dpo_loss(*logps, beta=0.3, loss_type=loss_type).losses
    torch.testing.assert_close(losses.mean(), -torch.nn.functional.logsigmoid(0.3 * delta).mean())


def test_columns_and_sums() -> None:
    logps, lengths = random_pairs()
    beta, margin, weight = torch.rand(3, 12).double() + 0.1
    z = beta * (logps[0] - logps[2] - logps[1] + logps[3]) - margin
    nll = -logps[0] / lengths[0].mean()
    out = dpo_loss(
        *logps,
        loss_type=["sigmoid", "hinge", "sft"],
        loss_weights=[1, 2, 3],
        beta=beta,
        margin=margin,
        weight=weight,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )
    expected = weight * (-torch.nn.functional.logsigmoid(z) + 2 * (1 - z).clamp(min=0) + 3 * nll)
    torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-12)


def test_the_mean_contains_the_mean_over_chosen_tokens() -> None:
    logps, lengths = random_pairs()
    both = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    out = dpo_loss(*logps[:2], loss_type="sft", **both)
    torch.testing.assert_close(out.losses.mean(), -logps[0].sum() / lengths[0].sum())
    rpo, plain = (dpo_loss(*logps, rpo_alpha=alpha, **both).losses for alpha in (0.5, None))
    torch.testing.assert_close(rpo - plain, 0.5 * out.losses)


def test_reference_free_is_a_reference_of_zeros() -> None:
    logps, _ = random_pairs()
    free = dpo_loss(*logps[:2], reference_free=True)
    zeros = dpo_loss(*logps[:2], *torch.zeros(2, 12))
    for actual, expected in zip(free, zeros, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "sigmod"}, "loss_type 'sigmod' is unknown; did you mean 'sigmoid'"),
        ({"loss_type": "kto"}, "loss_type 'kto' does not take pairs"),
        ({"ld_alpha": 0.5}, "ld_alpha needs the log-probs of tokens"),
        ({"use_weighting": True}, "use_weighting needs the log-probs of tokens"),
        ({"loss_type": "ipo"}, r"chosen_lengths must be given: loss_type \['ipo'\] reads lengths"),
        ({"loss_type": "cpo"}, "chosen_lengths must be given"),
        ({"loss_type": "simpo", "chosen_lengths": torch.ones(3)}, "rejected_lengths must be given"),
        ({"reference_free": True}, r"ref_chosen_logps must be None: loss_type \['sigmoid'\] reads no reference"),
        ({"ref_rejected_logps": None}, "ref_rejected_logps must be given"),
        ({"ref_rejected_logps": torch.zeros(2)}, r"ref_rejected_logps must be \[B\].*got \[2\], chosen_logps \[3\]"),
        ({"margin": torch.zeros(3, 1)}, r"margin must be \[B\]"),
        ({"margin": torch.zeros(3), "loss_type": "bco_pair"}, "'bco_pair' takes no margin per example"),
        ({"weight": torch.ones(3), "loss_type": "aot"}, "a weight per example makes no sense with loss_type 'aot'"),
        ({"beta": torch.tensor([0.1, 0.0, 0.1])}, "beta must be positive in every pair"),
        ({"beta": torch.tensor([0.1, math.nan, 0.1])}, "beta must be positive in every pair"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_argument_is_named(bad: dict[str, Any], message: str) -> None:
    logps = dict.fromkeys(["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"], -torch.ones(3))
    with pytest.raises(ValueError, match=message):
        dpo_loss(**logps | bad)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair"])
def test_the_second_derivative_of_the_logistic_loss_keeps_its_digits(name: str) -> None:
    z = torch.tensor([-61.0, -19.3, -8.1, -0.7, 0.0, 0.4, 7.7, 18.6, 39.2])
    chosen = (z / 0.5).requires_grad_()
    zero = torch.zeros_like(z)
    losses = dpo_loss(chosen, zero, zero, zero, loss_type=name, beta=0.5).losses
    (slope,) = torch.autograd.grad(losses.sum(), chosen, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), chosen)
    exact = torch.tensor([float(mpf(0.25) * s(mpf(x)) * s(-mpf(x))) for x in z.tolist()])
    torch.testing.assert_close(curvature, exact, rtol=1e-6, atol=0)

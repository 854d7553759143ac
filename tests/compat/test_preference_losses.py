"""FusedLinearDPOLoss and its siblings against float64, plain PyTorch and Liger, on padded batches of ragged lengths."""

import inspect
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdpo
from fastdpo.loss.objectives import OBJECTIVES, log_odds
from fastdpo.loss.options import PARAMETERS
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import make_inputs
from tests.helpers.no_logits import NoLogits

R, T, V, D, REF_D = 6, 11, 53, 19, 13
PROMPTS, LENGTHS = (3, 1, 0, 3, 1, 0), (8, 4, 7, 1, 10, 5)  # [R]: labels begin behind the prompt, padding follows


class Batch(NamedTuple):
    """What a loss is given, in any dtype."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Batch":
        """Return leaves in a dtype, of which the policy's want gradients."""
        cast = [x if x is None or x.dtype == torch.int64 else x.detach().to(dtype) for x in self]
        for x in (cast[0], cast[1], cast[3]):
            if x is not None:
                x.requires_grad_()
        return Batch(*cast)


def make_batch(*, bias: bool = True, ignore_index: int = -100, full: bool = False) -> Batch:
    policy = make_inputs(torch.float32, torch.device("cpu"), bias=bias, shape=(R * T, V, D))
    ref = make_inputs(torch.float32, torch.device("cpu"), bias=bias, shape=(R * T, V, REF_D))
    target = policy.targets.view(R, T).where(policy.targets.view(R, T) != ignore_index, 0)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        if not full:
            target[row, :prompt] = target[row, prompt + length :] = ignore_index
    hidden, ref_hidden = policy.hidden.view(R, T, D), ref.hidden.view(R, T, REF_D)
    return Batch(hidden, policy.weight, target, policy.bias, ref_hidden, ref.weight, ref.bias)


class Case(NamedTuple):
    """A loss and its settings."""

    name: str
    settings: dict[str, Any]
    loss_type: str
    ref: bool = False
    average: bool = False
    extra: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def loss(self, prefix: str = "", module: Any = fastdpo) -> Any:
        settings = self.settings if not prefix else self.settings | {"compiled": False}
        return getattr(module, f"{prefix}FusedLinear{self.name}Loss")(**settings)

    def run(self, batch: Batch, loss: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        ref = dict(zip(("ref_input", "ref_weight", "ref_bias"), batch[4:], strict=True)) if self.ref else {}
        first = (batch.hidden, batch.weight) if self.name == "KTO" else (batch.weight, batch.hidden)
        return loss(*first, batch.target, batch.bias, **ref, **self.extra)  # type: ignore[no-any-return]


def dpo(loss_type: str = "sigmoid", *, ref: bool = True, **settings: Any) -> Any:
    settings |= {"loss_type": loss_type, "use_ref_model": ref}
    average = settings.get("average_log_prob", False)
    case = Case("DPO", settings, loss_type, ref, average)
    return pytest.param(case, id="-".join(["dpo", loss_type, *(k for k in settings if k not in ("loss_type",))]))


LABELS = torch.tensor([True, False, False, True, True, False])
KL = torch.tensor([0.1, 0.0, 0.7, 0.3, 0.0, 2.0])
LIGER_CASES = [
    dpo(),
    dpo(beta=0.7, compute_nll_loss=True, alpha=0.3),
    dpo(average_log_prob=True, beta=2.0),
    dpo(ref=False),
    *map(dpo, ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")),
    dpo("exo_pair", label_smoothing=1e-3),
    dpo("robust", label_smoothing=0.2),
    pytest.param(Case("ORPO", {"beta": 0.4}, "orpo", average=True), id="orpo"),
    pytest.param(Case("ORPO", {"compute_nll_loss": False}, "orpo", average=True), id="orpo-without-nll"),
    pytest.param(Case("CPO", {"alpha": 0.2, "label_smoothing": 0.1}, "cpo"), id="cpo"),
    pytest.param(
        Case("CPO", {"average_log_prob": True, "compute_nll_loss": False}, "cpo", average=True), id="cpo-mean"
    ),
    pytest.param(Case("SimPO", {"beta": 2.0, "gamma": 0.8, "alpha": 0.5}, "simpo", average=True), id="simpo"),
    pytest.param(Case("KTO", {"beta": 0.02}, "kto", extra={"preference_labels": LABELS}), id="kto"),
    pytest.param(
        Case("KTO", {"use_ref_model": True}, "kto", True, extra={"preference_labels": LABELS, "kl": torch.tensor(0.4)}),
        id="kto-ref-kl",
    ),
    pytest.param(
        Case(
            "KTO", {"use_ref_model": True, "average_log_prob": True}, "kto", True, True, {"preference_labels": LABELS}
        ),
        id="kto-mean",
    ),
]
OUR_CASES = [
    dpo(label_smoothing=0.1),
    dpo("ipo"),
    dpo("sigmoid_norm"),
    dpo("aot"),
    pytest.param(
        Case("KTO", {"use_ref_model": True}, "kto", True, extra={"preference_labels": LABELS, "kl": KL}),
        id="kto-kl-of-each",
    ),
]


def plain(case: Case, batch: Batch, ignore_index: int = -100) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same with logits of all positions, in the dtype of the batch."""
    mask = batch.target != ignore_index
    lengths = mask.sum(1).to(batch.hidden.dtype)

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        logps = logits.log_softmax(-1).gather(-1, batch.target.where(mask, 0)[..., None])[..., 0]
        return logps.where(mask, 0.0).sum(1), logits.sum(-1).where(mask, 0.0).sum(1).detach()

    whole, logits = sums(batch.hidden, batch.weight, batch.bias)
    ref = sums(batch.ref_hidden, batch.ref_weight, batch.ref_bias)[0] if case.ref else torch.zeros_like(whole)
    logps, ref = (whole / lengths, ref / lengths) if case.average else (whole, ref)
    beta = case.settings.get("beta", 0.1)
    values: dict[str, Any] = {"beta": beta, "label_smoothing": 0.0, "discopop_tau": 0.05} | case.settings
    if case.name == "KTO":
        label = case.extra["preference_labels"]
        kl = case.extra.get("kl", torch.tensor(0.0)).to(logps.dtype)
        sign = torch.where(label, 1.0, -1.0).to(logps.dtype)
        losses = (-beta * sign * (logps - ref - kl)).sigmoid()
        parts = (logps, logits, beta * (logps - ref).detach())
        return losses.mean(), tuple((x * side).sum() for x in parts for side in (label, ~label))
    for name, x in (
        ("{}_logps", logps),
        ("ref_{}_logps", ref),
        ("{}_logratios", logps - ref),
        ("{}_scores", logps - ref),
    ):
        values |= zip((name.format("chosen"), name.format("rejected")), x.chunk(2), strict=True)
    values["z"] = beta * (values["chosen_scores"] - values["rejected_scores"])
    ones = torch.ones_like(lengths) if case.average else lengths
    values |= zip(("chosen_lengths", "rejected_lengths"), ones.chunk(2), strict=True)
    values["simpo_gamma"] = case.settings.get("gamma", 0.5)
    margins = values["ref_chosen_logps"] - values["ref_rejected_logps"]
    ranks = (values["chosen_logps"] - values["rejected_logps"]).argsort().argsort()
    values["matched_ref_margins"] = margins.sort().values[ranks]
    losses = OBJECTIVES[case.loss_type](**{name: values[name] for name in PARAMETERS[case.loss_type]})
    nll = logps.new_zeros(())
    if case.settings.get("compute_nll_loss", case.name != "DPO"):
        nll = -whole[: R // 2].sum() / lengths[: R // 2].sum()
    loss = losses.mean() + case.settings.get("alpha", 1.0) * nll
    means = (logits[side].sum() / lengths[side].sum() / V for side in (slice(0, R // 2), slice(R // 2, R)))
    metrics = [*logps.chunk(2), *means, nll, *(beta * (logps - ref).detach()).chunk(2)]
    if case.name == "ORPO":
        difference = log_odds(logps[: R // 2]) - log_odds(logps[R // 2 :])
        metrics += [F.logsigmoid(difference).mean(), difference.mean()]
    return loss, tuple(metrics)


def numbers(batch: Batch, result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The loss, the metrics and the gradients of three times the loss, each with at least one axis."""
    loss, metrics = result
    wanted = [x for x in (batch.hidden, batch.weight, batch.bias) if x is not None]
    grads = [x.flatten(0, -2) if x.ndim == 3 else x for x in torch.autograd.grad(3 * loss, wanted)]
    named = {"loss": loss} | {f"metric {i}": x for i, x in enumerate(metrics)}
    named |= dict(zip(("grad of hidden", "grad of weight", "grad of bias"), grads, strict=False))
    return {name: torch.atleast_1d(x.detach()) for name, x in named.items()}


def compare(case: Case, batch: Batch, loss: Any, **same: Any) -> None:
    exact, eager = (numbers(b, plain(case, b, **same)) for b in (batch.to(torch.float64), batch.to(torch.float32)))
    ours = numbers(b := batch.to(torch.float32), case.run(b, loss))
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("case", LIGER_CASES + OUR_CASES)
def test_the_loss_its_metrics_and_gradients(case: Case) -> None:
    compare(case, make_batch(), case.loss())


@pytest.mark.parametrize("case", [dpo(compute_nll_loss=True), LIGER_CASES[-1]])
def test_without_a_bias_and_with_another_ignore_index(case: Case) -> None:
    case = case._replace(settings=case.settings | {"ignore_index": 7})
    compare(case, make_batch(bias=False, ignore_index=7), case.loss(), ignore_index=7)


@pytest.mark.parametrize("case", LIGER_CASES)
@pytest.mark.parametrize("full", [True, False], ids=["full", "ragged"])
def test_liger_s_own_class_agrees(case: Case, full: bool) -> None:
    """In all but the logits of a ragged batch, of which Liger counts those of prompts and padding."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    batch = make_batch(full=full)
    exact, eager = (numbers(b, plain(case, b)) for b in (batch.to(torch.float64), batch.to(torch.float32)))
    theirs = numbers(b := batch.to(torch.float32), case.run(b, case.loss("Liger", liger)))
    assert theirs.keys() == exact.keys()
    for name, value in theirs.items():
        if full or name not in ("metric 2", "metric 3"):
            assert_as_accurate(value, eager[name], exact[name], f"Liger's {name}", slack=8)


@pytest.mark.parametrize("name", ["DPO", "ORPO", "CPO", "SimPO", "KTO"])
def test_names_order_and_defaults_are_liger_s(name: str) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    ours, theirs = getattr(fastdpo, f"FusedLinear{name}Loss"), getattr(liger, f"LigerFusedLinear{name}Loss")
    for method in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(c, method)).parameters.values() for c in (ours, theirs))
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other]


def test_the_bfloat16_gradient_of_the_weight_does_not_lose_digits_as_the_batch_grows() -> None:
    """Liger adds up one bfloat16 gradient per pair."""
    one = make_batch(bias=False)
    many = one._replace(
        hidden=torch.randn(40, R, T, D).flatten(0, 1),
        target=one.target.view(2, R // 2, T).repeat(1, 40, 1).flatten(0, 1),
    )
    loss = fastdpo.FusedLinearDPOLoss(use_ref_model=False)
    case = Case("DPO", {}, "sigmoid")
    half = many.to(torch.bfloat16)
    exact = half.to(torch.float64)
    ours = torch.autograd.grad(case.run(half, loss)[0], half.weight)[0]
    global_R = len(many.target)
    logps = F.linear(exact.hidden, exact.weight).log_softmax(-1)
    mask = exact.target != -100
    sums = logps.gather(-1, exact.target.where(mask, 0)[..., None])[..., 0].where(mask, 0.0).sum(1)
    truth = -F.logsigmoid(0.1 * (sums[: global_R // 2] - sums[global_R // 2 :])).mean()
    exact_grad = torch.autograd.grad(truth, exact.weight)[0]
    rounded = exact_grad.bfloat16()  # what a gradient in bfloat16 cannot do better
    assert (ours.double() - exact_grad).norm() <= 2 * (rounded.double() - exact_grad).norm()


def test_the_log_probs_and_the_likelihood_are_differentiable() -> None:
    """Liger's have no gradient."""
    case = Case("DPO", {"compute_nll_loss": True}, "sigmoid", ref=True)
    batch = make_batch()

    def grad(compute: Any, dtype: torch.dtype) -> Tensor:
        cast = batch.to(dtype)
        _, metrics = compute(cast)
        return torch.autograd.grad(metrics[0].sum() - 0.5 * metrics[1][0] + metrics[4], cast.weight)[0]

    eager, exact = (grad(lambda b: plain(case, b), dtype) for dtype in (torch.float32, torch.float64))
    assert_as_accurate(grad(lambda b: case.run(b, case.loss()), torch.float32), eager, exact, "grad of weight")


def test_what_stands_at_ignored_positions_does_not_matter() -> None:
    case = Case("DPO", {"compute_nll_loss": True}, "sigmoid", ref=True)
    clean = make_batch()
    ignored = (clean.target == -100)[..., None]
    dirty = clean._replace(
        hidden=clean.hidden.masked_fill(ignored, torch.nan), ref_hidden=clean.ref_hidden.masked_fill(ignored, torch.nan)
    )
    (a, b) = (numbers(x, case.run(x, case.loss())) for x in (clean.to(torch.float32), dirty.to(torch.float32)))
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_orpo_takes_other_labels_for_its_likelihood(bias: bool) -> None:
    """Prompts, as in TRL; and labels that differ from those of the preference."""
    batch = make_batch(bias=bias)
    nll_target = batch.target.where(batch.target != -100, 5)
    nll_target[:, -2:] = -100
    nll_target[0, 4] = (nll_target[0, 4] + 1) % V
    case = Case("ORPO", {}, "orpo", average=True, extra={"nll_target": nll_target})

    def whole(b: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, metrics = plain(case._replace(settings={"compute_nll_loss": False}), b)
        logits = F.linear(b.hidden, b.weight, b.bias)[: R // 2]
        nll = F.cross_entropy(logits.flatten(0, 1), nll_target[: R // 2].flatten())
        return loss + nll, (*metrics[:4], nll, *metrics[5:])

    exact, eager = (numbers(b, whole(b)) for b in (batch.to(torch.float64), batch.to(torch.float32)))
    ours = numbers(b := batch.to(torch.float32), case.run(b, case.loss()))
    for name, value in ours.items():
        assert_as_accurate(value, eager[name], exact[name], name)


def test_orpo_is_finite_on_a_response_that_is_certain() -> None:
    """Liger's odds are infinite there."""
    batch = make_batch(bias=False)
    certain = batch._replace(hidden=1e4 * batch.hidden)
    for b in (certain.to(torch.float32), certain.to(torch.bfloat16)):
        case = Case("ORPO", {}, "orpo")
        assert all(x.isfinite().all() for x in numbers(b, case.run(b, case.loss())).values())


def test_only_the_gradients_asked_for_are_computed() -> None:
    case = Case("DPO", {}, "sigmoid", ref=True)
    batch = make_batch().to(torch.float32)
    for x in (batch.ref_hidden, batch.ref_weight, batch.hidden):
        x.requires_grad_()
    batch.weight.requires_grad_(False)
    case.run(batch, case.loss())[0].backward()
    assert batch.hidden.grad is not None
    assert batch.ref_hidden.grad is batch.ref_weight.grad is batch.weight.grad is None
    with torch.no_grad():
        loss, metrics = case.run(batch, case.loss())
    assert not loss.requires_grad
    assert not metrics[0].requires_grad


def test_prompts_and_padding_never_reach_the_vocabulary() -> None:
    rows, columns, size = 4 * 64, 8192, 16
    inputs = make_inputs(torch.float32, torch.device("cpu"), shape=(rows, columns, size))
    hidden, weight = inputs.hidden.view(4, 64, size).requires_grad_(), inputs.weight.requires_grad_()
    target = inputs.targets.view(4, 64)
    target[:, :40] = target[:, 48:] = -100
    loss = fastdpo.FusedLinearDPOLoss(compute_nll_loss=True)
    with NoLogits(33 * columns):  # 32 rows have a label
        loss(weight, hidden, target, ref_input=hidden, ref_weight=weight)[0].backward()
    assert weight.grad is not None


# What Liger answers with NaN, with a wrong number or with an error from inside


def change(**changes: Any) -> Any:
    return lambda batch: batch._replace(**{name: f(getattr(batch, name)) for name, f in changes.items()})


def poke(row: Any, value: int) -> Any:
    def poked(target: Tensor) -> Tensor:
        target = target.clone()
        target[row] = value
        return target

    return change(target=poked)


def shorter(rows: int) -> Any:
    return change(**dict.fromkeys(("hidden", "target", "ref_hidden"), lambda x: x[:rows]))


REFUSED = [
    (shorter(5), r"target must hold 2B sequences, first the chosen ones and then the rejected ones, got 5"),
    (shorter(1), r"2B sequences.*, got 1"),
    (shorter(0), r"2B sequences.*, got 0"),
    (poke(slice(None), -100), r"target has no label in sequence 0: each position holds ignore_index -100; drop the"),
    (poke(4, -100), r"target has no label in sequence 4"),
    (poke((2, 3), V), r"target\[2, 3\] is 53, which is neither a token in \[0, 53\) nor ignore_index -100"),
    (poke((5, 1), -1), r"target\[5, 1\] is -1"),
    (poke((0, 4), 2**40), r"target\[0, 4\] is 1099511627776"),
    (change(target=Tensor.float), r"target must be int64 \[R, T\], got torch.float32"),
    (change(target=Tensor.flatten), r"target must hold 2B|target must be int64 \[R, T\]"),
    (change(target=lambda x: x[:, :-1]), r"_input must be \[R, T, D\] with the R and T of target"),
    (change(hidden=lambda x: x.flatten(0, 1)), r"_input must be \[R, T, D\]"),
    (change(weight=lambda x: x[:, 1:]), r"lin_weight must be \[V, 19\], got \[53, 18\]"),
    (change(hidden=Tensor.bfloat16), r"lin_weight must have the dtype of _input, torch.bfloat16, got torch.float32"),
    (change(ref_hidden=lambda x: x[:4]), r"ref_input must be"),
    (change(ref_weight=lambda x: x[:, 1:]), r"ref_weight must be \[V, 13\]"),
    (change(ref_weight=lambda x: x[:2], ref_bias=lambda x: x[:2]), r"ref_weight must have a row for each label, got 2"),
    (change(ref_hidden=lambda x: None), r"ref_input must be given with use_ref_model=True, got None"),
    (change(ref_weight=lambda x: None), r"ref_weight must be given with use_ref_model=True, got None"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[m[:45] for _, m in REFUSED])
def test_a_bad_batch_is_refused(spoil: Any, message: str) -> None:
    case = Case("DPO", {}, "sigmoid", ref=True)
    with pytest.raises(ValueError, match=message):
        case.run(spoil(make_batch()), case.loss())


@pytest.mark.parametrize("name", ["ref_hidden", "ref_weight", "ref_bias"])
def test_a_reference_that_would_be_ignored_is_refused(name: str) -> None:
    """The default of KTO's use_ref_model is False."""
    batch = make_batch()
    argument = name.replace("hidden", "input")
    for loss, first in (
        (fastdpo.FusedLinearKTOLoss(), (batch.hidden, batch.weight, batch.target, None, LABELS)),
        (fastdpo.FusedLinearDPOLoss(use_ref_model=False), (batch.weight, batch.hidden, batch.target)),
    ):
        with pytest.raises(ValueError, match=f"{argument} must be None with use_ref_model=False, which would ignore"):
            loss(*first, **{argument: getattr(batch, name)})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, r"preference_labels must be bool \[6\], True for desirable responses, got None"),
        ({"preference_labels": LABELS.long()}, r"preference_labels must be bool \[6\].* got torch.int64 \[6\]"),
        ({"preference_labels": LABELS[:3]}, r"got torch.bool \[3\]"),
        ({"preference_labels": LABELS, "kl": KL[:2]}, r"kl must be a scalar or \[6\], got \[2\]"),
    ],
)
def test_kto_refuses_bad_labels_and_kl(extra: dict[str, Any], message: str) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        fastdpo.FusedLinearKTOLoss()(batch.hidden, batch.weight, batch.target, **extra)


@pytest.mark.parametrize(
    ("settings", "spoil", "message"),
    [
        ({"compute_nll_loss": False}, lambda x: x, r"nll_target must be None with compute_nll_loss=False"),
        ({}, lambda x: x[:3], r"nll_target must have the shape of target, \[6, 11\], got \[3, 11\]"),
        ({}, lambda x: torch.full_like(x, -100), r"nll_target has no label in the chosen sequences"),
        ({}, lambda x: torch.full_like(x, V), r"nll_target\[0, 0\] is 53"),
    ],
)
def test_orpo_refuses_a_bad_nll_target(settings: dict[str, Any], spoil: Any, message: str) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        fastdpo.FusedLinearORPOLoss(**settings)(
            batch.weight, batch.hidden, batch.target, nll_target=spoil(batch.target)
        )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *[(name, {"beta": beta}, "beta") for name in ("DPO", "ORPO", "CPO", "SimPO", "KTO") for beta in (0.0, -0.1)],
        ("DPO", {"beta": float("nan")}, "beta must be a positive number, got nan"),
        ("DPO", {"loss_type": "sigmiod"}, "did you mean 'sigmoid'"),
        ("DPO", {"loss_type": "orpo"}, "loss_type must name an objective on pairs with a reference, .* got 'orpo'"),
        ("DPO", {"loss_type": "kto"}, "loss_type must name an objective on pairs with a reference"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing must be above 0"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ("DPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing 0.1 has no effect"),
        ("DPO", {"loss_type": "ipo", "average_log_prob": True}, "average_log_prob must be False"),
        ("DPO", {"alpha": -1.0}, "alpha must be finite and not negative, got -1"),
        ("CPO", {"alpha": float("nan")}, "cpo_alpha|alpha"),
        ("SimPO", {"alpha": float("inf")}, "alpha must be finite"),
        ("SimPO", {"gamma": -0.1}, "gamma must not be negative"),
    ],
)
def test_a_bad_setting_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fastdpo, f"FusedLinear{name}Loss")(**settings)

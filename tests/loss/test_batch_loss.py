"""fastdpo.loss.batch_loss: micro-batches and ranks add up; losses that look at the whole step; what tokens add."""

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.loss.batch_loss import compute, step_values
from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.options import PARAMETERS, ObjectiveSettings, kind_of_loss
from fastdpo.loss.whole_step import Values, step_context
from tests.helpers.token_batches import Step, make_step

B = 11
SIZES = {"one by one": [1] * B, "ragged": [4, 1, 6], "halves": [5, 6]}


def settings_of(name: str, **more: Any) -> ObjectiveSettings:
    options: dict[str, Any] = {"beta": 0.3}
    if "label_smoothing" in PARAMETERS[name]:
        options["label_smoothing"] = 0.1
    return ObjectiveSettings((name,), **options | more)


CASES: dict[str, tuple[ObjectiveSettings, tuple[str, ...]]] = {name: (settings_of(name), ()) for name in OBJECTIVES}
_OWN = "sigmoid-margin sigmoid-beta ipo-beta orpo-weight cpo-weight kto-weight kto-beta plackett_luce-beta"
CASES |= {own: (settings_of(own.split("-")[0]), (own.split("-")[1],)) for own in _OWN.split()}
CASES |= {
    "wpo": (settings_of("hinge", use_weighting=True), ("weight",)),
    "wpo-sft": (settings_of("sft", use_weighting=True), ()),
    "ld": (settings_of("sigmoid", ld_alpha=0.3), ()),
    "rpo": (settings_of("sigmoid", rpo_alpha=0.7), ("weight",)),
    "reference-free": (settings_of("sigmoid", reference_free=True), ("margin",)),
    "mpo": (ObjectiveSettings(("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)), ("weight",)),
    "sum-with-aot": (ObjectiveSettings(("aot", "aot_unpaired", "hinge", "sft"), loss_weights=(1, 2, 3, 4)), ()),
}


def step_of(settings: ObjectiveSettings, columns: tuple[str, ...] = (), **more: Any) -> Step:
    return make_step(B, kind=settings.kind, columns=columns, **more)


def loss_and_gradient(loss: Tensor, step: Step) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, step.logps)]


# Micro-batches and ranks


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("settings", "columns"), CASES.values(), ids=CASES)
def test_micro_batches_add_up_to_the_step(
    settings: ObjectiveSettings, columns: tuple[str, ...], sizes: list[int]
) -> None:
    step = step_of(settings, columns)
    whole = loss_and_gradient(step.normalised([step.numerators(settings)]), step)
    parts = loss_and_gradient(step.in_micro_batches(settings, sizes), step)
    for actual, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def on_ranks(settings: ObjectiveSettings, step: Step, ranks: list[list[int]], capacity: int | None) -> Tensor:
    """The step's loss where each rank has micro-batches of these sizes."""
    starts = itertools.accumulate(itertools.chain.from_iterable(ranks), initial=0)
    parts = [[step.pairs(range(start, start + n)) for n, start in zip(sizes, starts)] for sizes in ranks]  # noqa: B905
    contexts: list[list[Values]] = [[] for _ in ranks]
    sent: list[Tensor] = [torch.empty(0)] * len(ranks)
    barrier = threading.Barrier(len(ranks))

    def run(rank: int) -> None:
        def gather(x: Tensor) -> Tensor:
            sent[rank] = x
            barrier.wait(60)
            everything = torch.stack(sent)  # fails if the shapes differ
            barrier.wait(60)
            return everything

        values = [step_values(p.batch, p.logps, p.ref_token_logps, settings) for p in parts[rank]]
        contexts[rank] = step_context(values, gather=gather, rank=rank, capacity=capacity)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = zip(itertools.chain(*parts), itertools.chain(*contexts), strict=True)
    return step.normalised([part.numerators(settings, context) for part, context in every])


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "kto", "sum-with-aot"])
def test_ranks_of_different_sizes_add_up_to_the_step(name: str, capacity: int | None) -> None:
    settings = CASES[name][0]
    step = step_of(settings)
    whole = loss_and_gradient(step.normalised([step.numerators(settings)]), step)
    parts = loss_and_gradient(on_ranks(settings, step, [[1, 2], [3, 4], [1]], capacity), step)
    for actual, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_capacity_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must hold the process's examples of the step, got 2 for 3"):
        step_context([{"kl": torch.zeros(3)}], gather=lambda x: x[None], capacity=2)


# Objectives that look at the whole step, against PyTorch's sort


def f(delta: Tensor, settings: ObjectiveSettings) -> Tensor:
    z, e = settings.beta * delta, settings.label_smoothing
    return (-(1 - e) * z.sigmoid().log() - e * (-z).sigmoid().log()).mean()


def aot_truth(step: Step, settings: ObjectiveSettings) -> Tensor:
    (c, r), (ref_c, ref_r) = (step.sums(x).chunk(2) for x in (step.logps, step.ref_token_logps))
    return f((c - r).sort().values - (ref_c - ref_r).sort().values, settings)


def aot_unpaired_truth(step: Step, settings: ObjectiveSettings) -> Tensor:
    c, r = step.sums(step.logps - step.ref_token_logps).chunk(2)
    return f(c.sort().values - r.sort().values, settings)


def kto_truth(step: Step, settings: ObjectiveSettings) -> Tensor:
    ratios, kl = step.sums(step.logps - step.ref_token_logps).chunk(2)
    z0 = kl.detach().mean()
    assert z0 > 0
    yes = step.columns["label"]
    up, down = (1 - torch.sigmoid(settings.beta * sign * (ratios - z0)) for sign in (1, -1))
    return torch.cat((settings.desirable_weight * up[yes], settings.undesirable_weight * down[~yes])).mean()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("truth", [aot_truth, aot_unpaired_truth, kto_truth])
def test_the_step_context_is_exact(truth: Any, seed: int, sizes: list[int]) -> None:
    name = truth.__name__.removesuffix("_truth")
    more = {"desirable_weight": 1.3, "undesirable_weight": 0.6} if name == "kto" else {}
    settings = settings_of(name, **more)
    step = step_of(settings, seed=seed)
    expected = loss_and_gradient(truth(step, settings), step)
    actual = loss_and_gradient(step.in_micro_batches(settings, sizes), step)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_kto_kl_is_never_negative() -> None:
    low, high = ({"kl": torch.tensor(x)} for x in ([-3.0, 1.0], [-1.0, 3.0, 4.0]))
    assert step_context([low])[0]["kl"] == 0
    assert [c["kl"].item() for c in step_context([low, high])] == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_ties_are_matched_one_to_one(name: str) -> None:
    """As at the first step, where the policy is its reference and every log-ratio is 0."""
    settings = settings_of(name)
    step = step_of(settings)
    tied = step._replace(
        lengths=[1] * 2 * B,
        logps=torch.tensor([-1.0, -1.0, -2.0, -2.0, -2.0, -3.0, -3.0, -3.0, -3.0, -1.0, -2.0] * 2).requires_grad_(),
        ref_token_logps=-torch.arange(2.0 * B),
        log_sum_sq_probs=torch.zeros(2 * B),
    )
    truth = aot_truth if name == "aot" else aot_unpaired_truth
    torch.testing.assert_close(tied.in_micro_batches(settings, [4, 1, 6]), truth(tied, settings))


# Tokens


def test_ld_discounts_the_tail_of_policy_and_reference() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    batch = {"cu_target": torch.tensor([0, 3, 4, 6, 7]), "pair_index": torch.arange(2)}  # pairs of 3 and 2, 1 and 1
    out = compute(batch, logps, 2 * logps, ObjectiveSettings(beta=1.0, ld_alpha=0.5))
    torch.testing.assert_close(out.chosen_rewards, torch.tensor([1 + 2 + 0.5 * 3, 4.0]))
    torch.testing.assert_close(out.rejected_rewards, torch.tensor([5 + 6.0, 7.0]))
    torch.testing.assert_close(out.sequence_logps, torch.tensor([-6.0, -4.0, -11.0, -7.0]))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard", "aot_unpaired"])
def test_ld_with_alpha_1_is_no_discount(name: str) -> None:
    step = make_step(B)
    plain, discounted = (
        compute(step.batch, step.logps, step.ref_token_logps, settings_of(name, ld_alpha=alpha)).losses
        for alpha in (None, 1.0)
    )
    torch.testing.assert_close(discounted, plain, rtol=1e-12, atol=1e-12)


def test_wpo_multiplies_the_examples_own_weights() -> None:
    step = make_step(B, columns=["weight"])
    settings = ObjectiveSettings(use_weighting=True, rpo_alpha=1.0)
    out = compute(step.batch, step.logps, step.ref_token_logps, settings, stats=step.stats)
    weights = step.wpo_weights() * step.columns["weight"]
    c, r = step.sums(step.logps - step.ref_token_logps).chunk(2)
    torch.testing.assert_close(out.losses, weights * -torch.log(torch.sigmoid(0.1 * (c - r))), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.token_loss, -(weights * step.sums(step.logps)[:B]).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.weights, weights, rtol=1e-12, atol=1e-12)


def test_wpo_has_no_gradient_through_the_weights() -> None:
    step = make_step(B)
    weighted, plain = (
        compute(step.batch, step.logps, step.ref_token_logps, settings_of("sigmoid", **more), stats=step.stats).losses
        for more in ({"use_weighting": True}, {})
    )
    torch.testing.assert_close(weighted, step.wpo_weights() * plain, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(
        torch.autograd.grad(weighted.sum(), step.logps),
        torch.autograd.grad((step.wpo_weights() * plain).sum(), step.logps),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        (ObjectiveSettings(("sft",), loss_weights=(0.7,)), 0.7),
        (ObjectiveSettings(("orpo",)), 1.0),
        (ObjectiveSettings(("cpo",), cpo_alpha=0.4), 0.4),
        (ObjectiveSettings(("sigmoid",), rpo_alpha=0.3), 0.3),
        (ObjectiveSettings(("ipo",), rpo_alpha=0.2, ld_alpha=0.5), 0.2),  # of whole responses
        (ObjectiveSettings(("cpo", "sft", "hinge"), cpo_alpha=0.5, loss_weights=(2, 3, 4)), 4.0),
    ],
    ids=lambda value: "-".join(value.loss_type) if isinstance(value, ObjectiveSettings) else "",
)
def test_likelihood_terms(settings: ObjectiveSettings, factor: float) -> None:
    step = make_step(B, columns=["weight"])
    out = compute(step.batch, step.logps, step.ref_token_logps, settings)
    nll = -step.sums(step.logps)[:B] * step.columns["weight"]
    torch.testing.assert_close(out.token_loss, factor * nll.sum(), rtol=1e-12, atol=1e-12)


def test_no_likelihood_term_no_token_loss() -> None:
    step = make_step(B)
    assert compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings()).token_loss is None
    no_term = ObjectiveSettings(("cpo",), cpo_alpha=0.0)
    assert compute(step.batch, step.logps, None, no_term).token_loss is None


def test_columns_of_the_examples_reach_their_own_losses() -> None:
    step = make_step(B, columns=["weight", "margin", "beta"])
    out = compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings(("sigmoid",)))
    c, r = step.sums(step.logps - step.ref_token_logps).chunk(2)
    own = step.columns
    expected = own["weight"] * -torch.log(torch.sigmoid(own["beta"] * (c - r) - own["margin"]))
    torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.chosen_rewards, own["beta"] * c.detach(), rtol=1e-12, atol=1e-12)


def test_reference_from_the_batch_per_token_or_per_response() -> None:
    step = make_step(B)
    settings = ObjectiveSettings()
    given = compute(step.batch, step.logps, step.ref_token_logps, settings)
    sums = step.sums(step.ref_token_logps)
    for more in ({"ref_token_logps": step.ref_token_logps}, {"ref_logps": sums}):
        found = compute(step.batch | more, step.logps, None, settings)
        torch.testing.assert_close(found.losses, given.losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.ref_sequence_logps, sums)
    with pytest.raises(ValueError, match="'sigmoid' needs log-probs under a reference; the batch has none"):
        compute(step.batch, step.logps, None, settings)
    with pytest.raises(ValueError, match=r"ld_alpha 0.5 needs the reference's log-probs of every token"):
        compute(step.batch | {"ref_logps": sums}, step.logps, None, ObjectiveSettings(ld_alpha=0.5))


# Rewards


def test_rewards_without_a_reference() -> None:
    step = make_step(B)
    sums = step.sums(step.logps).detach()
    for name, expected in (("cpo", sums), ("simpo", sums / torch.tensor(step.lengths))):
        out = compute(step.batch, step.logps, None, ObjectiveSettings((name,), beta=2.0))
        torch.testing.assert_close(torch.cat((out.chosen_rewards, out.rejected_rewards)), 2 * expected)
        assert out.ref_sequence_logps is None


def test_rewards_of_ranked_and_unpaired_responses() -> None:
    step = make_step(B, kind="ranked")
    out = compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings(("plackett_luce",), beta=2.0))
    ratios = step.sums(step.logps - step.ref_token_logps).detach()
    index = step.columns["response_index"]
    for row, best, others in zip(index, out.chosen_rewards, out.rejected_rewards, strict=True):
        present = row[row < len(ratios)]
        torch.testing.assert_close(best, 2 * ratios[present[0]])
        torch.testing.assert_close(others, 2 * ratios[present[1:]].mean())

    step = make_step(B, kind="unpaired")
    out = compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings(("kto",), beta=2.0))
    kl = step.sums(step.logps - step.ref_token_logps)[len(step.batch["label"]) :].mean().clamp(min=0)
    torch.testing.assert_close(out.kl, kl, rtol=1e-12, atol=1e-12)
    ratios, yes = step.sums(step.logps - step.ref_token_logps)[:B].detach(), step.columns["label"]
    torch.testing.assert_close(out.chosen_rewards, 2 * ratios * yes)
    torch.testing.assert_close(out.rejected_rewards, 2 * ratios * ~yes)


@pytest.mark.parametrize(("settings", "columns"), CASES.values(), ids=CASES)
def test_what_is_for_metrics_is_detached(settings: ObjectiveSettings, columns: tuple[str, ...]) -> None:
    step = step_of(settings, columns)
    out = compute(step.batch, step.logps, step.ref_token_logps, settings, stats=step.stats)
    assert out.losses.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (B,)
    assert out.sequence_logps.shape == (len(step.lengths),)
    assert not any(x is not None and x.requires_grad for x in out[2:])
    values = step_values(step.batch, step.logps, step.ref_token_logps, settings)
    assert bool(values) == settings.needs_step_context
    assert not any(x.requires_grad for x in values.values())


# Refusals


def test_a_batch_of_another_kind_is_refused() -> None:
    for name, kind in (("kto", "preference"), ("sigmoid", "ranked"), ("plackett_luce", "unpaired")):
        step = make_step(B, kind=kind)
        with pytest.raises(ValueError, match=f"'{name}' takes {kind_of_loss(name)} examples, the batch is {kind}"):
            compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings((name,)))


def test_kto_without_kl_responses_is_refused() -> None:
    step = make_step(B, kind="unpaired")
    main = step.responses(range(B), **step.columns)
    with pytest.raises(ValueError, match="'kto' needs kl_ids in every example"):
        compute(main.batch, main.logps, main.ref_token_logps, ObjectiveSettings(("kto",)))
    compute(main.batch, main.logps, main.ref_token_logps, ObjectiveSettings(("apo_zero_unpaired",)))


def test_wpo_without_statistics_is_refused() -> None:
    step = make_step(B)
    with pytest.raises(ValueError, match="use_weighting needs the statistics of the tokens"):
        compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings(use_weighting=True))


def test_a_column_that_the_objective_cannot_use_is_refused() -> None:
    step = make_step(B, columns=["margin"])
    with pytest.raises(ValueError, match="'ipo' takes no margin per example"):
        compute(step.batch, step.logps, step.ref_token_logps, ObjectiveSettings(("ipo",)))


# The device is never waited for


class NothingThatWaits(TorchDispatchMode):
    """Refuses operators whose result, or its shape, would have to be fetched from an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount")
        assert func.overloadpacket.__name__.split(".")[-1] not in names, func
        if "index" in func.overloadpacket.__name__:
            masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
            assert not masks, f"{func} by a mask"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("settings", "columns"), CASES.values(), ids=CASES)
def test_nothing_waits_for_the_device(settings: ObjectiveSettings, columns: tuple[str, ...]) -> None:
    step = step_of(settings, columns)
    batch, stats = step.batch, step.stats
    with NothingThatWaits():
        context = None
        if settings.needs_step_context:
            values = step_values(batch, step.logps, step.ref_token_logps, settings)
            (context,) = step_context([values], gather=lambda x: x[None], capacity=B + 2)
        out = compute(batch, step.logps, step.ref_token_logps, settings, stats=stats, context=context)
        loss = out.losses.sum() if out.token_loss is None else out.losses.sum() + out.token_loss
        torch.autograd.grad(loss, step.logps)
    with NothingThatWaits(), pytest.raises(AssertionError):
        step.logps[step.logps > -1]
    with NothingThatWaits(), pytest.raises(AssertionError):
        step.logps.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize(("settings", "columns"), CASES.values(), ids=CASES)
def test_no_synchronisation(settings: ObjectiveSettings, columns: tuple[str, ...]) -> None:
    step = step_of(settings, columns, dtype=torch.float32)
    batch = {name: x.cuda() for name, x in step.batch.items()}
    logps, ref, log_sum_sq = (x.detach().cuda() for x in step[1:4])
    stats = step.stats._replace(log_sum_sq_probs=log_sum_sq)
    logps.requires_grad_()

    def run() -> Tensor:
        contexts: list[Any] = [None]
        if settings.needs_step_context:
            contexts = step_context([step_values(batch, logps, ref, settings)], gather=lambda x: x[None], capacity=B)
        out = compute(batch, logps, ref, settings, stats=stats, context=contexts[0])
        loss = out.losses.sum() if out.token_loss is None else out.losses.sum() + out.token_loss
        return torch.autograd.grad(loss, logps)[0]

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (expected,) = torch.autograd.grad(sum(step.numerators(settings)), step.logps)
    scale = max(1.0, math.sqrt(len(step.logps)))
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=1e-6 * scale)

"""A batch whose examples share responses: the losses, gradients and metrics of its examples alone, at fewer rows."""

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.data.packing import edges, shared_prefix_batch
from fastdpo.loss.batch_loss import LossOutput, compute, step_mean, step_values
from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.options import PARAMETERS, ObjectiveSettings
from fastdpo.loss.sequences import along_edges, sum_tokens
from fastdpo.loss.whole_step import step_context, step_totals
from fastdpo.model.layout import layout_of
from fastdpo.model.scoring_forward import TokenScores, patch_forward
from tests.helpers import tiny
from tests.helpers.packed import make_patched
from tests.helpers.tiny import VOCAB, assert_same_gradients, make_model, stock_logps

_rng = random.Random(3)


def ids(n: int) -> list[int]:
    return [_rng.randrange(3, VOCAB) for _ in range(n)]


SYSTEM = ids(20)  # longer than the least that different prompts share
P1, P2, P4 = SYSTEM + ids(6), SYSTEM + ids(3), ids(4)
A, B, C, D, E, F = ids(9), ids(4), [*ids(1), 7, 8], ids(12), ids(2), ids(5)
B = A[:3] + B  # so that trees have a level inside the responses
P3 = P1 + A[:-1] + ids(4)  # the next turn of a conversation


def pair(prompt: list[int], chosen: list[int], rejected: list[int], i: int) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair_index": i}


PAIRS = [
    pair(P1, A, B, 0),
    pair(P1, A, C, 1),
    pair(P2, D, E, 2),
    pair(P1, C, B, 3),
    pair(P1, A, B, 4),  # a duplicate
    pair(P1, B, A, 5),  # a tie: one judge prefers the other
    pair(P3, F, C, 6),
    pair(P4, E, F, 7),
    pair(P2, E, F, 8),
]
UNIQUE = {(tuple(p["prompt_ids"]), tuple(p[side])) for p in PAIRS for side in ("chosen_ids", "rejected_ids")}
OWN = [{"weight": _rng.uniform(0, 2), "margin": _rng.uniform(-1, 1), "beta": _rng.uniform(0.1, 1)} for _ in PAIRS]
RANKED = [
    {"prompt_ids": P1, "ranked_ids": [A, B, C]},
    {"prompt_ids": P1, "ranked_ids": [C, A]},
    {"prompt_ids": P2, "ranked_ids": [D, E, E, F]},
]
UNPAIRED = [
    {"prompt_ids": p["prompt_ids"], "completion_ids": p[side], "kl_ids": kl, "label": side == "chosen_ids"}
    for p, kl in zip(PAIRS, [D, D, A, D, E, E, A, A, A], strict=True)
    for side in ("chosen_ids", "rejected_ids")
]
EXAMPLES = {"preference": PAIRS, "ranked": RANKED, "unpaired": UNPAIRED}


def settings_of(name: str, **more: Any) -> ObjectiveSettings:
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in PARAMETERS[name] else {}
    return ObjectiveSettings((name,), **{"beta": 0.3} | smoothing | more)


CASES: dict[str, tuple[ObjectiveSettings, tuple[str, ...]]] = {name: (settings_of(name), ()) for name in OBJECTIVES}
CASES |= {
    "weight": (settings_of("sigmoid"), ("weight", "margin", "beta")),
    "wpo": (settings_of("hinge", use_weighting=True), ("weight",)),
    "ld": (settings_of("sigmoid", ld_alpha=0.3), ()),
    "ld-0": (settings_of("ipo", ld_alpha=0.0), ("weight",)),
    "rpo": (settings_of("sigmoid", rpo_alpha=0.7), ("weight",)),
    "sum": (ObjectiveSettings(("aot", "sft", "sigmoid"), loss_weights=(1, 2, 3)), ()),
    "divergence": (settings_of("sigmoid", f_divergence_type="forward_kl"), ()),
}


@functools.cache
def models() -> tuple[Any, Any]:
    policy, reference = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for model in (policy, reference):
        patch_forward(model, backward="exact")
    return policy, reference


class Scored:
    """Batches of one optimizer step, scored once by both models for all objectives."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        policy, reference = models()
        self.batches = batches
        self.scores: list[TokenScores] = [policy(**batch, with_stats=True) for batch in batches]
        with torch.no_grad():
            self.references = [reference(**batch).logps for batch in batches]

    def outputs(self, settings: ObjectiveSettings, numbers: list[dict[str, Tensor]]) -> list[LossOutput]:
        batches = [batch | own for batch, own in zip(self.batches, numbers, strict=True)]
        parts = list(zip(batches, self.scores, self.references, strict=True))
        contexts: list[Any] = [None] * len(parts)
        if settings.needs_step_context:
            contexts = step_context([step_values(b, s.logps, r, settings) for b, s, r in parts])
        return [
            compute(b, s.logps, r, settings, stats=s.stats, context=c)
            for (b, s, r), c in zip(parts, contexts, strict=True)
        ]

    def loss(self, outputs: list[LossOutput]) -> Tensor:
        totals = step_totals(self.batches)
        return torch.stack([step_mean(out, totals) for out in outputs]).sum()


@functools.cache
def graph(kind: str, layout: str) -> Scored:
    return Scored([shared_prefix_batch(EXAMPLES[kind], layout=layout, across_examples=True)])


@functools.cache
def alone(kind: str) -> Scored:
    return Scored([shared_prefix_batch([example], layout="packed") for example in EXAMPLES[kind]])


def gradients(loss: Tensor) -> dict[str, Tensor]:
    policy, _ = models()
    named = dict(policy.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("layout", ["shared", "tree", "padded", "packed"])
@pytest.mark.parametrize(("settings", "columns"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_examples_alone(
    settings: ObjectiveSettings, columns: tuple[str, ...], layout: str
) -> None:
    kind = settings.kind
    examples = EXAMPLES[kind]
    own = {name: torch.tensor([OWN[i % len(OWN)][name] for i in range(len(examples))]) for name in columns}
    together, apart = graph(kind, layout), alone(kind)
    (out,) = together.outputs(settings, [own])
    parts = apart.outputs(settings, [{name: x[i : i + 1] for name, x in own.items()} for i in range(len(examples))])
    for field in ("losses", "chosen_rewards", "rejected_rewards", "weights"):
        if (values := getattr(out, field)) is not None:
            expected = torch.cat([getattr(part, field) for part in parts])
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-5)
    loss, expected_loss = together.loss([out]), apart.loss(parts)
    assert abs(loss - expected_loss) <= 1e-6 * max(1.0, abs(expected_loss.item()))
    actual, expected = gradients(loss), gradients(expected_loss)
    assert_same_gradients(actual, expected)
    error = torch.cat([(actual[name] - expected[name]).flatten() for name in expected]).norm()
    assert error <= 1e-6 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm()


def test_the_chosen_tokens_of_a_step_count_for_each_pair() -> None:
    totals = step_totals([shared_prefix_batch(PAIRS, across_examples=True)])
    assert totals.examples == len(PAIRS)
    assert totals.chosen_tokens == sum(len(pair["chosen_ids"]) for pair in PAIRS)


@pytest.mark.parametrize("layout", ["shared", "tree"])
@pytest.mark.parametrize("family", ["gemma3-window", "gpt-oss"])
def test_windows_and_sinks_follow_graphs_like_transformers_on_each_response_alone(family: str, layout: str) -> None:
    model, reference = make_patched(family)
    batch = shared_prefix_batch(PAIRS, layout=layout, across_examples=True)
    sums = along_edges(sum_tokens(model(**batch).logps, batch["cu_target"]), edges(batch))
    lengths = [len(p[side]) for side in ("chosen_ids", "rejected_ids") for p in PAIRS]
    expected = torch.stack([x.sum() for x in stock_logps(reference, PAIRS).split(lengths)])
    torch.testing.assert_close(sums.flatten(), expected, rtol=1e-6, atol=1e-5)
    assert_same_gradients(tiny.gradients(model, sums.flatten()), tiny.gradients(reference, expected))


@pytest.mark.parametrize("family", ["qwen3-next", "mamba2"])
def test_recurrent_layers_follow_trees_of_several_levels(family: str) -> None:
    pytest.importorskip("tree_recurrence")
    model = make_model(family)
    assert layout_of(model)[0] == "tree"
    patch_forward(model, backward="exact")
    batch = shared_prefix_batch(PAIRS, layout="tree", across_examples=True)
    depth = [0] * (len(batch["tree_cu_seqlens_q"]) - 1)
    starts, ends = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
    for i, start in enumerate(starts[:-1]):
        path = batch["tree_kv_index"][ends[i] : ends[i + 1]].tolist()
        depth[i] = sum(row in starts for row in path if row < start)
    assert max(depth) >= 3  # system prompt, prompt, answer, next turn
    weights = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(0))
    found = []
    for batches in ([batch], [shared_prefix_batch([p], layout="packed") for p in PAIRS]):
        sums = [along_edges(sum_tokens(model(**b).logps, b["cu_target"]), edges(b)).T for b in batches]
        loss = (torch.cat(sums) * weights).sum()
        named = dict(model.named_parameters())
        gradient = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append((torch.cat(sums), {n: g for n, g in zip(named, gradient, strict=True) if g is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    assert_same_gradients(found[0][1], found[1][1], bound=5e-5)

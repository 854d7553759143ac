"""Values that the examples of a whole optimizer step share, for the objectives that look at all of them.

AOT sorts the pairs of the step, and KTO estimates a divergence over it. So a pass without gradients computes each
micro-batch's values (`fastdpo.loss.batch_loss.step_values`). `step_context` gathers them over micro-batches and
processes, and gives each micro-batch the constants that its loss reads:

    matched_ref_margins[i]  the reference's margin with the rank that pair i's margin has under the policy    (aot)
    matched_rejected[i]     the rejected log-ratio with the rank of pair i's chosen log-ratio         (aot_unpaired)
    matched_chosen[i]       the chosen log-ratio with the rank of pair i's rejected log-ratio         (aot_unpaired)
    kl                      max(0, mean of log pi - log pi_ref over the `kl_ids` responses)                   (kto)

Sorting is stable, so that ties match one to one. The micro-batches' losses then add up to the step's loss, and their
gradients to its gradient, because the gradient of a sorted sum treats the order as fixed.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.data.packing import edges

Values = dict[str, Tensor]
"""Detached values of one micro-batch by name, `[B]` each."""


class StepTotals(NamedTuple):
    """The denominators of an optimizer step's loss, float32 scalars on the device."""

    examples: Tensor
    chosen_tokens: Tensor


def step_totals(batches: Sequence[Mapping[str, Any]]) -> StepTotals:
    """Return the totals of micro-batches of `fastdpo.shared_prefix_batch`, which the caller sums over processes."""
    examples = sum(len(batch["pair_index"]) for batch in batches)
    chosen = [batch["cu_target"].diff()[edges(batch)[0]].sum() for batch in batches]
    tokens = torch.stack(chosen).sum().float()
    return StepTotals(torch.full_like(tokens, examples), tokens)


def step_context(
    values: Sequence[Values],
    *,
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    capacity: int | None = None,
) -> list[Values]:
    """Gather the values of an optimizer step and give each micro-batch those that its loss reads.

    Args:
        values: the values of this process's micro-batches, in their order, from `fastdpo.loss.batch_loss.step_values`.
        gather: takes this process's `[X]` and returns those of all processes, `[processes, X]`; None for one process.
        rank: this process's row in what `gather` returns.
        capacity: a number of examples that no process exceeds in the step, the same on all processes. None finds it
            with one more collective, and waits for the device.

    Returns:
        One dict per micro-batch: the `context` of `fastdpo.loss.batch_loss.compute`.
    """
    counts = [len(next(iter(v.values()))) for v in values]
    mine = torch.stack([torch.cat([v[name] for v in values]) for name in values[0]])  # [names, N]
    valid = mine.new_ones(1, sum(counts))
    rows = torch.cat((mine, valid))
    if gather is not None:
        if capacity is None:
            capacity = int(gather(torch.full((1,), sum(counts), device=mine.device)).max())
        if sum(counts) > capacity:
            raise ValueError(f"capacity must hold the process's examples of the step, got {capacity} for {sum(counts)}")
        rows = torch.nn.functional.pad(rows, (0, capacity - sum(counts)))
        rows = gather(rows.flatten()).view(-1, len(rows), capacity).transpose(0, 1).flatten(1)  # [names, all]
    start = 0 if capacity is None else rank * capacity
    table = dict(zip(values[0], rows[:-1], strict=True))
    matched = _contexts(table, rows[-1] > 0)
    own = {name: x if x.ndim == 0 else x[start : start + sum(counts)] for name, x in matched.items()}
    return [
        {name: x if x.ndim == 0 else x[end - n : end] for name, x in own.items()}
        for n, end in zip(counts, accumulate(counts), strict=True)
    ]


def _contexts(table: Values, valid: Tensor) -> Values:
    """Return the constants by name, `[all]` or a scalar; `valid` is False where a process's row was padded."""
    contexts = {}
    if "margins" in table:
        contexts["matched_ref_margins"] = _matched(table["margins"], table["ref_margins"], valid)
    if "chosen" in table:
        contexts["matched_rejected"] = _matched(table["chosen"], table["rejected"], valid)
        contexts["matched_chosen"] = _matched(table["rejected"], table["chosen"], valid)
    if "kl" in table:
        contexts["kl"] = (table["kl"].where(valid, 0.0).sum() / valid.sum()).clamp(min=0)
    return contexts


def _matched(x: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """Return for each element of `x` the element of `other` that has the same rank."""
    order = x.where(valid, torch.inf).argsort(stable=True)
    ranked = other.where(valid, torch.inf).sort(stable=True).values
    return torch.empty_like(x).scatter_(0, order, ranked)

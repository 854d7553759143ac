"""Optimizer steps without a model: ragged batches of token log-probs, to be split into micro-batches and ranks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head.eager import Stats
from fastdpo.loss.batch_loss import compute, step_values
from fastdpo.loss.options import ObjectiveSettings
from fastdpo.loss.whole_step import Values, step_context


class Step(NamedTuple):
    """Responses in the order of a packed batch; `logps [M]` is a leaf, or made of one."""

    lengths: list[int]
    logps: Tensor
    ref_token_logps: Tensor
    log_sum_sq_probs: Tensor
    columns: dict[str, Tensor]
    """Fields of the batch that have one row per example."""

    @property
    def M(self) -> int:
        return len(self.logps)

    @property
    def B(self) -> int:
        return len(self.columns["pair_index"])

    @property
    def batch(self) -> dict[str, Any]:
        return {"cu_target": torch.tensor([0, *self.lengths]).cumsum(0)} | self.columns

    @property
    def stats(self) -> Stats:
        zeros = torch.zeros_like(self.log_sum_sq_probs)
        return Stats(zeros, self.log_sum_sq_probs, zeros, zeros.bool())

    def sums(self, values: Tensor) -> Tensor:
        """[M] to [R]."""
        return torch.stack([part.sum() for part in values.split(self.lengths)])

    def wpo_weights(self) -> Tensor:
        """[B]: formula of WPO, pair by pair."""
        aligned = (self.logps - self.log_sum_sq_probs).detach()
        means = self.sums(aligned) / torch.tensor(self.lengths)
        return (means[: self.B] + means[self.B :]).exp()

    def responses(self, indices: Iterable[int], **columns: Tensor) -> "Step":
        """Those responses alone."""
        chosen = list(indices)

        def pick(values: Tensor) -> Tensor:
            parts = values.split(self.lengths)
            return torch.cat([parts[i] for i in chosen])

        lengths = [self.lengths[i] for i in chosen]
        return Step(lengths, *(pick(values) for values in self[1:4]), columns)

    def pairs(self, examples: Sequence[int]) -> "Step":
        """Those examples alone, of whatever kind."""
        picked = torch.tensor(list(examples))
        columns = {name: x[picked] for name, x in self.columns.items()}
        if "response_index" not in columns:
            R = len(self.lengths)
            return self.responses([i + start for start in range(0, R, self.B) for i in examples], **columns)
        index = columns["response_index"]
        old = [int(i) for i in index.T.flatten() if i < len(self.lengths)]
        new = {i: position for position, i in enumerate(old)}
        columns["response_index"] = index.clone().apply_(lambda i: new.get(i, len(old)))
        return self.responses(old, **columns)

    def in_micro_batches(self, settings: ObjectiveSettings, sizes: Sequence[int]) -> Tensor:
        """The step's loss, as a trainer accumulates it."""
        assert sum(sizes) == self.B
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [self.pairs(range(start, start + n)) for start, n in zip(starts, sizes, strict=True)]
        contexts: list[Values | None] = [None] * len(parts)
        if settings.needs_step_context:
            values = [step_values(p.batch, p.logps, p.ref_token_logps, settings) for p in parts]
            contexts = [*step_context(values)]
        losses = [part.numerators(settings, context) for part, context in zip(parts, contexts, strict=True)]
        return self.normalised(losses)

    def numerators(self, settings: ObjectiveSettings, context: Values | None = None) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and of the token losses, of this micro-batch."""
        out = compute(self.batch, self.logps, self.ref_token_logps, settings, stats=self.stats, context=context)
        return out.losses.sum(), torch.zeros(()) if out.token_loss is None else out.token_loss

    def normalised(self, numerators: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        losses, token_losses = (torch.stack(parts).sum() for parts in zip(*numerators, strict=True))
        return losses / self.B + token_losses / sum(self.lengths[: self.B])


def make_step(
    B: int,
    *,
    kind: str = "preference",
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    columns: Sequence[str] = (),
    seed: int = 0,
) -> Step:
    """A ragged step; log-ratios of about `scale` per token."""
    generator = torch.Generator().manual_seed(seed)

    def rand(n: int) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    own: dict[str, Tensor] = {"pair_index": torch.arange(B)}
    R = 2 * B
    if kind == "ranked":  # 2 to 5 responses, slot by slot
        counts = torch.randint(2, 6, (B,), generator=generator)
        present = torch.arange(5)[:, None] < counts
        R = int(present.sum())
        index = torch.full((5, B), R)
        index[present] = torch.arange(R)
        own["response_index"] = index.T.contiguous()
    if kind == "unpaired":
        own["label"] = rand(B) < 0.6
    own |= {name: 0.5 + rand(B) for name in columns}
    lengths = torch.randint(1, 12, (R,), generator=generator).tolist()
    M = sum(lengths)
    ref = -3 * rand(M) - 2 * scale
    logps = ref + scale * (2 * rand(M) - 0.8)  # above the reference on average: KTO's KL is not cut off at 0
    log_sum_sq = -2 * rand(M)
    values = [x.to(dtype) for x in (logps, ref, log_sum_sq)]
    return Step(lengths, values[0].requires_grad_(), values[1], values[2], own)

"""One call of a head, from which log-probs, statistics, or the logits of some of its rows can be computed later.

Shapes: N rows of the call, M of them that are asked for, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.head.eager import Stats, transform_logits
from fastdpo.head.impl.interface import result_dtype
from fastdpo.head.linear_logprobs import linear_logprobs_with_stats
from fastdpo.model.body_and_head import Operands


@dataclass(frozen=True)
class Transform:
    """The step from raw logits z to logits: scale * z, or factor * tanh(scale * z) with a soft-cap."""

    scale: float = 1.0
    factor: float | None = None

    def times(self, x: float) -> "Transform":
        return Transform(self.scale * x) if self.factor is None else Transform(self.scale, self.factor * x)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `linear_logprobs`."""
        capped = self.factor is not None
        return {
            "logit_scale": self.scale,
            "softcap": 1.0 if capped else None,
            "temperature": 1 / self.factor if self.factor is not None else 1.0,
        }


PLAIN = Transform()


@dataclass(eq=False)
class HeadCall:
    """One call of a head: all that its logits would have been computed from, as it was at that moment."""

    operands: Operands
    graph: tuple[Tensor, ...]
    """Views of the trained parameters. In them DDP finds the parameters that the loss will need."""
    grad: bool
    autocast: torch.dtype | None
    version: int = 0
    """How often a function has changed logits of this call in place."""
    scored: tuple[Any, Tensor, Stats] | None = None
    """The last call of `score`: the transform, the place of each row in it or -1, and the statistics."""

    def select(self, rows: Tensor) -> Operands:
        """Return the operands of some rows, given as `[M]`."""
        hidden, weight, bias, low_rank = self.operands
        if len(rows) == len(hidden) and bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            return self.operands
        hidden = hidden.index_select(0, rows)
        return hidden, weight, bias, None if low_rank is None else (low_rank[0].index_select(0, rows), low_rank[1])

    def as_called(self) -> AbstractContextManager[None]:
        """Restore autocast and the gradient mode of the moment when the head was called."""
        return _mode(self.operands[0].device.type, self.autocast, self.grad and torch.is_grad_enabled())

    def score(self, rows: Tensor, targets: Tensor, transform: Transform) -> tuple[Tensor, Stats]:
        """Compute the log-probs of `targets` `[M]` and the statistics of `rows` `[M]`, and remember the statistics."""
        with self.as_called():
            hidden, weight, bias, low_rank = self.select(rows)
            logps, stats = linear_logprobs_with_stats(
                hidden, weight, targets, bias, low_rank=low_rank, **transform.options()
            )
        place = torch.full((len(self.operands[0]),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        self.scored = transform, place, stats
        return logps, stats

    def statistics(self, rows: Tensor, transform: Transform) -> Stats:
        """Return the statistics of `rows` `[M]` other than `is_top1`, from the last call of `score` if it had them."""
        trained = self.grad and torch.is_grad_enabled()
        if self.scored is not None and self.scored[0] == transform and trained <= self.scored[2].entropy.requires_grad:
            place = self.scored[1][rows]
            if bool((place >= 0).all()):
                return each(self.scored[2], lambda x: x[place])
        return self.score(rows, torch.zeros_like(rows), transform)[1]

    def mean_logits(self, rows: Tensor) -> Tensor:
        """Return the mean over the vocabulary of the raw logits of `rows` `[M]`: the head is linear, as its mean is."""
        with _mode(rows.device.type, None, self.grad and torch.is_grad_enabled()):
            hidden, weight, bias, low_rank = self.select(rows)
            dtype = result_dtype(hidden)
            means = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
            if bias is not None:
                means = means + bias.mean(dtype=dtype)
            if low_rank is not None:
                means = means + low_rank[0].to(dtype) @ low_rank[1].mean(0, dtype=dtype)
            return means

    def logits(self, rows: Tensor, transform: Transform) -> Tensor:
        """Compute the logits `[M, V]` of `rows` `[M]`, in float32 or float64."""
        with self.as_called():
            hidden, weight, bias, low_rank = self.select(rows)
            z = F.linear(hidden, weight, bias)
            if low_rank is not None:
                z = z + F.linear(*low_rank)
            return transform_logits(z.to(result_dtype(hidden)), **transform.options())


def each(stats: Stats, change: Callable[[Tensor], Tensor]) -> Stats:
    """Change the statistics that every row has, and leave out the others."""
    return Stats(*(change(x) for x in stats[:4]))


@contextmanager
def _mode(device: str, autocast: torch.dtype | None, grad: bool) -> Iterator[None]:
    with torch.set_grad_enabled(grad), torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        yield

"""Pieces of the algorithm on a tile of some rows by some vocabulary entries, in PyTorch operations.

Names and shapes are those of `fastdpo.head.impl.interface`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.head.impl.interface import Transform

Index = slice | Tensor

MASKED = torch.finfo(torch.float32).min
"""Logit of an entry outside the sum. Finite, because 0 * MASKED must be 0."""


class Rows(NamedTuple):
    """What the gradient of logits is made of, all `[N]`. dtarget, dothers and dentropy include `Transform.slope`."""

    targets: Tensor
    others: Tensor
    dtarget: Tensor
    dothers: Tensor
    dentropy: Tensor | None
    entropy: Tensor | None

    @property
    def has_upstream(self) -> Tensor:
        """bool `[N]`: whether a row has an upstream gradient other than 0; NaN counts as one."""
        return (self.dtarget != 0) | (self.dothers != 0)

    def at(self, index: Index) -> "Rows":
        return Rows(*(None if t is None else t[index] for t in self))  # type: ignore[arg-type]


class Running(NamedTuple):
    """State of the online softmax over the tokens seen, without the target, all `[N]`; statistics may be None."""

    target: Tensor
    """Logit of the target; -inf before it is seen."""
    m: Tensor
    """Maximum of z."""
    s: Tensor
    """Sum of e^(z - m)."""
    sum_dz: Tensor | None
    """Sum of e^(z - m) (z - m)."""
    sum_sq: Tensor | None
    """Sum of e^(2 (z - m))."""
    sum_z: Tensor | None
    """Sum of z, the target's included."""
    top_before: Tensor | None
    """Largest z that was a tile's first maximum and comes before the target; -inf if there is none."""

    def at(self, index: slice) -> "Running":
        return Running(*(None if t is None else t[index] for t in self))  # type: ignore[arg-type]


def empty_running(hidden: Tensor, dtype: torch.dtype, stats: bool) -> Running:
    """Return the state before the first tile."""
    lowest, zero = -math.inf, 0.0
    values = (lowest, MASKED / 2, zero, *((zero, zero, zero, lowest) if stats else (None,) * 4))
    N = hidden.shape[0]
    return Running(*(None if v is None else hidden.new_full((N,), v, dtype=dtype) for v in values))  # type: ignore[arg-type]


class Folded(NamedTuple):
    """A tile after it was folded into the state; R rows, C columns."""

    e: Tensor
    """`[R, C]`: e^(z - m), 0 at the target."""
    weighted: Tensor
    """`[R, C]`: e * slope. May be `e`."""
    masses: Tensor
    """`[R, ceil(C / T)]`: sums of `weighted` over cells."""
    decay: Tensor
    """`[R]`: factor that takes earlier sums from the old m to the new one."""


def fold_tile(state: Running, z: Tensor, targets: Tensor, transform: Transform, T: int, spare: Tensor) -> Folded:
    """Fold a tile of logits into the `state` of its rows.

    Args:
        state: updated in place.
        z: `[R, C]`: the scale of the transform times the raw logits. Destroyed.
        targets: `[R]`, counted from the tile's first column.
        transform: the transform of the head.
        T: columns of a cell.
        spare: memory for another tile, used for statistics.
    """
    slope = None
    if transform.cap is not None:
        slope = torch.square(z.tanh_()).neg_().add_(1)
        z.mul_(transform.cap)
    here, index = locate_targets(targets, slice(0, z.shape[1]))
    picked = z.gather(1, index)
    state.target.copy_(torch.where(here, picked, state.target[:, None]).squeeze(1))
    if state.sum_z is not None:
        state.sum_z.add_(z.sum(1))
    z.scatter_(1, index, picked.masked_fill(here, MASKED))
    if state.top_before is None:
        top = z.amax(1)
    else:
        top, first = z.max(1)
        state.top_before.copy_(torch.maximum(state.top_before, torch.where(first < targets, top, -math.inf)))

    m = torch.maximum(state.m, top)
    shift = state.m - m
    decay = shift.exp()
    state.m.copy_(m)
    z.sub_(m[:, None])
    e = torch.exp(z, out=z if state.sum_dz is None else spare[: z.numel()].view_as(z))
    if state.sum_dz is not None and state.sum_sq is not None:
        z.clamp_(min=MASKED)  # a bias of -inf makes it -inf
        state.sum_dz.add_(state.s * shift).mul_(decay).add_(z.mul_(e).sum(1))
        state.sum_sq.mul_(decay.square()).add_(torch.square(e, out=z).sum(1))
    masses = cell_sums(e, T)
    state.s.mul_(decay).add_(masses.sum(1))
    if slope is None:
        return Folded(e, e, masses, decay)
    return Folded(e, slope.mul_(e), cell_sums(slope, T), decay)


def logits_tile(h: Tensor, w: Tensor, bias: Tensor | None, scale: float, buffer: Tensor) -> Tensor:
    """Compute scale * (h @ w.T + bias) in `buffer`."""
    z = buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
    if bias is not None:
        z.copy_(bias)
    addmm(z, h, w.t(), alpha=scale, beta=0.0 if bias is None else scale)
    return z


def dlogits_tile(z: Tensor, rows: Rows, vs: slice, transform: Transform) -> Tensor:
    """Turn `z`, `transform.scale` times the raw logits of columns `vs`, into the gradient of the raw ones, in place."""
    slope = None
    if transform.cap is not None:
        slope = torch.square(z.tanh_()).neg_().add_(1)
        z.mul_(transform.cap)
    z.sub_(rows.others[:, None])
    if rows.dentropy is None or rows.entropy is None:
        z.exp_().mul_(rows.dothers[:, None])
    else:
        log_q = z.clamp(min=torch.finfo(z.dtype).min)
        z.exp_().mul_(rows.dothers[:, None] - rows.dentropy[:, None] * (log_q + rows.entropy[:, None]))
    scatter_target(z, rows, vs)
    return z if slope is None else z.mul_(slope)


def scatter_target(dz: Tensor, rows: Rows, vs: slice) -> None:
    """Write dtarget into the target's column of each row."""
    here, index = locate_targets(rows.targets, vs)
    dz.scatter_(1, index, torch.where(here, rows.dtarget[:, None], dz.gather(1, index)))


def target_slope(target: Tensor, transform: Transform) -> Tensor | float:
    """Return the slope 1 - tanh^2 of the soft-cap at the transformed logits `target`; 1 without a soft-cap."""
    if transform.cap is None:
        return 1.0
    return 1 - (target / transform.cap).square()


def locate_targets(targets: Tensor, vs: slice) -> tuple[Tensor, Tensor]:
    """Return whether a row's target is in this slice of the vocabulary, and its column (0 if not), `[R, 1]` each."""
    here = (targets >= vs.start) & (targets < vs.stop)
    return here.unsqueeze(1), torch.where(here, targets - vs.start, 0).unsqueeze(1)


def cell_sums(x: Tensor, T: int) -> Tensor:
    """Sum `[R, C]` over cells of T columns, `[R, ceil(C / T)]`; the last cell may be smaller."""
    whole = x.shape[1] // T * T
    sums = x[:, :whole].unflatten(1, (-1, T)).sum(2)
    return sums if whole == x.shape[1] else torch.cat([sums, x[:, whole:].sum(1, keepdim=True)], 1)


def cell_means(weight: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """Return the mean of every T rows of `weight [C, D]`, `[ceil(C / T), D]`; the last cell may be smaller."""
    whole = weight.shape[0] // T * T
    means = weight[:whole].unflatten(0, (-1, T)).mean(1, dtype=dtype)
    return means if whole == weight.shape[0] else torch.cat([means, weight[whole:].mean(0, keepdim=True, dtype=dtype)])


def side_by_side(a: Tensor, b: Tensor | None, index: Index, dtype: torch.dtype) -> Tensor:
    """Return some rows of `(a, b)` as one matrix of `dtype`."""
    return a[index].to(dtype) if b is None else torch.cat([a[index].to(dtype), b[index].to(dtype)], 1)


def addmm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Compute out = beta * out + alpha * a @ b in place, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha, beta=beta)
    elif a.is_cuda:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta)


def slices(total: int, size: int, first: int = 0) -> Iterator[slice]:
    """Cut [first, total) into slices of `size`. A total of 0 gives one empty slice, so that sums are still written."""
    for start in range(first, max(total, 1), size):
        yield slice(start, min(start + size, total))


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Inside the block, compute fp32 matmuls in IEEE fp32, whatever `torch.set_float32_matmul_precision` says."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision

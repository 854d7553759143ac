"""The head in Triton: logits live in registers, and a sparse backward skips those of inactive cells.

The forward is one kernel. The backward goes over chunks of the vocabulary, and for each chunk over blocks of rows:

    dlogits        = gradient of the raw logits [rows, chunk], in the dtype of the inputs
    dhidden[rows] += dlogits @ weight[chunk]                      float32 [N, D], rounded once, at the end
    dweight       += dlogits.T @ hidden[rows]                     float32 [chunk, D], rounded once, after the last rows

So the rows of dweight are finished one chunk at a time and no float32 buffer of V x D elements exists. (Float64 inputs
accumulate in float64.) A dense backward recomputes dlogits in full and uses the vendor's matmuls; each of the three
steps costs 1 unit of 2 N D V FLOPs. In a sparse backward, kernels work through a list of the active rows of each tile
of the vocabulary, so that the cost is in proportion to the active cells: for all three steps
(`fastdpo.head.impl.cells`), or for dhidden alone if dweight must be exact. There are no atomics and no synchronisation
with the host; the same inputs give the same bits. A trained head keeps as many probabilities as fit into the workspace
(`kernels.kept_probs`), and spares as large a share of the step that recomputes dlogits. `expected` of `Keep` is not
kept here; `fastdpo.head.impl.blas` keeps it.

Names and shapes are those of `fastdpo.head.impl.interface`.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head.impl.cells import Cells, pairs_of, skipped_gradients, sparse_backward, whole_tiles
from fastdpo.head.impl.interface import (
    NOTHING,
    WORKSPACE_BYTES,
    Forward,
    Grads,
    Keep,
    Kept,
    LinearHead,
    Needs,
    OtherStats,
    result_dtype,
    without_others,
)
from fastdpo.head.impl.sparsity import Selection
from fastdpo.head.impl.tiles import addmm, ieee_matmul, slices
from fastdpo.kernels.kept_probs import WHOLE, kept_dlogits
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.linear_logprobs_forward import ForwardOutput, linear_logprobs_forward
from fastdpo.kernels.row_lists import TILE, Lists
from fastdpo.kernels.sparse_dhidden import sparse_dhidden

LEAST_KEPT = 16
"""Probabilities are kept if at least one in so many fits; below that, the forward's time for it is not won back."""


def cell_columns(device: torch.device) -> int:
    """Return the columns of a cell."""
    return TILE


def kept_like(hidden: Tensor, head: LinearHead, keep: Keep, workspace: int) -> Kept:
    """Allocate what `forward` keeps."""
    N, V, shares = hidden.shape[0], head.weight.shape[0], None
    if keep.shares:
        stored = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # float16 cannot hold e^-20
        shares = hidden.new_empty(N, -(-V // TILE), dtype=stored)
    columns = 0
    if keep.probs and head.transform.cap is None:
        stored = torch.int16 if hidden.element_size() == 2 else result_dtype(hidden)
        left = workspace - (0 if shares is None else shares.nbytes)
        of_whole = max(N, 1) * (WHOLE * stored.itemsize + WHOLE // TILE * result_dtype(hidden).itemsize)
        columns = min(-(-V // WHOLE), left // of_whole) * WHOLE
    if columns < V / LEAST_KEPT:
        return Kept(shares=shares)
    factors = hidden.new_empty(columns // TILE, N, dtype=result_dtype(hidden)).T
    return Kept(shares=shares, probs=hidden.new_empty(N, columns, dtype=stored), factors=factors)


@torch.no_grad()
def forward(
    hidden: Tensor,
    hidden2: Tensor | None,
    targets: Tensor,
    head: LinearHead,
    stats: bool = False,
    keep: Keep = NOTHING,
    workspace: int = WORKSPACE_BYTES,
    launch: Callable[..., ForwardOutput] = linear_logprobs_forward,
) -> Forward:
    """Compute the `Forward` of arguments that have been checked; `launch` runs the kernel on a slice of rows."""
    N, V = hidden.shape[0], head.weight.shape[0]
    kept = kept_like(hidden, head, keep, workspace)
    rows = N
    if kept.shares is not None:  # masses of a slice fit in half of the workspace; 2048 rows fill any chip
        rows = min(workspace, WORKSPACE_BYTES) // 2 // (4 * -(-V // TILE)) // 2048 * 2048
    parts = []
    for rs in slices(N, max(2048, rows)):
        part = launch(
            hidden[rs], head.weight, targets[rs], head.bias, *head.transform, stats,
            tile_masses=keep.shares, keep=_kept_at(kept, rs), low_rank=_low_rank(hidden2, head, rs, slice(None)),
        )  # fmt: skip
        if kept.shares is not None and part.tile_masses is not None:
            kept.shares[rs] = (part.tile_masses - without_others(part.others)[:, None]).exp_()
        parts.append((part.target_logits, part.others, *(part.stats or ())))
    target, others, *statistics = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return Forward(target, others, OtherStats(*statistics) if stats else None, kept)


@torch.no_grad()
def backward(
    grads: Grads,
    hidden: Tensor,
    hidden2: Tensor | None,
    targets: Tensor,
    head: LinearHead,
    result: Forward,
    needs: Needs,
    selection: Selection | None = None,
    exact_weight: bool = True,
    workspace: int = WORKSPACE_BYTES,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that `needs` asks for; arguments and results are those of `impl.torch.backward`."""
    N, V = hidden.shape[0], head.weight.shape[0]
    acc = result_dtype(hidden)
    others = without_others(result.others)
    boost = _float16_boost(grads, head) if hidden.dtype == torch.float16 else None
    if boost is not None:
        entropy_grad = None if grads.entropy is None else grads.entropy * boost
        grads = Grads(grads.target * boost, grads.others * boost, entropy_grad)
    workspace = min(workspace, WORKSPACE_BYTES)  # more is for what is kept: these blocks fill any chip
    needs_weights = needs.weight or needs.bias or needs.weight2
    if selection is not None and not (exact_weight and needs_weights):
        with ieee_matmul():
            dhidden, dweight, dbias = sparse_backward(
                grads, hidden, hidden2, targets, head, others, result, needs, selection, boost, workspace
            )
        dhidden = [None if x is None else _unboost(x, boost).to(hidden.dtype) for x in dhidden]
        second = (dhidden[1], dweight[1]) if len(dhidden) == 2 else (None, None)
        return dhidden[0], dweight[0], dbias, *second

    width = hidden.shape[1] + (0 if hidden2 is None else hidden2.shape[1])
    cells = None if selection is None else Cells(targets, grads, result, selection, workspace)
    left = workspace if cells is None else workspace - cells.list_bytes
    rows, columns = _block_shape(N, V, width, hidden.element_size(), acc.itemsize, left)
    buffer = hidden.new_empty(rows, _aligned(columns))
    pairs = pairs_of(hidden, hidden2, head)
    of_hidden, of_weight = [needs.hidden, needs.hidden2][: len(pairs)], [needs.weight, needs.weight2][: len(pairs)]
    with ieee_matmul():
        if cells is None:
            initial = [
                hidden.new_zeros(h.shape, dtype=acc) if n else None for (h, _), n in zip(pairs, of_hidden, strict=True)
            ]
        else:
            initial = skipped_gradients(cells, pairs, of_hidden, head.transform.slope, left).dhidden
        factors = [
            _Factor.of(h, w, dhidden, trained, columns, acc)
            for (h, w), dhidden, trained in zip(pairs, initial, of_weight, strict=True)
        ]
        dbias = head.weight.new_empty(V) if needs.bias else None
        bias_sum = hidden.new_zeros(columns, dtype=acc) if needs.bias else None
        kept = None if grads.entropy is not None else _kept_at(result.kept, slice(None))
        first = V if kept is None else -(-V // WHOLE) * WHOLE - kept[0].shape[1]
        for vs in (*slices(first, columns), *slices(V, columns, first)) if 0 < first < V else slices(V, columns):
            for rs in slices(N, rows):
                dlogits = buffer[: rs.stop - rs.start, : vs.stop - vs.start]
                if kept is not None and vs.start >= first:
                    here = slice(vs.start - first, None), slice((vs.start - first) // TILE, None)
                    kept_dlogits(
                        dlogits, kept[0][rs, here[0]], kept[1][rs, here[1]], targets[rs] - vs.start,
                        grads.target[rs], grads.others[rs], head.transform.scale,
                    )  # fmt: skip
                else:
                    entropy = None
                    if grads.entropy is not None and result.stats is not None:
                        entropy = grads.entropy[rs], result.stats.entropy[rs]
                    linear_logprobs_backward(
                        dlogits, hidden[rs], head.weight[vs], targets[rs] - vs.start,
                        None if head.bias is None else head.bias[vs], others[rs], grads.target[rs], grads.others[rs],
                        *head.transform, low_rank=_low_rank(hidden2, head, rs, vs), entropy=entropy,
                    )  # fmt: skip
                lists = None if cells is None else cells.lists(rs, vs)
                for factor in factors:
                    factor.accumulate(dlogits, lists, rs, vs)
                if bias_sum is not None:
                    total = bias_sum[: vs.stop - vs.start]
                    total.mul_(float(rs.start > 0)).add_(dlogits.sum(0, dtype=acc))

            sums = [factor.dweight_sum for factor in factors] + [bias_sum]
            results = [factor.dweight for factor in factors] + [dbias]
            for accumulated, out in zip(sums, results, strict=True):
                if accumulated is not None and out is not None:
                    out[vs] = _unboost(accumulated[: vs.stop - vs.start], boost)
    dhidden = [None if f.dhidden is None else _unboost(f.dhidden, boost).to(hidden.dtype) for f in factors]
    second = (dhidden[1], factors[1].dweight) if len(factors) == 2 else (None, None)
    return dhidden[0], factors[0].dweight, dbias, *second


class _Factor(NamedTuple):
    """One of the two products hidden @ weight.T that make the logits, and its gradients so far, None if not needed."""

    hidden: Tensor  # [N, K]
    weight: Tensor  # [V, K]
    dhidden: Tensor | None  # [N, K] in the accumulators' dtype
    dweight: Tensor | None  # [V, K]
    dweight_sum: Tensor | None  # [columns, K] in the accumulators' dtype

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, dhidden: Tensor | None, needs_weight: bool, columns: int, acc: Any
    ) -> "_Factor":
        return _Factor(
            hidden,
            weight,
            dhidden,
            torch.empty_like(weight) if needs_weight else None,
            weight.new_zeros(columns, weight.shape[1], dtype=acc) if needs_weight else None,
        )

    def accumulate(self, dlogits: Tensor, lists: Lists | None, rs: slice, vs: slice) -> None:
        """Add the gradients from the block `dlogits [rs, vs]`; with `lists`, dhidden takes the active cells alone."""
        if self.dhidden is not None and lists is not None:
            sparse_dhidden(self.dhidden[rs], dlogits, lists, self.weight[vs])
        elif self.dhidden is not None:
            addmm(self.dhidden[rs], dlogits, self.weight[vs])
        if self.dweight_sum is not None:
            addmm(self.dweight_sum[: vs.stop - vs.start], dlogits.T, self.hidden[rs], beta=float(rs.start > 0))


def _kept_at(kept: Kept, rs: slice) -> tuple[Tensor, Tensor] | None:
    return None if kept.probs is None or kept.factors is None else (kept.probs[rs], kept.factors[rs])


def _low_rank(hidden2: Tensor | None, head: LinearHead, rs: slice, vs: slice) -> tuple[Tensor, Tensor] | None:
    return None if hidden2 is None or head.weight2 is None else (hidden2[rs], head.weight2[vs])


def _block_shape(N: int, V: int, D: int, itemsize: int, acc_itemsize: int, workspace: int) -> tuple[int, int]:
    """Choose the rows and columns of a block of dlogits; the columns are whole cells.

    Half of the workspace is for the block, half for dweight's accumulator. Accumulators cost the matmuls
    8 N V D (1 / rows + 1 / columns) bytes of reads and writes, so the block is square, or narrower if dweight's
    accumulator would not fit otherwise.
    """
    half = workspace // 2
    columns = min(isqrt(half // itemsize), half // (acc_itemsize * max(D, 1)), -(-V // TILE) * TILE)
    columns = whole_tiles(columns)
    rows = min(_whole_tiles(half // (itemsize * _aligned(columns))), max(N, 1))
    return rows, columns


def _whole_tiles(length: int) -> int:
    """Round a length of at least 256 down to a multiple of 256; return at least 1."""
    return max(length // 256 * 256 if length >= 256 else length, 1)


def _aligned(columns: int) -> int:
    """Round up to a multiple of 64, a stride of dlogits that suits the matmuls."""
    return -(-columns // 64) * 64


def _float16_boost(grads: Grads, head: LinearHead) -> Tensor:
    """Return the power of two that brings the largest gradient of a logit to [2^14, 2^15), as a 0-dim tensor.

    Float16 ends at 2^16, and loses precision below 2^-14: a gradient of 1e-4 spread over 1e5 tokens would vanish.
    """
    slope = head.transform.slope
    largest = torch.cat([(g * slope).abs().nan_to_num(0.0, 0.0) for g in grads if g is not None])
    exponent = torch.cat([largest, largest.new_zeros(1)]).amax().frexp().exponent  # largest < 2^exponent
    return torch.ldexp(largest.new_ones(()), 15 - exponent.clamp(min=-100))


def _unboost(accumulator: Tensor, boost: Tensor | None) -> Tensor:
    return accumulator if boost is None else accumulator / boost

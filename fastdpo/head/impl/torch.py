"""The head in plain PyTorch, on any device: it makes tiles of logits that stay in cache, never all `[N, V]`.

The forward is an online softmax (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867, Algorithm 3) over tiles of
some rows by some vocabulary entries, with the target masked. The backward turns each tile into the gradient of its
logits, in place, and multiplies it into the gradients of the inputs. Its outer loop is over the vocabulary, so that a
slice of dweight is finished before the next one begins. Forward and backward together cost these matmuls, in
units of 2NDV FLOPs:

    head trained                    4 - f: forward, recompute, dhidden, dweight; f is the share of V with probs kept
    head frozen, `expected` kept    2: attention over the vocabulary whose values are the rows of weight
    sparse, a share rho computed    1 + 2 rho; 1 + 3 rho with dweight; 3 + rho - f with exact dweight

Names and shapes are those of `fastdpo.head.impl.interface`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastdpo.head.impl import sparsity
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
from fastdpo.head.impl.tiles import (
    Folded,
    Rows,
    Running,
    addmm,
    dlogits_tile,
    empty_running,
    fold_tile,
    ieee_matmul,
    logits_tile,
    scatter_target,
    side_by_side,
    slices,
    target_slope,
)

TILE_SHAPE = {"cpu": (1024, 1024), "cuda": (4096, 4096)}
"""Rows and vocabulary entries of a tile. On the CPU, 4 MiB of fp32 are the best of 1 to 16 MiB, by 3 % (Zen 4)."""
CELL = 64
"""T, the columns of a cell of the sparse backward."""


def cell_columns(device: torch.device) -> int | None:
    """Return T, or None if the backward cannot be sparse: on a GPU, counting active cells would wait for it."""
    return CELL if device.type == "cpu" else None


def kept_like(hidden: Tensor, head: LinearHead, keep: Keep, workspace: int) -> Kept:
    """Allocate what `forward` keeps."""
    N, V, width = hidden.shape[0], head.weight.shape[0], _width(head)
    stored = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # float16 cannot hold e^-20
    rows, cols = _tile_shape(hidden, head, workspace)
    shares = hidden.new_empty(N, -(-V // CELL), dtype=stored) if keep.shares else None
    blocks = 0  # of probs: as many as fit beside a tile and the shares
    if keep.probs and head.transform.cap is None:
        left = workspace - _tile_bytes(rows, cols, head, result_dtype(hidden))
        left -= 0 if shares is None else shares.nbytes
        blocks = min(-(-V // cols), max(0, left) // (stored.itemsize * cols * max(N, 1)))
    columns = max(0, V - (-(-V // cols) - blocks) * cols)
    return Kept(
        expected=hidden.new_zeros(N, width, dtype=result_dtype(hidden)) if keep.expected else None,
        shares=shares,
        probs=hidden.new_empty(N, columns, dtype=stored) if columns else None,
        factors=hidden.new_empty(N, blocks, dtype=result_dtype(hidden)) if columns else None,
    )


@torch.no_grad()
def forward(
    hidden: Tensor,
    hidden2: Tensor | None,
    targets: Tensor,
    head: LinearHead,
    stats: bool = False,
    keep: Keep = NOTHING,
    workspace: int = WORKSPACE_BYTES,
    *,
    fold: Callable[..., Folded] = fold_tile,
) -> Forward:
    """Compute the `Forward` of arguments that have been checked; `fold` folds a tile of logits into the state."""
    N, V = hidden.shape[0], head.weight.shape[0]
    dtype, operand = result_dtype(hidden), operand_dtype(hidden)
    rows, cols = _tile_shape(hidden, head, workspace)
    buffer = hidden.new_empty(rows * cols, dtype=dtype)
    spare = torch.empty_like(buffer) if stats else buffer
    running = empty_running(hidden, dtype, stats)
    kept = kept_like(hidden, head, keep, workspace)
    maxima = hidden.new_empty(N, -(-V // cols), dtype=dtype)  # the m that a block's shares and probs are relative to
    first_kept = V if kept.probs is None else V - kept.probs.shape[1]

    with ieee_matmul():
        for block, vs in enumerate(slices(V, cols)):
            w = side_by_side(head.weight, head.weight2, vs, operand)
            bias = None if head.bias is None else head.bias[vs].to(dtype)
            for rs in slices(N, rows):
                h = side_by_side(hidden, hidden2, rs, operand)
                z = logits_tile(h, w, bias, head.transform.scale, buffer)
                tile = fold(running.at(rs), z, targets[rs] - vs.start, head.transform, CELL, spare)
                maxima[rs, block] = running.m[rs]
                if kept.probs is not None and vs.start >= first_kept:
                    kept.probs[rs, vs.start - first_kept : vs.stop - first_kept] = tile.e
                if kept.shares is not None:
                    kept.shares[rs, vs.start // CELL : -(-vs.stop // CELL)] = tile.masses
                if kept.expected is not None:
                    addmm(kept.expected[rs].mul_(tile.decay[:, None]), tile.weighted.to(operand), w)

    log_s = running.s.log()
    others = running.m + log_s
    if kept.expected is not None:
        kept.expected.div_(running.s.clamp(min=torch.finfo(dtype).tiny)[:, None])
    factors = (maxima - without_others(others)[:, None]).exp()
    if kept.shares is not None:
        for shares, factor in zip(kept.shares.split(cols // CELL, 1), factors.unbind(1), strict=True):
            shares.mul_(factor[:, None])
    if kept.factors is not None:
        kept.factors.copy_(factors[:, first_kept // cols :])
    return Forward(running.target, others, _statistics(running, log_s), kept)


def _statistics(running: Running, log_s: Tensor) -> OtherStats | None:
    if running.sum_dz is None or running.sum_sq is None or running.sum_z is None or running.top_before is None:
        return None
    none = running.s == 0  # there is no other token
    return OtherStats(
        entropy=(log_s - running.sum_dz / running.s).masked_fill(none, 0),
        log_sum_sq=(running.sum_sq.log() - 2 * log_s).masked_fill(none, 0),
        sum_logits=running.sum_z,
        top_before=running.top_before,
        top=running.m.masked_fill(none, -math.inf),
    )


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
    *,
    make_dlogits: Callable[..., Tensor] = dlogits_tile,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that `needs` asks for, each in its input's dtype; the others are None.

    Args:
        grads: upstream gradients.
        hidden: `[N, D]`, as given to `forward`; so are hidden2, targets and head.
        hidden2: `[N, R]`, or None.
        targets: `[N]`.
        head: the head.
        result: the result of `forward`. Of its statistics only the entropy is read, if it has an upstream gradient.
        needs: the gradients to compute. Those of hidden and hidden2 come from `expected` if a frozen head kept it.
        selection: the cells to compute, chosen from the kept shares; None computes all cells.
        exact_weight: compute all cells for the gradients of weight, bias and weight2 even with a selection.
        workspace: bound of temporary memory, in bytes.
        make_dlogits: a function that turns a tile of logits into its gradient.
    """
    (N, D), width = hidden.shape, _width(head)
    dtype = result_dtype(hidden)
    scale = head.transform.slope
    all_rows = Rows(
        targets, without_others(result.others), scale * grads.target, scale * grads.others,
        None if grads.entropy is None else scale * grads.entropy,
        None if result.stats is None else result.stats.entropy,
    )  # fmt: skip
    dhidden = hidden.new_zeros(N, width, dtype=dtype) if needs.hidden or needs.hidden2 else None
    weights: tuple[Tensor | None, ...] = (None, None, None)
    with ieee_matmul():
        if result.kept.expected is not None and dhidden is not None:
            _from_expected(dhidden, all_rows, head, result)
        else:
            weights = _from_tiles(
                dhidden,
                hidden,
                hidden2,
                head,
                all_rows,
                result.kept,
                needs,
                selection,
                exact_weight,
                workspace,
                make_dlogits,
            )
    return (
        dhidden[:, :D].to(hidden.dtype) if dhidden is not None and needs.hidden else None,
        *weights[:2],
        dhidden[:, D:].to(hidden.dtype) if dhidden is not None and needs.hidden2 else None,
        weights[2],
    )


def _from_expected(dhidden: Tensor, rows: Rows, head: LinearHead, result: Forward) -> None:
    """Fill `dhidden` from the mean of weight that forward kept, and the target's row of weight."""
    assert result.kept.expected is not None
    dtarget = rows.dtarget * target_slope(result.target, head.transform)
    index = rows.targets.clamp(0, head.weight.shape[0] - 1)
    for rs in slices(len(index), TILE_SHAPE["cpu"][0]):
        torch.mul(result.kept.expected[rs], rows.dothers[rs, None], out=dhidden[rs])
        w = side_by_side(head.weight, head.weight2, index[rs], dhidden.dtype)
        dhidden[rs].addcmul_(w, dtarget[rs, None])


def _from_tiles(
    dhidden: Tensor | None,
    hidden: Tensor,
    hidden2: Tensor | None,
    head: LinearHead,
    all_rows: Rows,
    kept: Kept,
    needs: Needs,
    selection: Selection | None,
    exact_weight: bool,
    workspace: int,
    make_dlogits: Callable[..., Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Add to `dhidden` and return dweight, dbias and dweight2, from all tiles of dz or the active cells."""
    (N, D), V, width = hidden.shape, head.weight.shape[0], _width(head)
    dtype, operand = result_dtype(hidden), operand_dtype(hidden)
    rows, cols = _tile_shape(hidden, head, workspace)
    buffer = hidden.new_empty(rows * cols, dtype=dtype)
    dweight = torch.empty_like(head.weight) if needs.weight else None
    dbias = head.weight.new_empty(V) if needs.bias else None
    dweight2 = torch.empty_like(head.weight2) if head.weight2 is not None and needs.weight2 else None
    trained = slice(0 if needs.weight else D, width if needs.weight2 else D)  # columns of (weight, weight2)
    needs_weights = needs.weight or needs.bias or needs.weight2
    sparse = selection is not None and not (exact_weight and needs_weights)
    spread = None
    if selection is not None:
        spread = sparsity.spread_skipped(
            dhidden, hidden, hidden2, head, all_rows, kept.shares, selection, trained, CELL, operand
        )
    first_kept = V if kept.probs is None or sparse else V - kept.probs.shape[1]

    for vs in slices(V, cols):
        w = side_by_side(head.weight, head.weight2, vs, operand)
        bias = None if head.bias is None else head.bias[vs].to(dtype)
        dw = hidden.new_zeros(w.shape[0], trained.stop - trained.start, dtype=dtype) if needs_weights else None
        db = hidden.new_zeros(w.shape[0], dtype=dtype)
        active = None
        if selection is not None:
            assert kept.shares is not None
            cells = slice(vs.start // CELL, -(-vs.stop // CELL))
            active = sparsity.active_cells(
                kept.shares[:, cells],
                selection.threshold,
                all_rows.targets // CELL - cells.start,
                all_rows.has_upstream,
            )
        tiles = ((rs, slice(0, w.shape[0])) for rs in slices(N, rows))
        for at, cs in _row_lists(active, w.shape[0], rows) if sparse and active is not None else tiles:
            some, here = all_rows.at(at), slice(vs.start + cs.start, vs.start + cs.stop)
            h = side_by_side(hidden, hidden2, at, operand)
            if vs.start < first_kept:
                dz = logits_tile(h, w[cs], None if bias is None else bias[cs], head.transform.scale, buffer)
                dz = make_dlogits(dz, some, here, head.transform)
            else:
                assert kept.probs is not None
                assert kept.factors is not None
                factor = kept.factors[at, (vs.start - first_kept) // cols] * some.dothers
                probs = kept.probs[at, here.start - first_kept : here.stop - first_kept]
                dz = torch.mul(probs, factor[:, None], out=_view(buffer, probs))
                scatter_target(dz, some, here)
            db[cs] += dz.sum(0)
            dz = dz.to(operand)
            if dw is not None:
                addmm(dw[cs], dz.t(), h[:, trained])
            if dhidden is None:
                continue
            if isinstance(at, Tensor):
                dhidden.index_add_(0, at, dz @ w[cs])
            elif active is None:
                addmm(dhidden[at], dz, w)
            else:
                for index, cell in _row_lists(active[at], w.shape[0], rows):
                    dhidden[at].index_add_(0, index, dz[index, cell] @ w[cell])

        if spread is not None and sparse and dw is not None:
            every = (spread[vs.start // CELL : -(-vs.stop // CELL)]).repeat_interleave(CELL, 0)[: w.shape[0]]
            dw += every[:, :-1]
            db += every[:, -1]
        if dw is not None and dweight is not None:
            dweight[vs] = dw[:, :D]
        if dw is not None and dweight2 is not None:
            dweight2[vs] = dw[:, dw.shape[1] - dweight2.shape[1] :]
        if dbias is not None:
            dbias[vs] = db
    return dweight, dbias, dweight2


def _row_lists(active: Tensor, columns: int, most: int) -> Iterator[tuple[Tensor, slice]]:
    """For each column of `active [N, J]`, yield its active rows, at most `most` at a time, and its vocabulary slice."""
    rows = active.t().nonzero()[:, 1]
    for j, of_cell in enumerate(rows.split(active.sum(0).tolist())):
        for some in of_cell.split(most) if of_cell.numel() else ():
            yield some, slice(j * CELL, min((j + 1) * CELL, columns))


def _width(head: LinearHead) -> int:
    return head.weight.shape[1] + (0 if head.weight2 is None else head.weight2.shape[1])


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matmuls' operands: bf16 where CUDA multiplies it into fp32; in fp16, dz would vanish."""
    return hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else result_dtype(hidden)


def _tile_shape(hidden: Tensor, head: LinearHead, workspace: int) -> tuple[int, int]:
    """Return the rows and columns of a tile: TILE_SHAPE, or less to fit the workspace; columns are whole cells."""
    N = hidden.shape[0]
    max_rows, max_cols = TILE_SHAPE.get(hidden.device.type, TILE_SHAPE["cpu"])
    itemsize, width = result_dtype(hidden).itemsize, _width(head)
    rows = max(1, min(N, max_rows, workspace // (2 * itemsize * width)))
    fitting = (workspace - itemsize * rows * width) // (itemsize * (3 * rows + 2 * width))
    return rows, max(CELL, min(max_cols, fitting) // CELL * CELL)


def _tile_bytes(rows: int, cols: int, head: LinearHead, dtype: torch.dtype) -> int:
    """Return the bytes of a tile, a spare tile, a rounded copy, rows of hidden, and slices of weight and dweight."""
    return dtype.itemsize * (3 * rows * cols + (rows + 2 * cols) * _width(head))


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view_as(like)

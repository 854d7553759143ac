"""List the rows that are active in each tile of the vocabulary, as a mixture of experts lists the tokens of an expert.

The rule is `fastdpo.head.impl.sparsity.active_cells`: a cell is active if its share of its row is above the row's
threshold or it holds the target, and if the row has an upstream gradient at all.

    order  = rows by falling share of active cells; BLOCK_N neighbours in it are a block
    rows[j, :counts[j]] = active rows of tile j: those of its dense blocks, then the others, both in that order

A block is *dense* in a tile if at least `least` of its rows are active there: then a matmul of all its rows is cheaper
than lists. tiles[b] are the tiles in which block b is dense. A kernel takes the active rows of a tile from its list and
stops at its count, which the host never reads. bounds cut the list after its dense blocks into ranges of rows.

A program owns a tile and walks the blocks, first for those that are dense in it. The prefix sum of a block's mask,
added to the count so far, gives the place of each row in the list. Other programs own a block each, and collect its
dense tiles in the same way.

`skipped_mass` is what the cells that are not active leave out, dothers[n] * shares[n, j], and `cell_means` are the
means of the embeddings of a tile; their product is the gradient of the skipped cells.

Shapes: N rows, V vocabulary, D hidden size, J = ceil(V / TILE) tiles, B = ceil(N / BLOCK_N) blocks. The J lists of N
int32 take 1 / 64 of the memory of 16-bit dlogits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import interpreted

TILE = 128  # columns of a tile
BLOCK_N = 256  # rows of a block
BLOCK_J = 1024  # tiles that a program counts at once
BLOCK_V, BLOCK_D = 32, 256  # of `cell_means`


class Lists(NamedTuple):
    """The active rows of J tiles."""

    rows: Tensor  # [J, N] int32; only the first counts[j] entries of row j are initialised
    counts: Tensor  # [J] int32
    bounds: Tensor  # [J, B + 1] int32
    order: Tensor  # [N] int32
    active: Tensor  # [J, N] int8, by place in order
    tiles: Tensor  # [B, J] int16; only the first starts[J, b] entries of row b are initialised
    starts: Tensor  # [J + 1, B] int32: dense tiles of a block that come before a tile
    first: int  # tile of active, tiles and starts with which rows, counts and bounds begin
    block: int  # BLOCK_N

    def of(self, first: int, last: int) -> "Lists":
        """Return the lists of the tiles [first, last)."""
        rows, counts, bounds = (t[first:last] for t in self[:3])
        return self._replace(rows=rows, counts=counts, bounds=bounds, first=self.first + first)


@triton.jit
def _load_rows(threshold_ptr, dtarget_ptr, dothers_ptr, offs_n, N):
    """Return the thresholds, infinite past the end, which rows have an upstream gradient (NaN is one), and dothers."""
    mask = offs_n < N
    threshold = tl.load(threshold_ptr + offs_n, mask=mask, other=float("inf"))
    dothers = tl.load(dothers_ptr + offs_n, mask=mask, other=0.0)
    upstream = (tl.load(dtarget_ptr + offs_n, mask=mask, other=0.0) != 0) | (dothers != 0)
    return threshold, upstream, dothers


@triton.jit
def _is_above(shares, threshold):
    """Compare in float32, or in float64 for shares of that dtype."""
    if shares.dtype != tl.float64:
        shares = shares.to(tl.float32)
    return shares > threshold


@triton.jit
def _active_rows(
    order_ptr, shares_ptr, threshold_ptr, targets_ptr, dtarget_ptr, dothers_ptr, offs_i, stride_sn, N, tile, first,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return the rows at some places of the order, and whether each is active in a tile, as int32."""
    # int64, because offsets in shares may pass 2^31
    offs_n = tl.load(order_ptr + offs_i, mask=offs_i < N, other=0)
    offs_n = tl.where(offs_i < N, offs_n, N)
    threshold, upstream, _ = _load_rows(threshold_ptr, dtarget_ptr, dothers_ptr, offs_n, N)
    shares = tl.load(shares_ptr + offs_n.to(tl.int64) * stride_sn + tile, mask=offs_n < N, other=0.0)
    targets = tl.load(targets_ptr + offs_n, mask=offs_n < N, other=-1)
    holds_target = (targets >= 0) & (targets // TILE == first + tile)
    active = (_is_above(shares, threshold) | holds_target) & upstream
    return offs_n, active.to(tl.int32)


@triton.jit(do_not_specialize=["N", "first", "least"])  # they change from batch to batch: compile once for all
def _row_lists_kernel(
    rows_ptr,  # [J, N] int32, out
    counts_ptr,  # [J] int32, out
    bounds_ptr,  # [J, B + 1] int32, out
    active_ptr,  # [J, N] int8, out
    dense_ptr,  # [J, B] int8, out
    order_ptr,  # [N] int32
    shares_ptr,  # [N, J]
    threshold_ptr,  # [N] float32
    targets_ptr,  # [N] int64
    dtarget_ptr,  # [N]
    dothers_ptr,  # [N]
    stride_sn,
    N,
    first,  # tile of the vocabulary with which shares begin
    least,  # active rows of a dense block
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)  # int64, because offsets in rows may pass 2^31
    blocks = tl.cdiv(N, BLOCK_N)
    count = tl.zeros((), tl.int32)
    for block in range(0, blocks):
        offs_i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n, active = _active_rows(
            order_ptr, shares_ptr, threshold_ptr, targets_ptr, dtarget_ptr, dothers_ptr, offs_i, stride_sn, N, tile,
            first, TILE,
        )  # fmt: skip
        is_dense = tl.sum(active, axis=0) >= least
        tl.store(active_ptr + tile * N + offs_i, active.to(tl.int8), mask=offs_i < N)
        tl.store(dense_ptr + tile * blocks + block, is_dense.to(tl.int8))
        active = tl.where(is_dense, active, 0)
        tl.store(rows_ptr + tile * N + count + tl.cumsum(active, axis=0) - active, offs_n, mask=active > 0)
        count += tl.sum(active, axis=0)
    bounds_ptrs = bounds_ptr + tile * (blocks + 1)
    for block in range(0, blocks):
        tl.store(bounds_ptrs + block, count)
        offs_i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n, active = _active_rows(
            order_ptr, shares_ptr, threshold_ptr, targets_ptr, dtarget_ptr, dothers_ptr, offs_i, stride_sn, N, tile,
            first, TILE,
        )  # fmt: skip
        active = tl.where(tl.sum(active, axis=0) < least, active, 0)
        tl.store(rows_ptr + tile * N + count + tl.cumsum(active, axis=0) - active, offs_n, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(bounds_ptrs + blocks, count)
    tl.store(counts_ptr + tile, count)


@triton.jit(do_not_specialize=["J", "B"])
def _dense_tiles_kernel(
    tiles_ptr,  # [B, J] int16, out
    starts_ptr,  # [J + 1, B] int32, out
    dense_ptr,  # [J, B] int8
    J,
    B,
    BLOCK_J: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.int32)
    for j_start in range(0, J, BLOCK_J):
        offs_j = j_start + tl.arange(0, BLOCK_J)
        dense = tl.load(dense_ptr + offs_j * B + block, mask=offs_j < J, other=0).to(tl.int32)
        place = count + tl.cumsum(dense, axis=0) - dense
        tl.store(starts_ptr + offs_j * B + block, place, mask=offs_j < J)
        tl.store(tiles_ptr + block * J + place, offs_j, mask=dense > 0)
        count += tl.sum(dense, axis=0)
    tl.store(starts_ptr + J * B + block, count)


@triton.jit(do_not_specialize=["J", "B", "cells"])
def _count_cells_kernel(
    found_ptr,  # [3] float32, in and out, of which the last two are added to
    counts_ptr,  # [J] int32
    bounds_ptr,  # [J, B + 1] int32
    starts_ptr,  # [J + 1, B] int32
    J,
    B,
    cells,  # of the whole head
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    in_blocks = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B, BLOCK):
        offs_b = start + tl.arange(0, BLOCK)
        in_blocks += tl.load(starts_ptr + J * B + offs_b, mask=offs_b < B, other=0).to(tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, J, BLOCK):
        offs_j = start + tl.arange(0, BLOCK)
        mask = offs_j < J
        listed = tl.load(counts_ptr + offs_j, mask=mask, other=0)
        listed -= tl.load(bounds_ptr + offs_j * (B + 1), mask=mask, other=0)
        others += listed.to(tl.float32)
    tl.store(found_ptr + 1, tl.load(found_ptr + 1) + tl.sum(in_blocks, axis=0) * BLOCK_N / cells)
    tl.store(found_ptr + 2, tl.load(found_ptr + 2) + tl.sum(others, axis=0) / cells)


@triton.jit(do_not_specialize=["N"])
def _skipped_mass_kernel(
    skipped_ptr,  # [N, columns], out
    shares_ptr,  # [N, J]
    threshold_ptr,  # [N] float32
    targets_ptr,  # [N] int64
    dtarget_ptr,  # [N]
    dothers_ptr,  # [N]
    stride_mn,
    stride_sn,
    N,
    J,
    columns,  # of skipped, J rounded up so that it is stored in vectors
    factor: tl.float64,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    offs_n = n + tl.arange(0, 1)
    threshold, upstream, dothers = _load_rows(threshold_ptr, dtarget_ptr, dothers_ptr, offs_n, N)
    target = tl.load(targets_ptr + offs_n)
    for j_start in range(0, columns, BLOCK_J):
        offs_j = j_start + tl.arange(0, BLOCK_J)
        shares = tl.load(shares_ptr + n * stride_sn + offs_j, mask=offs_j < J, other=0.0)
        holds_target = (target >= 0) & (offs_j == target // TILE)
        active = (_is_above(shares, threshold) | holds_target) & upstream
        mass = shares.to(dothers.dtype) * (dothers * tl.full((), factor, dothers.dtype))
        mass = tl.where(active, 0.0, mass).to(skipped_ptr.dtype.element_ty)
        tl.store(skipped_ptr + n * stride_mn + offs_j, mass, mask=offs_j < columns)


@triton.jit
def _cell_means_kernel(
    means_ptr,  # [J, D], out
    weight_ptr,  # [V, D]
    stride_wv,
    stride_wd,
    V,
    D,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,  # a divisor of TILE
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros((BLOCK_D,), ACC)
    for v_start in range(0, TILE, BLOCK_V):
        offs_v = tile * TILE + v_start + tl.arange(0, BLOCK_V)
        # int64, because v * stride_wv, or d * stride_wd of a transposed weight, passes 2^31 at V=262144, D=8192
        pointers = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_wv + offs_d.to(tl.int64)[None, :] * stride_wd
        w = tl.load(pointers, mask=(offs_v < V)[:, None] & mask_d[None, :], other=0.0)
        total += tl.sum(w.to(ACC), axis=0)
    means = total / tl.minimum(V - tile * TILE, TILE).to(ACC)
    tl.store(means_ptr + tile.to(tl.int64) * D + offs_d, means.to(means_ptr.dtype.element_ty), mask=mask_d)


def row_lists(
    shares: Tensor,
    threshold: Tensor,
    targets: Tensor,
    dtarget: Tensor,
    dothers: Tensor,
    first: int = 0,
    *,
    order: Tensor,
    least: int,
    found: tuple[Tensor, int] | None = None,
) -> Lists:
    """List the active rows of every tile.

    Args:
        shares: `[N, J]`, rows contiguous: of some neighbouring tiles.
        threshold: `[N]` float32.
        targets: `[N]` int64.
        dtarget: `[N]`, gradient of the target's logit.
        dothers: `[N]`, gradient of `others`. A row where both are 0 is in no list.
        first: tile of the vocabulary with which `shares` begins.
        order: `[N]` int32: rows, of which BLOCK_N neighbours are a block.
        least: active rows from which a block is dense in a tile.
        found: `[3]` float32, and the number of cells N * J of the whole head: the share of them in dense blocks is
            added to `found[1]`, and that of the other active cells to `found[2]`.
    """
    N, J = shares.shape
    B = triton.cdiv(N, BLOCK_N)
    assert J < 2**15
    shapes = (J, N), (J,), (J, B + 1), (J + 1, B)
    rows, counts, bounds, starts = (torch.empty(shape, dtype=torch.int32, device=shares.device) for shape in shapes)
    tiles = torch.empty(B, J, dtype=torch.int16, device=shares.device)
    active, dense = (torch.empty(shape, dtype=torch.int8, device=shares.device) for shape in ((J, N), (J, B)))
    of_rows = (t.contiguous() for t in (threshold, targets, dtarget, dothers))
    with torch.cuda.device_of(shares):
        _row_lists_kernel[(J,)](
            rows, counts, bounds, active, dense, order, shares, *of_rows, shares.stride(0), N, first, least,
            TILE=TILE, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        if B > 0:
            _dense_tiles_kernel[(B,)](tiles, starts, dense, J, B, BLOCK_J=BLOCK_J)
        if found is not None:
            _count_cells_kernel[(1,)](
                found[0], counts, bounds, starts, J, B, float(found[1]), BLOCK_N=BLOCK_N, BLOCK=BLOCK_J
            )
    return Lists(rows, counts, bounds, order, active, tiles, starts, 0, BLOCK_N)


def skipped_mass(
    shares: Tensor,
    threshold: Tensor,
    targets: Tensor,
    dtarget: Tensor,
    dothers: Tensor,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return `factor * dothers[n] * shares[n, j]` of the cells that are not active and 0 of the others, `[N, J]`.

    The arguments are those of `row_lists`, for all tiles; the result has `dtype`, and rows that suit a matmul.
    """
    N, J = shares.shape
    kernel = _skipped_mass_kernel
    skipped = torch.empty(N, triton.cdiv(J, 64) * 64, dtype=dtype, device=shares.device)
    out = (
        torch.empty_like(skipped, dtype=dothers.dtype) if interpreted(kernel) else skipped
    )  # the interpreter truncates
    rows = (t.contiguous() for t in (threshold, targets, dtarget, dothers))
    strides = out.stride(0), shares.stride(0)
    with torch.cuda.device_of(shares):
        kernel[(N,)](out, shares, *rows, *strides, N, J, out.shape[1], factor, TILE=TILE, BLOCK_J=1024)
    return (skipped if out is skipped else skipped.copy_(out))[:, :J]


def cell_means(weight: Tensor) -> Tensor:
    """Return the mean of every TILE rows of `weight [V, D]`, `[J, D]` in its dtype; the last tile may be smaller."""
    V, D = weight.shape
    kernel = _cell_means_kernel
    means = torch.empty(triton.cdiv(V, TILE), D, dtype=weight.dtype, device=weight.device)
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = means.to(acc) if interpreted(kernel) else means
    with torch.cuda.device_of(weight):
        kernel[(triton.cdiv(V, TILE), triton.cdiv(D, BLOCK_D))](
            out, weight, *weight.stride(), V, D,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            TILE=TILE, BLOCK_V=min(TILE, BLOCK_V), BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return means if out is means else means.copy_(out)

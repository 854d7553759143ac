"""List the active rows of every vocabulary tile, the work of a sparse backward, without waiting for the host.

The vocabulary is cut into tiles of TILE columns. A cell is one row by one tile, and a sparse backward computes only the
active cells:

    active[n, j] = upstream[n] and (shares[n, j] > threshold[n] or the target of row n lies in tile j)

A row with the threshold -inf is *full*: all of its cells are active. The list of a tile begins with the full rows, and
all lists begin with the same ones; the other active rows follow. Both parts are in ascending order:

    rows[j, :counts[j]]       the rows active in tile j
    rows[j, :bounds[j, 0]]    the full rows
    bounds[j, b]              where in the list the other rows n >= b * BLOCK_N begin; bounds[j, B] = counts[j]

The kernels `sparse_dlogits`, `sparse_dhidden` and `sparse_dweight` gather the rows of a tile from its list and stop at
its count, which the host never reads. bounds cut a list into ranges of rows.

A program owns a tile and walks the rows in blocks, first for the full ones. The prefix sum of a block's mask, added to
the count so far, gives the place of each row in the list.

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
BLOCK_N = 256
BLOCK_V, BLOCK_D = 32, 256  # of `cell_means`


class Lists(NamedTuple):
    """The active rows of J tiles."""

    rows: Tensor  # [J, N] int32; only the first counts[j] entries of row j are initialised
    counts: Tensor  # [J] int32
    bounds: Tensor  # [J, B + 1] int32

    def of(self, first: int, last: int) -> "Lists":
        """Return the lists of the tiles [first, last)."""
        return Lists(*(t[first:last] for t in self))


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


@triton.jit(do_not_specialize=["N", "first"])  # they change from batch to batch: compile once for all
def _row_lists_kernel(
    rows_ptr,  # [J, N] int32, out
    counts_ptr,  # [J] int32, out
    bounds_ptr,  # [J, B + 1] int32, out
    shares_ptr,  # [N, J]
    threshold_ptr,  # [N] float32
    targets_ptr,  # [N] int64
    dtarget_ptr,  # [N]
    dothers_ptr,  # [N]
    stride_sn,
    N,
    first,  # tile of the vocabulary with which shares begin
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)  # int64, because offsets in rows and in shares may pass 2^31
    count = tl.zeros((), tl.int32)
    for n_start in range(0, N, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        threshold, upstream, _ = _load_rows(threshold_ptr, dtarget_ptr, dothers_ptr, offs_n, N)
        full = ((threshold == float("-inf")) & upstream).to(tl.int32)
        tl.store(rows_ptr + tile * N + count + tl.cumsum(full, axis=0) - full, offs_n, mask=full > 0)
        count += tl.sum(full, axis=0)
    bounds_ptrs = bounds_ptr + tile * (tl.cdiv(N, BLOCK_N) + 1)
    for n_start in range(0, N, BLOCK_N):
        tl.store(bounds_ptrs + n_start // BLOCK_N, count)
        offs_n = n_start + tl.arange(0, BLOCK_N)
        threshold, upstream, _ = _load_rows(threshold_ptr, dtarget_ptr, dothers_ptr, offs_n, N)
        shares = tl.load(shares_ptr + offs_n.to(tl.int64) * stride_sn + tile, mask=offs_n < N, other=0.0)
        targets = tl.load(targets_ptr + offs_n, mask=offs_n < N, other=-1)
        holds_target = (targets >= 0) & (targets // TILE == first + tile)
        active = (_is_above(shares, threshold) | holds_target) & upstream & (threshold != float("-inf"))
        active = active.to(tl.int32)
        tl.store(rows_ptr + tile * N + count + tl.cumsum(active, axis=0) - active, offs_n, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(bounds_ptrs + tl.cdiv(N, BLOCK_N), count)
    tl.store(counts_ptr + tile, count)


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
    shares: Tensor, threshold: Tensor, targets: Tensor, dtarget: Tensor, dothers: Tensor, first: int = 0
) -> Lists:
    """List the active rows of every tile.

    Args:
        shares: `[N, J]`, rows contiguous: of some neighbouring tiles.
        threshold: `[N]` float32.
        targets: `[N]` int64.
        dtarget: `[N]`, gradient of the target's logit.
        dothers: `[N]`, gradient of `others`. A row where both are 0 is in no list.
        first: tile of the vocabulary with which `shares` begins.
    """
    N, J = shares.shape
    shapes = (J, N), (J,), (J, triton.cdiv(N, BLOCK_N) + 1)
    lists = Lists(*(torch.empty(shape, dtype=torch.int32, device=shares.device) for shape in shapes))
    rows = (t.contiguous() for t in (threshold, targets, dtarget, dothers))
    with torch.cuda.device_of(shares):
        _row_lists_kernel[(J,)](*lists, shares, *rows, shares.stride(0), N, first, TILE=TILE, BLOCK_N=BLOCK_N)
    return lists


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

"""List the active rows of every vocabulary tile, the work of a sparse backward, without waiting for the host.

The vocabulary is cut into tiles of TILE columns. A cell is one row by one tile, and a sparse backward computes only the
active cells. Its kernels `sparse_dlogits`, `sparse_dhidden` and `sparse_dweight` gather the rows of a tile from its
list and stop at its count, which the host never reads:

    rows[j, :counts[j]] = the n with active[n, j], in ascending order

A program owns a tile and walks the rows in blocks. The prefix sum of a block's mask, added to the count so far, gives
the place of each active row in the list.

Shapes: N rows, J = ceil(V / TILE) tiles. The J lists of N int32 take 1 / 64 of the memory of 16-bit dlogits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # columns of a tile
BLOCK_N = 1024


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch: compile once for all
def _row_lists_kernel(
    rows_ptr,  # [J, N] int32, out
    counts_ptr,  # [J] int32, out
    active_ptr,  # [N, J] uint8, 0 or 1
    stride_an,
    stride_aj,
    N,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)  # int64, because offsets in rows and in the mask may pass 2^31
    count = tl.zeros((), tl.int32)
    for n_start in range(0, N, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        active_ptrs = active_ptr + tile * stride_aj + offs_n.to(tl.int64) * stride_an
        active = tl.load(active_ptrs, mask=offs_n < N, other=0).to(tl.int32)
        place = count + tl.cumsum(active, axis=0) - active
        tl.store(rows_ptr + tile * N + place, offs_n, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(counts_ptr + tile, count)


def row_lists(active: Tensor) -> tuple[Tensor, Tensor]:
    """List the active rows of every tile.

    Args:
        active: `[N, J]` bool, any strides.

    Returns:
        `rows [J, N]` int32, where only the first `counts[j]` entries of row j are initialised, and `counts [J]` int32.
    """
    N, J = active.shape
    rows = torch.empty((J, N), dtype=torch.int32, device=active.device)
    counts = torch.empty(J, dtype=torch.int32, device=active.device)
    with torch.cuda.device_of(active):
        _row_lists_kernel[(J,)](rows, counts, active.view(torch.uint8), *active.stride(), N, BLOCK_N=BLOCK_N)
    return rows, counts

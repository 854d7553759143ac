"""Choose the cells of a sparse backward: for every row, the largest threshold that skips no more mass than it may.

The rule and the names are those of `fastdpo.head.impl.sparsity`, whose `select` is the same in PyTorch. A program owns
a row. It keeps the row's J shares in registers, and finds the threshold by bisection:

    mass[n, j]   = shares[n, j] * |weight[n]|
    limit(k)     = cell * scale / sqrt(2)^k                                       k = 0 ... 31
    threshold[n] = limit(k) / |weight[n]|,   the smallest k with  sum of mass[n, j] <= limit(k)  at most  row * scale

scale is the root mean square of the finite weights other than 0. One program sums it in float64 before.

Shapes: N rows, J tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
STEPS = 5  # of the bisection: the last k is 2^STEPS - 1


@triton.jit(do_not_specialize=["N"])
def _mean_square_root_kernel(
    scale_ptr,  # [1] float32, out
    weight_ptr,  # [N]
    N,
    BLOCK: tl.constexpr,
):
    squares = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        weight = tl.abs(tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0)).to(tl.float32)
        weight = tl.where(weight < float("inf"), weight, 0.0).to(tl.float64)  # NaN is not below infinity
        squares += weight * weight
        count += (weight != 0).to(tl.int32)
    mean = tl.sum(squares, axis=0) / tl.maximum(tl.sum(count, axis=0), 1)
    tl.store(scale_ptr, tl.sqrt(mean).to(tl.float32))


@triton.jit
def _limit(cell, k):
    """Return cell / sqrt(2)^k; powers of two are exact on every device."""
    return cell * (tl.exp2(-(k // 2).to(tl.float32)) * tl.where(k % 2 == 1, 0.7071067811865476, 1.0))


@triton.jit
def _skipped(mass, limit):
    return tl.sum(tl.where(mass <= limit, mass, 0.0), axis=0)


@triton.jit(do_not_specialize=["N"])
def _select_cells_kernel(
    threshold_ptr,  # [N] float32, out, as the next two
    bound_ptr,
    active_ptr,
    shares_ptr,  # [N, J]
    weight_ptr,  # [N]
    scale_ptr,  # [1] float32
    stride_sn,
    J,
    row,
    cell,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # n * stride_sn may pass 2^31
    offs_j = tl.arange(0, BLOCK)
    mask = offs_j < J
    shares = tl.load(shares_ptr + n * stride_sn + offs_j, mask=mask, other=0.0).to(tl.float32)
    weight = tl.abs(tl.load(weight_ptr + n)).to(tl.float32)
    scale = tl.load(scale_ptr)
    row, cell = scale * row, scale * cell
    mass = shares * weight

    k = tl.full((), 2**STEPS - 1, tl.int32)  # the lowest threshold, which skips next to nothing
    for i in tl.static_range(STEPS):
        lower = k - 2 ** (STEPS - 1 - i)
        k = tl.where(_skipped(mass, _limit(cell, lower)) <= row, lower, k)
    limit = _limit(cell, k)
    threshold = tl.where(weight > 0, tl.div_rn(limit, tl.where(weight > 0, weight, 1.0)), float("inf"))
    active = tl.sum((mask & (shares > threshold)).to(tl.float32), axis=0) / J
    tl.store(threshold_ptr + n, threshold)
    tl.store(bound_ptr + n, _skipped(mass, limit))
    tl.store(active_ptr + n, active)


@triton.jit(do_not_specialize=["N"])
def _density_kernel(
    density_ptr,  # [1] float32, out
    active_ptr,  # [N]
    N,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        total += tl.load(active_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float64)
    tl.store(density_ptr, (tl.sum(total, axis=0) / N).to(tl.float32))


def select_cells(shares: Tensor, weight: Tensor, row: float, cell: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the cells to compute.

    Args:
        shares: `[N, J]`, rows contiguous.
        weight: `[N]`, float32 or float64.
        row: largest mass that a row skips, in units of the root mean square of `weight`.
        cell: largest mass of a skipped cell, in the same units.

    Returns:
        threshold, bound and active of `fastdpo.head.impl.sparsity.Selection`, `[N]` float32 each.
    """
    N, J = shares.shape
    weight = weight.contiguous()
    scale = torch.empty(1, dtype=torch.float32, device=shares.device)
    threshold, bound, active = (torch.empty(N, dtype=torch.float32, device=shares.device) for _ in range(3))
    block = max(triton.next_power_of_2(J), 16)
    with torch.cuda.device_of(shares):
        _mean_square_root_kernel[(1,)](scale, weight, N, BLOCK=BLOCK)
        _select_cells_kernel[(N,)](
            threshold, bound, active, shares, weight, scale, shares.stride(0), J, row, cell,
            STEPS=STEPS, BLOCK=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return threshold, bound, active


def mean_density(active: Tensor, density: Tensor) -> None:
    """Store the mean of `active [N]` in the first element of `density`, float32."""
    with torch.cuda.device_of(active):
        _density_kernel[(1,)](density, active, len(active), BLOCK=BLOCK)

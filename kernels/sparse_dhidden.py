"""Compute the gradient of the hidden states from the active cells of dlogits.

    dhidden[n, :] += sum over the active cells (n, j) of dlogits[n, tile j] @ weight[tile j, :]

A program owns a range of rows and BLOCK_D columns of dhidden, and no other program touches them, so there are no
atomics. It walks the tiles in order, and in each tile the part of the list (`row_lists`) that lies in its range,
BLOCK_N rows at a time: it gathers their cells, multiplies, and adds to their rows of dhidden. A row's sum is formed in
the order of the tiles, so it has the same bits in every run.

The rows within one list are distinct, but the next list repeats some of them. A barrier after every tile therefore
makes the sums that some threads of the program stored visible to the others, which load them again.

The ranges fill the chip where slices of D alone are too few programs. A list is in ascending order, so a binary search
finds the part of it that lies in a range; one PyTorch operation does this for all lists and ranges.

Shapes: N rows, D hidden size, V vocabulary, J = ceil(V / BLOCK_V) tiles, R ranges of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import (
    FALLBACK,
    SMALL,
    Config,
    Configs,
    default_config,
    interpreted,
    loads_vectors,
    processors,
)
from fastdpo.kernels.row_lists import TILE

PROGRAMS = 4  # per multiprocessor: while one program waits for its gathers, others work

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(64, TILE, 64, 4, 2),
    ((9, 0), 2): Config(64, TILE, 64, 4, 2),
    ((10, 0), 2): Config(64, TILE, 64, 4, 2),
}


def default_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    return (CONFIGS, FALLBACK) if vectors else ({}, SMALL | {4: Config(32, TILE, 16, 8, 2)})


@triton.jit(do_not_specialize=["N", "R"])  # they change from batch to batch; a V divisible by 16 is loaded in vectors
def _sparse_dhidden_kernel(
    dhidden_ptr,  # [N, D] ACC, in and out
    dlogits_ptr,  # [N, V]
    rows_ptr,  # [J, N] int32
    bounds_ptr,  # [J, R + 1] int32, the places in the lists where the ranges begin and end
    weight_ptr,  # [V, D]
    stride_on,
    stride_dn,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    R,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_r = tl.program_id(0) % R
    pid_d = tl.program_id(0) // R
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    for tile in range(0, tl.cdiv(V, BLOCK_V)):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        offs_v = offs_v.to(tl.int64)
        start = tl.load(bounds_ptr + tile * (R + 1) + pid_r)
        stop = tl.load(bounds_ptr + tile * (R + 1) + pid_r + 1)
        for i_start in range(start, stop, BLOCK_N):
            offs_i = i_start + tl.arange(0, BLOCK_N)
            mask_n = offs_i < stop
            # int64: N * tile, rows * stride_dn and rows * D may pass 2^31; v * stride_wv does at V=262144, D=8192
            offs_n = tl.load(rows_ptr + tl.full((), N, tl.int64) * tile + offs_i, mask=mask_n, other=0).to(tl.int64)
            dlogits_ptrs = dlogits_ptr + offs_n[:, None] * stride_dn + offs_v[None, :]
            weight_ptrs = weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :] * stride_wd
            dhidden_ptrs = dhidden_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
            mask = mask_n[:, None] & mask_d[None, :]
            dlogits = tl.load(dlogits_ptrs, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_d[None, :], other=0.0)
            dhidden = tl.load(dhidden_ptrs, mask=mask, other=0.0)
            if UPCAST:
                dlogits = dlogits.to(ACC)
                w = w.to(ACC)
            dhidden = tl.dot(dlogits, w, dhidden, input_precision="ieee", out_dtype=ACC)
            tl.store(dhidden_ptrs, dhidden, mask=mask)
        tl.debug_barrier()


def sparse_dhidden(
    dhidden: Tensor,
    dlogits: Tensor,
    rows: Tensor,
    counts: Tensor,
    weight: Tensor,
    config: Config | None = None,
    ranges: int | None = None,
) -> None:
    """Add to `dhidden` the gradient from the active cells of `dlogits`.

    Args:
        dhidden: `[N, D]` float32 (float64 for float64 inputs), in and out, rows contiguous.
        dlogits: `[N, V]`, the dtype of `weight`, rows contiguous. Only active cells are read.
        rows: `[J, N]` int32, as `row_lists` returned it.
        counts: `[J]` int32, as `row_lists` returned it.
        weight: `[V, D]`, any strides: a chunk of the head.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
        ranges: number of row ranges R; None chooses by shape and device.
    """
    (N, V), D = dlogits.shape, weight.shape[1]
    kernel = _sparse_dhidden_kernel
    vectors = all(map(loads_vectors, (dhidden, dlogits, weight)))
    config = config or default_config(dlogits, *default_configs(vectors))._replace(BLOCK_V=TILE)
    assert rows.shape == (triton.cdiv(V, config.BLOCK_V), N)
    slices = triton.cdiv(D, config.BLOCK_D)
    if ranges is None:
        programs = PROGRAMS * processors(dlogits)
        ranges = max(1, min(triton.cdiv(programs, slices), triton.cdiv(N, config.BLOCK_N)))
    places = torch.arange(N, dtype=torch.int32, device=rows.device)
    edges = torch.arange(ranges + 1, dtype=torch.int32, device=rows.device) * triton.cdiv(N, ranges)
    edges.clamp_(max=N)  # N marks entries past the end of a list
    lists = rows.where(places < counts.unsqueeze(1), N)
    bounds = torch.searchsorted(lists, edges.repeat(len(rows), 1), out_int32=True)
    with torch.cuda.device_of(dlogits):
        kernel[(ranges * slices,)](
            dhidden, dlogits, rows, bounds, weight, dhidden.stride(0), dlogits.stride(0), *weight.stride(),
            N, V, D, ranges, ACC=tl.float64 if dhidden.dtype == torch.float64 else tl.float32,
            UPCAST=interpreted(kernel), enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip

"""Compute the gradient of the hidden states from the active cells of dlogits.

    dhidden[n, :] += sum over the active cells (n, j) of dlogits[n, tile j, :] @ weight[tile j, :]

There are two kernels, one after the other. Both go by the lists of `row_lists`.

*Full rows*, all of whose cells are active, are the same in every list. A program owns BLOCK_N of them and BLOCK_D
columns of dhidden, sums over all columns of the vocabulary in registers, and adds to dhidden once. This is a plain
matmul with gathered rows.

*The other rows* differ from tile to tile. A program owns a range of rows and BLOCK_D columns of dhidden, and no other
program touches them, so there are no atomics. It walks the tiles in order, and in each tile the part of the list that
lies in its range, BLOCK_N rows at a time: it gathers their cells, multiplies, and adds to their rows of dhidden. A
row's sum is formed in the order of the tiles, so it has the same bits in every run.

The rows within one list are distinct, but the next list repeats some of them. A barrier after every tile with rows in
the range therefore makes the sums that some threads of the program stored visible to the others, which load them again.

An active cell of the second kernel reads and writes D float32 for 2 * TILE * D operations. That is an eighth of what a
multiprocessor computes in that time, which is why rows with many active cells are full. Ranges are as long as the chip
allows, because a program loads its slice of a tile of weight for the rows of its range alone: one program for each
place that registers and shared memory leave on the chip.

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
from fastdpo.kernels.row_lists import TILE, Lists

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(64, TILE, 64, 4, 1),
    ((9, 0), 2): Config(64, TILE, 64, 4, 1),
    ((10, 0), 2): Config(64, TILE, 64, 4, 1),
}
PROGRAMS = {(8, 0): 4, (9, 0): 4, (10, 0): 5}
"""Programs of these that registers and shared memory leave room for on a multiprocessor. tests/kernels/test_aot.py
compares the numbers with what was compiled."""
FULL_CONFIGS: Configs = {  # BLOCK_V: columns of the vocabulary in a step
    ((8, 0), 2): Config(128, 64, 128, 8, 3),
    ((9, 0), 2): Config(256, 32, 128, 8, 4),
    ((10, 0), 2): Config(128, 64, 128, 8, 3),
}
FULL_FALLBACK = {2: Config(128, 32, 128, 8, 3), 4: Config(64, 32, 64, 8, 3), 8: Config(32, 16, 32, 8, 2)}


def default_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    return (
        (CONFIGS, FALLBACK | {2: Config(64, TILE, 32, 4, 1)})
        if vectors
        else ({}, SMALL | {4: Config(32, TILE, 16, 8, 2)})
    )


def full_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose those of the kernel of full rows."""
    return (
        (FULL_CONFIGS, FULL_FALLBACK)
        if vectors
        else ({}, FULL_FALLBACK | {2: Config(64, 32, 32, 4, 3), 4: Config(32, 32, 32, 8, 2)})
    )


def programs_at_once(x: Tensor) -> int:
    """Return how many programs the device of `x` holds at once; of chips without an entry, two a multiprocessor."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    return PROGRAMS.get(capability, 2) * processors(x)


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch; a V divisible by 16 is loaded in vectors
def _sparse_dhidden_full_kernel(
    dhidden_ptr,  # [N, D] ACC, in and out
    dlogits_ptr,  # [N, V]
    rows_ptr,  # [J, N] int32, of which the first list is read
    bounds_ptr,  # [J, B + 1] int32, of which the first number is read
    weight_ptr,  # [V, D]
    stride_on,
    stride_dn,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slices = tl.cdiv(D, BLOCK_D)
    i_start = tl.program_id(0) // slices * BLOCK_N
    full = tl.load(bounds_ptr)
    if i_start >= full:
        return
    offs_i = i_start + tl.arange(0, BLOCK_N)
    mask_n = offs_i < full
    # int64: rows * stride_dn and rows * stride_on may pass 2^31; v * stride_wv does at V=262144, D=8192
    offs_n = tl.load(rows_ptr + offs_i, mask=mask_n, other=0).to(tl.int64)
    offs_d = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    dhidden_ptrs = dhidden_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    total = tl.load(dhidden_ptrs, mask=mask, other=0.0)  # at the end, it would take registers beside the sums
    for v_start in range(0, V, BLOCK_V):
        offs_v = v_start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        offs_v = offs_v.to(tl.int64)
        dlogits_ptrs = dlogits_ptr + offs_n[:, None] * stride_dn + offs_v[None, :]
        weight_ptrs = weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :] * stride_wd
        dlogits = tl.load(dlogits_ptrs, mask=mask_v[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_d[None, :], other=0.0)
        if UPCAST:
            dlogits = dlogits.to(ACC)
            w = w.to(ACC)
        total = tl.dot(dlogits, w, total, input_precision="ieee", out_dtype=ACC)
    tl.store(dhidden_ptr + offs_n[:, None] * stride_on + offs_d[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["N", "R", "B", "blocks"])
def _sparse_dhidden_kernel(
    dhidden_ptr,  # [N, D] ACC, in and out
    dlogits_ptr,  # [N, V]
    rows_ptr,  # [J, N] int32
    bounds_ptr,  # [J, B + 1] int32
    weight_ptr,  # [V, D]
    stride_on,
    stride_dn,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    R,
    B,
    blocks,  # of bounds in a range
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) % R * blocks
    last = tl.minimum(first + blocks, B)
    offs_d = tl.program_id(0) // R * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    for tile in range(0, tl.cdiv(V, BLOCK_V)):
        start = tl.load(bounds_ptr + tile * (B + 1) + first)
        stop = tl.load(bounds_ptr + tile * (B + 1) + last)
        if start < stop:
            offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            offs_v = offs_v.to(tl.int64)
            weight_ptrs = weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :] * stride_wd
            w = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_d[None, :], other=0.0)
            if UPCAST:
                w = w.to(ACC)
            for i_start in range(start, stop, BLOCK_N):
                offs_i = i_start + tl.arange(0, BLOCK_N)
                mask_n = offs_i < stop
                # int64: N * tile, rows * stride_dn and rows * D may pass 2^31; v * stride_wv does at V=262144, D=8192
                offs_n = tl.load(rows_ptr + tl.full((), N, tl.int64) * tile + offs_i, mask=mask_n, other=0).to(tl.int64)
                dlogits_ptrs = dlogits_ptr + offs_n[:, None] * stride_dn + offs_v[None, :]
                dhidden_ptrs = dhidden_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
                mask = mask_n[:, None] & mask_d[None, :]
                dlogits = tl.load(dlogits_ptrs, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
                dhidden = tl.load(dhidden_ptrs, mask=mask, other=0.0)
                if UPCAST:
                    dlogits = dlogits.to(ACC)
                dhidden = tl.dot(dlogits, w, dhidden, input_precision="ieee", out_dtype=ACC)
                tl.store(dhidden_ptrs, dhidden, mask=mask)
            tl.debug_barrier()


def sparse_dhidden(
    dhidden: Tensor,
    dlogits: Tensor,
    lists: Lists,
    weight: Tensor,
    config: Config | None = None,
    full_config: Config | None = None,
    ranges: int | None = None,
) -> None:
    """Add to `dhidden` the gradient from the active cells of `dlogits`.

    Args:
        dhidden: `[N, D]` float32 (float64 for float64 inputs), in and out, rows contiguous.
        dlogits: `[N, V]`, the dtype of `weight`, rows contiguous. Only active cells are read.
        lists: of the tiles of `dlogits`, as `row_lists` returned them.
        weight: `[V, D]`, any strides: a chunk of the head.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
        full_config: tile sizes for the full rows; None chooses by device and dtype.
        ranges: about how many ranges of rows R; None chooses by shape and device.
    """
    (N, V), D = dlogits.shape, weight.shape[1]
    kernel = _sparse_dhidden_kernel
    vectors = all(map(loads_vectors, (dhidden, dlogits, weight)))
    config = config or default_config(dlogits, *default_configs(vectors))._replace(BLOCK_V=TILE)
    full_config = full_config or default_config(dlogits, *full_configs(vectors and V % 16 == 0))
    rows, _, bounds = lists
    assert rows.shape == (triton.cdiv(V, config.BLOCK_V), N)
    B = bounds.shape[1] - 1
    slices = triton.cdiv(D, config.BLOCK_D)
    if ranges is None:
        ranges = max(1, programs_at_once(dlogits) // slices)
    blocks = max(1, triton.cdiv(B, ranges))
    ranges = max(1, triton.cdiv(B, blocks))
    options = {
        "ACC": tl.float64 if dhidden.dtype == torch.float64 else tl.float32,
        "UPCAST": interpreted(kernel),
        "enable_fp_fusion": True,
    }
    operands = (
        dhidden, dlogits, rows, bounds, weight, dhidden.stride(0), dlogits.stride(0), *weight.stride(), N, V, D,
    )  # fmt: skip
    with torch.cuda.device_of(dlogits):
        programs = triton.cdiv(N, full_config.BLOCK_N) * triton.cdiv(D, full_config.BLOCK_D)
        _sparse_dhidden_full_kernel[(programs,)](*operands, **options, **full_config._asdict())
        kernel[(ranges * slices,)](*operands, ranges, B, blocks, **options, **config._asdict())

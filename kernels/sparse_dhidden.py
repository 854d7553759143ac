"""Compute the gradient of the hidden states from the active cells of dlogits.

    dhidden[n, :] += sum over the active cells (n, j) of dlogits[n, tile j, :] @ weight[tile j, :]

There are two kernels, one after the other. Both go by `row_lists`.

*Dense blocks*: in some tiles many rows of a block are active. A program owns BLOCK_N rows of a block and BLOCK_D
columns of dhidden, sums over the block's dense tiles in registers, and adds to dhidden once. This is a plain matmul
with gathered rows and tiles, in which cells that are not active count as 0 and are not read. Rows come in the order of
their number of active cells, and tokens that are likely in many places are neighbours in most vocabularies, so the
dense blocks hold most of a model's active cells.

*The other cells* differ from tile to tile. A program owns a range of the order and BLOCK_D columns of dhidden, and no
other program touches them, so there are no atomics. It walks the tiles in order, and in each tile the part of the list
that lies in its range, BLOCK_N rows at a time: it gathers their cells, multiplies, and adds to their rows of dhidden. A
row's sum is formed in the order of the tiles, so it has the same bits in every run.

The rows within one list are distinct, but the next list repeats some of them. A barrier after every tile with rows in
the range therefore makes the sums that some threads of the program stored visible to the others, which load them again.

An active cell of the second kernel reads and writes D float32 for 2 * TILE * D operations. That is a sixth of what a
multiprocessor computes in that time. Ranges are long, because a program loads its slice of a tile of weight for the
rows of its range alone: PROGRAMS programs for each multiprocessor, fewer than it has room for.

Shapes: N rows, D hidden size, V vocabulary, J = ceil(V / TILE) tiles, B blocks, R ranges of rows.
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
PROGRAMS = 2
"""Programs for each multiprocessor: with more, they load weight more often; with fewer, they wait for memory."""
BLOCK_CONFIGS: Configs = {  # BLOCK_N divides that of `row_lists`; BLOCK_V: columns of the vocabulary in a step
    ((8, 0), 2): Config(128, 64, 128, 8, 3),
    ((9, 0), 2): Config(256, 32, 128, 8, 4),
    ((10, 0), 2): Config(128, 64, 128, 8, 3),
}
BLOCK_FALLBACK = {2: Config(128, 32, 128, 8, 3), 4: Config(64, 32, 64, 8, 3), 8: Config(32, 16, 32, 8, 2)}


def default_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    return (
        (CONFIGS, FALLBACK | {2: Config(64, TILE, 32, 4, 1)})
        if vectors
        else ({}, SMALL | {4: Config(32, TILE, 16, 8, 2)})
    )


def block_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose those of the kernel of dense blocks."""
    return (
        (BLOCK_CONFIGS, BLOCK_FALLBACK)
        if vectors
        else ({}, BLOCK_FALLBACK | {2: Config(64, 32, 32, 4, 3), 4: Config(32, 32, 32, 8, 2)})
    )


@triton.jit(do_not_specialize=["N", "J", "B", "first", "last"])  # a V divisible by 16 is loaded in vectors
def _sparse_dhidden_blocks_kernel(
    dhidden_ptr,  # [N, D] ACC, in and out
    dlogits_ptr,  # [N, V]
    order_ptr,  # [N] int32
    active_ptr,  # [J, N] int8
    tiles_ptr,  # [B, J] int16: as int32, the compiler keeps fewer copies in flight
    starts_ptr,  # [J + 1, B] int32
    weight_ptr,  # [V, D]
    stride_on,
    stride_dn,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    J,
    B,
    first,  # tile of the lists with which dlogits begins
    last,  # and the one after its end
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    LIST_BLOCK: tl.constexpr,  # places of a block; BLOCK_N divides it
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,  # a divisor of TILE
    BLOCK_D: tl.constexpr,
):
    slices = tl.cdiv(D, BLOCK_D)
    i_start = tl.program_id(0) // slices * BLOCK_N
    block = i_start // LIST_BLOCK
    start = tl.load(starts_ptr + first * B + block)
    stop = tl.load(starts_ptr + last * B + block)
    if start >= stop:
        return
    offs_i = i_start + tl.arange(0, BLOCK_N)
    mask_n = offs_i < N
    # int64: rows * stride_dn and rows * stride_on may pass 2^31; v * stride_wv does at V=262144, D=8192
    offs_n = tl.load(order_ptr + offs_i, mask=mask_n, other=0).to(tl.int64)
    offs_d = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    mask = mask_n[:, None] & mask_d[None, :]
    # at the end, they would take registers beside the sums
    total = tl.load(dhidden_ptr + offs_n[:, None] * stride_on + offs_d[None, :], mask=mask, other=0.0)
    STEPS: tl.constexpr = TILE // BLOCK_V
    tiles_ptr += block.to(tl.int64) * J
    for step in range(start * STEPS, stop * STEPS):
        tile = tl.load(tiles_ptr + step // STEPS).to(tl.int32)
        is_active = tl.load(active_ptr + tile.to(tl.int64) * N + offs_i, mask=mask_n, other=0) != 0
        offs_v = (tile - first) * TILE + step % STEPS * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        offs_v = offs_v.to(tl.int64)
        dlogits_ptrs = dlogits_ptr + offs_n[:, None] * stride_dn + offs_v[None, :]
        weight_ptrs = weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :] * stride_wd
        dlogits = tl.load(dlogits_ptrs, mask=is_active[:, None] & mask_v[None, :], other=0.0)
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
    block_config: Config | None = None,
    ranges: int | None = None,
) -> None:
    """Add to `dhidden` the gradient from the active cells of `dlogits`.

    Args:
        dhidden: `[N, D]` float32 (float64 for float64 inputs), in and out, rows contiguous.
        dlogits: `[N, V]`, the dtype of `weight`, rows contiguous. Only active cells are read.
        lists: of the tiles of `dlogits`, as `row_lists` returned them.
        weight: `[V, D]`, any strides: a chunk of the head.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
        block_config: tile sizes for dense blocks; None chooses by device and dtype.
        ranges: about how many ranges of rows R; None chooses by shape and device.
    """
    (N, V), D = dlogits.shape, weight.shape[1]
    kernel = _sparse_dhidden_kernel
    vectors = all(map(loads_vectors, (dhidden, dlogits, weight)))
    config = config or default_config(dlogits, *default_configs(vectors))._replace(BLOCK_V=TILE)
    block_config = block_config or default_config(dlogits, *block_configs(vectors and V % 16 == 0))
    block_config = block_config._replace(
        BLOCK_N=min(block_config.BLOCK_N, lists.block), BLOCK_V=min(block_config.BLOCK_V, config.BLOCK_V)
    )
    tiles, B = triton.cdiv(V, config.BLOCK_V), lists.starts.shape[1]
    assert lists.rows.shape == (tiles, N)
    assert lists.block % block_config.BLOCK_N == config.BLOCK_V % block_config.BLOCK_V == 0
    slices = triton.cdiv(D, config.BLOCK_D)
    if ranges is None:
        ranges = max(1, PROGRAMS * processors(dlogits) // slices)
    blocks = max(1, triton.cdiv(B, ranges))
    ranges = max(1, triton.cdiv(B, blocks))
    options = {
        "ACC": tl.float64 if dhidden.dtype == torch.float64 else tl.float32,
        "UPCAST": interpreted(kernel),
        "enable_fp_fusion": True,
    }
    strides = dhidden.stride(0), dlogits.stride(0), *weight.stride()
    with torch.cuda.device_of(dlogits):
        programs = triton.cdiv(N, block_config.BLOCK_N) * triton.cdiv(D, block_config.BLOCK_D)
        _sparse_dhidden_blocks_kernel[(programs,)](
            dhidden, dlogits, lists.order, lists.active, lists.tiles, lists.starts, weight, *strides, N, V, D,
            lists.active.shape[0], B, lists.first, lists.first + tiles,
            LIST_BLOCK=lists.block, TILE=config.BLOCK_V, **options, **block_config._asdict(),
        )  # fmt: skip
        kernel[(ranges * slices,)](
            dhidden, dlogits, lists.rows, lists.bounds, weight, *strides, N, V, D, ranges, B, blocks,
            **options, **config._asdict(),
        )  # fmt: skip

"""Compute the gradients of the weight and the bias from the active cells of dlogits.

    dweight[tile j, :] (+)= sum over the rows n active in tile j of dlogits[n, tile j]^T hidden[n, :]
    dbias[tile j]      (+)= sum over the rows n active in tile j of dlogits[n, tile j]

A program owns one tile and BLOCK_D columns of dweight. It walks the tile's list (`row_lists`), BLOCK_N rows at a time,
gathers their cells and hidden states, and adds their product to a sum in registers, which it stores once. So there are
no atomics, and every run gives the same bits. A tile with an empty list gets 0.

Shapes: N rows, D hidden size, V vocabulary, J = ceil(V / BLOCK_V) tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import FALLBACK, SMALL, Config, Configs, default_config, interpreted, loads_vectors
from fastdpo.kernels.row_lists import TILE

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(64, TILE, 128, 8, 3),
    ((9, 0), 2): Config(64, TILE, 128, 8, 3),
    ((10, 0), 2): Config(64, TILE, 128, 8, 3),
}


def default_configs(vectors: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    small_float32 = {4: Config(16, TILE, 32, 8, 3)}
    return (CONFIGS, FALLBACK | small_float32) if vectors else ({}, SMALL | small_float32)


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch; a V divisible by 16 is loaded in vectors
def _sparse_dweight_kernel(
    dweight_ptr,  # [V, D] ACC, out
    dbias_ptr,  # [V] ACC, out, or None
    dlogits_ptr,  # [N, V]
    rows_ptr,  # [J, N] int32
    counts_ptr,  # [J] int32
    hidden_ptr,  # [N, D]
    stride_ov,
    stride_dn,
    stride_hn,
    stride_hd,
    N,
    V,
    D,
    ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slices = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // slices  # the programs of a tile run side by side: its cells stay in L2
    pid_d = tl.program_id(0) % slices
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_v = offs_v < V
    mask_d = offs_d < D
    offs_v = offs_v.to(tl.int64)
    offs_d = offs_d.to(tl.int64)
    count = tl.load(counts_ptr + tile)

    dweight = tl.zeros((BLOCK_V, BLOCK_D), ACC)
    dbias = tl.zeros((BLOCK_V,), ACC)
    for i_start in range(0, count, BLOCK_N):
        offs_i = i_start + tl.arange(0, BLOCK_N)
        mask_n = offs_i < count
        # int64, because tile * N, rows * stride_dn and rows * stride_hn may pass 2^31
        offs_n = tl.load(rows_ptr + tile.to(tl.int64) * N + offs_i, mask=mask_n, other=0).to(tl.int64)
        dlogits_ptrs = dlogits_ptr + offs_n[None, :] * stride_dn + offs_v[:, None]
        hidden_ptrs = hidden_ptr + offs_n[:, None] * stride_hn + offs_d[None, :] * stride_hd
        dlogits = tl.load(dlogits_ptrs, mask=mask_n[None, :] & mask_v[:, None], other=0.0)
        h = tl.load(hidden_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        if UPCAST:
            dlogits = dlogits.to(ACC)
            h = h.to(ACC)
        dweight = tl.dot(dlogits, h, dweight, input_precision="ieee", out_dtype=ACC)
        if dbias_ptr is not None:
            dbias += tl.sum(dlogits.to(ACC), axis=1)

    dweight_ptrs = dweight_ptr + offs_v[:, None] * stride_ov + offs_d[None, :]
    mask = mask_v[:, None] & mask_d[None, :]
    if ACCUMULATE:
        dweight += tl.load(dweight_ptrs, mask=mask, other=0.0)
    tl.store(dweight_ptrs, dweight, mask=mask)
    if dbias_ptr is not None:  # noqa: SIM102  (this is decided when compiling, the next one when running)
        if pid_d == 0:
            if ACCUMULATE:
                dbias += tl.load(dbias_ptr + offs_v, mask=mask_v, other=0.0)
            tl.store(dbias_ptr + offs_v, dbias, mask=mask_v)


def sparse_dweight(
    dweight: Tensor,
    dlogits: Tensor,
    rows: Tensor,
    counts: Tensor,
    hidden: Tensor,
    accumulate: bool,
    config: Config | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Write the gradients from the active cells of `dlogits` to `dweight` and `dbias`, or add to what they hold.

    Args:
        dweight: `[V, D]` float32 (float64 for float64 inputs), out, rows contiguous.
        dlogits: `[N, V]`, the dtype of `hidden`, rows contiguous. Only active cells are read.
        rows: `[J, N]` int32, as `row_lists` returned it.
        counts: `[J]` int32, as `row_lists` returned it.
        hidden: `[N, D]`, any strides.
        accumulate: whether to add to what `dweight` and `dbias` hold.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
        dbias: `[V]`, out, the dtype of `dweight`, contiguous; None if not needed.
    """
    (N, V), D = dlogits.shape, hidden.shape[1]
    kernel = _sparse_dweight_kernel
    vectors = all(map(loads_vectors, (dweight, dlogits, hidden)))
    config = config or default_config(dlogits, *default_configs(vectors))._replace(BLOCK_V=TILE)
    tiles = triton.cdiv(V, config.BLOCK_V)
    assert rows.shape == (tiles, N)
    with torch.cuda.device_of(dlogits):
        kernel[(tiles * triton.cdiv(D, config.BLOCK_D),)](
            dweight, dbias, dlogits, rows, counts, hidden,
            dweight.stride(0), dlogits.stride(0), *hidden.stride(), N, V, D, ACCUMULATE=accumulate,
            ACC=tl.float64 if dweight.dtype == torch.float64 else tl.float32,
            UPCAST=interpreted(kernel), enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip

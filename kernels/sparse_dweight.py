"""Compute the gradients of the weight and the bias from the active cells of dlogits.

    dweight[tile j, :] = before[tile j, :] + sum over the rows n active in tile j of dlogits[n, tile j]^T hidden[n, :]
                         + spread[j, :] / columns of tile j
    dbias[tile j]      = the same with 1 in place of hidden[n, :]

before is the sum of earlier blocks of rows, and spread is what the skipped cells of tile j add to all of its columns
together; both are optional. Blocks of rows before the last one leave their sum in float32.

A program owns one tile and BLOCK_D columns of dweight. It walks the tile's list (`row_lists`), BLOCK_N rows at a time,
gathers their cells and hidden states, and adds their product to a sum in registers, which it stores once. So there are
no atomics, and every run gives the same bits. It loads the row numbers of a step while the step before computes.

Shapes: N rows, D hidden size, V vocabulary, J = ceil(V / BLOCK_V) tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import FALLBACK, SMALL, Config, Configs, default_config, interpreted, loads_vectors
from fastdpo.kernels.row_lists import TILE

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(64, TILE, 256, 8, 3),
    ((9, 0), 2): Config(64, TILE, 256, 8, 3),
    ((10, 0), 2): Config(64, TILE, 256, 8, 3),
}
# A sum of earlier rows, a bias and a V that is loaded one by one take registers
NARROW_CONFIGS: Configs = {capability: Config(64, TILE, 128, 8, 3) for capability in CONFIGS}


def default_configs(vectors: bool, narrow: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    small_float32 = {4: Config(16, TILE, 32, 8, 3)}
    if not vectors:
        return {}, SMALL | small_float32 | {2: Config(32, TILE, 32, 8, 3)}
    return NARROW_CONFIGS if narrow else CONFIGS, FALLBACK | small_float32 | {2: Config(64, TILE, 64, 8, 2)}


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch; a V divisible by 16 is loaded in vectors
def _sparse_dweight_kernel(
    dweight_ptr,  # [V, D], out
    before_ptr,  # [V, D] ACC, or None; may be dweight
    spread_ptr,  # [J, D] ACC, or None
    dbias_ptr,  # [V], out, or None
    bias_before_ptr,  # [V] ACC, or None
    bias_spread_ptr,  # [J] ACC, or None
    boost_ptr,  # [] ACC, or None: the result is divided by it
    dlogits_ptr,  # [N, V]
    rows_ptr,  # [J, N] int32
    counts_ptr,  # [J] int32
    hidden_ptr,  # [N, D]
    stride_ov,
    stride_bv,
    stride_sj,
    stride_dn,
    stride_hn,
    stride_hd,
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
    tile = tl.program_id(0) // slices  # the programs of a tile run side by side: its cells stay in L2
    pid_d = tl.program_id(0) % slices
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_v = offs_v < V
    mask_d = offs_d < D
    offs_v = offs_v.to(tl.int64)
    offs_d = offs_d.to(tl.int64)
    count = tl.load(counts_ptr + tile)

    # What is added is where the sums begin: at the end it would take registers beside them
    size = tl.minimum(V - tile * BLOCK_V, BLOCK_V).to(ACC)
    mask = mask_v[:, None] & mask_d[None, :]
    dweight = tl.zeros((BLOCK_V, BLOCK_D), ACC)
    if before_ptr is not None:
        dweight = tl.load(before_ptr + offs_v[:, None] * stride_bv + offs_d[None, :], mask=mask, other=0.0)
    if spread_ptr is not None:
        spread = tl.load(spread_ptr + tile.to(tl.int64) * stride_sj + offs_d, mask=mask_d, other=0.0)
        dweight += (spread / size)[None, :]
    dbias = tl.zeros((BLOCK_V,), ACC)
    if bias_before_ptr is not None:
        dbias = tl.load(bias_before_ptr + offs_v, mask=mask_v, other=0.0)
    if bias_spread_ptr is not None:
        dbias += tl.load(bias_spread_ptr + tile) / size
    # int64, because tile * N, rows * stride_dn and rows * stride_hn may pass 2^31
    rows_ptrs = rows_ptr + tile.to(tl.int64) * N + tl.arange(0, BLOCK_N)
    next_n = tl.load(rows_ptrs, mask=tl.arange(0, BLOCK_N) < count, other=0)
    for i_start in range(0, count, BLOCK_N):
        offs_i = i_start + tl.arange(0, BLOCK_N)
        mask_n = offs_i < count
        offs_n = next_n.to(tl.int64)
        next_n = tl.load(rows_ptrs + i_start + BLOCK_N, mask=offs_i + BLOCK_N < count, other=0)
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

    boost = tl.full((), 1.0, ACC)
    if boost_ptr is not None:
        boost = tl.load(boost_ptr)
    dweight_ptrs = dweight_ptr + offs_v[:, None] * stride_ov + offs_d[None, :]
    tl.store(dweight_ptrs, (dweight / boost).to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:  # noqa: SIM102  (this is decided when compiling, the next one when running)
        if pid_d == 0:
            tl.store(dbias_ptr + offs_v, (dbias / boost).to(dbias_ptr.dtype.element_ty), mask=mask_v)


class Sum(NamedTuple):
    """A gradient that `sparse_dweight` computes, with what it adds."""

    out: Tensor
    """`[V, D]` or, of the bias, `[V]`: overwritten; rows contiguous, any dtype."""
    before: Tensor | None = None
    """The sum of earlier blocks of rows, float32 (float64 for float64 inputs), rows contiguous; may be `out`."""
    spread: Tensor | None = None
    """`[J, D]` or `[J]`, in that dtype, rows contiguous: what the skipped cells add to a tile."""


def sparse_dweight(
    dweight: Sum,
    dlogits: Tensor,
    rows: Tensor,
    counts: Tensor,
    hidden: Tensor,
    config: Config | None = None,
    *,
    dbias: Sum | None = None,
    boost: Tensor | None = None,
) -> None:
    """Write the gradients of the weight and the bias from the active cells of `dlogits`.

    Args:
        dweight: where the gradient of the weight goes, and what is added.
        dlogits: `[N, V]`, the dtype of `hidden`, rows contiguous. Only active cells are read.
        rows: `[J, N]` int32, as `row_lists` returned it.
        counts: `[J]` int32, as `row_lists` returned it.
        hidden: `[N, D]`, any strides.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
        dbias: the same for the gradient of the bias; None if not needed.
        boost: a 0-dim float32 tensor by which both are divided; None for 1.
    """
    (N, V), D = dlogits.shape, hidden.shape[1]
    kernel = _sparse_dweight_kernel
    vectors = all(map(loads_vectors, (dweight.out, dlogits, hidden)))
    narrow = dweight.before is not None or dbias is not None or boost is not None or V % 16 > 0
    config = config or default_config(dlogits, *default_configs(vectors, narrow))._replace(BLOCK_V=TILE)
    tiles = triton.cdiv(V, config.BLOCK_V)
    assert rows.shape == (tiles, N)
    bias = dbias or Sum(*(None,) * 3)  # type: ignore[arg-type]
    acc = torch.float64 if dlogits.dtype == torch.float64 else torch.float32
    # The interpreter truncates where it should round to bfloat16, so PyTorch does the rounding
    outs = [x if x is None or not interpreted(kernel) else x.to(acc) for x in (dweight.out, bias.out)]
    assert outs[0] is not None
    with torch.cuda.device_of(dlogits):
        kernel[(tiles * triton.cdiv(D, config.BLOCK_D),)](
            outs[0], dweight.before, dweight.spread, outs[1], bias.before, bias.spread, boost,
            dlogits, rows, counts, hidden,
            outs[0].stride(0), 0 if dweight.before is None else dweight.before.stride(0),
            0 if dweight.spread is None else dweight.spread.stride(0), dlogits.stride(0), *hidden.stride(), N, V, D,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            UPCAST=interpreted(kernel), enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    for x, out in zip((dweight.out, bias.out), outs, strict=True):
        if x is not None and out is not None and out is not x:
            x.copy_(out)

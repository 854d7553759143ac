"""Compute the gradient of the raw logits in the active cells of a block of rows and a chunk of the vocabulary.

The maths and the bits of the results are those of `linear_logprobs_backward` without the entropy. Cells that are not
active stay untouched. A program owns BLOCK_N rows of one tile's list (`row_lists`): it gathers their hidden states,
recomputes their logits in that tile, and scatters the gradient to its place in the dense layout. A list may be as long
as N, so the grid is that of the dense kernel, but a program past the end of its list returns at once: an inactive cell
costs neither arithmetic nor memory traffic.

Shapes: N rows, D hidden size, V vocabulary, where N and V count those of the block, J = ceil(V / BLOCK_V) tiles.
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
    add_low_rank,
    default_config,
    interpreted,
    loads_vectors,
    low_rank_operands,
    raw_logits_tile,
    store_dlogits_tile,
)
from fastdpo.kernels.row_lists import TILE

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(128, TILE, 64, 8, 3),
    ((9, 0), 2): Config(256, TILE, 64, 8, 4),
    ((10, 0), 2): Config(128, TILE, 64, 8, 3),
}
# A soft-cap keeps a second tile in registers, the slopes
SOFTCAP_CONFIGS: Configs = {capability: Config(64, TILE, 64, 8, 3) for capability in CONFIGS}


def default_configs(vectors: bool, has_softcap: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    if has_softcap:
        return SOFTCAP_CONFIGS if vectors else {}, SMALL
    return (CONFIGS, FALLBACK | {4: SMALL[4]}) if vectors else ({}, SMALL)


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch; a V divisible by 16 is loaded in vectors
def _sparse_dlogits_kernel(
    dlogits_ptr,  # [N, V], out
    rows_ptr,  # [J, N] int32
    counts_ptr,  # [J] int32
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    hidden2_ptr,  # [N, R], or None
    weight2_ptr,  # [V, R]
    targets_ptr,  # [N] int64, counted from the first column of the block
    others_ptr,  # [N] ACC
    dtarget_ptr,  # [N] ACC
    dothers_ptr,  # [N] ACC
    stride_dn,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    R,
    scale: tl.float64,  # without the annotation, a Python float is rounded to float32
    cap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // row_blocks  # the programs of a tile run side by side: its weight stays in L2
    i_start = tl.program_id(0) % row_blocks * BLOCK_N
    count = tl.load(counts_ptr + tile)
    if i_start >= count:
        return

    offs_i = i_start + tl.arange(0, BLOCK_N)
    mask_n = offs_i < count
    offs_n = tl.load(rows_ptr + tile.to(tl.int64) * N + offs_i, mask=mask_n, other=0)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    scale = tl.full((), scale, ACC)
    cap = tl.full((), cap, ACC)

    z = raw_logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
        ACC, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    z = add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)
    store_dlogits_tile(
        dlogits_ptr, z, targets_ptr, others_ptr, dtarget_ptr, dothers_ptr, None, None,
        offs_n, mask_n, tile * BLOCK_V, stride_dn, V, scale, cap, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def sparse_dlogits(
    dlogits: Tensor,
    rows: Tensor,
    counts: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    others: Tensor,
    dtarget: Tensor,
    dothers: Tensor,
    scale: float,
    cap: float | None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> None:
    """Fill the active cells of `dlogits` with the gradient of the raw logits; the others stay as they are.

    Args:
        dlogits: `[N, V]`, out, the dtype of `hidden`, rows contiguous.
        rows: `[J, N]` int32, as `row_lists` returned it.
        counts: `[J]` int32, as `row_lists` returned it.
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides: a chunk of the head.
        targets: `[N]` int64, counted from the first row of `weight`; outside [0, V) for a target in another chunk.
        bias: `[V]`, or None.
        others: `[N]` float32 (float64 for float64 inputs): log-sum-exp of the vocabulary without the target.
        dtarget: `[N]`, gradient of the target's transformed logit, the dtype of `others`.
        dothers: `[N]`, gradient of `others`; NaN in it fills the row's active cells.
        scale: factor of the raw logits.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
        low_rank: `(hidden2 [N, R], weight2 [V, R])` of the forward, in the dtype of `hidden`, or None.
        config: tile sizes, where BLOCK_V is the width of a cell. None chooses by device and dtype, with BLOCK_V = TILE.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    kernel = _sparse_dlogits_kernel
    vectors = loads_vectors(hidden) and loads_vectors(weight)
    configs = default_configs(vectors, cap is not None)
    config = config or default_config(hidden, *configs)._replace(BLOCK_V=TILE)
    tiles = triton.cdiv(V, config.BLOCK_V)
    assert rows.shape == (tiles, N)
    hidden2, weight2, R = low_rank_operands(low_rank)
    # The interpreter truncates where it should round to bfloat16, so PyTorch does the rounding
    out = dlogits.float() if interpreted(kernel) and dlogits.dtype == torch.bfloat16 else dlogits
    with torch.cuda.device_of(hidden):
        kernel[(tiles * triton.cdiv(N, config.BLOCK_N),)](
            out, rows, counts, hidden, weight, None if bias is None else bias.contiguous(), hidden2, weight2,
            targets.contiguous(), others.contiguous(), dtarget.contiguous(), dothers.contiguous(),
            out.stride(0), *hidden.stride(), *weight.stride(), N, V, D, R,
            scale, cap or 0.0,
            HAS_SOFTCAP=cap is not None, UPCAST=interpreted(kernel),
            ACC=tl.float64 if others.dtype == torch.float64 else tl.float32,
            enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

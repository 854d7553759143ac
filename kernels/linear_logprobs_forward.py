"""Compute the two parts of every target's log-probability from hidden states: matmul and log-sum-exp in one kernel.

    target_logits[n] = x[n, targets[n]]
    others[n]        = log sum_{v != targets[n]} exp(x[n, v])

with the x of `logits_tile`. The caller computes logps = logsigmoid(target_logits - others), and may first merge these
two over several shards of the vocabulary (a sum and a log-sum-exp).

A program owns BLOCK_N rows and one of S shares of the vocabulary, which it walks in tiles of BLOCK_V columns. A tile of
logits lives in registers, in ACC (float32; float64 for float64 inputs), and is folded into the state of
`online_logsumexp`. Several programs share the vocabulary so that a small N fills the chip too.

Where the chip and the inputs allow it, `linear_logprobs_forward_tma` runs instead; both are exact.

Shapes: N rows, D hidden size, V vocabulary, R rank of the low-rank addition, S shares, J tiles of TILE tokens. The
kernel stores 3 numbers per row and share, 7 with statistics.
"""

from functools import cache
from math import log
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.kernels.kept_probs import WHOLE
from fastdpo.kernels.linear_logprobs_forward_tma import (
    IS_OLD,
    TMA_CONFIGS,
    TMA_KEEPING_CONFIGS,
    TMA_TWO_TILE_CONFIGS,
    descriptors,
    fits_tma,
    linear_logprobs_forward_tma_kernel,
)
from fastdpo.kernels.logits_tile import (
    FALLBACK,
    GROUP_N,
    SMALL,
    Config,
    Configs,
    add_low_rank,
    default_config,
    grouped_program_ids,
    interpreted,
    loads_vectors,
    low_rank_operands,
    processors,
    raw_logits_tile,
)
from fastdpo.kernels.online_logsumexp import empty_state, exponent, fold_tile, load_targets, merge, store_state
from fastdpo.kernels.row_lists import TILE

MAX_SPLITS = 256  # shares of the vocabulary; enough to fill any chip with a single row block

# tests/kernels/test_aot.py checks that these spill no register. (9, 0) serves inputs that TMA does not fit
CONFIGS: Configs = {capability: Config(128, 128, 64, 8, 3) for capability in (((8, 0), 2), ((9, 0), 2), ((10, 0), 2))}
# Statistics keep a second tile in registers, e beside x; tile masses with a soft-cap too, the slopes
TWO_TILE_CONFIGS: Configs = {capability: Config(64, 128, 64, 8, 3) for capability in CONFIGS}


def default_configs(
    use_tma: bool, vectors: bool, stats: bool, softcapped_masses: bool, low_rank: bool, keeps: bool
) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    if stats + softcapped_masses + low_rank > 1 or not (use_tma or vectors):
        return {}, SMALL | {2: SMALL[4]} if keeps else SMALL
    if stats or softcapped_masses:
        return TMA_TWO_TILE_CONFIGS if use_tma else TWO_TILE_CONFIGS, SMALL
    if use_tma and not low_rank:
        return TMA_KEEPING_CONFIGS if keeps else TMA_CONFIGS, FALLBACK
    if keeps:  # Triton 3.6 spills registers at 128 rows
        return TWO_TILE_CONFIGS if IS_OLD else CONFIGS, SMALL
    return CONFIGS, FALLBACK


@cache
def default_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """Choose the number of vocabulary shares: the one whose busiest processor ends first.

    The smallest candidate fills the chip with at most GROUP_N row blocks at a time, the largest is eight times as many.
    """
    fewest = min(triton.cdiv(processors, max(1, min(row_blocks, GROUP_N))), tiles, MAX_SPLITS)
    most = min(8 * fewest, tiles, MAX_SPLITS)
    return min(range(fewest, most + 1), key=lambda splits: busiest(row_blocks, tiles, processors, splits))


def busiest(row_blocks: int, tiles: int, processors: int, splits: int) -> int:
    """Return the tiles of the busiest of the processors, when they take pairs in turn as the TMA kernel does."""
    pairs = torch.arange(row_blocks * splits)
    first = pairs // (GROUP_N * splits) * GROUP_N
    share = (pairs - first * splits) // (row_blocks - first).clamp(max=GROUP_N)
    of_pair = (share + 1) * tiles // splits - share * tiles // splits
    return int(torch.zeros(processors, dtype=torch.int64).index_add_(0, pairs % processors, of_pair).max())


@triton.jit(do_not_specialize=["N", "V", "S", "stride_fj"])  # they change from batch to batch: compile once for all
def _linear_logprobs_forward_kernel(
    partials_ptr,  # [S, 3 or 7, N] ACC, out
    masses_ptr,  # [J, N] float32, out, or None
    probs_ptr,  # [N, C], out, or None; see `kept_probs.store_probs`
    factors_ptr,
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    hidden2_ptr,  # [N, R], or None
    weight2_ptr,  # [V, R]
    targets_ptr,  # [N] int64
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    R,
    S,
    first,
    C,
    stride_fj,
    scale: tl.float64,  # without the annotation, a Python float is rounded to float32
    c: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n, pid_s = grouped_program_ids(tl.program_id(0), tl.cdiv(N, BLOCK_N), S, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    targets = load_targets(targets_ptr, offs_n, N, V)
    scale = tl.full((), scale, ACC)
    c = tl.full((), c, ACC)

    state = empty_state(HAS_STATS, ACC, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(pid_s * tiles // S, (pid_s + 1) * tiles // S):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = raw_logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
            ACC, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        z = add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)
        state = fold_tile(
            state, z, masses_ptr, probs_ptr, factors_ptr, pid_n * BLOCK_N, first, C, stride_fj, targets, offs_n,
            tile * BLOCK_V, N, V, scale, c, HAS_SOFTCAP, IS_NEGATIVE, False, HAS_STATS, TILE, BLOCK_N, BLOCK_V,
        )  # fmt: skip
    store_state(partials_ptr, state, offs_n, pid_s, N, HAS_STATS)


class ForwardOutput(NamedTuple):
    """Results of the forward for each row, in float32, or float64 for float64 inputs."""

    target_logits: Tensor
    """`[N]`, transformed; -inf if the target is outside [0, V), where another shard may have it."""
    others: Tensor
    """`[N]`, log-sum-exp of all tokens but the target."""
    stats: tuple[Tensor, ...] | None
    """Statistics of the other tokens that `online_logsumexp.merge` returns; None if not asked for."""
    tile_masses: Tensor | None
    """`[N, J]` float32, columns contiguous, as `online_logsumexp` defines them; None if not asked for."""


def linear_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float | None,
    stats: bool,
    *,
    tile_masses: bool = False,
    keep: tuple[Tensor, Tensor] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> ForwardOutput:
    """Launch the kernel that suits the chip and the inputs, and merge the results of the shares.

    Args:
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides, the dtype and device of `hidden`.
        targets: `[N]` int64; outside [0, V) for a target in another shard.
        bias: `[V]`, or None.
        scale: factor of the raw logits.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
        stats: whether to compute the statistics too.
        tile_masses: whether to store the tile masses too.
        keep: `(probs [N, C], factors [N, C / TILE])` of `kept_probs`, out, for the last C columns of a vocabulary that
            is filled up to a multiple of WHOLE, as C is one; the columns of factors are contiguous. None keeps
            nothing. Not with a soft-cap.
        low_rank: `(hidden2 [N, R], weight2 [V, R])`, whose product is added to the raw logits, in the dtype of
            `hidden`, or None.
        config: tile sizes; chosen by device and dtype if None.
        splits: number of vocabulary shares S; chosen by shape and device if None.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    use_tma = fits_tma(hidden, weight)
    vectors = loads_vectors(hidden) and loads_vectors(weight)
    epilogue = stats, tile_masses and cap is not None, low_rank is not None, keep is not None
    configs = default_configs(use_tma, vectors, *epilogue)
    config = config or default_config(hidden, *configs)
    row_blocks, tiles = triton.cdiv(N, config.BLOCK_N), triton.cdiv(V, config.BLOCK_V)
    splits = splits or default_splits(row_blocks, tiles, processors(hidden))
    hidden2, weight2, R = low_rank_operands(low_rank)

    kernel = linear_logprobs_forward_tma_kernel if use_tma else _linear_logprobs_forward_kernel
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    partials = hidden.new_empty((splits, 7 if stats else 3, N), dtype=acc)
    masses = hidden.new_empty((triton.cdiv(V, TILE), N), dtype=torch.float32) if tile_masses else None
    kept: tuple[Any, Tensor | None] = None, None
    first, columns, stride_fj = 0, 0, 0
    if keep is not None:
        assert cap is None
        columns = keep[0].shape[1]
        first = triton.cdiv(V, WHOLE) * WHOLE - columns
        block = [config.BLOCK_N, config.BLOCK_V]
        kept = TensorDescriptor.from_tensor(keep[0], block) if use_tma else keep[0], keep[1]
        stride_fj = keep[1].stride(1)
    operands = descriptors(hidden, weight, config) if use_tma else (hidden, weight)
    with torch.cuda.device_of(hidden):
        kernel[(min(row_blocks * splits, processors(hidden)) if use_tma else row_blocks * splits,)](
            partials, masses, *kept, *operands, None if bias is None else bias.contiguous(), hidden2, weight2,
            targets.contiguous(), *(() if use_tma else (*hidden.stride(), *weight.stride())),
            N, V, D, R, splits, first, columns, stride_fj, scale, exponent(scale, cap)[1],
            HAS_SOFTCAP=cap is not None, IS_NEGATIVE=cap is None and scale < 0, HAS_STATS=stats,
            UPCAST=interpreted(kernel), ACC=tl.float64 if acc == torch.float64 else tl.float32, TILE=TILE,
            GROUP_N=GROUP_N, enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    merged = merge(partials, (targets >= 0) & (targets < V), scale, cap)
    if keep is not None:
        others = merged[1].masked_fill(merged[1] == -torch.inf, torch.inf)  # no other token: then e is 0
        keep[1].sub_(others[:, None], alpha=1 / log(2)).exp2_()
    return ForwardOutput(*merged, None if masses is None else masses.T)

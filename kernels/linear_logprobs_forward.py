"""Log-probabilities of the targets straight from the hidden states: matmul, log-sum-exp and gather in one kernel.

    z[n, v]  = sum_d hidden[n, d] * weight[v, d] + bias[v]
    x[n, v]  = scale * z[n, v]          or, with a soft-cap,          cap * tanh(scale * z[n, v])
    lse[n]   = log sum_v exp(x[n, v])
    logps[n] = x[n, targets[n]] - lse[n]

A program owns BLOCK_N rows and one of S shares of the vocabulary, which it walks in tiles of BLOCK_V columns. A tile of
logits lives in registers, in ACC (float32; float64 for float64 inputs), and is folded into a running maximum m and
sum s (online softmax, Milakov & Gimelshein, https://arxiv.org/abs/1805.02867, Algorithm 3). Two choices of ours:

* m and s run over the *other* tokens, v != targets[n]; the target's logit t is kept apart. With d = t - (m + log s),
  logps = -log(1 + exp(-d)): at most 0 by construction, and exact to 1e-6 of itself where p -> 1 and t - lse, the
  difference of two large numbers, has no digit left.
* The vocabulary is split between programs, so that a small N fills the chip too. The S partial results of a row are
  merged by a few PyTorch operations on [S, N]: no atomics, no locks, the same bits in every run.

Per row and share the kernel stores m, s, t (0 where the target is elsewhere) and, for the statistics,
sum e * (x - m), sum e^2 with e = exp(x - m), sum x (of all tokens), and the maximum of x before the target: the target
is the first maximum, as argmax has it, if t >= m and t > that.

Shapes: N rows, D hidden size, V vocabulary, S shares. Memory: 3 numbers per row and share, 7 with statistics.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

GROUP_N = 16  # row blocks that walk the vocabulary side by side: 2048 rows of hidden, 16 MiB at D=4096, stay in L2
MAX_SPLITS = 256  # shares of the vocabulary: fills any chip with a single row block


class Config(NamedTuple):
    """Launch parameters of a kernel: the tile of one program, and how it is computed."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


Configs = dict[tuple[tuple[int, int], int], Config]  # by compute capability and bytes per element

# tests/test_aot.py compiles these: no spilled register, with and without bias and soft-cap
CONFIGS: Configs = {
    ((8, 0), 2): Config(128, 128, 64, 8, 3),
    ((9, 0), 2): Config(128, 256, 64, 8, 3),
    ((10, 0), 2): Config(128, 128, 64, 8, 3),
}
# The statistics need registers: smaller tiles
STATS_CONFIGS: Configs = {
    ((8, 0), 2): Config(128, 128, 64, 8, 3),
    ((9, 0), 2): Config(128, 128, 64, 8, 3),
    ((10, 0), 2): Config(64, 128, 64, 8, 3),
}
# By bytes per element, for every other chip: at most 64 KiB of shared memory
FALLBACK = {2: Config(128, 128, 32, 8, 3), 4: Config(64, 128, 32, 8, 3), 8: Config(32, 32, 32, 4, 3)}


def default_config(x: Tensor, configs: Configs) -> Config:
    """Pick the Config for the device and the dtype of `x`, or one that fits any chip."""
    if x.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        return configs.get((capability, x.element_size()), FALLBACK[x.element_size()])
    return FALLBACK[x.element_size()]


@cache
def default_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """Choose the number of vocabulary shares.

    Enough of them to fill the chip with at most GROUP_N row blocks at a time; from there to four times as many, the one
    whose last wave of programs ends first.
    """
    fewest = min(triton.cdiv(processors, max(1, min(row_blocks, GROUP_N))), tiles, MAX_SPLITS)
    most = min(4 * fewest, tiles, MAX_SPLITS)
    return min(
        range(fewest, most + 1),
        key=lambda splits: triton.cdiv(row_blocks * splits, processors) * triton.cdiv(tiles, splits),
    )


def interpreted(kernel: object) -> bool:
    """Whether `kernel` runs in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return not isinstance(kernel, triton.JITFunction)


def fold_transform(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """Return `scale` and `cap` of the module's docstring; `cap` means nothing without a soft-cap."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature


@triton.jit
def grouped_program_ids(row_blocks, columns, GROUP_N: tl.constexpr):
    """Row block and column of this program: GROUP_N row blocks x all columns, then the next group.

    The hidden states of a group and the weight tiles it is at fit L2 together.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP_N * columns)
    group_size = tl.minimum(row_blocks - group * GROUP_N, GROUP_N)
    pid = pid % (GROUP_N * columns)
    return group * GROUP_N + pid % group_size, pid // group_size


@triton.jit
def raw_logits_tile(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    offs_n,  # [BLOCK_N]
    offs_v,  # [BLOCK_V]
    stride_hn,
    stride_hd,
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
    """z[offs_n, offs_v] in ACC. Past the edges: the last row, the last column."""
    # Clamped, not masked: fewer registers. int64: n * stride_hn passes 2^31 in a slice of a long batch, and
    # v * stride_wv (or d * stride_wd of a transposed weight) at V=262144, D=8192
    offs_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_v = tl.minimum(offs_v, V - 1).to(tl.int64)
    z = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    for d_start in range(0, D, BLOCK_D):
        offs_d = d_start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        offs_d = offs_d.to(tl.int64)
        hidden_ptrs = hidden_ptr + offs_n[:, None] * stride_hn + offs_d[None, :] * stride_hd
        weight_ptrs = weight_ptr + offs_v[None, :] * stride_wv + offs_d[:, None] * stride_wd
        h = tl.load(hidden_ptrs, mask=mask_d[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0)
        if UPCAST:
            h = h.to(ACC)
            w = w.to(ACC)
        z = tl.dot(h, w, z, input_precision="ieee", out_dtype=ACC)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v).to(ACC)[None, :]
    return z


@triton.jit
def tanh_and_slope(y):
    """tanh(y) and 1 - tanh(y)^2, neither by cancellation."""
    e = tl.exp(-2 * tl.abs(y))
    t = (1 - e) / (1 + e)
    t = tl.where(y < 0, -t, t)
    if y.dtype == tl.float32:
        # The 1 - e of a small y is all rounding error; there, the Taylor series to y^9 is exact to 1e-8
        y2 = y * y
        series = y * (1 + y2 * (-1 / 3 + y2 * (2 / 15 + y2 * (-17 / 315 + y2 * (62 / 2835)))))
        t = tl.where(y2 < 0.0625, series, t)
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit(do_not_specialize=["N", "V", "S"])  # they change from batch to batch: one compilation
def _linear_logprobs_forward_kernel(
    partials_ptr,  # [S, 3 or 7, N] ACC, out
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    targets_ptr,  # [N] int64
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    S,
    scale: tl.float64,  # a Python float would be rounded to float32
    cap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n, pid_s = grouped_program_ids(tl.cdiv(N, BLOCK_N), S, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)  # one that does not fit is invalid
    scale = tl.full((), scale, ACC)
    cap = tl.full((), cap, ACC)

    m = tl.full((BLOCK_N,), float("-inf"), ACC)
    s = tl.zeros((BLOCK_N,), ACC)
    t = tl.zeros((BLOCK_N,), ACC)
    if HAS_STATS:
        sum_ex = tl.zeros((BLOCK_N,), ACC)
        sum_ee = tl.zeros((BLOCK_N,), ACC)
        sum_x = tl.zeros((BLOCK_N,), ACC)
        before = tl.full((BLOCK_N,), float("-inf"), ACC)

    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(pid_s * tiles // S, (pid_s + 1) * tiles // S):
        v_start = tile * BLOCK_V
        offs_v = v_start + tl.arange(0, BLOCK_V)
        x = scale * raw_logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
            ACC, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if HAS_SOFTCAP:
            x = cap * tanh_and_slope(x)[0]

        # Few tiles hold a target or the end of the vocabulary; the others are spared the comparisons
        holds_target = tl.max(((targets >= v_start) & (targets < v_start + BLOCK_V)).to(tl.int32), axis=0) > 0
        if HAS_STATS | holds_target | (v_start + BLOCK_V > V):
            in_vocab = (offs_v < V)[None, :]
            t += tl.sum(tl.where(offs_v[None, :] == targets[:, None], x, 0.0), axis=1)
            if HAS_STATS:
                sum_x += tl.sum(tl.where(in_vocab, x, 0.0), axis=1)
                is_before = offs_v[None, :] < targets[:, None]
                before = tl.maximum(before, tl.max(tl.where(is_before, x, float("-inf")), axis=1))
            x = tl.where(in_vocab & (offs_v[None, :] != targets[:, None]), x, float("-inf"))

        m_new = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing but -inf so far: no -inf - -inf
        e = tl.exp(x - shift[:, None])
        rescale = tl.exp(m - shift)
        if HAS_STATS:
            sum_ex += s * tl.where(m == float("-inf"), 0.0, m - shift)
            x = tl.where(x == float("-inf"), 0.0, x - shift[:, None])
            sum_ex = rescale * sum_ex + tl.sum(e * x, axis=1)
            sum_ee = rescale * rescale * sum_ee + tl.sum(e * e, axis=1)
        s = rescale * s + tl.sum(e, axis=1)
        m = m_new

    K: tl.constexpr = 7 if HAS_STATS else 3
    partials_ptrs = partials_ptr + pid_s.to(tl.int64) * K * N + offs_n
    tl.store(partials_ptrs, m, mask=mask_n)
    tl.store(partials_ptrs + N, s, mask=mask_n)
    tl.store(partials_ptrs + 2 * N, t, mask=mask_n)
    if HAS_STATS:
        tl.store(partials_ptrs + 3 * N, sum_ex, mask=mask_n)
        tl.store(partials_ptrs + 4 * N, sum_ee, mask=mask_n)
        tl.store(partials_ptrs + 5 * N, sum_x, mask=mask_n)
        tl.store(partials_ptrs + 6 * N, before, mask=mask_n)


def linear_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: bool,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Launch the kernel and merge the shares.

    Args:
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides, the dtype and device of `hidden`.
        targets: `[N]` int64. A row whose target is outside [0, V) gets NaN.
        bias: `[V]`, or None.
        logit_scale: factor of the logits.
        softcap: bound of the soft-capped logits, or None.
        temperature: divisor of the logits.
        stats: compute the statistics too.
        config: tile sizes; chosen by device and dtype if None.
        splits: number of vocabulary shares S; chosen by shape and device if None.

    Returns:
        `logps [N]`, at most 0; `lse [N]`; the fields of `fastdpo.eager.Stats`, or None. float32, or float64 for float64
        inputs.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    kernel = _linear_logprobs_forward_kernel
    config = config or default_config(hidden, STATS_CONFIGS if stats else CONFIGS)
    row_blocks, tiles = triton.cdiv(N, config.BLOCK_N), triton.cdiv(V, config.BLOCK_V)
    if splits is None:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
        splits = default_splits(row_blocks, tiles, processors)
    scale, cap = fold_transform(logit_scale, softcap, temperature)

    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    partials = hidden.new_empty((splits, 7 if stats else 3, N), dtype=acc)
    with torch.cuda.device_of(hidden):
        kernel[(row_blocks * splits,)](
            partials, hidden, weight, None if bias is None else bias.contiguous(), targets.contiguous(),
            *hidden.stride(), *weight.stride(), N, V, D, splits, scale, cap,
            HAS_SOFTCAP=softcap is not None, HAS_STATS=stats, UPCAST=interpreted(kernel),
            ACC=tl.float64 if acc == torch.float64 else tl.float32, GROUP_N=GROUP_N,
            enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    return _merge(partials, (targets >= 0) & (targets < V), V)


def _merge(partials: Tensor, valid: Tensor, V: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Merge `partials [S, 3 or 7, N]` into logps, lse and statistics; NaN where not `valid [N]`."""
    m, s, t, *sums = partials.unbind(1)
    lowest = torch.finfo(m.dtype).min
    target_logits = t.sum(0).where(valid, torch.nan)
    top = m.amax(0)
    shift = top.where(top > -torch.inf, target_logits.clamp(min=lowest))  # finite also if there is no other token
    drop = (m - shift).clamp(min=lowest)  # of an empty share: exp(drop) is 0, and so is 0 * drop
    rescale = drop.exp()
    total = (rescale * s).sum(0)
    lse_others = shift + total.log()
    lse = torch.logaddexp(lse_others, target_logits)
    logps = F.logsigmoid(target_logits - lse_others).where(lse.isfinite(), torch.nan)
    if not sums:
        return logps, lse, None

    ex, ee, x, before = sums
    # With q = exp(shift - lse): sum_v p (x - lse) over the others = q * sum_v e * ((x - shift) + (shift - lse))
    others = (shift - lse).exp() * ((rescale * (ex + s * drop)).sum(0) + total * (shift - lse))
    entropy = -(logps.exp() * logps.clamp(min=lowest) + others)
    log_sum_sq_probs = torch.logaddexp(2 * logps, 2 * (shift - lse) + (rescale.square() * ee).sum(0).log())
    is_top1 = (target_logits >= top) & (target_logits > before.amax(0))
    return logps, lse, (entropy, log_sum_sq_probs, x.sum(0) / V, is_top1)

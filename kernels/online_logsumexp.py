"""The running log-sum-exp of a row: fold a tile of logits into it, and merge the results of S shares of a vocabulary.

x are the transformed logits of `logits_tile`, [N, V], and u what they are before the last multiplication,
x = factor * u with a positive factor: u is z, or -z if the scale is negative, or tanh(scale * z) with a soft-cap. A
row's state is a running maximum m of u and a sum s (online softmax, Milakov & Gimelshein,
https://arxiv.org/abs/1805.02867, Algorithm 3) over the *other* tokens, v != targets[n]:

    s = sum_{v != target} 2^(c * u - c * m)        c = factor * log2(e)

The hardware raises 2 to a power, so that an element costs one fused multiply-add, one power and one addition. Its
product c * u is not rounded, and c * m is rounded once and in the same way wherever it is used. The target's u is kept
apart as t (0 if it is in another share). With others = log sum_{v != target} exp(x) and d = factor * t - others,

    logps = -log(1 + exp(-d))

is at most 0 by construction. It is exact to 1e-6 of itself even where p -> 1 and t - lse, the difference of two large
numbers, has no digit left.

With statistics, the state also holds sum e * c * (u - m) and sum e^2 over the other tokens, with e the power above, the
sum of u over all tokens, and `before`, the maximum of u before the target. The target is the argmax if t >= m and
t > before.

The S partial results of a row are merged by a few PyTorch operations on [S, N], without atomics or locks, so every run
gives the same bits.

For the sparse backward there are tile masses, one for each of J = ceil(V / TILE) tiles of TILE columns:

    tile_masses[n, j] = log sum_{v in tile j, v != target} exp(x[n, v]) * slope[n, v]

with slope = 1 or, with a soft-cap, 1 - tanh^2. A mass 87 below the row's running maximum (1e-38 of it) is -inf.

Shapes: N rows, V vocabulary, S shares.
"""

from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.kept_probs import store_probs
from fastdpo.kernels.logits_tile import tanh_and_slope


@triton.jit
def load_targets(targets_ptr, offs_n, N, V):
    """Load targets[offs_n] as int32; a target outside [0, V) becomes -1."""
    targets = tl.load(targets_ptr + offs_n, mask=offs_n < N, other=-1)
    return tl.where((targets >= 0) & (targets < V), targets, -1).to(tl.int32)


@triton.jit
def empty_state(HAS_STATS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the state before the first tile: m, s, t and, with statistics, sum_ex, sum_ee, sum_u, before."""
    lowest = tl.full((BLOCK_N,), float("-inf"), ACC)
    zeros = tl.zeros((BLOCK_N,), ACC)
    if HAS_STATS:
        return lowest, zeros, zeros, zeros, zeros, zeros, lowest
    else:
        return lowest, zeros, zeros


@triton.jit
def fold_tile(
    state,
    z,  # [BLOCK_N, BLOCK_V], the raw logits of the tile
    masses_ptr,  # [J, N] float32, out, or None
    probs,  # [N, C], out, or None; as the arguments below of `kept_probs.store_probs`
    factors_ptr,
    n_start,
    first,
    C,
    stride_fj,
    targets,  # [BLOCK_N]
    offs_n,  # [BLOCK_N]
    v_start,
    N,
    V,
    scale,  # of tanh's argument; read only with a soft-cap
    c,
    HAS_SOFTCAP: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    BY_TMA: tl.constexpr,
    HAS_STATS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return `state` with the tokens [v_start, v_start + BLOCK_V) folded in; store their masses and powers."""
    m, s, t = state[0], state[1], state[2]
    offs_v = v_start + tl.arange(0, BLOCK_V)
    u = z
    if HAS_SOFTCAP:
        u, slope = tanh_and_slope(scale * z)
    elif IS_NEGATIVE:
        u = -z

    # Few tiles hold a target or the end of the vocabulary; the others skip the comparisons
    holds_target = tl.max(((targets >= v_start) & (targets < v_start + BLOCK_V)).to(tl.int32), axis=0) > 0
    if HAS_STATS:
        sum_ex, sum_ee, sum_u, before = state[3], state[4], state[5], state[6]
    if HAS_STATS | holds_target | (v_start + BLOCK_V > V):
        in_vocab = (offs_v < V)[None, :]
        t += tl.sum(tl.where(offs_v[None, :] == targets[:, None], u, 0.0), axis=1)
        if HAS_STATS:
            sum_u += tl.sum(tl.where(in_vocab, u, 0.0), axis=1)
            is_before = offs_v[None, :] < targets[:, None]
            before = tl.maximum(before, tl.max(tl.where(is_before, u, float("-inf")), axis=1))
        u = tl.where(in_vocab & (offs_v[None, :] != targets[:, None]), u, float("-inf"))

    m_new = tl.maximum(m, tl.max(u, axis=1))
    shift = c * tl.where(m_new == float("-inf"), 0.0, m_new)  # avoids -inf - -inf
    power = c * u - shift[:, None]
    e = tl.exp2(power)
    drop = c * m - shift
    rescale = tl.exp2(drop)
    if HAS_STATS:
        sum_ex += s * tl.where(m == float("-inf"), 0.0, drop)
        sum_ex = rescale * sum_ex + tl.sum(e * tl.maximum(power, -1e30), axis=1)  # 0 where u is -inf
        sum_ee = rescale * rescale * sum_ee + tl.sum(e * e, axis=1)
    s = rescale * s + tl.sum(e, axis=1)

    if probs is not None:  # noqa: SIM102  (this is decided when compiling, the next one when running)
        if v_start >= first:
            store_probs(
                probs, factors_ptr, e, shift, n_start, v_start, first, N, C, stride_fj, BY_TMA, TILE, BLOCK_N, BLOCK_V
            )  # fmt: skip
    if masses_ptr is not None:
        if HAS_SOFTCAP:
            e *= slope
        TILES: tl.constexpr = BLOCK_V // TILE
        sums = tl.sum(tl.reshape(e, (BLOCK_N, TILES, TILE)), axis=2)
        empty = sums == 0
        LN2: tl.constexpr = 0.6931471805599453
        masses = tl.where(empty, float("-inf"), (shift[:, None] + tl.log2(tl.where(empty, 1.0, sums))) * LN2)
        offs_j = v_start // TILE + tl.arange(0, TILES)
        # int64, because J * N passes 2^31 at V=262144 from 2^20 rows on
        masses_ptrs = masses_ptr + offs_j.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(masses_ptrs, masses.to(tl.float32), mask=(offs_n < N)[:, None] & (offs_j < tl.cdiv(V, TILE))[None, :])

    if HAS_STATS:
        return m_new, s, t, sum_ex, sum_ee, sum_u, before
    else:
        return m_new, s, t


@triton.jit
def store_state(partials_ptr, state, offs_n, pid_s, N, HAS_STATS: tl.constexpr):
    """Store `state` in partials[pid_s, :, offs_n]."""
    K: tl.constexpr = 7 if HAS_STATS else 3
    mask_n = offs_n < N
    partials_ptrs = partials_ptr + pid_s.to(tl.int64) * K * N + offs_n
    for k in tl.static_range(K):
        tl.store(partials_ptrs + k * N, state[k], mask=mask_n)


def exponent(scale: float, cap: float | None) -> tuple[float, float]:
    """Return the positive factor of the transform's last multiplication, and c, the same in powers of 2."""
    factor = abs(scale) if cap is None else cap
    return factor, factor / log(2)


def merge(
    partials: Tensor, valid: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Merge `partials [S, 3 or 7, N]` into the target's logit (-inf where not `valid [N]`), others and statistics.

    With q = exp(x - others), the distribution of the other tokens, the statistics are -sum q log q, log sum q^2, the
    sum of x over all tokens, the maximum of x before the target, and that of all others; -inf if there is none.
    """
    factor, c = exponent(scale, cap)
    m, s, t, *sums = partials.unbind(1)
    lowest = torch.finfo(m.dtype).min
    t = t.sum(0)
    top = m.amax(0)
    shift = (c * top.where(top > -torch.inf, t)).clamp(min=lowest)  # finite even if there is no other token
    drop = (c * m - shift).clamp(min=lowest)  # finite for an empty share, so that 0 * drop is 0
    rescale = drop.exp2()
    total = (rescale * s).sum(0)
    # in float64, so that the change of the base adds no rounding of its own
    others = ((shift.double() + total.double().log2()) * log(2)).to(m.dtype)
    target_logits = (factor * t).where(valid, -torch.inf)
    if not sums:
        return target_logits, others, None

    ex, ee, u, before = sums
    alone = total == 0  # there is no other token
    entropy = total.log() - log(2) * (rescale * (ex + s * drop)).sum(0) / total
    log_sum_sq = (rescale.square() * ee).sum(0).log() - 2 * total.log()
    statistics = entropy.masked_fill(alone, 0), log_sum_sq.masked_fill(alone, 0)
    return target_logits, others, (*statistics, factor * u.sum(0), factor * before.amax(0), factor * top)

"""Fold a block of logits, made by a vendor matmul, into the running log-sum-exp of its rows.

z is scale times the raw logits of C columns of the vocabulary, and x = z or, with a soft-cap, cap * tanh(z). Over the
tokens other than the target,

    m' = max(m, max x)      decay = exp(m - m')      e = exp(x - m') * slope      s' = decay * s + sum exp(x - m')

where slope is 1 or, with a soft-cap, 1 - tanh^2. A program owns a row and walks it twice, first for the maximum, then
for all else: the second time the row comes from the cache. e is 0 at the target, whose x goes to `target`.

The statistics are sum exp(x - m') (x - m'), sum exp(x - m')^2, sum x of all tokens, and the largest x before the
target.

Shapes: N rows, C columns, T columns of a cell, J = ceil(C / T).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import interpreted, tanh_and_slope

BLOCK = 1024  # tests/kernels/test_aot.py checks that it spills no register


@triton.jit
def _transformed(z_ptrs, offs_c, C, target, cap, HAS_SOFTCAP: tl.constexpr):
    """Return x, its slope, and whether its token is one of the others."""
    x = tl.load(z_ptrs, mask=offs_c < C, other=0.0)
    slope = tl.full(x.shape, 1.0, x.dtype)
    if HAS_SOFTCAP:
        x, slope = tanh_and_slope(x)
        x = cap * x
    return x, slope, (offs_c < C) & (offs_c != target)


@triton.jit(do_not_specialize=["J"])  # a C divisible by 16, which all blocks but the last have, is loaded in vectors
def _fold_logits_kernel(
    e_ptr,  # [N, C], out
    masses_ptr,  # [N, J] ACC, out
    decay_ptr,  # [N] ACC, out
    z_ptr,  # [N, C] ACC
    targets_ptr,  # [N] int64
    target_ptr,  # [N] ACC, in and out, as the state below
    m_ptr,
    s_ptr,
    sum_dz_ptr,
    sum_sq_ptr,
    sum_z_ptr,
    top_before_ptr,
    stride_en,
    stride_zn,
    C,
    J,
    cap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + n)
    m_old = tl.load(m_ptr + n)
    cap = tl.full((), cap, m_old.dtype)

    m = m_old
    if HAS_STATS:
        sum_z = tl.load(sum_z_ptr + n)
        top_before = tl.load(top_before_ptr + n)
    for start in range(0, C, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)
        x, _, is_other = _transformed(z_ptr + n * stride_zn + offs_c, offs_c, C, target, cap, HAS_SOFTCAP)
        m = tl.maximum(m, tl.max(tl.where(is_other, x, float("-inf")), axis=0))
        if HAS_STATS:
            sum_z += tl.sum(tl.where(offs_c < C, x, 0.0), axis=0)
            before = tl.max(tl.where(is_other & (offs_c < target), x, float("-inf")), axis=0)
            top_before = tl.maximum(top_before, before)

    decay = tl.exp(m_old - m)
    s = decay * tl.load(s_ptr + n)
    if HAS_STATS:
        sum_dz = decay * (tl.load(sum_dz_ptr + n) + tl.load(s_ptr + n) * (m_old - m))
        sum_sq = decay * decay * tl.load(sum_sq_ptr + n)
    for start in range(0, C, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)
        x, slope, is_other = _transformed(z_ptr + n * stride_zn + offs_c, offs_c, C, target, cap, HAS_SOFTCAP)
        e = tl.where(is_other, tl.exp(x - m), 0.0)
        s += tl.sum(e, axis=0)
        if HAS_STATS:
            sum_dz += tl.sum(tl.where(e > 0, e * (x - m), 0.0), axis=0)
            sum_sq += tl.sum(e * e, axis=0)
        e *= slope
        tl.store(e_ptr + n * stride_en + offs_c, e.to(e_ptr.dtype.element_ty), mask=offs_c < C)
        offs_j = start // T + tl.arange(0, BLOCK // T)
        masses = tl.sum(tl.reshape(e, (BLOCK // T, T)), axis=1)
        tl.store(masses_ptr + n * J + offs_j, masses, mask=offs_j < J)

    if (target >= 0) & (target < C):
        x, _, _ = _transformed(z_ptr + n * stride_zn + target, target, C, target, cap, HAS_SOFTCAP)
        tl.store(target_ptr + n, x)
    tl.store(decay_ptr + n, decay)
    tl.store(m_ptr + n, m)
    tl.store(s_ptr + n, s)
    if HAS_STATS:
        tl.store(sum_dz_ptr + n, sum_dz)
        tl.store(sum_sq_ptr + n, sum_sq)
        tl.store(sum_z_ptr + n, sum_z)
        tl.store(top_before_ptr + n, top_before)


def fold_logits(
    e: Tensor,
    z: Tensor,
    targets: Tensor,
    state: tuple[Tensor | None, ...],
    cap: float | None,
    T: int,
) -> tuple[Tensor, Tensor]:
    """Fold `z` into the state of its rows, in place.

    Args:
        e: `[N, C]`, out, the dtype of the operands of the next matmul, rows contiguous.
        z: `[N, C]` float32 (float64 for float64 inputs), rows contiguous.
        targets: `[N]` int64, counted from the first column.
        state: target, m, s, sum_dz, sum_sq, sum_z, top_before, `[N]` contiguous, in and out; the last four may be None.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
        T: columns of a cell, a power of two.

    Returns:
        `masses [N, J]`, the sums of e over cells before e is rounded, and `decay [N]`.
    """
    N, C = z.shape
    masses = z.new_empty(N, triton.cdiv(C, T))
    decay = z.new_empty(N)
    kernel = _fold_logits_kernel
    out = e.to(z.dtype) if interpreted(kernel) and e.dtype != z.dtype else e  # the interpreter truncates
    with torch.cuda.device_of(z):
        kernel[(N,)](
            out, masses, decay, z, targets.contiguous(), *state, out.stride(0), z.stride(0), C, masses.shape[1],
            cap or 0.0, HAS_SOFTCAP=cap is not None, HAS_STATS=state[-1] is not None, T=T,
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    if out is not e:
        e.copy_(out)
    return masses, decay

"""Keep probabilities of a forward in 16 bits each, and compute the gradient of the logits from them.

With q the probability given that the token is not the target, others its log-sum-exp, and the power e and the maximum m
of `online_logsumexp` at the tile that holds token v,

    q[n, v] = factor[n, j] * e[n, v]          factor[n, j] = 2^(c * m - log2(e) * others[n])

so e can be stored before the row's others is known. It lies in [0, 1] and needs no sign, so 16 bits have room for 10
digits after the binary point and for exponents down to 2^-62; what is smaller becomes 0. The rounding changes q by at
most 4.9e-4 of itself, rms 2e-4. A bfloat16 would change it by 1.7e-3, as the rounding of dlogits does afterwards, and
the bar for dweight, 2.5e-3, leaves no room for a second rounding of that size. Inputs of 32 or 64 bits keep e as it is.

The kernel here turns what was kept into dlogits, as `linear_logprobs_backward` defines them without soft-cap and
entropy. It reads and writes a block of N rows by C columns once.

Shapes: N rows, V vocabulary, J tiles of TILE tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import interpreted
from fastdpo.kernels.row_lists import TILE

WHOLE = 512
"""Columns are kept in multiples of it: the tiles of every configuration are kept whole or not at all, and the lists of
the first kept chunk begin at a multiple of 16 bytes, as those of all others do, so that no kernel is compiled twice."""
BLOCK = 2048
LOWEST = tl.constexpr(65 << 10)  # of a float32 without its last 13 bits: 2^-62; it becomes the code 1


@triton.jit
def encode(e):
    """Return the 16-bit codes of float32 numbers in [0, 1]."""
    bits = e.to(tl.int32, bitcast=True) + (4096 - ((LOWEST - 1) << 13))  # 4096 rounds to nearest
    return (tl.maximum(bits, 0) >> 13).to(tl.int16)


@triton.jit
def decode(codes):
    """Return the float32 numbers of 16-bit codes."""
    bits = codes.to(tl.int32) & 0xFFFF
    return tl.where(bits == 0, 0.0, ((bits + (LOWEST - 1)) << 13).to(tl.float32, bitcast=True))


@triton.jit
def store_probs(
    probs,  # [N, C] int16 or ACC, out; a descriptor with BY_TMA, else a pointer
    factors_ptr,  # [N, C / TILE] ACC, out: c * m, from which the launcher makes the factors
    e,  # [BLOCK_N, BLOCK_V]
    shift,  # [BLOCK_N], c * m
    n_start,
    v_start,
    first,  # column with which the kept ones begin, a multiple of WHOLE
    N,
    C,
    stride_fj,
    BY_TMA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store the powers of a tile and their shift."""
    offs_n = n_start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    start = tl.multiple_of(v_start - first, TILE)  # or 2 bytes would be stored at a time
    element: tl.constexpr = probs.dtype if BY_TMA else probs.dtype.element_ty
    codes = encode(e) if element == tl.int16 else e
    if BY_TMA:
        probs.store([n_start, start], codes)
    else:
        # int64 up to the tile, because N * C may pass 2^31; inside it, 32-bit offsets take fewer registers
        places = tl.arange(0, BLOCK_N)[:, None] * C + tl.arange(0, BLOCK_V)[None, :]
        tl.store(probs + n_start.to(tl.int64) * C + start + places, codes, mask=mask_n[:, None])
    for j in tl.static_range(BLOCK_V // TILE):
        tl.store(factors_ptr + (start // TILE + j).to(tl.int64) * stride_fj + offs_n, shift, mask=mask_n)


@triton.jit(do_not_specialize=["stride_fj"])  # a C divisible by 16 is loaded and stored in vectors
def _kept_dlogits_kernel(
    dlogits_ptr,  # [N, C], out
    probs_ptr,  # [N, C] int16 or ACC
    factors_ptr,  # [N, C / TILE] ACC
    targets_ptr,  # [N] int64
    dtarget_ptr,  # [N] ACC
    dothers_ptr,  # [N] ACC
    stride_dn,
    stride_pn,
    stride_fn,
    stride_fj,
    C,
    scale: tl.float64,  # without the annotation, a Python float is rounded to float32
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64, because n times a stride may pass 2^31
    offs_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_c = offs_c < C
    factors_ptrs = factors_ptr + n * stride_fn + (offs_c // TILE).to(tl.int64) * stride_fj
    e = tl.load(probs_ptr + n * stride_pn + offs_c, mask=mask_c, other=0)
    if probs_ptr.dtype.element_ty == tl.int16:
        e = decode(e)
    dx = e * (tl.load(factors_ptrs, mask=mask_c, other=0.0) * tl.load(dothers_ptr + n))
    dx = tl.where(offs_c == tl.load(targets_ptr + n), tl.load(dtarget_ptr + n), dx)
    dlogits = dx * tl.full((), scale, dx.dtype)
    tl.store(dlogits_ptr + n * stride_dn + offs_c, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask_c)


def kept_dlogits(
    dlogits: Tensor,
    probs: Tensor,
    factors: Tensor,
    targets: Tensor,
    dtarget: Tensor,
    dothers: Tensor,
    scale: float,
) -> None:
    """Fill `dlogits` with the gradient of the raw logits.

    Args:
        dlogits: `[N, C]`, out, rows contiguous.
        probs: `[N, C or more]` int16, or float32 (float64 for float64 inputs), rows contiguous, as the forward kept it.
        factors: `[N, C / TILE or more]`, float32 (float64 for float64 inputs), any strides.
        targets: `[N]` int64, counted from the first column; outside [0, C) for a target in another block.
        dtarget: `[N]`, gradient of the target's transformed logit, the dtype of `factors`.
        dothers: `[N]`, gradient of the others' log-sum-exp, the dtype of `factors`; NaN in it fills the row.
        scale: factor of the raw logits.
    """
    N, C = dlogits.shape
    kernel = _kept_dlogits_kernel
    # The interpreter truncates where it should round to bfloat16, so PyTorch does the rounding
    out = dlogits.float() if interpreted(kernel) and dlogits.dtype == torch.bfloat16 else dlogits
    with torch.cuda.device_of(dlogits):
        kernel[(N, triton.cdiv(C, BLOCK))](
            out, probs, factors, targets.contiguous(), dtarget.contiguous(), dothers.contiguous(),
            out.stride(0), probs.stride(0), *factors.stride(), C, scale,
            TILE=TILE, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

"""Compute the gradient of a block of logits that a vendor matmul made, row by row.

z is scale times the raw logits of C columns of the vocabulary, and x = z or, with a soft-cap, cap * tanh(z). With
q = exp(x - others) and slope = 1 or, with a soft-cap, 1 - tanh^2, the gradient of the raw logits is

    dlogits[n, v] = q * (dothers[n] - dentropy[n] * (log q + entropy[n])) * slope        v != targets[n]
    dlogits[n, targets[n]] = dtarget[n] * slope

Shapes: N rows, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits_tile import interpreted, tanh_and_slope

BLOCK = 2048


@triton.jit  # a C divisible by 16, which all blocks but the last have, is loaded in vectors
def _dlogits_rows_kernel(
    dlogits_ptr,  # [N, C], out
    z_ptr,  # [N, C] ACC
    targets_ptr,  # [N] int64
    others_ptr,  # [N] ACC, as those below
    dtarget_ptr,
    dothers_ptr,
    dentropy_ptr,  # or None
    entropy_ptr,
    stride_dn,
    stride_zn,
    C,
    cap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_c = offs_c < C
    x = tl.load(z_ptr + n * stride_zn + offs_c, mask=mask_c, other=0.0)
    slope = tl.full((BLOCK,), 1.0, x.dtype)
    if HAS_SOFTCAP:
        x, slope = tanh_and_slope(x)
        x = tl.full((), cap, x.dtype) * x
    log_q = x - tl.load(others_ptr + n)
    q = tl.exp(log_q)
    dx = q * tl.load(dothers_ptr + n)
    if dentropy_ptr is not None:
        log_q = tl.where(q == 0, 0.0, log_q)  # an impossible token has -inf
        dx -= tl.load(dentropy_ptr + n) * (q * (log_q + tl.load(entropy_ptr + n)))
    dx = tl.where(offs_c == tl.load(targets_ptr + n), tl.load(dtarget_ptr + n), dx) * slope
    tl.store(dlogits_ptr + n * stride_dn + offs_c, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_c)


def dlogits_rows(
    dlogits: Tensor,
    z: Tensor,
    targets: Tensor,
    others: Tensor,
    dtarget: Tensor,
    dothers: Tensor,
    dentropy: Tensor | None,
    entropy: Tensor | None,
    cap: float | None,
) -> None:
    """Fill `dlogits` with the gradient of the raw logits.

    Args:
        dlogits: `[N, C]`, out, rows contiguous.
        z: `[N, C]` float32 (float64 for float64 inputs), rows contiguous.
        targets: `[N]` int64, counted from the first column; outside [0, C) for a target in another block.
        others: `[N]`, contiguous, in the dtype of `z`, as all that follow.
        dtarget: `[N]`, gradient of the target's logit, times the slope of the transform at 0.
        dothers: `[N]`, gradient of `others`, times the same factor.
        dentropy: `[N]`, gradient of the entropy of q, times the same factor; None if it has no gradient.
        entropy: `[N]`, the entropy of q; None if `dentropy` is None.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
    """
    N, C = z.shape
    kernel = _dlogits_rows_kernel
    out = torch.empty_like(dlogits, dtype=z.dtype) if interpreted(kernel) else dlogits  # the interpreter truncates
    rows = (t if t is None else t.contiguous() for t in (targets, others, dtarget, dothers, dentropy, entropy))
    with torch.cuda.device_of(z):
        kernel[(N, triton.cdiv(C, BLOCK))](
            out, z, *rows, out.stride(0), z.stride(0), C, cap or 0.0,
            HAS_SOFTCAP=cap is not None, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

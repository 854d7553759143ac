"""Gradient of a block of logits that a vendor matmul made, row by row.

z are scale times the raw logits of C columns of the vocabulary, x = z or, with a soft-cap, cap * tanh(z). With
q = exp(x - others) and slope = 1, or 1 - tanh^2,

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


@triton.jit  # C a multiple of 16, as of all but the last block, moves in vectors
def _dlogits_rows_kernel(
    dlogits_ptr,  # [N, C], out
    z_ptr,  # [N, C] ACC
    targets_ptr,  # [N] int64
    others_ptr,  # [N] ACC, as the rest
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
        log_q = tl.where(q == 0, 0.0, log_q)  # of an impossible token it is -inf
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
    """Fill `dlogits`.

    Args:
        dlogits: `[N, C]`, out, rows contiguous.
        z: `[N, C]` float32 (float64 for float64 inputs), rows contiguous.
        targets: `[N]` int64, counted from the first column; outside [0, C) for a target in another block.
        others: `[N]`, as the rest, contiguous, in the dtype of `z`.
        dtarget: `[N]`, gradient of the target's logit, times the scale of dx/dz.
        dothers: `[N]`, gradient of `others`, times that scale.
        dentropy: `[N]`, gradient of the entropy of q, times that scale; None for none.
        entropy: `[N]`, or None.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
    """
    N, C = z.shape
    kernel = _dlogits_rows_kernel
    out = torch.empty_like(dlogits, dtype=z.dtype) if interpreted(kernel) else dlogits  # it would truncate
    rows = (t if t is None else t.contiguous() for t in (targets, others, dtarget, dothers, dentropy, entropy))
    with torch.cuda.device_of(z):
        kernel[(N, triton.cdiv(C, BLOCK))](
            out, z, *rows, out.stride(0), z.stride(0), C, cap or 0.0,
            HAS_SOFTCAP=cap is not None, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

"""Gradient of the raw logits of a block of rows and a chunk of the vocabulary, recomputed from hidden and weight.

With the names of `linear_logprobs_forward`, p = exp(x - lse), and dlogps the gradient of the log-probabilities:

    dlogits[n, v] = dlogps[n] * (1[v == targets[n]] - p[n, v]) * dx/dz
    dx/dz         = scale          or, with a soft-cap,          cap * scale * (1 - tanh(scale * z)^2)

from which vendor matmuls make dhidden = dlogits @ weight and dweight = dlogits.T @ hidden. 1 - p of the target, which
vanishes in a difference with a p of 0.999999, comes from the caller in ACC.

dlogps is multiplied in here, rather than P - onehot being stored and dlogps applied as a scale of rows later. Stored in
bfloat16, the product is rounded once, to 1.7e-3 rms. Scaling the rows of hidden for dweight would be a second rounding
of that size, and the bar for dweight, 2.5e-3, leaves no room for it beside the rounding of the result. bfloat16 has the
exponents of float32, so a small dlogps costs nothing. float16 has not: there, the caller multiplies dlogps by a power
of two that brings the largest gradient just below 2^15 and divides the float32 accumulators by it, both exact.

Shapes: N rows, D hidden size, V vocabulary; both N and V are those of the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.linear_logprobs_forward import (
    GROUP_N,
    Config,
    Configs,
    default_config,
    fold_transform,
    grouped_program_ids,
    interpreted,
    raw_logits_tile,
    tanh_and_slope,
)

# tests/test_aot.py compiles these: no spilled register, with and without bias
CONFIGS: Configs = {
    ((8, 0), 2): Config(128, 128, 64, 8, 3),
    ((9, 0), 2): Config(128, 256, 64, 8, 3),
    ((10, 0), 2): Config(128, 128, 64, 8, 3),
}
# A soft-cap keeps a second tile alive, the slopes
SOFTCAP_CONFIGS: Configs = {capability: Config(128, 128, 64, 8, 3) for capability in CONFIGS}


@triton.jit(do_not_specialize=["N", "V"])  # they change from batch to batch: one compilation
def _linear_logprobs_backward_kernel(
    dlogits_ptr,  # [N, V], out
    dlogps_ptr,  # [N] ACC
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    targets_ptr,  # [N] int64, counted from the first column of the block
    lse_ptr,  # [N] ACC
    others_ptr,  # [N] ACC, 1 - p of the target
    stride_dn,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    N,
    V,
    D,
    scale: tl.float64,  # a Python float would be rounded to float32
    cap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n, pid_v = grouped_program_ids(tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    scale = tl.full((), scale, ACC)
    cap = tl.full((), cap, ACC)

    x = scale * raw_logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
        ACC, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    slope = scale
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(x)
        x = cap * t
        slope *= cap * scale

    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=float("inf"))
    dx = -tl.exp(x - lse[:, None])
    targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    v_start = pid_v * BLOCK_V
    # Few tiles hold a target; the others are spared the comparisons
    if tl.max(((targets >= v_start) & (targets < v_start + BLOCK_V)).to(tl.int32), axis=0) > 0:
        others = tl.load(others_ptr + offs_n, mask=mask_n, other=0.0)
        dx = tl.where(offs_v.to(tl.int64)[None, :] == targets[:, None], others[:, None], dx)
    dlogits = tl.load(dlogps_ptr + offs_n, mask=mask_n, other=0.0)[:, None] * dx * slope

    # int64: rows * stride_dn may pass 2^31
    dlogits_ptrs = dlogits_ptr + offs_n.to(tl.int64)[:, None] * stride_dn + offs_v[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_v < V)[None, :])


def linear_logprobs_backward(
    dlogits: Tensor,
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    others: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    config: Config | None = None,
) -> None:
    """Fill `dlogits` with the gradient of the raw logits (before bias and transform have been applied to them).

    Args:
        dlogits: `[N, V]`, out, the dtype of `hidden`, rows contiguous.
        dlogps: `[N]` float32 (float64 for float64 inputs); NaN in it fills the row.
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides: a chunk of the head.
        targets: `[N]` int64, counted from the first row of `weight`; outside [0, V) for a target in another chunk.
        bias: `[V]`, or None.
        lse: `[N]`, of the whole vocabulary, the dtype of `dlogps`.
        others: `[N]`, 1 - p of the target, all other probabilities together, the dtype of `dlogps`.
        logit_scale: factor of the logits.
        softcap: bound of the soft-capped logits, or None.
        temperature: divisor of the logits.
        config: tile sizes; chosen by device and dtype if None.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    kernel = _linear_logprobs_backward_kernel
    config = config or default_config(hidden, CONFIGS if softcap is None else SOFTCAP_CONFIGS)
    scale, cap = fold_transform(logit_scale, softcap, temperature)
    # The interpreter truncates where it should round to bfloat16: leave that to PyTorch
    out = dlogits.float() if interpreted(kernel) and dlogits.dtype == torch.bfloat16 else dlogits
    with torch.cuda.device_of(hidden):
        kernel[(triton.cdiv(N, config.BLOCK_N) * triton.cdiv(V, config.BLOCK_V),)](
            out, dlogps.contiguous(), hidden, weight, None if bias is None else bias.contiguous(),
            targets.contiguous(), lse.contiguous(), others.contiguous(),
            out.stride(0), *hidden.stride(), *weight.stride(), N, V, D, scale, cap,
            HAS_SOFTCAP=softcap is not None, UPCAST=interpreted(kernel),
            ACC=tl.float64 if dlogps.dtype == torch.float64 else tl.float32, GROUP_N=GROUP_N,
            enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

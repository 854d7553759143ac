"""Compute the gradient of the raw logits of a block of rows and a chunk of the vocabulary, from hidden and weight.

The names are those of `linear_logprobs_forward`. q = exp(x - others) is the distribution of the tokens other than the
target, and H = -sum_v q log q its entropy, whose gradient dentropy is optional:

    dx[n, v]          = q[n, v] * (dothers[n] - dentropy[n] * (log q[n, v] + H[n]))        v != targets[n]
    dx[n, targets[n]] = dtarget[n]
    dlogits           = dx * dx/dz
    dx/dz             = scale          or, with a soft-cap,          cap * scale * (1 - tanh(scale * z)^2)

Vendor matmuls then make dhidden = dlogits @ weight and dweight = dlogits.T @ hidden. With p the probability of the
target, a log-probability has dtarget = dlogps * (1 - p) = -dothers: no digits cancel as p approaches 1.

The kernel multiplies by the upstream gradients, instead of leaving them to a later scaling of rows. Stored in bfloat16,
the product is rounded once, to 1.7e-3 rms. Scaling the rows of hidden for dweight would be a second rounding of that
size, and the bar for dweight, 2.5e-3, leaves no room for it beside the rounding of the result. bfloat16 has the
exponents of float32, so small gradients lose no precision. float16 does not have them: there, the caller multiplies the
gradients by a power of two that brings the largest just below 2^15, and divides the float32 accumulators by it. Both
steps are exact.

Shapes: N rows, D hidden size, V vocabulary, R rank of the low-rank addition; N and V are those of the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    raw_logits_tile,
    store_dlogits_tile,
)

# tests/kernels/test_aot.py compiles these and checks that they spill no register
CONFIGS: Configs = {
    ((8, 0), 2): Config(128, 128, 64, 8, 3),
    ((9, 0), 2): Config(128, 256, 64, 8, 3),
    ((10, 0), 2): Config(128, 128, 64, 8, 3),
}
# A soft-cap keeps a second tile in registers, the slopes
SOFTCAP_CONFIGS: Configs = {capability: Config(128, 128, 64, 8, 3) for capability in CONFIGS}


def default_configs(vectors: bool, has_softcap: bool, has_entropy: bool) -> tuple[Configs, dict[int, Config]]:
    """Choose the table of configurations, and the fallback for what it has no entry for."""
    if has_entropy or not vectors:
        return {}, SMALL
    return SOFTCAP_CONFIGS if has_softcap else CONFIGS, FALLBACK


@triton.jit(do_not_specialize=["N"])  # it changes from batch to batch; a V divisible by 16 is stored in vectors
def _linear_logprobs_backward_kernel(
    dlogits_ptr,  # [N, V], out
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    hidden2_ptr,  # [N, R], or None
    weight2_ptr,  # [V, R]
    targets_ptr,  # [N] int64, counted from the first column of the block
    others_ptr,  # [N] ACC
    dtarget_ptr,  # [N] ACC
    dothers_ptr,  # [N] ACC
    dentropy_ptr,  # [N] ACC, or None
    entropy_ptr,  # [N] ACC
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
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n, pid_v = grouped_program_ids(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    scale = tl.full((), scale, ACC)
    cap = tl.full((), cap, ACC)

    z = raw_logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
        ACC, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    z = add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)
    store_dlogits_tile(
        dlogits_ptr, z, targets_ptr, others_ptr, dtarget_ptr, dothers_ptr, dentropy_ptr, entropy_ptr,
        offs_n, offs_n < N, pid_v * BLOCK_V, stride_dn, V, scale, cap, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def linear_logprobs_backward(
    dlogits: Tensor,
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
    entropy: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> None:
    """Fill `dlogits` with the gradient of the raw logits (those before the bias and the transform).

    Args:
        dlogits: `[N, V]`, out, the dtype of `hidden`, rows contiguous.
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides: a chunk of the head.
        targets: `[N]` int64, counted from the first row of `weight`; outside [0, V) for a target in another chunk.
        bias: `[V]`, or None.
        others: `[N]` float32 (float64 for float64 inputs): log-sum-exp of the vocabulary without the target.
        dtarget: `[N]`, gradient of the target's transformed logit, the dtype of `others`.
        dothers: `[N]`, gradient of `others`; NaN in it fills the row.
        scale: factor of the raw logits.
        cap: factor of the soft-cap's tanh; None for no soft-cap.
        low_rank: `(hidden2 [N, R], weight2 [V, R])` of the forward, in the dtype of `hidden`, or None.
        entropy: `(dentropy [N], entropy [N])`, gradient and value of the entropies of whole rows of q, in the dtype of
            `others`; None if the entropy has no gradient.
        config: tile sizes; chosen by device and dtype if None.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    kernel = _linear_logprobs_backward_kernel
    vectors = loads_vectors(hidden) and loads_vectors(weight)
    config = config or default_config(hidden, *default_configs(vectors, cap is not None, entropy is not None))
    hidden2, weight2, R = low_rank_operands(low_rank)
    dentropy, entropy_value = (None, None) if entropy is None else (x.contiguous() for x in entropy)
    # The interpreter truncates where it should round to bfloat16, so PyTorch does the rounding
    out = dlogits.float() if interpreted(kernel) and dlogits.dtype == torch.bfloat16 else dlogits
    with torch.cuda.device_of(hidden):
        kernel[(triton.cdiv(N, config.BLOCK_N) * triton.cdiv(V, config.BLOCK_V),)](
            out, hidden, weight, None if bias is None else bias.contiguous(), hidden2, weight2,
            targets.contiguous(), others.contiguous(), dtarget.contiguous(), dothers.contiguous(),
            dentropy, entropy_value,
            out.stride(0), *hidden.stride(), *weight.stride(), N, V, D, R,
            scale, cap or 0.0, HAS_SOFTCAP=cap is not None, UPCAST=interpreted(kernel),
            ACC=tl.float64 if others.dtype == torch.float64 else tl.float32, GROUP_N=GROUP_N,
            enable_fp_fusion=True, **config._asdict(),
        )  # fmt: skip
    if out is not dlogits:
        dlogits.copy_(out)

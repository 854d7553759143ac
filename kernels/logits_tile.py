"""Parts that the kernels of the head share: tiles of raw logits, the transform, and the choice of a configuration.

    z[n, v] = sum_d hidden[n, d] * weight[v, d] + bias[v] + sum_r hidden2[n, r] * weight2[v, r]
    x[n, v] = scale * z[n, v]           or, with a soft-cap,          cap * tanh(scale * z[n, v])

hidden2 and weight2, of rank R, are optional. With hidden2 = s * hidden @ A.T and weight2 = B they are a LoRA adapter of
the head, and weight + s * B @ A is never formed.

Shapes: N rows, D hidden size, V vocabulary, R rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

GROUP_N = 16  # row blocks that walk the vocabulary side by side: 2048 rows of hidden, 16 MiB at D=4096, stay in L2


class Config(NamedTuple):
    """Launch parameters of a kernel: the tile of one program, and how it is computed."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


Configs = dict[tuple[tuple[int, int], int], Config]  # by compute capability and bytes per element

# By bytes per element, for chips without an entry of their own: they take at most 64 KiB of shared memory
FALLBACK = {2: Config(128, 128, 32, 8, 3), 4: Config(64, 128, 32, 8, 3), 8: Config(16, 128, 16, 8, 2)}
# By bytes per element, for kernels that need more registers: two more float32 tiles, or an address per element
SMALL = {2: Config(64, 128, 32, 8, 3), 4: Config(32, 128, 32, 8, 3), 8: Config(16, 128, 16, 8, 2)}


def default_config(x: Tensor, configs: Configs, fallback: dict[int, Config] = FALLBACK) -> Config:
    """Pick the Config for the device and the dtype of `x`, or the fallback, which fits any chip."""
    if x.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        return configs.get((capability, x.element_size()), fallback[x.element_size()])
    return fallback[x.element_size()]


def loads_vectors(x: Tensor) -> bool:
    """Whether Triton can load 16 elements of `x` at once; if not, the addresses of single elements fill registers."""
    return x.data_ptr() % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in x.stride())


def interpreted(kernel: object) -> bool:
    """Whether `kernel` runs in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return not isinstance(kernel, triton.JITFunction)


def processors(x: Tensor) -> int:
    """Count the multiprocessors of the device of `x`; 1 without a GPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def low_rank_operands(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Return both contiguous, padded with zeros to a rank that Triton loads in vectors, and that rank (0 for None)."""
    if pair is None:
        return None, None, 0
    R = triton.cdiv(pair[0].shape[1], 16) * 16
    hidden2, weight2 = (x.contiguous() if x.shape[1] == R else F.pad(x, (0, R - x.shape[1])) for x in pair)
    return hidden2, weight2, R


@triton.jit
def grouped_program_ids(pid, row_blocks, columns, GROUP_N: tl.constexpr):
    """Return the row block and the column of program `pid`: GROUP_N row blocks by all columns, then the next group.

    The hidden states of a group and the weight tiles that it works on fit into L2 together.
    """
    group = pid // (GROUP_N * columns)
    group_size = tl.minimum(row_blocks - group * GROUP_N, GROUP_N)
    pid = pid % (GROUP_N * columns)
    return group * GROUP_N + pid % group_size, pid // group_size


@triton.jit
def accumulate_tile(
    z,  # [BLOCK_N, BLOCK_V]
    a_ptr,  # [N, K]
    b_ptr,  # [V, K]
    offs_n,  # [BLOCK_N]
    offs_v,  # [BLOCK_V]
    stride_an,
    stride_ak,
    stride_bv,
    stride_bk,
    N,
    V,
    K,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return z + a[offs_n] @ b[offs_v].T in ACC; past the edges it repeats the last row and the last column."""
    # Clamping takes fewer registers than masking. int64, because n * stride_an passes 2^31 in a slice of a long batch,
    # and v * stride_bv (or k * stride_bk of a transposed weight) does at V=262144, K=8192
    offs_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_v = tl.minimum(offs_v, V - 1).to(tl.int64)
    for k_start in range(0, K, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        offs_k = offs_k.to(tl.int64)
        a_ptrs = a_ptr + offs_n[:, None] * stride_an + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_v[None, :] * stride_bv + offs_k[:, None] * stride_bk
        a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        if UPCAST:
            a = a.to(ACC)
            b = b.to(ACC)
        z = tl.dot(a, b, z, input_precision="ieee", out_dtype=ACC)
    return z


@triton.jit
def add_bias(z, bias_ptr, offs_v, V):
    """Return z + bias[offs_v], or z without a bias."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + tl.minimum(offs_v, V - 1)).to(z.dtype)[None, :]
    return z


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
    """Return z[offs_n, offs_v] in ACC, without the low-rank part; past the edges it repeats the last row and column."""
    z = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    z = accumulate_tile(
        z, hidden_ptr, weight_ptr, offs_n, offs_v, stride_hn, stride_hd, stride_wv, stride_wd, N, V, D,
        ACC, UPCAST, BLOCK_D,
    )  # fmt: skip
    return add_bias(z, bias_ptr, offs_v, V)


@triton.jit
def add_low_rank(
    z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return z + hidden2[offs_n] @ weight2[offs_v].T, both contiguous, or z without a low-rank part."""
    if hidden2_ptr is not None:
        z = accumulate_tile(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, R, 1, R, 1, N, V, R, ACC, UPCAST, BLOCK_D)
    return z


@triton.jit
def tanh_and_slope(y):
    """Return tanh(y) and 1 - tanh(y)^2, both computed without cancellation."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(y))  # exp(-2 |y|)
    t = (1 - e) / (1 + e)
    slope = e * (1 + t) * (1 + t)  # 4 e / (1 + e)^2 without a division
    t = tl.where(y < 0, -t, t)
    if y.dtype == tl.float32:
        # For a small y, 1 - e is all rounding error, but the Taylor series to y^9 is exact to 1e-8
        y2 = y * y
        series = y * (1 + y2 * (-1 / 3 + y2 * (2 / 15 + y2 * (-17 / 315 + y2 * (62 / 2835)))))
        t = tl.where(y2 < 0.0625, series, t)
    return t, slope


@triton.jit
def store_dlogits_tile(
    dlogits_ptr,  # [N, V], out
    z,  # [BLOCK_N, BLOCK_V], raw logits
    targets_ptr,  # [N] int64, counted from the first column of the block
    others_ptr,  # [N] ACC
    dtarget_ptr,  # [N] ACC
    dothers_ptr,  # [N] ACC
    dentropy_ptr,  # [N] ACC, or None
    entropy_ptr,  # [N] ACC
    offs_n,  # [BLOCK_N]
    mask_n,  # [BLOCK_N]
    v_start,
    stride_dn,
    V,
    scale,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store the gradient of z in dlogits[offs_n, v_start:v_start + BLOCK_V]; see `linear_logprobs_backward`."""
    offs_v = v_start + tl.arange(0, BLOCK_V)
    LOG2E: tl.constexpr = 1.4426950408889634
    factor, slope = scale, scale
    if HAS_SOFTCAP:
        z, slope = tanh_and_slope(scale * z)
        factor = cap
        slope *= cap * scale
    others = tl.load(others_ptr + offs_n, mask=mask_n, other=float("inf"))
    log2_q = (factor * LOG2E) * z - (others * LOG2E)[:, None]  # one fused multiply-add: hardware raises 2 to a power
    q = tl.exp2(log2_q)
    dx = q * tl.load(dothers_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + offs_n, mask=mask_n, other=0.0)
        entropy = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
        # An impossible token has log q = -inf, but q log q = 0
        dx -= dentropy[:, None] * (q * (tl.where(q == 0, 0.0, log2_q / LOG2E) + entropy[:, None]))
    targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    # Few tiles hold a target; the others skip the comparisons
    if tl.max(((targets >= v_start) & (targets < v_start + BLOCK_V)).to(tl.int32), axis=0) > 0:
        dtarget = tl.load(dtarget_ptr + offs_n, mask=mask_n, other=0.0)
        dx = tl.where(offs_v.to(tl.int64)[None, :] == targets[:, None], dtarget[:, None], dx)
    dlogits = dx * slope

    # int64, because rows * stride_dn may pass 2^31
    dlogits_ptrs = dlogits_ptr + offs_n.to(tl.int64)[:, None] * stride_dn + offs_v[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_v < V)[None, :])

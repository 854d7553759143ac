"""The op in Triton: a fused forward kernel; in the backward, recomputed gradients of logits and vendor matmuls.

Matmuls, in units of 2 N D V FLOPs: forward 1; backward 1 to recompute the logits and 1 for each of dhidden and dweight.

Backward, vocabulary chunk by vocabulary chunk, and within it block of rows by block of rows:

    dlogits        = gradient of the raw logits [rows, chunk], in the dtype of the inputs
    dhidden[rows] += dlogits @ weight[chunk]                      float32 [N, D], rounded once, at the end
    dweight       += dlogits.T @ hidden[rows]                     float32 [chunk, D], rounded once, after the last rows

so the rows of dweight are finished one chunk at a time and no float32 buffer of V x D elements exists. (Float64 inputs
accumulate in float64.) There are no atomics and no synchronisation with the host; the same inputs give the same bits.

Shapes: N rows, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt

import torch
from torch import Tensor

from fastdpo.eager import Stats
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.linear_logprobs_forward import linear_logprobs_forward

WORKSPACE_BYTES = 256 * 2**20
"""Bound of the backward's workspace: one block of dlogits and one chunk of dweight's accumulator."""


@torch.no_grad()
def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute log-probabilities and log-sum-exps.

    Args:
        hidden: `[N, D]`, any strides.
        weight: `[V, D]`, any strides, the dtype and device of `hidden`.
        targets: `[N]` int64. A row whose target is outside [0, V) gets NaN.
        bias: `[V]`, or None.
        logit_scale: factor of the logits.
        softcap: bound of the soft-capped logits, or None.
        temperature: divisor of the logits.
        stats: compute `Stats` too.

    Returns:
        `logps [N]`, at most 0; `lse [N]` of the transformed logits; `Stats`, or None. float32, or float64 for float64
        inputs.
    """
    logps, lse, extra = linear_logprobs_forward(hidden, weight, targets, bias, logit_scale, softcap, temperature, stats)
    return logps, lse, None if extra is None else Stats(*extra)


@torch.no_grad()
def backward(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *,
    logps: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients that are needed, dense and exact.

    Args:
        dlogps: `[N]`, gradient of `logps`.
        hidden: `[N, D]`, as all that follows the argument of `forward`.
        weight: `[V, D]`.
        targets: `[N]` int64. A target outside [0, V) makes its row of dlogits NaN.
        bias: `[V]`, or None.
        lse: `[N]`, as `forward` returned it.
        logit_scale: factor of the logits.
        softcap: bound of the soft-capped logits, or None.
        temperature: divisor of the logits.
        needs_hidden: compute dhidden.
        needs_weight: compute dweight.
        needs_bias: compute dbias.
        logps: `[N]`, as `forward` returned it; if None, a second forward finds it. `lse` alone cannot tell the gradient
            of a confident target, 1 - p: rounded at 20, it is off by 1e-6.

    Returns:
        `dhidden [N, D]`, `dweight [V, D]`, `dbias [V]` in the dtypes of `hidden`, `weight`, `bias`; None where not
        needed.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dlogps = dlogps.to(acc).where((targets >= 0) & (targets < V), torch.nan)
    boost = _float16_boost(dlogps, logit_scale / temperature) if hidden.dtype == torch.float16 else None
    if boost is not None:
        dlogps = dlogps * boost
    rows, columns = _block_shape(N, V, D, hidden.element_size(), acc.itemsize)
    if logps is None:
        logps, _, _ = forward(hidden, weight, targets, bias, logit_scale, softcap, temperature, False)
    others = -torch.expm1(logps)

    workspace = hidden.new_empty(rows, _aligned(columns))
    dhidden = hidden.new_empty((N, D), dtype=acc) if needs_hidden else None
    dweight = weight.new_empty(weight.shape) if needs_weight else None
    dweight_sum = hidden.new_empty((columns, D), dtype=acc) if needs_weight else None
    dbias_sum = hidden.new_zeros(V, dtype=acc) if needs_bias else None

    with _ieee_matmul():
        for v in range(0, V, columns):
            chunk = slice(v, min(v + columns, V))
            for n in range(0, max(N, 1), rows):
                block = slice(n, min(n + rows, N))
                dlogits = workspace[: block.stop - n, : chunk.stop - v]
                linear_logprobs_backward(
                    dlogits, dlogps[block], hidden[block], weight[chunk], targets[block] - v,
                    None if bias is None else bias[chunk], lse[block], others[block],
                    logit_scale, softcap, temperature,
                )  # fmt: skip
                if dhidden is not None:
                    _matmul_into(dhidden[block], dlogits, weight[chunk], accumulate=v > 0)
                if dweight_sum is not None:
                    _matmul_into(dweight_sum[: chunk.stop - v], dlogits.T, hidden[block], accumulate=n > 0)
                if dbias_sum is not None:
                    dbias_sum[chunk] += dlogits.sum(0, dtype=acc)
            if dweight is not None and dweight_sum is not None:
                dweight[chunk] = _unboost(dweight_sum[: chunk.stop - v], boost)
    if dhidden is not None:
        dhidden = _unboost(dhidden, boost).to(hidden.dtype)
    dbias = None if dbias_sum is None else _unboost(dbias_sum, boost).to(hidden.dtype)
    return dhidden, dweight, dbias


def _block_shape(N: int, V: int, D: int, itemsize: int, acc_itemsize: int) -> tuple[int, int]:
    """Choose the rows and columns of a block of dlogits.

    Half of the workspace for the block, half for dweight's accumulator. The matmuls read and write their accumulators
    8 N V D (1 / rows + 1 / columns) bytes in all: the block is square, unless the accumulator wants it narrower.
    """
    half = WORKSPACE_BYTES // 2
    columns = min(_whole_tiles(min(isqrt(half // itemsize), half // (acc_itemsize * max(D, 1)))), V)
    rows = min(_whole_tiles(half // (itemsize * _aligned(columns))), max(N, 1))
    return rows, columns


def _whole_tiles(length: int) -> int:
    """Round down to a multiple of 256, from there up; at least 1."""
    return max(length // 256 * 256 if length >= 256 else length, 1)


def _aligned(columns: int) -> int:
    """Round up to a multiple of 64: the stride of dlogits that suits the matmuls."""
    return -(-columns // 64) * 64


def _float16_boost(dlogps: Tensor, slope: float) -> Tensor:
    """Return the power of two that brings the largest gradient of a logit to [2^14, 2^15), as a 0-dim tensor.

    Float16 ends at 2^16, and loses precision below 2^-14: a gradient of 1e-4 spread over 1e5 tokens would vanish.
    """
    largest = (dlogps * slope).abs().nan_to_num(0.0, 0.0)
    exponent = torch.cat([largest, largest.new_zeros(1)]).amax().frexp().exponent  # largest < 2^exponent
    return torch.ldexp(largest.new_ones(()), 15 - exponent.clamp(min=-100))


def _unboost(accumulator: Tensor, boost: Tensor | None) -> Tensor:
    return accumulator if boost is None else accumulator / boost


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    """Keep float32 matmuls in float32, whatever `torch.set_float32_matmul_precision` says."""
    matmul = torch.backends.cuda.matmul
    saved = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = saved


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """Compute `out = a @ b`, or `out += a @ b`, without rounding the product to the dtype of `a` first."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, beta=int(accumulate), out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), out=out)

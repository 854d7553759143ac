"""The op in plain PyTorch, on any device: tiles of logits that stay in cache, never `[N, V]` of them.

    z[n, v]  = transform(hidden[n] @ weight[v] + bias[v])
    lse[n]   = log sum_v exp(z[n, v])
    logps[n] = z[n, targets[n]] - lse[n]
    dz[n, v] = dlogps[n] * (1[v == targets[n]] - exp(z[n, v] - lse[n]))

Forward: online softmax (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867, Algorithm 3) over tiles of some rows by
some vocabulary entries. Backward: each tile is recomputed, turned into dz in place and multiplied into both gradients.
The vocabulary is the outer loop: a slice of dweight is finished before the next one begins.

The target stays out of the running sum: `1 - p` of a confident target is then a sum of small numbers, not a difference
of large ones.

Shapes: N rows, D hidden size, V vocabulary. Matmuls, in units of 2NDV FLOPs: forward 1, backward 1 + 1 per gradient.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.eager import Stats

WORKSPACE_BYTES = 256 * 2**20
"""Bound of what a call allocates besides its results and fp32 `[N, D]`."""
TILE = {"cpu": (1024, 1024), "cuda": (4096, 4096)}
"""Rows and vocabulary entries of a tile. CPU: 4 MiB of fp32, on a Zen 4 core the best of 1 to 16 MiB, by 3 %."""

MASKED = torch.finfo(torch.float32).min
"""Logit of an entry outside the sum. Finite, because 0 * MASKED must be 0."""


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
    """Compute logps `[N]` and lse `[N]`, in fp32 (fp64 for fp64 inputs), and `Stats` if asked.

    Arguments as `fastdpo.eager.linear_logprobs`, already checked. A row whose target is outside [0, V) becomes NaN.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    dtype, operand = _dtypes(hidden)
    rows, cols = _tile_shape(N, D, V, hidden)
    buffer = hidden.new_empty(rows * cols, dtype=dtype)
    alpha, beta = _scales(logit_scale, softcap, temperature)

    def per_row(value: float) -> Tensor:
        return hidden.new_full((N,), value, dtype=dtype)

    target_z = per_row(math.nan)
    m, s = per_row(MASKED / 2), per_row(0.0)  # running maximum, sum of e^(z - m); without the target
    if stats:
        spare = torch.empty_like(buffer)
        sum_dz, sum_sq = per_row(0.0), per_row(0.0)  # sums of e^(z - m) * (z - m) and e^(2 (z - m))
        sum_z, top, top_index = per_row(0.0), per_row(-math.inf), torch.full_like(targets, -1)

    with _ieee_matmul():
        for vs in _slices(V, cols):
            w, b = weight[vs].to(operand), None if bias is None else bias[vs].to(dtype)
            for rs in _slices(N, rows):
                z = _logits(hidden[rs].to(operand), w, b, buffer, alpha)
                if softcap is not None:
                    z.tanh_().mul_(beta)
                here, index = _locate(targets[rs], vs)
                if stats:
                    sum_z[rs] += z.sum(1)
                    tile_top, tile_index = z.max(1)  # the first maximum; an earlier tile wins a tie
                    top_index[rs] = torch.where(tile_top > top[rs], tile_index + vs.start, top_index[rs])
                    top[rs] = torch.maximum(top[rs], tile_top)

                picked = z.gather(1, index)
                target_z[rs] = torch.where(here, picked, target_z[rs, None]).squeeze(1)
                z.scatter_(1, index, picked.masked_fill(here, MASKED))

                old = m[rs].clone()
                m[rs] = torch.maximum(old, z.amax(1))
                shift = old - m[rs]
                z.sub_(m[rs, None])
                e = torch.exp(z, out=_view(spare, z) if stats else z)
                decay = shift.exp()
                if stats:
                    sum_dz[rs] = decay * (sum_dz[rs] + s[rs] * shift) + z.mul_(e).sum(1)
                    sum_sq[rs] = decay.square() * sum_sq[rs] + torch.square(e, out=z).sum(1)
                s[rs] = decay * s[rs] + e.sum(1)

    logps = F.logsigmoid(target_z - m - s.log())
    lse = target_z - logps
    if not stats:
        return logps, lse, None
    p, shift = logps.exp(), m - target_z + logps  # m - lse, without the rounding of lse
    scale = shift.exp()
    return (
        logps,
        lse,
        Stats(
            entropy=-scale * (s * shift + sum_dz) - p * logps,
            log_sum_sq_probs=(scale.square() * sum_sq + p.square()).log(),
            mean_logits=sum_z / V,
            is_top1=top_index == targets,
        ),
    )


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
    """Compute dhidden `[N, D]`, dweight `[V, D]` and dbias `[V]`, each in its input's dtype, None where not needed.

    `dlogps [N]` is the gradient of logps; `lse [N]` and `logps [N]` come from `forward`, as the rest. Without `logps`
    the gradient of a target of probability p is only as exact as lse lets 1 - p be: some 1e-7 * |lse|.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    dtype, operand = _dtypes(hidden)
    rows, cols = _tile_shape(N, D, V, hidden)
    buffer = hidden.new_empty(rows * cols, dtype=dtype)
    tanh_squared = torch.empty_like(buffer) if softcap is not None else buffer
    rounded = torch.empty_like(buffer, dtype=operand) if operand != dtype else buffer

    alpha, beta = _scales(logit_scale, softcap, temperature)
    lse = lse.unsqueeze(1)
    target_minus_one = None if logps is None else torch.expm1(logps).unsqueeze(1)
    invalid = (targets < 0) | (targets >= V)
    scale = (-logit_scale / temperature * dlogps.to(dtype)).masked_fill(invalid, math.nan).unsqueeze(1)

    dhidden = hidden.new_empty(N, D, dtype=dtype) if needs_hidden else None
    dweight = weight.new_empty(V, D) if needs_weight else None
    dbias = weight.new_zeros(V, dtype=dtype) if needs_bias else None

    with _ieee_matmul():
        for vs in _slices(V, cols):
            w, b = weight[vs].to(operand), None if bias is None else bias[vs].to(dtype)
            dw = None if dweight is None else dweight[vs]
            if dw is not None and dw.dtype != dtype:
                dw = torch.empty_like(dw, dtype=dtype)
            for rs in _slices(N, rows):
                h = hidden[rs].to(operand)
                z = _logits(h, w, b, buffer, alpha)
                if softcap is not None:
                    tanh_sq = torch.square(z.tanh_(), out=_view(tanh_squared, z))
                    z.mul_(beta)

                here, index = _locate(targets[rs], vs)
                z.sub_(lse[rs])
                minus_one = torch.expm1(z.gather(1, index)) if target_minus_one is None else target_minus_one[rs]
                z.exp_()
                z.scatter_(1, index, torch.where(here, minus_one, z.gather(1, index)))
                z.mul_(scale[rs])  # z is now scale * (p - onehot)
                if softcap is not None:
                    z.addcmul_(z, tanh_sq, value=-1)

                if dbias is not None:
                    dbias[vs] += z.sum(0)
                dz = z if operand == dtype else _view(rounded, z).copy_(z)
                if dhidden is not None:
                    _addmm(dhidden[rs], dz, w, beta=float(vs.start > 0))
                if dw is not None:
                    _addmm(dw, dz.t(), h, beta=float(rs.start > 0))
            if dweight is not None and dw is not None and dw.dtype != dweight.dtype:
                dweight[vs] = dw

    return (
        dhidden.to(hidden.dtype) if dhidden is not None else None,
        dweight,
        dbias.to(weight.dtype) if dbias is not None else None,
    )


def _dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of logits and sums, and that of the operands of matmuls."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # only CUDA multiplies bf16 into fp32; gradients of logits would vanish in fp16
    return dtype, hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else dtype


def _tile_shape(N: int, D: int, V: int, hidden: Tensor) -> tuple[int, int]:
    """Return the rows and vocabulary entries of a tile: TILE, or less to stay within WORKSPACE_BYTES."""
    dtype, operand = _dtypes(hidden)
    max_rows, max_cols = TILE.get(hidden.device.type, TILE["cpu"])
    rows = max(1, min(N, max_rows))
    upcast = operand != hidden.dtype
    row_bytes = dtype.itemsize * D * upcast  # hidden
    col_bytes = dtype.itemsize * (2 * rows + D * (upcast + (dtype != hidden.dtype))) + operand.itemsize * rows
    fitting = (WORKSPACE_BYTES - rows * row_bytes) // col_bytes
    return rows, max(1, min(V, max_cols, fitting))


def _slices(total: int, size: int) -> Iterator[slice]:
    """Cut [0, total) into slices of `size`; one empty slice if there is nothing, so that sums are still written."""
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))


def _scales(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """Return alpha and beta: the transform is alpha * z, or beta * tanh(alpha * z) with a soft-cap."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view_as(like)


def _logits(h: Tensor, w: Tensor, b: Tensor | None, buffer: Tensor, alpha: float) -> Tensor:
    """alpha * (h @ w.T + b), in `buffer`."""
    z = buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
    if b is not None:
        z.copy_(b)
    _addmm(z, h, w.t(), alpha=alpha, beta=0.0 if b is None else alpha)
    return z


def _addmm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float) -> None:
    """out = beta * out + alpha * a @ b, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha, beta=beta)
    else:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)


def _locate(targets: Tensor, vs: slice) -> tuple[Tensor, Tensor]:
    """Say which rows `[R, 1]` have their target in this slice of the vocabulary, and where (0 if not)."""
    here = (targets >= vs.start) & (targets < vs.stop)
    return here.unsqueeze(1), torch.where(here, targets - vs.start, 0).unsqueeze(1)


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    """Keep fp32 matmuls in IEEE fp32, whatever `torch.set_float32_matmul_precision` says."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision

"""Log-probabilities of a linear head without logits: arguments checked, implementation chosen, op registered.

    logps[n] = log softmax(transform(hidden[n] @ weight.T + bias))[targets[n]]

`transform` is, in this order: z * logit_scale, softcap * tanh(z / softcap), z / temperature.

Shapes: N rows, D hidden size, V vocabulary.
"""

import logging
import math
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fastdpo import eager
from fastdpo.eager import Stats

Impl = Literal["auto", "eager", "torch", "triton"]
Backward = Literal["auto", "exact"]

IMPLS = ("auto", "eager", "torch", "triton")
BACKWARDS = ("auto", "exact")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger("fastdpo")


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
    backward: Backward = "auto",
) -> Tensor:
    """Compute the log-probability of every row's target, without ever holding `[N, V]` logits.

    Differentiable once with respect to `hidden`, `weight` and `bias`; only the gradients asked for are computed.
    Under `torch.autocast` these three are cast as `F.linear` would cast them.

    Args:
        hidden: `[N, D]`, float64, float32, bfloat16 or float16, any strides.
        weight: `[V, D]`, dtype and device of `hidden`.
        targets: `[N]` int64 in [0, V).
        bias: `[V]`, dtype and device of `hidden`.
        logit_scale: factor of the raw logits, finite and not 0.
        softcap: bound of the soft-capped logits, above 0; None for no soft-cap.
        temperature: divisor of the logits, above 0.
        impl: "triton" (CUDA, or TRITON_INTERPRET=1), "torch" (any device), "eager" (`[N, V]` logits in the dtype of
            the inputs, for tests) or "auto": triton on CUDA if it can be imported, else torch.
        backward: "exact" computes dense gradients; so does "auto".

    Returns:
        `[N]` float32 (float64 for float64 inputs), in nats, never above 0. Logits are not rounded below float32.

    Raises:
        ValueError: an argument breaks a rule above. On CUDA a target outside [0, V) cannot be seen without waiting for
            the device: there its row, and every gradient it takes part in, is NaN.
    """
    return _compute(hidden, weight, targets, bias, logit_scale, softcap, temperature, impl, backward, False)[0]


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
    backward: Backward = "auto",
) -> tuple[Tensor, Stats]:
    """Compute `linear_logprobs` and the statistics of each row's distribution, in the same pass over the vocabulary.

    Arguments and errors as `linear_logprobs`.

    Returns:
        The log-probabilities and `Stats`: entropy, log_sum_sq_probs and mean_logits `[N]` in their dtype, is_top1 `[N]`
        bool. The statistics are detached: no gradient flows through them.
    """
    logps, stats = _compute(hidden, weight, targets, bias, logit_scale, softcap, temperature, impl, backward, True)
    return logps, Stats(*(stat.detach() for stat in stats))


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    backward: str,
    stats: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Check, then compute the log-probabilities and, if asked, the four statistics."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check_tensors(hidden, weight, targets, bias)
    _check_options(logit_scale, softcap, temperature, impl, backward)
    transform = float(logit_scale), None if softcap is None else float(softcap), float(temperature)

    if impl == "eager":
        if not torch.compiler.is_compiling():
            _check_targets(targets, weight.shape[0])
        logps, _, values = eager.linear_logprobs(hidden, weight, targets, bias, *transform, stats)
        dtype = _result_dtype(hidden)
        return logps.to(dtype), tuple(v.to(dtype) if v.is_floating_point() else v for v in values or ())
    logps, _, *outputs = linear_logprobs_op(hidden, weight, targets, bias, *transform, impl, stats)
    return logps, tuple(outputs)


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Check ranks, sizes, dtypes and devices."""
    tensors = [("hidden", hidden, 2, "[N, D]"), ("weight", weight, 2, "[V, D]"), ("targets", targets, 1, "[N]")]
    if bias is not None:
        tensors.append(("bias", bias, 1, "[V]"))
    for name, tensor, ndim, layout in tensors:
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
        if tensor is not targets and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must have a dtype among {', '.join(map(str, DTYPES))}, got {hidden.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must have dtype torch.int64, got {targets.dtype}")

    (N, D), (V, weight_D) = hidden.shape, weight.shape
    if weight_D != D:
        raise ValueError(f"weight must have the D of hidden, {D}, got {weight_D} (shape {tuple(weight.shape)})")
    if targets.shape[0] != N:
        raise ValueError(f"targets must have the N of hidden, {N}, got {targets.shape[0]}")
    if bias is not None and bias.shape[0] != V:
        raise ValueError(f"bias must have the V of weight, {V}, got {bias.shape[0]}")
    if V == 0:
        raise ValueError(f"weight must have at least one vocabulary entry, got shape {tuple(weight.shape)}")


def _check_options(logit_scale: float, softcap: float | None, temperature: float, impl: str, backward: str) -> None:
    """Check everything that is not a tensor."""
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or finite and above 0, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}, got {backward!r}")


def _check_targets(targets: Tensor, V: int) -> None:
    """Check the range of targets, unless that would wait for a device."""
    if targets.device.type != "cpu":
        return
    outside = (targets < 0) | (targets >= V)
    if outside.any():
        n = int(outside.int().argmax())
        raise ValueError(f"targets must be in [0, V) = [0, {V}), got {int(targets[n])} at position {n}")


@cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: linear_logprobs runs on CUDA in PyTorch.")
    return found


def _implementation(impl: str, device: torch.device) -> ModuleType:
    """Import the module of fastdpo.impl that serves `impl` on `device`."""
    if impl == "torch" or (impl == "auto" and not (device.type == "cuda" and _has_triton())):
        return import_module("fastdpo.impl.torch")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"impl='triton' needs tensors on CUDA, or Triton's interpreter (TRITON_INTERPRET=1 in the environment), "
            f"got tensors on {device}"
        )
    return import_module("fastdpo.impl.triton")  # only here: not every platform has Triton


def _result_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastdpo::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logps, lse and the four statistics, which are empty unless asked for."""
    _check_targets(targets, weight.shape[0])
    module = _implementation(impl, hidden.device)
    logps, lse, values = module.forward(hidden, weight, targets, bias, logit_scale, softcap, temperature, stats)
    if values is None:
        values = (*(logps.new_empty(0) for _ in range(3)), logps.new_empty(0, dtype=torch.bool))
    return logps, lse, *values


@linear_logprobs_op.register_fake
def _(hidden: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, stats = options
    N, dtype = hidden.shape[0], _result_dtype(hidden)
    dtypes = (dtype, dtype, dtype, dtype, dtype, torch.bool)
    return tuple(hidden.new_empty(N if i < 2 or stats else 0, dtype=dtype) for i, dtype in enumerate(dtypes))


@torch.library.custom_op("fastdpo::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward_op(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logps: Tensor,
    lse: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias; those not needed are empty."""
    module = _implementation(impl, hidden.device)
    grads = module.backward(
        dlogps, hidden, weight, targets, bias, lse, logit_scale, softcap, temperature,
        needs_hidden, needs_weight, needs_bias, logps=logps,
    )  # fmt: skip
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return dhidden, dweight, dbias


@linear_logprobs_backward_op.register_fake
def _(dlogps: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, needs_hidden, needs_weight, needs_bias = options
    (N, D), V = hidden.shape, weight.shape[0]
    wanted = ((needs_hidden, (N, D)), (needs_weight, (V, D)), (needs_bias, (V,)))
    return tuple(hidden.new_empty(shape if needed else 0) for needed, shape in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.options, _ = inputs
    logps, lse, *_ = output
    ctx.save_for_backward(hidden, weight, targets, bias, logps, lse)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dlogps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs_hidden, needs_weight, _, needs_bias, *others = ctx.needs_input_grad
    needs = needs_hidden, needs_weight, needs_bias
    grads = linear_logprobs_backward_op(dlogps, *ctx.saved_tensors, *ctx.options, *needs)
    dhidden, dweight, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dhidden, dweight, None, dbias, *(None for _ in others)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("fastdpo.linear_logprobs can be differentiated once, not twice: do not use create_graph=True")


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward_op.register_autograd(_no_double_backward)

"""Attention on a grid as one operation that torch.compile does not look into.

The grid of a batch has as many buckets, of such sizes, as its lengths want, so code that is compiled with them in it
would be compiled again for almost every batch. Here they are data: the operation reads them when it runs. Its backward
computes the attention again, because an operation can keep nothing but tensors for it.

Shapes: T rows, H query heads, G key-value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.model.attention.backends import attend
from fastdpo.model.attention.key_paths import Paths


def tensors_of(paths: Paths) -> list[Tensor]:
    """Return the tensors of the paths, which are all that a grid is made of."""
    return [x for x in paths if isinstance(x, Tensor)]


def attend_on_grid(
    paths: Paths,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend as `fastdpo.model.attention.backends.attend` does with the backend `grid`; it has the same arguments."""
    out: Tensor = _attend(query, key, value, sinks, tensors_of(paths), scaling, window, softcap)
    return out


def _on_grid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    paths = Paths(*tensors[:3], 0, 0, *tensors[3:])  # a grid reads no longest length
    return attend("grid", paths, query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=sinks)


@torch.library.custom_op("fastdpo::attend_on_grid", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return _on_grid(query, key, value, sinks, tensors, scaling, window, softcap)


@torch.library.custom_op("fastdpo::attend_on_grid_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    # the dispatcher calls this below autograd, which is needed here
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        sinks = inputs[3] if len(inputs) > 3 else None
        out = _on_grid(inputs[0], inputs[1], inputs[2], sinks, tensors, scaling, window, softcap)
        return [x.contiguous() for x in torch.autograd.grad(out, inputs, grad)]


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query, key, value, sinks) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, sinks, tensors, *ctx.options = inputs
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(query, key, value, *([sinks] if ctx.has_sinks else []), *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, *tensors = ctx.saved_tensors
    sinks = tensors.pop(0) if ctx.has_sinks else None
    grads = _attend_backward(grad, query, key, value, sinks, tensors, *ctx.options)
    return (*grads[:3], grads[3] if ctx.has_sinks else None, [None] * len(tensors), None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)

"""Attention over key paths as one operation that torch.compile does not look into.

The lengths of a batch's segments decide the shapes in attention. Code that is compiled with them in it would be
compiled again for almost every batch, and a CUDA graph of it recorded again. Here they are data that the operation
reads when it runs, so the code around it depends on nothing but the number of rows. Its backward computes the
attention again, because an operation can keep nothing but tensors for it.

Shapes: T rows, H query heads, G key-value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.model.attention.backends import attend
from fastdpo.model.attention.key_paths import Paths


def attend_opaquely(
    name: str,
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
    """Attend as `fastdpo.model.attention.backends.attend` does; the arguments are the same."""
    out: Tensor = _attend(query, key, value, sinks, list(paths), name, scaling, window, softcap)
    return out


def _plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    paths: Sequence[Tensor],
    name: str,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return attend(
        name, Paths(*paths), query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=sinks
    ).contiguous()


# a CUDA graph would repeat the lengths of the batch that it was recorded with, so torch leaves this out of it
@torch.library.custom_op("fastdpo::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    paths: Sequence[Tensor],
    name: str,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return _plainly(query, key, value, sinks, paths, name, scaling, window, softcap)


@torch.library.custom_op("fastdpo::attend_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    paths: Sequence[Tensor],
    name: str,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for part in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, part))
    # the dispatcher calls this below autograd, which is needed here
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        sinks = inputs[3] if len(inputs) > 3 else None
        out = _plainly(inputs[0], inputs[1], inputs[2], sinks, paths, name, scaling, window, softcap)
        return [x.contiguous() for x in torch.autograd.grad(out, inputs, grad)]


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query, key, value, sinks) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, sinks, paths, *ctx.options = inputs
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(query, key, value, *([sinks] if ctx.has_sinks else []), *paths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, *paths = ctx.saved_tensors
    sinks = paths.pop(0) if ctx.has_sinks else None
    grads = _attend_backward(grad, query, key, value, sinks, paths, *ctx.options)
    return (*grads[:3], grads[3] if ctx.has_sinks else None, [None] * len(paths), *[None] * len(ctx.options))


_attend.register_autograd(_backward, setup_context=_keep)

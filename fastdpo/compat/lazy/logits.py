"""Logits that are not computed: a stand-in that a model returns, and that answers what trainers ask of logits.

Inside a block of `fastdpo.compat.lazy.heads`, the LM head of a model returns `LazyLogits` in place of a tensor.
Indexing, views, scales, soft-caps and temperatures only change the description of what the stand-in stands for.
Log-probabilities of targets, cross-entropy, entropy and means come from the fused head. A function that this module
does not know gets the logits after all, and a line in the log says so, once for each function.

Shapes: N rows of the head, D hidden size, V vocabulary, `[*]` any shape.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdpo.compat.lazy.call import PLAIN, HeadCall, Transform, each
from fastdpo.head.eager import Stats
from fastdpo.head.impl.interface import result_dtype
from fastdpo.model.body_and_head import CHUNK_BYTES

logger = logging.getLogger("fastdpo")

DIM_AT = {"index_select": 0, "unbind": 0, "chunk": 1, "split": 1}
"""Functions that select rows along a dimension, and the place of that dimension among the arguments after the first."""
REDUCTIONS = {"argmax", "logsumexp", "amax"}
"""Functions of a row that are computed for a chunk of rows at a time."""


@dataclass(eq=False)
class LazyLogits:
    """Stands for logits `[*, V]`, or for a multiple of their log-softmax, of some rows of one call of a head."""

    head: HeadCall
    rows: Tensor
    """`[*]` int64: which rows of the call."""
    transform: Transform = PLAIN
    log_softmax_times: float | None = None
    """None for logits; else this multiple of the log-softmax."""
    detached: bool = False
    version: int = 0
    """The version of the call that this stands for; other views of a tensor would have changed with it."""

    # What a tensor of this shape would say

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.head.operands[1].shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return result_dtype(self.head.operands[0])

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self.head.grad and not self.detached

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["LazyLogits"]:
        return (replace(self, rows=rows) for rows in self.rows)

    def needs_grad(self) -> bool:
        return self.requires_grad and torch.is_grad_enabled()

    # What is asked of it

    def __getitem__(self, index: Any) -> Any:
        return _call(torch.Tensor.__getitem__, self, index)

    def __mul__(self, other: Any) -> Any:
        return _call(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return _call(torch.div, self, other)

    def __add__(self, other: Any) -> Any:
        return _call(torch.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _call(torch.sub, self, other)

    def __neg__(self) -> Any:
        return _call(torch.neg, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"LazyLogits has no attribute {name!r}")
        method = getattr(torch.Tensor, name)
        if callable(method):
            return lambda *args, **kwargs: _call(method, self, *args, **kwargs)
        return getattr(self.realise(name), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = kwargs.pop("input"), *args
        return _call(func, *args, **kwargs)

    # What it answers with

    def logps(self, targets: Tensor) -> Tensor:
        """Return the log-probs of `targets` `[*]`, differentiable if the head's call was."""
        logps, _ = self.head.score(self.rows.flatten(), targets.flatten(), self.transform)
        return self._own(logps)

    def statistics(self) -> Stats:
        """Return `Stats` of `[*]` other than `is_top1`; the entropy is differentiable if the head's call was."""
        return each(self.head.statistics(self.rows.flatten(), self.transform), self._own)

    def means(self) -> Tensor:
        """Return the mean over the vocabulary `[*]`, differentiable if the head's call was."""
        if self.transform.factor is None:
            return self._own(self.head.mean_logits(self.rows.flatten()) * self.transform.scale)
        return self.in_chunks(lambda logits: logits.mean(-1)) if self.needs_grad() else self.statistics().mean_logits

    def realise(self, asked: str) -> Tensor:
        """Compute what this stands for, `[*, V]`, and log once that the function `asked` made it necessary."""
        _say_realised(asked)
        return self._own(self._values(self.rows.flatten())).view(self.shape)

    def in_chunks(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the last dimension of a chunk of rows at a time; a chunk is computed again in the backward."""
        rows = self.rows.flatten()
        size = max(CHUNK_BYTES // (8 * self.shape[-1]), 1)
        grad = self.needs_grad()

        def chunk(rows: Tensor) -> Tensor:
            return reduce(self._values(rows))

        parts = [checkpoint(chunk, r, use_reentrant=False) if grad else chunk(r) for r in rows.split(size)]
        return self._own(torch.cat(parts))

    def _values(self, rows: Tensor) -> Tensor:
        logits = self.head.logits(rows, self.transform)
        return logits if self.log_softmax_times is None else self.log_softmax_times * logits.log_softmax(-1)

    def _own(self, flat: Tensor) -> Tensor:
        if self.version != self.head.version:
            raise RuntimeError("logits are used of which a view was changed in place after fastdpo.patch_trl()")
        flat = flat.detach() if self.detached else flat
        return flat.view(*self.rows.shape, *flat.shape[1:])


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch whose arguments hold `LazyLogits`."""
    name = func.__name__
    if args and isinstance(args[0], LazyLogits) and not any(isinstance(x, LazyLogits) for x in args[1:]):
        answer = _answer(name, func, *args, **kwargs)
        if answer is not NotImplemented:
            return answer
    args = tuple(x.realise(name) if isinstance(x, LazyLogits) else x for x in args)
    return func(*args, **{k: x.realise(name) if isinstance(x, LazyLogits) else x for k, x in kwargs.items()})


def _answer(name: str, func: Any, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Answer without logits, or return NotImplemented."""
    raw = x.log_softmax_times is None
    if name in ("mul_", "div_") and raw:
        changed = _answer(name[:-1], func, x, *args, **kwargs)
        if isinstance(changed, LazyLogits):
            x.head.version += 1
            x.transform, x.version = changed.transform, x.head.version
            return x
    if name in ("contiguous", "float") or (name == "to" and _same_dtype_and_device(x, *args, **kwargs)):
        return x
    if name == "detach":
        return replace(x, detached=True)
    if name == "__getitem__":
        index = _of_rows(args[0], x.ndim)
        return NotImplemented if index is None else replace(x, rows=x.rows[index])
    if name in DIM_AT:
        return _along_a_dim(name, func, x, *args, **kwargs)
    if name in ("view", "reshape") and not kwargs:
        return _reshape(x, *args)
    if name == "flatten":
        return _flatten(x, *args, **kwargs)
    if name in ("mul", "div", "true_divide") and len(args) == 1 and not kwargs and isinstance(args[0], Real):
        factor = float(args[0]) if name == "mul" else 1 / float(args[0])
        if x.log_softmax_times is not None:
            return replace(x, log_softmax_times=x.log_softmax_times * factor)
        return replace(x, transform=x.transform.times(factor)) if factor > 0 else NotImplemented
    if name == "tanh" and raw and x.transform.factor is None:
        return replace(x, transform=Transform(x.transform.scale, 1.0))
    if name == "log_softmax" and raw and _is_last(x, *args, **kwargs):
        return replace(x, log_softmax_times=1.0)
    if name == "gather":
        return _gather(x, *args, **kwargs)
    if name in REDUCTIONS and _is_last(x, *args, **kwargs):
        if name == "logsumexp" and x.log_softmax_times == 2 and not x.needs_grad():
            return x.statistics().log_sum_sq_probs  # WPO's weight
        return x.in_chunks(lambda logits: func(logits, -1))
    if name == "cross_entropy" and raw and x.ndim == 2:
        return _cross_entropy(x, *args, **kwargs)
    if name in ("mean", "sum", "nansum") and raw and not kwargs and args in ((), (-1,)):
        means = x.means() * (1 if name == "mean" else x.shape[-1])
        return means if args else getattr(means, name)()
    if name.endswith("_") and not name.endswith("__"):
        raise RuntimeError(f"{name} changes logits in place, which they cannot after fastdpo.patch_trl()")
    return NotImplemented


def _is_last(x: LazyLogits, dim: int | None = None, keepdim: bool = False, **kwargs: Any) -> bool:
    """Whether a function works along the last dimension, which it drops if it reduces, and nothing else is asked."""
    wanted = {k: v for k, v in kwargs.items() if k != "_stacklevel" and v not in (None, x.dtype)}
    return isinstance(dim, int) and dim % x.ndim == x.ndim - 1 and not keepdim and not wanted


def _same_dtype_and_device(x: LazyLogits, *args: Any, **kwargs: Any) -> bool:
    """Whether `x.to(...)` leaves `x` as it is."""
    return {*args, *kwargs.values()} <= {x.dtype, x.device, x.device.type}


def _of_rows(index: Any, ndim: int) -> Any:
    """Return the part of an index that selects rows, or None if the index selects among the vocabulary too."""
    index = index if isinstance(index, tuple) else (index,)

    def covers(part: Any) -> int:
        return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else int(part is not None)

    places = [i for i, part in enumerate(index) if part is Ellipsis]
    after = index[places[0] + 1 :] if places else ()
    if any(after) if places else sum(map(covers, index)) == ndim:
        *index, last = index
        return tuple(index) if isinstance(last, slice) and last == slice(None) else None
    return index


def _along_a_dim(name: str, func: Any, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    place = DIM_AT[name]
    dim = kwargs.pop("dim", args[place] if len(args) > place else 0) % x.ndim
    if dim == x.ndim - 1:
        return NotImplemented
    found = func(x.rows, *args[:place], dim, *args[place + 1 :], **kwargs)
    return replace(x, rows=found) if isinstance(found, Tensor) else tuple(replace(x, rows=rows) for rows in found)


def _reshape(x: LazyLogits, *sizes: Any) -> Any:
    *before, last = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if last != x.shape[-1] and not (last == -1 and torch.Size(before).numel() == x.rows.numel()):
        return NotImplemented
    return replace(x, rows=x.rows.reshape(*before))


def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    end = end_dim % x.ndim
    return NotImplemented if end == x.ndim - 1 else replace(x, rows=x.rows.flatten(start_dim % x.ndim, end))


def _gather(x: LazyLogits, dim: int, index: Tensor, **kwargs: Any) -> Any:
    one_each = dim % x.ndim == x.ndim - 1 and index.shape == (*x.rows.shape, 1)
    if x.log_softmax_times is None or not one_each or kwargs:
        return NotImplemented
    return x.log_softmax_times * x.logps(index.squeeze(-1)).unsqueeze(-1)


def _cross_entropy(
    x: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if weight is not None or size_average is not None or reduce is not None or label_smoothing or target.ndim != 1:
        return NotImplemented
    counted = target != ignore_index
    losses = -x.logps(target.where(counted, 0)).where(counted, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (counted.sum() if reduction == "mean" else 1)


@cache
def _say_realised(asked: str) -> None:
    logger.warning(
        "patch_trl: logits are computed as before, because they are given to %s, which fastdpo's head cannot serve",
        asked,
    )

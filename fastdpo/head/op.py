"""The head as a custom op of PyTorch, with its fake implementation and its autograd formula.

The op returns `target` and `others` of `fastdpo.head.impl.interface` and the statistics of the other tokens, from which
`fastdpo.head.linear_logprobs` makes log-probabilities. It also returns what the forward keeps for the backward, so that
torch.compile sees all memory in use.
"""

import logging
import os
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head import autotune
from fastdpo.head.impl import sparsity
from fastdpo.head.impl.interface import (
    Forward,
    Grads,
    Keep,
    Kept,
    LinearHead,
    Needs,
    OtherStats,
    Transform,
    result_dtype,
)

logger = logging.getLogger("fastdpo")


class Arguments(NamedTuple):
    """The op's arguments, in order."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    hidden2: Tensor | None  # [N, R]
    weight2: Tensor | None  # [V, R]
    scale: float  # fields of Transform
    cap: float | None
    impl: str
    stats: bool
    needs: list[bool]  # fields of Needs, for which the forward keeps tensors; autograd decides what is computed
    sparse: bool  # compute gradients from the active cells only,
    exact_weight: bool  # but those of weight, bias and weight2 from all cells
    vocab_start: int  # token with which weight begins,
    vocab_size: int  # in a vocabulary of this many tokens
    workspace: int
    trial: str  # key of the trial of autotune that this call is part of; "" if none

    @property
    def local_targets(self) -> Tensor:
        return self.targets - self.vocab_start if self.vocab_start else self.targets

    @property
    def head(self) -> LinearHead:
        return LinearHead(self.weight, self.bias, self.weight2, Transform(self.scale, self.cap))

    @property
    def module(self) -> ModuleType:
        return implementation(self.impl, self.hidden.device)

    @property
    def keep(self) -> Keep:
        """What the forward keeps.

        A sparse backward needs shares. Without them, a frozen head keeps `expected`. A trained head keeps probs, unless
        the gradients of its weights are sparse too.
        """
        needs = Needs(*self.needs)
        trained = needs.weight or needs.bias or needs.weight2
        N, V = self.hidden.shape[0], self.weight.shape[0]
        T = self.module.cell_columns(self.hidden.device) if self.sparse else None
        # exact gradients of weights compute all cells: then the shares only speed up the matmul of dhidden
        shares = T is not None and any(needs) and (needs.hidden or needs.hidden2 or not self.exact_weight)
        if T is not None and shares and N * -(-V // T) * self.hidden.element_size() > self.workspace // 2:
            shares = False
        return Keep(
            expected=any(needs) and not trained and not shares,
            shares=shares,
            probs=trained and not (shares and not self.exact_weight),
        )


ARGUMENTS = (
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? hidden2, Tensor? weight2, float scale, "
    "float? cap, str impl, bool stats, bool[] needs, bool sparse, bool exact_weight, "
    "int vocab_start, int vocab_size, int workspace, str trial"
)
STATS = len(OtherStats._fields)
RESULTS = 2 + STATS + len(Kept._fields)


def results_of(outputs: list[Tensor], stats: bool) -> Forward:
    """Sort the op's outputs into a `Forward`; kept tensors are 2-dimensional, placeholders are not."""
    target, others, *rest = outputs
    kept = (t if t.ndim == 2 else None for t in rest[STATS:])
    return Forward(target, others, OtherStats(*rest[:STATS]) if stats else None, Kept(*kept))


@torch.library.custom_op(
    "fastdpo::linear_logprobs", mutates_args=(), schema=f"{ARGUMENTS}) -> ({', '.join(['Tensor'] * RESULTS)})"
)
def linear_logprobs_op(*args: Any) -> tuple[Tensor, ...]:
    """Return target, others, the fields of `OtherStats` and of `Kept`; those not asked for are empty tensors."""
    a = Arguments(*args)
    check_targets(a.targets, a.vocab_size)
    with autotune.timed(a.trial, a.impl, "forward", a.hidden):
        target, others, stats, kept = a.module.forward(
            a.hidden, a.hidden2, a.local_targets, a.head, a.stats, a.keep, a.workspace
        )
    optional = (*(stats or [None] * STATS), *kept)
    return target, others, *(target.new_empty(0) if t is None else t for t in optional)


@linear_logprobs_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args)
    kept = a.module.kept_like(a.hidden, a.head, a.keep, a.workspace)

    def per_row(size: int) -> Tensor:
        return a.hidden.new_empty(size, dtype=result_dtype(a.hidden))

    N = a.hidden.shape[0]
    per_rows = [per_row(N), per_row(N), *(per_row(N if a.stats else 0) for _ in range(STATS))]
    return *per_rows, *(per_row(0) if t is None else t for t in kept)


@torch.library.custom_op(
    "fastdpo::linear_logprobs_backward",
    mutates_args=(),
    schema=f"{ARGUMENTS}, Tensor[] results, Tensor dtarget, Tensor dothers, Tensor? dentropy) -> "
    f"({', '.join(['Tensor'] * len(Needs._fields))})",
)
def linear_logprobs_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients that `needs` asks for; the others are empty tensors."""
    *forward_args, results, dtarget, dothers, dentropy = args
    a = Arguments(*forward_args)
    result = results_of(results, a.stats)
    if dentropy is not None:  # kept tensors only give the gradient of a log-probability
        result = result._replace(kept=Kept())
    selection = chosen = None
    if result.kept.shares is not None:
        chosen = sparsity.select(result.kept.shares, dothers)
        selection = None if sparsity.too_dense(chosen) else chosen
    with autotune.timed(a.trial, a.impl, "backward", a.hidden):
        grads = a.module.backward(
            Grads(dtarget, dothers, dentropy), a.hidden, a.hidden2, a.local_targets, a.head, result, Needs(*a.needs),
            selection, a.exact_weight, a.workspace,
        )  # fmt: skip
    if chosen is not None:
        sparsity.remember(density_key(a.hidden, a.weight), chosen)
    return tuple(dtarget.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@linear_logprobs_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args[: len(Arguments._fields)])
    inputs = a.hidden, a.weight, a.bias, a.hidden2, a.weight2
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and needed
        else a.hidden.new_empty(0)
        for t, needed in zip(inputs, a.needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = Arguments(*inputs)
    # `expected`, if the implementation kept it, replaces hidden, unless a gradient of the entropy may need hidden
    replaced = results_of(list(output), a.stats).kept.expected is not None and not a.stats
    hidden, hidden2 = (None, None) if replaced else (a.hidden, a.hidden2)
    ctx.save_for_backward(hidden, *inputs[1:4], hidden2, a.weight2, *output)
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)
    _, _, entropy, *rest = output
    ctx.mark_non_differentiable(*rest, *([] if a.stats else [entropy]))


def _backward(ctx: Any, dtarget: Tensor | None, dothers: Tensor | None, dentropy: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors  # read once, because each access unpacks the tensors
    a, results = Arguments(*saved[:6], *ctx.options), saved[6:]
    if a.hidden is None:
        N = len(a.targets)
        hidden2 = None if a.weight2 is None else a.weight2.new_empty(N, a.weight2.shape[1])
        a = a._replace(hidden=a.weight.new_empty(N, a.weight.shape[1]), hidden2=hidden2)
    hidden, weight, _, bias, hidden2, weight2, *others = ctx.needs_input_grad
    needs = Needs(hidden, weight, bias, hidden2, weight2)
    if not any(needs) or (dtarget is None and dothers is None and dentropy is None):
        return (None,) * len(Arguments._fields)
    zero = torch.zeros_like(results[0])
    args = (
        *a._replace(needs=list(needs)), list(results), zero if dtarget is None else dtarget,
        zero if dothers is None else dothers, dentropy,
    )  # fmt: skip
    grads = linear_logprobs_backward_op(*args)
    dhidden, dweight, dbias, dhidden2, dweight2 = (g if n else None for g, n in zip(grads, needs, strict=True))
    return dhidden, dweight, None, dbias, dhidden2, dweight2, *(None for _ in others)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("fastdpo.linear_logprobs can be differentiated once, not twice: do not use create_graph=True")


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward_op.register_autograd(_no_double_backward)


def check_targets(targets: Tensor, V: int) -> None:
    """Check the range of targets on the CPU; elsewhere a check would wait for the device."""
    if targets.device.type != "cpu":
        return
    outside = (targets < 0) | (targets >= V)
    if outside.any():
        n = int(outside.int().argmax())
        raise ValueError(f"targets must be in [0, V) = [0, {V}), got {int(targets[n])} at position {n}")


def implementation(impl: str, device: torch.device) -> ModuleType:
    """Import the module of fastdpo.head.impl that serves `impl` on `device`."""
    if impl == "torch" or (impl == "auto" and not (device.type == "cuda" and autotune.has_triton())):
        return import_module("fastdpo.head.impl.torch")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"impl={impl!r} needs tensors on CUDA, or Triton's interpreter (TRITON_INTERPRET=1 in the environment), "
            f"got tensors on {device}"
        )
    return import_module(
        f"fastdpo.head.impl.{'triton' if impl == 'auto' else impl}"
    )  # imported late: Triton may be missing


def density_key(hidden: Tensor, weight: Tensor) -> sparsity.Key:
    """Return the key under which `sparsity` remembers the density of this head."""
    return hidden.device, hidden.dtype, tuple(weight.shape)

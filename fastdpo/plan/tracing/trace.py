"""Run a training step on fake tensors, which have shapes and dtypes but no memory, and count the bytes of storages.

Two steps of different size give, for each operation i of the step, the bytes alive after it as a straight line in the T
rows of the packed batch:

    alive[i](T) = fixed[i] + per_row[i] * T

Attention, head and experts are stand-ins (`fastdpo.plan.tracing.stand_ins`).
"""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.model.adapted_layers import base_linear
from fastdpo.model.attention.backends import Usable
from fastdpo.model.scoring_forward import find_head
from fastdpo.plan.tracing.stand_ins import HeadMemory, grouped_mm

# a model that loops over tokens is refused after the small batches; the large ones would take minutes
PROBED_ROWS = (32, 64)
TRACED_ROWS = (1024, 2048)


class Ratios(NamedTuple):
    """What a batch holds for each of its rows."""

    paths: float
    """K / T: entries of the key paths, for which attention gathers keys and values."""
    targets: float
    """M / T: completion tokens."""
    grid: float
    """Places of the padded grid, which attention without a variable-length kernel uses, divided by T."""


@dataclass
class Place:
    """Where a traced step is."""

    part: int = 0
    """See `Operation`."""
    layer: int = -1
    """See `Operation`."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of the weights and of autocast; None if autocast is off."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.weights


class Setting(NamedTuple):
    """What all traces of a training have in common; `chosen` collects the attention backends of the layers.

    `place` says where the step is; others may set its layer.
    """

    ratios: Ratios
    precision: Precision
    accumulates: bool
    runs_reference: bool
    backends: Usable
    chosen: set[str]
    place: Place


class Operation(NamedTuple):
    """An operation of a traced step."""

    alive: int
    """Bytes alive after it, without the persistent ones."""
    workspaces: int
    """See `Moment`."""
    in_backward: bool
    part: int
    """0 in the policy's forward, 1 in that of the reference, 2 in the backward."""
    name: str
    """What it computes, and the bytes of its results."""
    layer: int
    """Number of the layer that it belongs to, if layers are watched; -1 outside of them."""


class Moment(NamedTuple):
    """Bytes alive after an operation, without the persistent ones, as a straight line in the rows."""

    per_row: float
    fixed: float
    workspaces: int
    """Number of the head's workspaces alive: one that it keeps for its backward, one in which it works."""
    in_backward: bool = False


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed."""

    def __init__(self, known: Iterator[Tensor], alive: int, place: Place) -> None:
        super().__init__()
        self.alive, self.workspaces, self.place = alive, 0, place
        self.operations: list[Operation] = []
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_grouped = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        out = (grouped_mm if is_grouped else func)(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._count(tensor.untyped_storage())
        name = f"{func} {[tensor.nbytes for tensor in made]}"
        part, layer = self.place.part, self.place.layer
        self.operations.append(Operation(self.alive, self.workspaces, part == 2, part, name, layer))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def trace(
    model: Any, reference: Any | None, rows: int, setting: Setting, *, stops_at_head: bool = False
) -> tuple[list[Operation], int]:
    """Run a step on fake tensors; return its operations, and the bytes that the body of the model keeps.

    With `stops_at_head` it runs only the body of the model, which takes a fifth of the time.
    """
    ratios, precision = setting.ratios, setting.precision
    known = [x for each in (model, reference) if each is not None for x in (*each.parameters(), *each.buffers())]
    alive = 0
    for parameter in model.parameters():
        parameter.grad = None
        if setting.accumulates and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
            alive += parameter.grad.nbytes
    layer = {
        "memory_paths": torch.zeros(round(rows * ratios.paths), dtype=torch.int64),
        "memory_grid": torch.zeros(round(rows * ratios.grid), dtype=torch.int64),
        "memory_backends": setting.backends,
        "memory_chosen": setting.chosen,
    }
    place = setting.place
    place.part, place.layer = 0, -1
    with Live(iter(known), alive, place) as live:
        ids = torch.zeros(1, rows, dtype=torch.int64)
        index = torch.zeros(round(rows * ratios.targets), dtype=torch.int64)

        def body(scored: Any) -> tuple[Tensor, Any]:
            head, mask = find_head(scored), torch.ones_like(ids)
            out = head.decoder(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, **layer)
            return out[0][0], base_linear(head.linears[-1])  # the last one is the copy that is trained, if there is one

        with torch.autocast("cpu", precision.autocast) if precision.autocast else nullcontext():
            hidden, lm_head = body(model)
            kept = live.alive
            if stops_at_head:
                return live.operations, kept
            scores = _score(hidden, index, lm_head, precision, live)
            del hidden
            place.part = 1
            if setting.runs_reference:
                with torch.no_grad():
                    hidden, lm_head = body(model if reference is None else reference)
                    _score(hidden, index, lm_head, precision, live)
                    del hidden
        place.part = 2
        scores.sum().backward()
    return live.operations, kept


def _score(hidden: Tensor, index: Tensor, lm_head: nn.Linear, precision: Precision, live: Live) -> Tensor:
    weight = lm_head.weight.to(precision.compute)
    if not torch.is_grad_enabled():  # an autograd function would take a trained weight for one that needs a gradient
        weight = weight.detach()
    scores: Tensor = HeadMemory.apply(hidden.index_select(0, index).to(precision.compute), weight, live)
    return scores


def make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU, where autocast works; tied weights stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # a kept tensor's id is not reused
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]


def upper_envelope(moments: set[Moment]) -> tuple[Moment, ...]:
    """Return the moments that have the most bytes at some number of rows, for each number of workspaces.

    Moments of the forward and of the backward are kept apart, because they grow differently with the number of layers.
    """
    envelope: list[Moment] = []
    for kind in sorted({m[2:] for m in moments}):
        hull: list[Moment] = []
        for line in sorted(m for m in moments if m[2:] == kind):
            # the last line is nowhere the highest: `line` is above it, or passes the one before it earlier
            while hull and (
                line.fixed >= hull[-1].fixed or (len(hull) > 1 and _meet(hull[-2], line) <= _meet(hull[-2], hull[-1]))
            ):
                hull.pop()
            hull.append(line)
        envelope += hull
    return tuple(envelope)


def _meet(a: Moment, b: Moment) -> float:
    """Return the number of rows at which b, the steeper line, reaches a."""
    return (a.fixed - b.fixed) / (b.per_row - a.per_row)


def line_of(small: Operation, large: Operation) -> Moment:
    """Return the straight line through one operation's bytes in two steps."""
    per_row = (large.alive - small.alive) / (TRACED_ROWS[1] - TRACED_ROWS[0])
    return Moment(per_row, large.alive - per_row * TRACED_ROWS[1], large.workspaces, large.in_backward)

"""Trace a step of a model with few layers and continue it to all of its layers, if these are alike.

Where layers repeat each other, possibly with a period of several, one more period adds the same operations to each
part of a step: to the forward of the policy, to that of the reference and to the backward. An operation of the first
layers is found in a deeper model by its place from the part's beginning, one of the last layers by that from its end,
and the bytes alive after it are a straight line in the number of periods. Those of layers in between are between them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdpo.model.scoring_forward import decoder_layers, find_head
from fastdpo.plan.tracing.trace import PROBED_ROWS, Operation, Place, Setting, trace

PERIODS = (3, 4)
"""Numbers of periods that are traced."""


class Stack(NamedTuple):
    """The layers of a decoder, which repeat each other."""

    owner: nn.Module
    name: str
    layers: nn.ModuleList
    period: int

    @property
    def periods(self) -> int:
        return len(self.layers) // self.period

    def cut(self, periods: int) -> None:
        """Leave only the first layers in the decoder, which then runs no others."""
        setattr(self.owner, self.name, self.layers[: periods * self.period])


class Traced(NamedTuple):
    """A step for one number of rows."""

    operations: list[Operation]
    """Where layers are alike, not all of them, but those after which most bytes are alive."""
    kept: int
    """Bytes that the forward of the body keeps for the backward."""
    by_layer: tuple[int, ...] = ()
    """The part of each of `decoder_layers`; empty where layers are alike."""


def traces(model: Any, reference: Any | None, sizes: Sequence[int], setting: Setting) -> list[Traced]:
    """Run a step for each number of rows.

    Args:
        model: as in `fastdpo.plan.tracing.trace.trace`.
        reference: as in `fastdpo.plan.tracing.trace.trace`.
        sizes: numbers of rows.
        setting: as in `fastdpo.plan.tracing.trace.trace`.

    Raises:
        ValueError: the operations depend on the number of rows.
    """
    stacks = stacks_of(model, reference)
    for stack in stacks:
        stack.cut(PERIODS[0])
    for each in filter(None, (model, reference)):
        _check_alike(each, [trace(each, None, n, setting, stops_at_head=True)[0] for n in PROBED_ROWS])
    if stacks:
        steps = []
        for periods in PERIODS:
            for stack in stacks:
                stack.cut(periods)
            with _watching(stacks, setting.place):
                steps.append([trace(model, reference, n, setting) for n in sizes])
        whole = stacks[0].periods
        for stack in stacks:
            stack.cut(whole)
        continued = [
            Traced(_continued(few, more, whole), _line(few_kept, more_kept, whole))
            for (few, few_kept), (more, more_kept) in zip(*steps, strict=True)
        ]
        if all(step.operations for step in continued):
            return continued
    layers = decoder_layers(model)
    with _inside(layers, setting.place):
        found = [trace(model, reference, n, setting) for n in sizes]
    _check_alike(model, [operations for operations, _ in found])
    return [Traced(operations, kept, _kept_by(len(layers), operations)) for operations, kept in found]


def _check_alike(model: Any, steps: Sequence[Sequence[Operation]]) -> None:
    if len({len(operations) for operations in steps}) > 1:
        raise ValueError(f"{type(model).__name__} does not run the same operations on batches of different sizes")


def stacks_of(*models: Any) -> list[Stack]:
    """Return the layers of the models that are not None; nothing if those of one of them do not repeat each other."""
    stacks = [_stack(find_head(model).decoder) for model in models if model is not None]
    found = [stack for stack in stacks if stack is not None]
    return found if len(found) == len(stacks) and len({stack.periods for stack in found}) == 1 else []


def _stack(decoder: nn.Module) -> Stack | None:
    depth = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [
        (module, name, child)
        for module in decoder.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(lists) != 1:
        return None
    owner, name, layers = lists[0]
    kinds = [_kind(layer) for layer in layers]
    for period in range(1, len(layers) // (sum(PERIODS) + 1) + 1):  # a longer one saves no time
        if len(layers) % period == 0 and kinds[period:] == kinds[:-period]:
            return Stack(owner, name, layers, period)
    return None


def _kind(layer: nn.Module) -> list[Any]:
    """Return what decides what a layer computes, except its number: the settings and weights of all its modules."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = {key: x for key, x in vars(module).items() if isinstance(x, (bool, int, float, str, type(None)))}
        found += [name, type(module), {key: x for key, x in plain.items() if key not in ("layer_idx", "layer_id")}]
        found += [(key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False)]
    return found


@contextmanager
def _watching(stacks: Sequence[Stack], place: Place) -> Iterator[None]:
    """Inside the block, `place` has the layer that an operation belongs to, also in the backward."""

    def enter(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            place.layer = layer
            hidden = args[0] if args else kwargs.get("hidden_states")
            if layer == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(place, "layer", -1))

        return hook

    def leave(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if place.part == 2:  # checkpointing computes the layer again, and its backward follows
                return
            place.layer = -1
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(place, "layer", layer))

        return hook

    handles = []
    for stack in stacks:
        for number, layer in enumerate(stack.layers):
            handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
            handles.append(layer.register_forward_hook(leave(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inside(layers: Sequence[nn.Module], place: Place) -> Iterator[None]:
    """Inside the block, `place` has the layer that an operation of a forward belongs to."""
    outer: list[int] = []
    handles = []
    for number, layer in enumerate(layers):

        def enter(*_: Any, number: int = number) -> None:
            outer.append(place.layer)
            place.layer = number

        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(lambda *_: setattr(place, "layer", outer.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept_by(count: int, operations: Sequence[Operation]) -> tuple[int, ...]:
    """Return the bytes that the policy's forward has more after each layer than before it."""
    kept = [0] * count
    for group, after in pairwise(_by_layer([each for each in operations if each.part == 0])):
        if group[0].layer >= 0:
            kept[group[0].layer] += after[0].alive - group[0].alive
    return tuple(kept)


def _continued(few: Sequence[Operation], more: Sequence[Operation], periods: int) -> list[Operation]:
    """Continue steps of `PERIODS` periods to all of them; return nothing if they differ by more than operations."""
    found: list[Operation] = []
    for part in sorted({operation.part for operation in few}):
        a, b = (_by_layer([each for each in step if each.part == part]) for step in (few, more))
        added = len(b) - len(a)
        first = next((i for i, group in enumerate(a) if group[0].layer >= 0), len(a))
        for i, group in enumerate(a):
            # the first two periods count from the beginning, the last two from the end; the one between counts as both
            for j in [i] * (i < first + 2 * added) + [i + added] * (i >= first + added):
                other = b[j]
                if [x[1:5] for x in group] != [y[1:5] for y in other]:
                    return []
                found += [x._replace(alive=_line(x.alive, y.alive, periods)) for x, y in zip(group, other, strict=True)]
    return found


def _by_layer(operations: Sequence[Operation]) -> list[list[Operation]]:
    return [list(group) for _, group in groupby(operations, key=lambda operation: operation.layer)]


def _line(few: int, more: int, periods: int) -> int:
    first, second = PERIODS
    return few + (periods - first) * (more - few) // (second - first)

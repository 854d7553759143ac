"""Metrics under TRL's names, summed on the device and read once per logging step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Sum(NamedTuple):
    """A weighted total over all processes since the last read."""

    total: float
    weight: float


class RunningSums:
    """Weighted sums by name. Adding costs no synchronisation; reading costs one collective and one synchronisation."""

    def __init__(self) -> None:
        self._on_device: dict[str, Tensor] = {}  # [2] float32 each: total, weight
        self._on_host: dict[str, Sum] = {}

    def add(self, name: str, values: Tensor, weight: Tensor | None = None) -> None:
        """Count in `values` (any shape): each element once, or their sum as `weight` (a scalar) elements."""
        total = values.detach().sum(dtype=torch.float32)
        # filled on the device: torch.tensor(number, device=...) would wait for it
        weight = torch.full_like(total, values.numel()) if weight is None else weight.float()
        entry = torch.stack([total, weight])
        self._on_device[name] = self._on_device[name] + entry if name in self._on_device else entry

    def add_number(self, name: str, total: float, weight: float = 1.0) -> None:
        """Count in a number that is known on the host."""
        old = self._on_host.get(name, Sum(0.0, 0.0))
        self._on_host[name] = Sum(old.total + total, old.weight + weight)

    def read(self, accelerator: Accelerator) -> dict[str, Sum]:
        """The sums over all processes, which must have added the same names; starts afresh."""
        names = [*sorted(self._on_device), *sorted(self._on_host)]
        entries = [self._on_device[name] for name in sorted(self._on_device)]
        entries += [
            torch.tensor(self._on_host[name], dtype=torch.float32, device=accelerator.device)
            for name in sorted(self._on_host)
        ]
        self._on_device.clear()
        self._on_host.clear()
        if not names:
            return {}
        sums: Any = accelerator.reduce(torch.stack(entries), reduction="sum")
        return {name: Sum(*entry) for name, entry in zip(names, sums.tolist(), strict=True)}


class NonFiniteGuard:
    """Stops training at the first loss or gradient norm that is not a number.

    On the CPU it raises at once, before the backward or the optimizer step. On an accelerator the verdict is copied
    to the host without waiting for it and read when it has arrived, one or two steps later; `check_now` waits.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.Event | None, Callable[[], str]]] = []

    def watch(self, value: Tensor, what: Callable[[], str]) -> None:
        """Check the scalar `value`, now or as soon as it has reached the host; `what()` names it in the error."""
        finite = torch.isfinite(value.detach())
        event = None
        if finite.device.type != "cpu":
            finite = finite.to("cpu", non_blocking=True)
            event = torch.Event(value.device)
            event.record()
        self._pending.append((finite, event, what))
        self._raise(wait=False)

    def check_now(self) -> None:
        """Wait for all pending verdicts: before anything is written to disk."""
        self._raise(wait=True)

    def _raise(self, *, wait: bool) -> None:
        while self._pending:
            finite, event, what = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._pending.pop(0)
            if not finite:
                raise FloatingPointError(
                    f"{what()} is not finite. Training stopped; checkpoints on disk are unharmed. Usual causes: a "
                    "learning rate too high, fp16 overflow (use bf16), or weights that were not finite to begin with."
                )

"""The stop at a loss or gradient norm that is not a number."""

from collections.abc import Callable

import torch
from torch import Tensor


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

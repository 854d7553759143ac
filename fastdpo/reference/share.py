"""Measure how much of a training's time the reference takes, and say when precomputing it would pay."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger("fastdpo")

ENOUGH_STEPS = 20
"""Steps after which a run's time can be told ahead."""
WORTH_SAYING = 60.0
"""Seconds that the reference must take in a run for the log to say more than its share."""


class ReferenceTime:
    """Adds up the time that the reference takes in training, without waiting for the device while it works.

    Args:
        device: where the reference runs; on any device but the CPU, events on it are timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_step: int | None = None
        """Optimizer steps that were finished when the reference ran first; None if it has not run."""
        self.share: float | None = None
        """Share of the time between the last two logs; None before the first."""
        self._on_host, self._is_said = device.type == "cpu", False
        self._device, self._seconds, self._logged = device, 0.0, 0.0
        self._spans: deque[tuple[Any, Any]] = deque()  # those that the device may not have finished

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Count the time of the block, unless it raises.

        Args:
            step: number of finished optimizer steps.
        """
        start = self._now()
        yield
        self._spans.append((start, self._now()))
        self.first_step = step if self.first_step is None else self.first_step
        self._collect(waits=False)  # so that the events of a run that never logs are not kept

    def _now(self) -> Any:
        if self._on_host:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _collect(self, *, waits: bool) -> None:
        while self._spans and (self._on_host or waits or self._spans[0][1].query()):
            start, end = self._spans.popleft()
            if self._on_host:
                self._seconds += end - start
            else:
                end.synchronize()
                self._seconds += start.elapsed_time(end) / 1e3

    def seconds(self) -> float:
        """Return the seconds of all blocks; waits until the device has finished them."""
        self._collect(waits=True)
        return self._seconds

    def since_log(self) -> float:
        """Return the seconds since the last call of `log`; waits like `seconds`."""
        return self.seconds() - self._logged

    def restore(self, seconds: float) -> None:
        """Count the seconds since the last log that an earlier process has measured."""
        self._logged = -seconds

    def log(self, seconds: float) -> dict[str, float]:
        """Return the metric `reference/share`, nothing if the reference has not run; waits like `seconds`.

        Args:
            seconds: time of the training since the last call.
        """
        if self.first_step is None or seconds <= 0:
            return {}
        self.share = self.since_log() / seconds
        self._logged = self._seconds
        return {"reference/share": self.share}

    def advise(self, step: int, epoch: float, max_steps: int, *, ends: bool) -> None:
        """Log when precomputing would pay, once, if the reference takes enough of the run's time to say so.

        Args:
            step: number of finished optimizer steps.
            epoch: passes over the data that these steps have made.
            max_steps: optimizer steps of the run.
            ends: whether the run ends here; else nothing is said before `ENOUGH_STEPS`.
        """
        steps = 0 if self.first_step is None else step - self.first_step
        if self._is_said or self.share is None or steps < (1 if ends else ENOUGH_STEPS):
            return
        of_run, epochs = self.seconds() / steps * max_steps, max_steps * epoch / step
        if of_run < WORTH_SAYING or epochs <= 0:
            return
        self._is_said = True
        logger.info(
            "reference: it takes %.0f %% of the time, about %s of this run. precompute_ref_log_probs=True would "
            "compute it once, in about %s, for all epochs and for later runs on these rows, and pays %s",
            *(100 * self.share, _about(of_run), _about(of_run / epochs), when_it_pays(epochs)),
        )


def when_it_pays(epochs: float) -> str:
    """Return when one pass of the reference over the data costs less than those of runs of so many epochs, above 0."""
    runs = math.floor(1 / epochs + 1e-6) + 1  # one epoch may be a little more, after rounding
    return f"in this run of {epochs:.3g} epochs" if runs == 1 else f"with {runs} such runs, or with a second epoch"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

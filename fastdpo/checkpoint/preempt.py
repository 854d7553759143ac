"""The signals with which a scheduler announces that it will stop a job: save first, then exit.

This module needs only the standard library, so that the command line can import it at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from fastdpo.settings.failures import is_ours, name_of

EXIT_CODE = 143
"""The exit code after a checkpoint was saved because of a signal; the usual code of a process that SIGTERM ended."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
_TWICE_SECONDS = 1.0
"""A launcher passes on the signal that its processes get themselves too, so a signal this soon after is the same."""


class Preempted(SystemExit):
    """A signal came, and a checkpoint was saved; it ends the process with `EXIT_CODE` unless it is caught."""

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_CODE)
        self.signum = signum


class Request:
    """Whether one of `SIGNALS` came to this process."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._at = 0.0

    def __str__(self) -> str:
        return "a signal to another process" if self.signum is None else name_of(self.signum)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """Note the first signal; at the second one, end the process at once."""
        if self.signum is None:
            self.signum, self._at = signum, time.monotonic()
        elif time.monotonic() - self._at > _TWICE_SECONDS:
            os._exit(128 + signum)


_noted: list[Request] = []


@contextlib.contextmanager
def noted() -> Iterator[Request]:
    """Inside the block, `SIGNALS` are noted and do nothing else, until a second one ends the process at once.

    A handler that the user's program installed stays, and so does a signal that is ignored, as SIGHUP under nohup.
    Outside of the main thread no signal can be handled.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {}
    for signum in SIGNALS:
        handler = signal.getsignal(signum)
        if handler is signal.SIG_DFL or is_ours(handler):
            before[signum] = signal.signal(signum, request.handle)
    _noted.append(request)
    try:
        yield request
    finally:
        _noted.remove(request)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _leave_signals_to_the_parent() -> None:
    """Ignore the signals in data-loading workers: a scheduler sends them to all, but the parent needs its workers."""
    if _noted:
        for signum in SIGNALS:
            if getattr(signal.getsignal(signum), "__self__", None) in _noted:
                signal.signal(signum, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_signals_to_the_parent)

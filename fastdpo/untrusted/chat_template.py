"""Bound the time, memory and output of a chat template, which is a program of whoever made the model.

transformers runs it in jinja's sandbox, so it reads and writes nothing but its arguments. But nested loops or a doubled
text can still take hours or all memory.
"""

import faulthandler
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

try:
    import resource
except ImportError:  # Windows: memory is not bounded
    resource = None  # type: ignore[assignment]

SECONDS = 10.0
"""CPU time for one rendering; that of a long conversation takes milliseconds."""
_AT_LAST = 6
"""After this multiple of `SECONDS` the process is ended: an operation of the interpreter can't be interrupted."""
HEADROOM = 4 * 2**30
"""Bytes by which the process may grow in one rendering; more than other threads allocate at the same time."""
MAX_TEMPLATE = 2**20
"""Most characters of a template; the longest in use have about 30,000."""
_FREE, _RATIO = 2**22, 16
"""A rendered text may have `_FREE` characters and `_RATIO` times those of its messages."""
_STATM = "/proc/self/statm"
_PAGE = 0 if resource is None else resource.getpagesize()
_HAS_STATM = resource is not None and os.path.exists(_STATM)


class TooMuch(ValueError):
    """Raised for a chat template that takes too much time or memory, or writes too much."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside the block, at most `SECONDS` of this thread's CPU time and `HEADROOM` bytes of new memory can be used.

    Memory is bounded on Linux only. A single operation of the interpreter, such as a comparison of lists that are
    nested in each other many times, raises nothing until it has ended; if it takes too long, the operating system ends
    the process with SIGVTALRM, after a traceback has been written to stderr.

    Raises:
        TooMuch: the time is over, from within the block.
        MemoryError: the memory is used up, from within the block.
    """
    with _memory(HEADROOM), _ended(_AT_LAST * SECONDS), _alarm(SECONDS) if _has_alarm() else _traced(SECONDS):
        yield


@contextmanager
def _ended(seconds: float) -> Iterator[None]:
    """End the process after so much CPU time of its own, unless the program uses this timer for something else."""
    if (
        not hasattr(signal, "setitimer")
        or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL
        or signal.getitimer(signal.ITIMER_VIRTUAL)[0]
    ):
        yield
        return
    _say_where()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@cache
def _say_where() -> None:
    """Let SIGVTALRM write the traceback before it ends the process; a program without a stderr does without."""
    if sys.__stderr__ is None:
        return
    with suppress(io.UnsupportedOperation, ValueError, RuntimeError):
        faulthandler.register(signal.SIGVTALRM, file=sys.__stderr__, all_threads=False, chain=True)


def _has_alarm() -> bool:
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise from a signal handler; a timer that someone else has set goes on afterwards."""
    started, clock = time.thread_time(), time.monotonic()

    def ring(*_: Any) -> None:
        if time.thread_time() - started >= seconds:  # else the machine is slow, or the process was stopped
            raise TooMuch(_too_slow(seconds))

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - clock), 1e-6), interval)


@contextmanager
def _traced(seconds: float) -> Iterator[None]:
    """Raise from a trace function: signals reach the main thread alone."""
    end = time.thread_time() + seconds

    def check(*_: Any) -> Any:
        if time.thread_time() > end:
            raise TooMuch(_too_slow(seconds))
        return check

    if sys.gettrace() is not None:  # a debugger
        yield
        return
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(None)


def _too_slow(seconds: float) -> str:
    return f"it takes more than {seconds:g} s of CPU time"


@contextmanager
def _memory(headroom: int) -> Iterator[None]:
    if not _HAS_STATM:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    file = os.open(_STATM, os.O_RDONLY)  # this block is entered for each row, and takes some 20 microseconds
    limit = int(os.read(file, 32).split()[0]) * _PAGE + headroom
    os.close(file)
    others = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *others]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_length(text: str, messages: Any, tools: Any) -> None:
    """Check that a rendered text is not out of proportion to what was rendered.

    Raises:
        TooMuch: it is.
    """
    if len(text) > _FREE and len(text) > _FREE + _RATIO * len(str((messages, tools))):
        raise TooMuch(f"it writes {len(text):,} characters")

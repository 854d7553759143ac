"""Show fastdpo's log messages in the terminal by default, each once, above any progress bar."""

import logging
import os
import sys
from typing import Any

from tqdm import tqdm

from fastdpo.untrusted.text import printable

_logger = logging.getLogger("fastdpo")


def write_line(text: str) -> None:
    """Write a line to stderr, above the progress bars that are drawn there."""
    tqdm.write(printable(text), file=sys.stderr)


def show(*, debug: bool | None = None) -> None:
    """Show log messages to a user who has not configured logging.

    The first process shows level INFO and above, the others WARNING and above. If the user has handlers, now or later,
    they show the messages instead. In a script, a level that the user has set for the logger "fastdpo" is kept.

    Args:
        debug: whether the command line has `--debug`. True shows level DEBUG and above, and tracebacks of logged
            exceptions; False shows such an exception in one line. None, in a script, shows tracebacks.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    if debug is not None:
        _logger.setLevel(logging.DEBUG if debug else level)
    if _logger.hasHandlers():
        return
    handler = _Terminal()
    handler.setFormatter(_Formatter(tracebacks=debug is not False))
    _logger.addHandler(handler)
    if _logger.level == logging.NOTSET:
        _logger.setLevel(level)


class _Terminal(logging.Handler):
    """Writes a message unless another handler shows it."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*_logger.handlers, *(logging.getLogger().handlers if _logger.propagate else [])]
        if others == [self]:
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            write_line(f"{record.name}: {level}{self.format(record)}")


class _Formatter(logging.Formatter):
    """Shows a logged exception with its traceback, or as one line."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei) if self._tracebacks else f"{type(ei[1]).__name__}: {ei[1]}"

"""fastdpo's log messages on the terminal: shown by default, once, and above a progress bar."""

import logging
import os
import sys
from typing import Any

from tqdm import tqdm

_logger = logging.getLogger("fastdpo")


def write_line(text: str) -> None:
    """Write a line to stderr, above the progress bars that are drawn there."""
    tqdm.write(text, file=sys.stderr)


def show(*, debug: bool | None = None) -> None:
    """Show messages from INFO on to a user who has configured no logging; from WARNING on in all but the first process.

    Handlers of the user's own, present or added later, show the messages instead. A level that the user has set for
    the logger "fastdpo" is kept.

    Args:
        debug: of the command line: show messages from DEBUG on, and the traceback of an exception that is logged; False
            shows the exception in one line. None: a script's tracebacks are shown.
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
    """Writes what no other handler shows."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*_logger.handlers, *(logging.getLogger().handlers if _logger.propagate else [])]
        if others == [self]:
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            write_line(f"{record.name}: {level}{self.format(record)}")


class _Formatter(logging.Formatter):
    """Shows an exception that is logged by its traceback, or else by its message."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei) if self._tracebacks else f"{type(ei[1]).__name__}: {ei[1]}"

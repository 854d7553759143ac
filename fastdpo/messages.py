"""fastdpo's log messages on the terminal: shown by default, once, and above a progress bar."""

import logging
import os
import sys

from tqdm import tqdm

_logger = logging.getLogger("fastdpo")


def write_line(text: str) -> None:
    """Write a line to stderr, above the progress bars that are drawn there."""
    tqdm.write(text, file=sys.stderr)


def show() -> None:
    """Show messages from INFO on to a user who has configured no logging; from WARNING on in all but the first process.

    Handlers of the user's own, present or added later, show the messages instead. A level that the user has set for
    the logger "fastdpo" is kept.
    """
    if _logger.hasHandlers():
        return
    _logger.addHandler(_Terminal())
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


class _Terminal(logging.Handler):
    """Writes what no other handler shows."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*_logger.handlers, *(logging.getLogger().handlers if _logger.propagate else [])]
        if others == [self]:
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            write_line(f"{record.name}: {level}{self.format(record)}")

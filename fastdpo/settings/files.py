"""Where fastdpo keeps files of its own, and how it writes a file."""

import contextlib
import os
from pathlib import Path


def cache_home() -> Path:
    """The folder of all that later runs find again: $FASTDPO_CACHE, else ~/.cache/fastdpo."""
    return Path(os.environ.get("FASTDPO_CACHE", Path.home() / ".cache" / "fastdpo"))


def write_file(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or is as it was, whatever stops the process.

    Raises:
        OSError: it could not be written; nothing is left beside `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # processes may write the same file at once
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

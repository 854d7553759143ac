"""The folder of fastdpo's caches, and the function that writes a file atomically."""

import contextlib
import os
from pathlib import Path


def cache_home() -> Path:
    """Return the folder of all caches that later runs use: $FASTDPO_CACHE, else ~/.cache/fastdpo."""
    return Path(os.environ.get("FASTDPO_CACHE", Path.home() / ".cache" / "fastdpo"))


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: if the process is stopped, `path` holds all of `data` or is unchanged.

    Raises:
        OSError: the file could not be written; no temporary file is left behind.
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
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

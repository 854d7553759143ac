"""The folder of fastdpo's caches, and functions that write a file atomically."""

import contextlib
import os
import uuid
from pathlib import Path


def cache_home() -> Path:
    """Return the folder of all caches that later runs use: $FASTDPO_CACHE, else ~/.cache/fastdpo."""
    return Path(os.environ.get("FASTDPO_CACHE", Path.home() / ".cache" / "fastdpo"))


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: if the process is stopped, `path` holds all of `data` or is unchanged.

    Raises:
        OSError: the file could not be written; no temporary file is left behind.
    """
    # processes may write the same file at once; on several machines, or in containers, they may share a process id
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: a file could not be opened or written; for a folder this is ignored, as some file systems can't do it.
    """
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

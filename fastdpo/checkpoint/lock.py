"""One run at a time in an output folder, and no run over the results of another.

This module needs only the standard library.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastdpo.checkpoint.manifest import checkpoints
from fastdpo.checkpoint.write import remove, sweep

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".fastdpo.lock"
_RESULTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "trainer_state.json")
_held: dict[Path, IO[str]] = {}


@contextlib.contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block, no other process can enter it with the same folder.

    The operating system frees the lock of a process that was killed, also on another host if the file system is shared
    and supports locks. Data-loading workers do not inherit it.

    Raises:
        ValueError: another process has it; the message names its host and process id.
    """
    folder = Path(folder)
    path = folder.absolute() / LOCK
    if fcntl is None or path in _held:  # also a second trainer of this process, which runs after the first
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    if file is None:  # a file system without locks
        yield
        return
    _held[path] = file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is freed, so that nobody else's is removed
        _held.pop(path).close()


def _locked(path: Path) -> IO[str] | None:
    while True:
        file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"output_dir {str(path.parent)!r} is in use by another run ({owner}); give this run an output_dir of "
                "its own, or stop that process"
            ) from None
        except OSError:
            file.close()
            return None
        # its last owner may have removed the file after it was opened here
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def prepare_new_run(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a run that starts from the beginning does not mix its results with those of an earlier run.

    Args:
        folder: the run's `output_dir`, whose lock is held.
        overwrite: remove the checkpoints of an earlier run; its other files are replaced as this run writes them.

    Raises:
        ValueError: as `check_new_run`.
    """
    check_new_run(folder, overwrite=overwrite)
    sweep(folder)
    for path in checkpoints(folder).values():
        remove(path)


def check_new_run(folder: Path, *, overwrite: bool) -> None:
    """Change nothing, but raise what `prepare_new_run` would raise.

    Raises:
        ValueError: the folder has checkpoints or results of an earlier run, and `overwrite` is False.
    """
    old = checkpoints(folder)
    results = [name for name in _RESULTS if (folder / name).exists()]
    if not overwrite and old:
        raise ValueError(
            f"output_dir {str(folder)!r} has checkpoints of an earlier run, up to step {next(iter(old))}: continue it "
            "with resume_from_checkpoint=auto, or give another output_dir; overwrite_output_dir=True removes the "
            "checkpoints and starts from the beginning"
        )
    if not overwrite and results:
        raise ValueError(
            f"output_dir {str(folder)!r} has the results of an earlier run ({', '.join(results)}): give another "
            "output_dir, or replace them with overwrite_output_dir=True"
        )

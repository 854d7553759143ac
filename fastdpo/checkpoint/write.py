"""Write checkpoints and models beside their place, and move them there when they are complete and on the disk.

A folder that is being written has a hidden name, so that nothing takes it for a checkpoint; if the process is killed,
the next run removes it. This module needs only the standard library.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdpo.checkpoint.manifest import checkpoints
from fastdpo.settings.config_file import MANIFEST
from fastdpo.settings.files import sync

logger = logging.getLogger("fastdpo")

_SUFFIX = ".tmp"
_REPLACED = f".replaced{_SUFFIX}"


def unfinished(place: Path) -> Path:
    """Return the hidden folder in which `place` is written."""
    return place.with_name(f".{place.name}{_SUFFIX}")


def sweep(folder: Path) -> None:
    """Remove what a killed process has left unfinished in an output folder that no other process uses."""
    for path in folder.glob(f".checkpoint-*{_REPLACED}"):
        place = path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED))
        if not place.exists():
            logger.warning("%s is back, because the process was killed that was replacing it", place)
            os.rename(path, place)
    for path in (*folder.glob(f".checkpoint-*{_SUFFIX}"), *folder.glob(f".model{_SUFFIX}")):
        logger.info("removing %s, which was not written completely", path)
        shutil.rmtree(path, ignore_errors=True)


def move_into_place(written: Path, place: Path) -> None:
    """Rename a complete checkpoint to its name, and bring that to the disk.

    An older folder of the same name is removed once the new one has its name, and until then `sweep` finds it.
    """
    replaced = place.with_name(f".{place.name}{_REPLACED}")
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(place, replaced)
    os.rename(written, place)
    sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, so that a kill in the middle leaves a hidden folder and no damaged checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed{_SUFFIX}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, so that `limit` complete ones are left, among them the newest and the best.

    Incomplete folders are neither counted nor removed, because they could not replace a complete one.
    """
    if not limit or limit < 1:
        return
    complete = [path for path in checkpoints(folder).values() if (path / MANIFEST).is_file()]
    kept = {path for path in complete[:1] if path is not None}
    kept |= {path for path in complete if best is not None and path.name == Path(best).name}
    for path in reversed(complete[1:]):
        if len(complete) <= max(limit, len(kept)):
            return
        if path not in kept:
            complete.remove(path)
            remove(path)


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints of later steps than `after`, from which a run that resumes there does not continue."""
    for step, path in checkpoints(folder).items():
        if step > after:
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            logger.warning("%s is now %s, because this run continues from step %d", path, aside.name, after)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder whose files replace those of `folder` one by one when the block ends without an error.

    So a file of a saved model is the old one or the new one, never a part of it. Files of `folder` that have no
    successor stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / f".model{_SUFFIX}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        yield hidden
        for path in sorted(path for path in hidden.rglob("*") if path.is_file()):
            sync(path)
            place = folder / path.relative_to(hidden)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        sync(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)

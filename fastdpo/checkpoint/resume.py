"""Decide where a run begins: at the beginning, or at a checkpoint that is undamaged and its own."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.checkpoint import lock, write
from fastdpo.checkpoint.identity import OPTIMIZER, differences
from fastdpo.checkpoint.manifest import STATE, Damaged, good_checkpoints, verify
from fastdpo.settings.config_file import MANIFEST

logger = logging.getLogger("fastdpo")


class Found(NamedTuple):
    """The checkpoint from which a run continues."""

    folder: Path
    new_optimizer_settings: list[str]
    """Settings of the optimizer and its schedule that differ from the checkpoint's, as "name: old -> new"."""


def begin(
    folder: Path,
    wanted: str | bool | None,
    now: Mapping[str, Any],
    *,
    changed: bool = False,
    overwrite: bool = False,
    needed: Sequence[str] = (),
) -> Found | None:
    """Choose the checkpoint to continue from, or make sure that a new run may begin in the folder.

    Args:
        folder: the run's `output_dir`, whose lock is held.
        wanted: a checkpoint; True for the newest good one; "auto" for that or the beginning; None for the beginning.
        now: the run's `fastdpo.checkpoint.identity.identity`.
        changed: continue although the checkpoint is of another run, or cannot be checked.
        overwrite: a new run may replace an earlier one.
        needed: files without which a checkpoint cannot continue, because they are the state of the optimizer.

    Returns:
        The checkpoint; None for the beginning.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another run.
    """
    write.sweep(folder)
    if wanted is None:
        lock.prepare_new_run(folder, overwrite=overwrite)
        return None
    if wanted is True or wanted == "auto":
        found = next(good_checkpoints(folder), None)
        if found is None and wanted is True:
            raise ValueError(f"resume_from_checkpoint: there is no undamaged checkpoint in output_dir {str(folder)!r}")
        if found is None:
            write.set_aside(folder, after=-1)
            lock.prepare_new_run(folder, overwrite=overwrite)
            return None
        path, then = found
    else:
        path = Path(str(wanted))
        then = _named(path, changed=changed)
        if path.absolute().parent.resolve() != folder.resolve():
            lock.prepare_new_run(folder, overwrite=overwrite)
    if not changed and not all((path / name).exists() for name in needed):
        raise ValueError(
            f"{path} has no state of the optimizer, as with save_only_model: training would go on with a new "
            "optimizer; resume_changed=True allows that"
        )
    return _compared(folder, path, then, now, changed=changed)


def _named(path: Path, *, changed: bool) -> dict[str, Any]:
    """Return what a checkpoint that the user named says about its run; nothing if it has no manifest."""
    if changed and (path / STATE).is_file() and not (path / MANIFEST).exists():
        logger.warning("%s has no %s, so neither its files nor its settings can be checked", path, MANIFEST)
        return {}
    try:
        return verify(path)
    except Damaged as damage:
        other = next(good_checkpoints(path.absolute().parent), None)
        hint = f"; the newest undamaged checkpoint beside it is {str(other[0])!r}" if other else ""
        if not (path / MANIFEST).exists() and (path / STATE).is_file():
            hint += "; resume_changed=True uses it unchecked"
        raise ValueError(f"{path} can't be resumed from: {damage}{hint}") from damage


def _compared(folder: Path, path: Path, then: dict[str, Any], now: Mapping[str, Any], *, changed: bool) -> Found:
    others, from_now_on = differences(then, now)
    if others and not changed:
        also = f"; also different: {'; '.join(from_now_on)}" if from_now_on else ""
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(others)}{also}. Set this back, or give another output_dir to "
            "start from the beginning; resume_changed=True continues with the new values"
        )
    step = json.loads((path / STATE).read_bytes())["global_step"]
    write.set_aside(folder, after=step)
    said = "; ".join((*others, *from_now_on))
    logger.info(
        "resuming from %s, after step %d; %s",
        path,
        step,
        f"different from now on: {said}" if said else "nothing differs from the run that saved it",
    )
    changes = [text for text in (*others, *from_now_on) if text.partition(":")[0] in OPTIMIZER]
    return Found(path, changes)

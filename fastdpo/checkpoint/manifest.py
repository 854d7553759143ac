"""The manifest of a checkpoint: which files it has, with their hashes, and which run it belongs to.

The manifest is the last file of a checkpoint, so a folder without it was not written completely. The hashes find
damage, not forgery: whoever can change a checkpoint can change its manifest too. This module needs only the standard
library.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastdpo.settings.config_file import MANIFEST
from fastdpo.settings.files import sync, write_file

logger = logging.getLogger("fastdpo")

FORMAT = 1
STATE = "trainer_state.json"
"""The Trainer's own state, which has the step and the log."""
_NAME = re.compile(r"checkpoint-(\d+)")
_MAX_BYTES = 64 * 2**20  # a manifest takes a few kB, and a larger file is none
_THREADS = 4  # hashing runs outside of Python's lock, at about 1 GB/s in each thread


class Damaged(ValueError):
    """A checkpoint is incomplete or not as it was written; the message says which file, and how it differs."""


def write_manifest(folder: Path, *, step: int, run: Mapping[str, Any]) -> None:
    """Bring all files of a checkpoint to the disk, then write their hashes and `run` to its manifest.

    Args:
        folder: the checkpoint, which nobody changes any more.
        step: the optimizer step after which it was saved.
        run: what the checkpoint belongs to, see `fastdpo.checkpoint.identity`; JSON values.

    Raises:
        OSError: a file could not be read or brought to the disk.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_sync_and_hash, paths))
    for path in sorted({path.parent for path in paths}):
        sync(path)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    said: dict[str, Any] = {"format": FORMAT, "step": step, "files": files, "run": run}
    said["sha256"] = _hash_of(said)
    write_file(folder / MANIFEST, json.dumps(said, indent=1).encode())


def _hash_of(said: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, so that damage to the manifest itself is found too."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sync_and_hash(path: Path) -> str:
    sync(path)
    return _hash(path)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's manifest says about its run, after every file has been compared with its hash.

    Raises:
        Damaged: a file is missing, has changed or cannot be read, or the folder has no manifest.
    """
    try:
        return _verify(folder)
    except OSError as error:
        raise Damaged(f"{Path(error.filename or folder).name} can't be read ({error.strerror or error})") from error


def _verify(folder: Path) -> dict[str, Any]:
    files, step, run = _read(folder / MANIFEST)
    if (named := step_of(folder)) not in (None, step):
        raise Damaged(f"{MANIFEST} is that of step {step}")
    if STATE not in files:
        raise Damaged(f"{STATE} is not in its manifest")
    for name, said in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise Damaged(f"{name} is missing" if not path.is_symlink() else f"{name} is a symbolic link")
        if (size := path.stat().st_size) != said["bytes"]:
            raise Damaged(f"{name} has {size:,} bytes instead of {said['bytes']:,}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(files, pool.map(_hash, (folder / name for name in files)), strict=True):
            if digest != files[name]["sha256"]:
                raise Damaged(f"{name} is not the file that was written, because its SHA-256 differs")
    if json.loads((folder / STATE).read_bytes()).get("global_step") != step:
        raise Damaged(f"{STATE} is not that of step {step if named is None else named}")
    return run


def _read(manifest: Path) -> tuple[dict[str, dict[str, Any]], int, dict[str, Any]]:
    """Return the files, the step and the run of a manifest of the right form, with names that stay in the folder."""
    if not manifest.is_file() or manifest.is_symlink():
        raise Damaged(f"it has no {MANIFEST}, so it was not written completely, or not by fastdpo")
    if manifest.stat().st_size > _MAX_BYTES:
        raise Damaged(f"{MANIFEST} is larger than {_MAX_BYTES:,} bytes")
    try:
        said = json.loads(manifest.read_bytes())
        digest, files, step, run = said.pop("sha256"), said["files"], said["step"], said["run"]
        right = said["format"] == FORMAT and type(step) is int and isinstance(files, dict) and isinstance(run, dict)
        right = right and all(
            type(each["bytes"]) is int and isinstance(each["sha256"], str) and _stays_inside(name)
            for name, each in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} can't be read ({type(error).__name__})") from error
    if not right:
        raise Damaged(f"{MANIFEST} is not of format {FORMAT}")
    if digest != _hash_of(said):
        raise Damaged(f"{MANIFEST} is not the file that was written, because its SHA-256 differs")
    return files, step, run


def _stays_inside(name: str) -> bool:
    return name != "" and not name.startswith("/") and "\\" not in name and ".." not in name.split("/")


# The checkpoints of a folder


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint's name; None if its name has another form."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders in a folder that are named like a checkpoint, by step, the newest first."""
    named = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    found = {step: path for path in named if (step := step_of(path)) is not None}
    return dict(sorted(found.items(), reverse=True))


def good_checkpoints(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the checkpoints whose files are all as they were written, the newest first, each with its run.

    A warning names each one that is skipped, and why.
    """
    for path in checkpoints(folder).values():
        try:
            yield path, verify(path)
        except Damaged as damage:
            logger.warning("%s is skipped: %s", path, damage)

"""Keep per-token log-probs in a folder, by the ids they belong to, safe from kills, damage and other processes.

A shard is two files. The data is safetensors, so reading it never runs code:

    shard-<id>.safetensors    keys [n, 32] uint8, offsets [n + 1] int64, logps [M] float32; entry i begins at offsets[i]
    shard-<id>.json           its manifest: sizes, and the SHA-256 of the data

Both files are written to a temporary name, fsynced and renamed, the manifest last. A shard is finished when it has a
manifest; what a killed process leaves behind has none. Shards are never changed and their ids are random, so processes
that fill a folder at the same time can at worst do some work twice. A shard that differs from its manifest, or holds a
value that is not finite, is removed with a warning; only its entries are missing then.

This module needs only numpy and safetensors.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import load, save

from fastdpo.settings.files import write_file
from fastdpo.untrusted.json_files import read_bytes, read_json

try:
    import fcntl
except ImportError:  # Windows: two processes may do the same work, which does no harm
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fastdpo")

FORMAT = 1
"""Increase it when the format of shards or the values in them change, so that old shards are not found any more."""

KEY_BYTES = 32
_MANIFEST = re.compile(r"shard-[0-9a-f]{32}\.json")
_LEFTOVER = re.compile(r"\.?shard-[0-9a-f]{32}\.(safetensors|(json|safetensors)(\.[0-9a-f]+)?\.tmp)")
_MANIFEST_BYTES = 2**16
_STALE_SECONDS = 3600.0  # no process takes this long between the renames of a shard's two files

Logps: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class _Damaged(Exception):
    pass


def entry_key(prompt: Any, response: Any) -> bytes:
    """Return the 32 bytes that identify a response to a prompt, both given as ids: the SHA-256 of both."""
    prompt, response = np.asarray(prompt, "<i8"), np.asarray(response, "<i8")
    return hashlib.sha256(np.array([len(prompt)], "<i8").tobytes() + prompt.tobytes() + response.tobytes()).digest()


class TokenCache:
    """The finished shards of a folder, held in memory, to which new shards can be added.

    Args:
        folder: made when the first shard is written. None: no file is read or written, and entries live in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._entries: dict[bytes, Logps] = {}
        self._read: set[str] = set()
        if folder is not None and folder.is_dir():
            _sweep(folder)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __getitem__(self, key: bytes) -> Logps:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Read the shards that any process has finished since the last call."""
        if self.folder is None or not self.folder.is_dir():
            return
        for manifest in sorted(self.folder.iterdir()):
            # the data's file name is made from the manifest's file name, not read in it, so it stays in the folder
            if not _MANIFEST.fullmatch(manifest.name) or manifest.name in self._read:
                continue
            try:
                self._entries |= _read_shard(manifest)
                self._read.add(manifest.name)
            except FileNotFoundError:
                if manifest.exists():
                    _discard(manifest, "its data is missing")  # else another process has just removed it
            except _Damaged as damage:
                _discard(manifest, str(damage))
                self._read.add(manifest.name)  # it is named once, even if it could not be removed

    def add(self, entries: Mapping[bytes, Logps]) -> None:
        """Keep `entries`; when this returns, they are one finished shard.

        Raises:
            ValueError: a key does not have 32 bytes, or a value is not finite.
            OSError: the shard can't be written; an unfinished shard is never read.
        """
        for key, logps in entries.items():
            if len(key) != KEY_BYTES or not np.isfinite(logps).all():
                raise ValueError(f"entry {key.hex()} must have {KEY_BYTES} bytes of key and finite log-probs")
        if entries and self.folder is not None:
            self._read.add(_write_shard(self.folder, entries))
        self._entries |= entries

    def hold(self, entries: Mapping[bytes, Logps]) -> None:
        """Keep entries in memory only, because another process has written them to its disk."""
        self._entries |= entries

    @contextlib.contextmanager
    def filling(self, share: str = "") -> Iterator[None]:
        """Inside the block, no other process fills the same share of the folder.

        A share is the part of the work that one of several processes does. The operating system frees the lock of a
        killed process.
        """
        if self.folder is None or fcntl is None:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"filling{share}.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:  # a link or a folder of this name
            logger.info("reference cache: %s can't be opened (%s); work may be done twice", path, error)
            yield
            return
        with open(lock, "wb"):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("reference cache: waiting for another process that fills %s", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                logger.info("reference cache: %s can't be locked (%s); work may be done twice", self.folder, error)
            self.refresh()
            yield


def _write_shard(folder: Path, entries: Mapping[bytes, Logps]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    offsets = np.cumsum([0, *(len(logps) for logps in entries.values())], dtype=np.int64)
    data = save(
        {
            "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, KEY_BYTES),
            "offsets": offsets,
            "logps": np.concatenate([np.asarray(logps, np.float32) for logps in entries.values()]),
        }
    )
    manifest = {
        "format": FORMAT,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "entries": len(entries),
        "tokens": int(offsets[-1]),
    }
    name = f"shard-{uuid.uuid4().hex}"
    write_file(folder / f"{name}.safetensors", data)
    write_file(folder / f"{name}.json", json.dumps(manifest, indent=1).encode())
    return f"{name}.json"


def _read_shard(manifest: Path) -> dict[bytes, Logps]:
    """Return the entries of one shard, read from the same bytes whose hash is checked."""
    data_path = manifest.with_suffix(".safetensors")
    if manifest.is_symlink() or data_path.is_symlink():
        raise _Damaged("it is a symbolic link")
    try:
        said = read_json(manifest, _MANIFEST_BYTES)
        digest, *sizes = (said[name] for name in ("sha256", "bytes", "entries", "tokens"))
        if any(type(each) is not int for each in sizes):
            raise TypeError(f"sizes must be ints, got {sizes}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"its manifest can't be read ({error!r})") from error
    size, n, tokens = sizes
    if (found := data_path.stat().st_size) != size:
        raise _Damaged(f"it has {found} bytes instead of {size}")
    try:
        data = read_bytes(data_path, size)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _Damaged(f"its data can't be read ({error!r})") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise _Damaged("its SHA-256 is not the manifest's")
    try:
        tensors = load(data)
        keys, offsets, logps = tensors["keys"], tensors["offsets"], tensors["logps"]
    except Exception as error:  # a parser may raise anything for data that it does not expect
        raise _Damaged(f"its data can't be read ({error!r})") from error
    right = (
        _is(keys, np.uint8, (n, KEY_BYTES))
        and _is(offsets, np.int64, (n + 1,))
        and _is(logps, np.float32, (tokens,))
        and offsets[0] == 0
        and offsets[-1] == tokens
        and bool((np.diff(offsets) >= 0).all())
    )
    if not right:
        raise _Damaged("its tensors are not those of a shard")
    if not np.isfinite(logps).all():
        raise _Damaged("it holds a log-prob that is not finite")
    if said.get("format") != FORMAT:
        raise _Damaged(f"its format is {said.get('format')!r:.40}, not {FORMAT}")
    ends = offsets.tolist()
    return {keys[i].tobytes(): logps[ends[i] : ends[i + 1]] for i in range(n)}


def _is(x: Any, dtype: Any, shape: tuple[int, ...]) -> bool:
    return bool(x.dtype == dtype and x.shape == shape)


def _discard(manifest: Path, why: str) -> None:
    logger.warning("reference cache: %s is damaged: %s. Only its entries are computed again.", manifest, why)
    for path in (manifest, manifest.with_suffix(".safetensors")):
        with contextlib.suppress(OSError):  # it is a folder, or may not be removed
            path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove unfinished files of killed processes, but none so new that a process may still be writing it."""
    for path in folder.iterdir():
        if not _LEFTOVER.fullmatch(path.name) or path.with_suffix(".json").exists():
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()

"""A folder of per-token log-probs by the content they belong to, which survives kills, damage and company.

A shard is two files. The data is safetensors, so nothing read here can run code:

    shard-<id>.safetensors    keys [n, 32] uint8, offsets [n + 1] int64, logps [M] float32; entry i begins at o_i
    shard-<id>.json           its manifest: sizes, and the SHA-256 of the data

Both are written to a temporary name, fsynced and renamed, the manifest last: a shard is finished when it has one, and
what a killed process leaves behind has none. Shards are never changed and their ids are random, so processes that fill
a folder at once can only do some work twice. A shard that is not what its manifest says, or holds a value that is not
finite, is removed with a warning; its entries are missing then, and no others.

Stands on numpy and safetensors alone.
"""

import contextlib
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fastdpo.settings.files import write_file

try:
    import fcntl
except ImportError:  # Windows: two processes may do the same work, and harm nothing
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fastdpo")

FORMAT = 1
"""Raised when shards look different, or when a mended fault changes values: older ones are then not found."""

KEY_BYTES = 32
_MANIFEST = re.compile(r"shard-[0-9a-f]{32}\.json")
_LEFTOVER = re.compile(r"\.?shard-[0-9a-f]{32}\.(safetensors|(json|safetensors)(\.\d+)?\.tmp)")
_STALE_SECONDS = 3600.0  # no process takes as long from one rename to the next

Logps: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class _Damaged(Exception):
    pass


def entry_key(prompt: Any, response: Any) -> bytes:
    """`[32]` bytes that stand for a response (ids) to a prompt (ids): SHA-256 of both."""
    prompt, response = np.asarray(prompt, "<i8"), np.asarray(response, "<i8")
    return hashlib.sha256(np.array([len(prompt)], "<i8").tobytes() + prompt.tobytes() + response.tobytes()).digest()


class TokenCache:
    """The finished shards of a folder, in memory, and a way to add one.

    Args:
        folder: made when the first shard is written. None: nothing is read or written, entries live in memory.
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
        """Read the shards that were finished since, by whichever process."""
        if self.folder is None or not self.folder.is_dir():
            return
        for manifest in sorted(self.folder.iterdir()):
            # the data's name comes from the manifest's own, never from its text: nothing can point out of the folder
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

    def add(self, entries: Mapping[bytes, Logps]) -> None:
        """Keep `entries`, as one finished shard when this returns.

        Raises:
            ValueError: a key of another length, or a value that is not finite.
            OSError: the shard can't be written; nothing unfinished is ever read.
        """
        for key, logps in entries.items():
            if len(key) != KEY_BYTES or not np.isfinite(logps).all():
                raise ValueError(f"entry {key.hex()} must have {KEY_BYTES} bytes of key and finite log-probs")
        if entries and self.folder is not None:
            self._read.add(_write_shard(self.folder, entries))
        self._entries |= entries

    @contextlib.contextmanager
    def filling(self, share: str = "") -> Iterator[None]:
        """Within it no other process fills the same share of the folder; freed by the system where one is killed."""
        if self.folder is None or fcntl is None:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"filling{share}.lock", "a") as lock:
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
    """The entries of one shard, from the very bytes whose hash was checked."""
    data_path = manifest.with_suffix(".safetensors")
    if manifest.is_symlink() or data_path.is_symlink():
        raise _Damaged("it is a symbolic link")
    try:
        said = json.loads(manifest.read_bytes())
        size, digest, n, tokens = (said[name] for name in ("bytes", "sha256", "entries", "tokens"))
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"its manifest can't be read ({error!r})") from error
    data = data_path.read_bytes()
    if len(data) != size:
        raise _Damaged(f"it has {len(data)} bytes instead of {size}")
    if hashlib.sha256(data).hexdigest() != digest:
        raise _Damaged("its SHA-256 is another")
    try:
        tensors = load(data)
        keys, offsets, logps = tensors["keys"], tensors["offsets"], tensors["logps"]
    except (SafetensorError, KeyError, ValueError) as error:
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
    ends = offsets.tolist()
    return {keys[i].tobytes(): logps[ends[i] : ends[i + 1]] for i in range(n)}


def _is(x: Any, dtype: Any, shape: tuple[int, ...]) -> bool:
    return bool(x.dtype == dtype and x.shape == shape)


def _discard(manifest: Path, why: str) -> None:
    logger.warning("reference cache: %s is damaged: %s. Its entries alone are computed again.", manifest, why)
    manifest.unlink(missing_ok=True)
    manifest.with_suffix(".safetensors").unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished, unless it is so new that one may still be at it."""
    for path in folder.iterdir():
        if not _LEFTOVER.fullmatch(path.name) or path.with_suffix(".json").exists():
            continue
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()

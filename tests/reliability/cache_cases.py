"""Damage to the caches of log-probs and of verdicts: what is damaged is computed again, and nothing else."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fastdpo.head import autotune
from fastdpo.reference.cache import FORMAT, TokenCache, entry_key
from tests.reliability.data_cases import listening

Case = tuple[str, Callable[[Path], bool]]
Damage = Callable[[Path, Path], Any]
"""A function of the paths of a shard's data and manifest."""
DEEP = "[" * 100_000


def _entries(start: int) -> dict[bytes, Any]:
    return {entry_key([9, i], [i]): np.linspace(-3, -1 - i, i % 4, dtype=np.float32) for i in range(start, start + 5)}


def _miss(damage: Damage) -> Callable[[Path], bool]:
    """One of two shards is damaged: the other is read, and one warning names the damaged one, once."""

    def case(folder: Path) -> bool:
        TokenCache(folder / "cache").add(_entries(0))
        (manifest,) = (folder / "cache").glob("shard-*.json")
        TokenCache(folder / "cache").add(_entries(5))
        damage(manifest.with_suffix(".safetensors"), manifest)
        with listening() as lines:
            found = TokenCache(folder / "cache")
            found.refresh()
            with found.filling():
                kept = len(found) == 5 and all(np.array_equal(found[key], value) for key, value in _entries(5).items())
                found.add(_entries(0))
        named = [line for line in lines if manifest.name in line]
        return kept and len(named) == 1 and "\n" not in named[0] and _whole(folder / "cache")

    return case


def _whole(folder: Path) -> bool:
    """Whether the damage is mended: all entries are found by the next process."""
    found, true = TokenCache(folder), _entries(0) | _entries(5)
    return all(key in found and np.array_equal(found[key], value) for key, value in true.items())


def _harmless(damage: Callable[[Path], Any]) -> Callable[[Path], bool]:
    """Something odd in the folder costs nothing."""

    def case(folder: Path) -> bool:
        TokenCache(folder / "cache").add(_entries(0))
        damage(folder / "cache")
        found = TokenCache(folder / "cache")
        with found.filling():
            found.add(_entries(5))
        return _whole(folder / "cache")

    return case


def _said(**fields: Any) -> Damage:
    """Change fields of the manifest; None removes one."""

    def damage(data: Path, manifest: Path) -> None:
        said = json.loads(manifest.read_text()) | fields
        manifest.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))

    return damage


def _text(text: str) -> Damage:
    return lambda data, manifest: manifest.write_text(text)


def _bytes(change: Callable[[bytearray], Any]) -> Damage:
    def damage(data: Path, manifest: Path) -> None:
        raw = bytearray(data.read_bytes())
        changed = change(raw)
        data.write_bytes(raw if changed is None else changed)

    return damage


def _flip(at: int) -> Damage:
    def change(raw: bytearray) -> None:
        raw[at] ^= 16

    return _bytes(change)


def _tensors(**changes: Any) -> Damage:
    """Write other tensors, with a manifest that fits."""

    def damage(data: Path, manifest: Path) -> None:
        tensors: dict[str, Any] = {"keys": np.zeros((2, 32), np.uint8), "offsets": np.array([0, 1, 3])}
        tensors |= {"logps": np.array([-1, -2, -3], np.float32)} | changes
        raw = save({name: value for name, value in tensors.items() if value is not None})
        _write(data, manifest, raw)

    return damage


def _write(data: Path, manifest: Path, raw: bytes) -> None:
    data.write_bytes(raw)
    said = {"format": FORMAT, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "entries": 2, "tokens": 3}
    manifest.write_text(json.dumps(said))


def _replace(which: int, make: Callable[[Path], Any]) -> Damage:
    def damage(*paths: Path) -> None:
        paths[which].unlink()
        make(paths[which])

    return damage


def _link(*paths: Path) -> None:
    for path in paths:
        path.rename(path.parent / f"elsewhere{path.suffix}")
        path.symlink_to(path.parent / f"elsewhere{path.suffix}")


def _verdicts(write: Callable[[Path], Any]) -> Callable[[Path], bool]:
    """A damaged `choices.json` is read as empty, with one warning at most, and is replaced by the next verdict."""

    def case(folder: Path) -> bool:
        before = os.environ.get("FASTDPO_CACHE")
        os.environ["FASTDPO_CACHE"] = str(folder)
        autotune._verdicts = None
        try:
            write(autotune.cache_file())
            with listening() as lines:
                empty = not autotune._read() and not autotune._read()
            return empty and len(lines) <= 1 and autotune.pick("key", ("triton", "blas")) == "triton"
        finally:
            autotune._verdicts = None
            autotune._calls.clear()
            os.environ.pop("FASTDPO_CACHE")
            os.environ.update({} if before is None else {"FASTDPO_CACHE": before})

    return case


def cases() -> list[Case]:
    """Return the names of the cases, and functions that return whether only what was damaged was missed."""
    name = "shard-" + "0" * 32
    return [
        ("a bit of a log-prob", _miss(_flip(-3))),
        ("a bit of the header", _miss(_flip(12))),
        ("data cut short", _miss(_bytes(lambda raw: raw[:-4]))),
        ("empty data", _miss(_bytes(lambda raw: b""))),
        ("data with a byte more", _miss(_bytes(lambda raw: bytes(raw) + b"0"))),
        ("data missing", _miss(lambda data, manifest: data.unlink())),
        ("data that is a pipe", _miss(_replace(0, os.mkfifo))),
        ("data that is a folder", _miss(_replace(0, os.mkdir))),
        ("a manifest cut short", _miss(lambda data, manifest: manifest.write_bytes(manifest.read_bytes()[:20]))),
        ("an empty manifest", _miss(_text(""))),
        ("a manifest that is a list", _miss(_text("[1, 2]"))),
        ("a manifest nested deeply", _miss(_text(DEEP))),
        ("a huge manifest", _miss(_text('{"a": "' + "x" * 2**20 + '"}'))),
        ("a manifest that is a pipe", _miss(_replace(1, os.mkfifo))),
        ("a manifest that is a folder", _miss(_replace(1, os.mkdir))),
        ("links", _miss(_link)),
        ("another format", _miss(_said(format=FORMAT + 1))),
        ("no format", _miss(_said(format=None))),
        ("entries: 5.0", _miss(_said(entries=5.0))),
        ("tokens: true", _miss(_said(tokens=True))),
        ("negative bytes", _miss(_said(bytes=-1))),
        ("a hash that is no text", _miss(_said(sha256=[]))),
        ("a NaN", _miss(_tensors(logps=np.array([-1, np.nan, -3], np.float32)))),
        ("log-probs of another dtype", _miss(_tensors(logps=np.array([-1.0, -2.0, -3.0])))),
        ("offsets that go back", _miss(_tensors(offsets=np.array([0, 4, 3])))),
        ("no keys", _miss(_tensors(keys=None))),
        ("data that is no safetensors", _miss(lambda data, manifest: _write(data, manifest, b"\xff" * 64))),
        ("a lock that is a pipe", _harmless(lambda cache: os.mkfifo(cache / "filling.lock"))),
        ("a lock that is a folder", _harmless(lambda cache: (cache / "filling.lock").mkdir())),
        ("a lock that is a link", _harmless(lambda cache: (cache / "filling.lock").symlink_to("/proc/none"))),
        ("an old folder with a shard's name", _harmless(lambda cache: _old(cache / f"{name}.safetensors"))),
        ("verdicts nested deeply", _verdicts(lambda path: path.write_text(DEEP))),
        ("verdicts that are a list", _verdicts(lambda path: path.write_text("[1]"))),
        ("verdicts that are numbers", _verdicts(lambda path: path.write_text('{"key": 1}'))),
        ("verdicts that are a pipe", _verdicts(os.mkfifo)),
        ("verdicts that are a folder", _verdicts(os.mkdir)),
        ("verdicts that are cut short", _verdicts(lambda path: path.write_text('{"key": "bl'))),
    ]


def _old(folder: Path) -> None:
    folder.mkdir()
    os.utime(folder, (0, 0))

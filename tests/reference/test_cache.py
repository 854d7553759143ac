"""The folder of shards: what is written comes back, and what is damaged does not."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fastdpo.reference import cache
from fastdpo.reference.cache import TokenCache, entry_key
from fastdpo.settings.files import write_file

ROOT = Path(__file__).parent.parent.parent


def entries(n: int, start: int = 0) -> dict[bytes, np.ndarray]:
    """Ragged, one of them of no tokens."""
    return {entry_key([1, i], [i]): np.linspace(-9, -i - 1, i % 5, dtype=np.float32) for i in range(start, start + n)}


def same(found: TokenCache, expected: dict[bytes, np.ndarray]) -> bool:
    return all(key in found and np.array_equal(found[key], expected[key]) for key in expected)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def test_a_key_is_of_prompt_and_response_and_of_where_one_ends() -> None:
    keys = [entry_key([1, 2], [3]), entry_key([1], [2, 3]), entry_key([1, 2], [4]), entry_key([1, 2, 3], [])]
    assert len(set(keys)) == 4
    assert entry_key(np.array([1, 2], np.int32), (3,)) == keys[0]
    assert {len(key) for key in keys} == {cache.KEY_BYTES}


def test_what_is_added_is_read_by_another_and_extended(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on demand"
    first = TokenCache(folder)
    first.add(entries(7))
    second = TokenCache(folder)
    assert same(second, entries(7))
    assert len(second) == 7
    second.add(entries(3, start=7))
    assert not same(first, entries(10))
    first.refresh()
    assert same(first, entries(10))
    assert len(shards(folder)) == 2


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    memory = TokenCache(None)
    with memory.filling():
        memory.add(entries(5))
    assert same(memory, entries(5))
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_sizes_and_the_hash(tmp_path: Path) -> None:
    import hashlib

    TokenCache(tmp_path).add(entries(7))
    (data,) = shards(tmp_path)
    manifest = json.loads(data.with_suffix(".json").read_text())
    assert manifest == {
        "format": cache.FORMAT,
        "bytes": data.stat().st_size,
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "entries": 7,
        "tokens": sum(i % 5 for i in range(7)),
    }


def damaged(data: Path, how: str) -> None:
    """Damage one shard in place."""
    raw = bytearray(data.read_bytes())
    manifest = data.with_suffix(".json")
    if how == "flipped bit":
        raw[-3] ^= 16
    elif how == "truncated":
        raw = raw[:-4]
    elif how == "emptied":
        raw.clear()
    elif how == "longer":
        raw += b"\0"
    elif how == "manifest truncated":
        manifest.write_bytes(manifest.read_bytes()[:20])
    elif how == "manifest of another shape":
        manifest.write_text("[1, 2]")
    elif how in ("not finite", "other tensors", "offsets", "no safetensors"):  # with a hash that fits
        keys, offsets = np.zeros((2, 32), np.uint8), np.array([0, 1, 3])
        logps = np.array([-1, np.nan if how == "not finite" else -2, -3], np.float32)
        if how == "other tensors":
            logps = logps.astype(np.float64)
        if how == "offsets":
            offsets[1] = 4
        raw = bytearray(save({"keys": keys, "offsets": offsets, "logps": logps}))
        if how == "no safetensors":
            raw = bytearray(b"\xff" * 64)
        import hashlib

        said = {
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "entries": 2,
            "tokens": 3,
            "format": cache.FORMAT,
        }
        manifest.write_text(json.dumps(said))
    data.write_bytes(raw)
    if how == "data missing":
        data.unlink()
    elif how == "symbolic link":
        elsewhere = data.with_name("elsewhere")
        data.rename(elsewhere)
        data.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "how",
    [
        *("flipped bit", "truncated", "emptied", "longer", "manifest truncated", "manifest of another shape"),
        *("not finite", "other tensors", "offsets", "no safetensors", "data missing", "symbolic link"),
    ],
)
def test_a_damaged_shard_is_found_and_no_other_is_lost(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TokenCache(tmp_path)
    for start in (0, 4, 8):
        writer.add(entries(4, start))
    victim = shards(tmp_path)[1]
    lost = next(
        start for start in (0, 4, 8) if set(entries(4, start)) == set(cache._read_shard(victim.with_suffix(".json")))
    )
    damaged(victim, how)
    with caplog.at_level(logging.WARNING, "fastdpo"):
        found = TokenCache(tmp_path)
    assert victim.with_suffix(".json").name in caplog.text
    assert len(caplog.records) == 1
    for start in (0, 4, 8):
        assert same(found, entries(4, start)) == (start != lost)
    assert not victim.exists()
    found.add(entries(4, lost))
    assert same(TokenCache(tmp_path), entries(12))


def test_a_manifest_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    """Other names are not read, whatever the text of a manifest says."""
    TokenCache(tmp_path / "outside").add(entries(3))
    (data,) = shards(tmp_path / "outside")
    inside = tmp_path / "inside"
    inside.mkdir()
    said = json.loads(data.with_suffix(".json").read_text()) | {"file": f"../outside/{data.name}"}
    (inside / data.with_suffix(".json").name).write_text(json.dumps(said))
    (inside / "shard-..json").write_text(json.dumps(said))
    assert len(TokenCache(inside)) == 0
    assert len(TokenCache(tmp_path / "outside")) == 3


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        TokenCache(tmp_path).add({entry_key([1], [2]): np.array([np.nan], np.float32)})
    assert not shards(tmp_path)


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    TokenCache(tmp_path).add(entries(3))
    names = ("shard-{}.safetensors", ".shard-{}.json.123.tmp")
    leftovers = [tmp_path / name.format(c * 32) for c in "ab" for name in names]
    for path in leftovers:
        path.write_bytes(b"unfinished")
        if "aaa" in path.name:
            os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path / "notes.txt", (0, 0))
    os.utime(shards(tmp_path)[0], (0, 0))
    assert same(TokenCache(tmp_path), entries(3))
    assert [path.exists() for path in leftovers] == [False, False, True, True]
    assert (tmp_path / "notes.txt").exists()


def test_write_file_replaces_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_file(target, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_files_written_at_once_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on two machines, or in two containers, may have the same id."""
    replace, names = os.replace, []
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(Path(source)), replace(source, target)))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for _ in range(2):
        write_file(tmp_path / f"shard-{'0' * 32}.json", b"{}")
    assert names[0] != names[1]
    assert all(cache._LEFTOVER.fullmatch(path.name) for path in names)  # so that one of a killed process is removed


FILL = """
import sys
from pathlib import Path
from tests.helpers.cache_fill import fill
fill(Path(sys.argv[1]), n=int(sys.argv[2]), share=sys.argv[3])
"""


def test_processes_at_once_compute_once_and_corrupt_nothing(tmp_path: Path) -> None:
    """Three processes fill the same folder: the lock lets one compute, and the others read."""
    command = [sys.executable, "-c", FILL, tmp_path, "40", ""]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    computed = sorted(int(p.communicate(timeout=60)[0].split()[-1]) for p in running)
    assert computed == [0, 0, 40]
    assert same(TokenCache(tmp_path), entries(40))


def test_processes_without_a_lock_only_work_twice(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", FILL, tmp_path, "40", f"-{i}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        for i in range(3)
    ]
    assert [p.wait(timeout=60) for p in running] == [0, 0, 0]
    found = TokenCache(tmp_path)
    assert same(found, entries(40))
    assert len(found) == 40

"""fastdpo.checkpoint's files and folders, without a trainer: manifests, rotation, the lock."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdpo.checkpoint import lock, write
from fastdpo.checkpoint.manifest import Damaged, checkpoints, good_checkpoints, verify, write_manifest
from fastdpo.settings.config_file import MANIFEST

ROOT = Path(__file__).parents[2]


def save(output: Path, step: int, *, complete: bool = True) -> Path:
    """A checkpoint of a few bytes, written as the trainer writes it."""
    place = output / f"checkpoint-{step}"
    beside = write.unfinished(place)
    (beside / "adapter").mkdir(parents=True)
    (beside / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (beside / "adapter" / "weights").write_bytes(bytes(range(step, step + 9)))
    if complete:
        write_manifest(beside, step=step, run={"seed": step})
    write.move_into_place(beside, place)
    return place


def test_a_checkpoint_says_what_it_belongs_to_and_may_be_moved(tmp_path: Path) -> None:
    place = save(tmp_path, 7)
    said = json.loads((place / MANIFEST).read_text())
    assert sorted(said["files"]) == ["adapter/weights", "trainer_state.json"]
    assert verify(place) == {"seed": 7}
    (place / "added-later").write_text("a callback's own file")
    assert verify(place.rename(tmp_path / "kept")) == {"seed": 7}


def test_a_file_that_is_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-12").write_text("notes")
    place = save(tmp_path, 7)
    assert checkpoints(tmp_path) == {7: place}


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_replaced_loses_at_most_one_of_the_two(
    kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the old one has another name, before the new one has its own, or before the old one is removed."""
    old = save(tmp_path, 3)
    (old / "adapter" / "old").touch()
    calls: list[str] = []

    def killed(real: object, *args: object, **options: object) -> object:
        calls.append("")
        if len(calls) >= kill_at:
            raise KeyboardInterrupt
        return real(*args, **options)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", functools.partial(killed, os.rename))
        patch.setattr("fastdpo.checkpoint.write.sync", functools.partial(killed, write.sync))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3)
    write.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-3"]
    assert verify(tmp_path / "checkpoint-3") == {"seed": 3}
    assert (tmp_path / "checkpoint-3" / "adapter" / "old").exists() is (kill_at < 3)


def test_everything_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then the folder's name; a crash of the machine can lose only what comes later."""
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".json.")[0].lstrip("."))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        happened.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    save(tmp_path, 3)
    first = {"weights", "trainer_state.json", "adapter"}
    manifest = happened.index(MANIFEST.removesuffix(".json"))
    assert first <= set(happened[:manifest])
    assert happened[-2:] == ["rename to checkpoint-3", tmp_path.name]
    assert manifest < len(happened) - 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[]", "can't be read (TypeError)"),
        ("{", "can't be read (JSONDecodeError)"),
        ("[" * 5000, "can't be read"),
        ({"format": 99}, "is not of format 1"),
        ({"step": "5"}, "is not of format 1"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0"}}}, "is not of format 1"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "is not of format 1"),
        ({"files": {}}, "trainer_state.json is not in its manifest"),
        ({"step": 6}, "is that of step 6"),
        ({"run": {"seed": 6}}, "fastdpo_manifest.json is not the file that was written"),
    ],
    ids=range(10),
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, said: object, reason: str) -> None:
    place = save(tmp_path, 5)
    if isinstance(said, dict):
        changed = json.loads((place / MANIFEST).read_text()) | said
        if "run" not in said:  # what is wrong must be found though the manifest's own hash is right
            del changed["sha256"]
            changed["sha256"] = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        said = json.dumps(changed)
    (place / MANIFEST).write_text(str(said))
    with pytest.raises(Damaged) as error:
        verify(place)
    assert reason in str(error.value)


def test_links_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    place = save(tmp_path, 5)
    (place / "adapter" / "weights").rename(tmp_path / "elsewhere")
    (place / "adapter" / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="weights is a symbolic link"):
        verify(place)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, [9]), (2, None, [9, 8]), (1, 3, [9, 3]), (2, 3, [9, 3]), (3, 3, [9, 8, 3]), (0, None, [9, 8, 5, 3])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, limit: int, best: int | None, left: list[int]) -> None:
    """By step, not by time, and an incomplete folder does not count."""
    for step in (9, 3, 8, 5):
        save(tmp_path, step)
    save(tmp_path, 11, complete=False)
    write.rotate(tmp_path, limit, None if best is None else f"/moved/checkpoint-{best}")
    assert list(checkpoints(tmp_path)) == [11, *left]
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_leaves_is_never_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for name in (".checkpoint-6.tmp", ".checkpoint-2.removed.tmp", ".model.tmp"):
        (tmp_path / name.removesuffix("/")).mkdir()
    (tmp_path / ".checkpoint-6.tmp" / "model.safetensors").write_text("half")
    assert [path.name for path, _ in good_checkpoints(tmp_path)] == ["checkpoint-4"]
    write.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_model_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("old")
    (tmp_path / "notes").write_text("the user's own")
    with contextlib.suppress(OSError), write.replacing_files(tmp_path) as folder:
        (folder / "weights").write_text("ne")
        raise OSError("the disk is full")
    assert (tmp_path / "weights").read_text() == "old"
    with write.replacing_files(tmp_path) as folder:
        (folder / "weights").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"weights": "new", "notes": "the user's own"}


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    """The second one names the first; when that is killed, its lock is free, and a normal end leaves no file."""
    code = "import sys, time; from fastdpo.checkpoint import lock\nwith lock.held(sys.argv[1]):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"in use by another run \(process {owner.pid} on .+\)"), lock.held(tmp_path):
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert (tmp_path / lock.LOCK).exists()
    with lock.held(tmp_path), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["checkpoint-3", "model.safetensors", "adapter_model.safetensors", "trainer_state.json"]
)
def test_a_folder_with_results_is_not_trained_into(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "checkpoint-3" else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"an earlier run.*overwrite_output_dir=True"):
        lock.prepare_new_run(tmp_path, overwrite=False)
    lock.prepare_new_run(tmp_path, overwrite=True)
    assert not (tmp_path / "checkpoint-3").exists()


SIGNALS = """
import os, signal, sys, time
from fastdpo.checkpoint import preempt
signal.signal(signal.SIGUSR1, lambda *_: print("the script's own"))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with preempt.noted() as request:
    for signum in (signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), signum)
    assert request.signum is None
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher's copy
    assert request.signum == signal.SIGTERM
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    request._at -= 2
    print("so far", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_signals_are_noted_once_and_others_handlers_stay() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SIGNALS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "the script's own\nso far\n"), done.stderr
    assert time.monotonic() - started < 60

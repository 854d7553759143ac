"""A disk that is full at any moment: one clear line, nothing corrupt, and the run goes on once there is space.

The disk is a small tmpfs where this may be mounted, which needs root. The writes that fail in turn need nothing.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch

from fastdpo.reference.cache import TokenCache
from fastdpo.report.page import write_report
from fastdpo.settings.dataset_files import load_splits
from fastdpo.settings.failures import one_line
from tests.helpers.trainers import make_trainer, rows, weights

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "data": rows(16)}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def says_so(work: Callable[[], Any]) -> bool:
    """The work fails, in one line that is about the disk."""
    try:
        work()
    except Exception as error:
        return (one_line(error) or "").startswith("the disk is full")
    return False


@functools.cache
def uninterrupted() -> torch.Tensor:
    trainer = make_trainer(Path(tempfile.mkdtemp()), **SETTINGS | {"save_strategy": "no"})
    trainer.train()
    return weights(trainer.model)


def goes_on(folder: Path, **changes: Any) -> bool:
    """The first checkpoint is there, nothing is left of the second one, and the run resumes to the same weights."""
    output = Path(changes.get("output_dir", folder / "out"))
    left = {path.name for path in output.iterdir()}
    trainer = make_trainer(folder, **SETTINGS | changes)
    trainer.train(resume_from_checkpoint="auto")
    return left == {"checkpoint-2"} and torch.equal(weights(trainer.model), uninterrupted())


def failing_write(target: str, folder: Path) -> bool:
    """One of the writes of the second checkpoint fails."""
    trainer = make_trainer(folder, **SETTINGS)
    save = trainer._save_checkpoint

    def save_or_fail(*args: Any) -> None:
        with mock.patch(target, full) if trainer.state.global_step == 4 else contextlib.nullcontext():
            save(*args)

    trainer._save_checkpoint = save_or_fail
    return says_so(trainer.train) and goes_on(folder)


def checkpoint(folder: Path) -> bool:
    with small_disk(folder, kib=1700) as disk:  # one checkpoint fits, and a part of the next one
        trainer = make_trainer(folder, **SETTINGS, output_dir=str(disk / "out"))
        fails = says_so(trainer.train)
        enlarge(disk)
        return fails and goes_on(folder, output_dir=str(disk / "out"))


def final_model(folder: Path) -> bool:
    """An older model of the same names stays whole."""
    with small_disk(folder, kib=500) as disk:
        trainer = make_trainer(folder, **SETTINGS | {"save_strategy": "no"}, output_dir=str(disk / "out"))
        trainer.save_model()
        before = (disk / "out" / "model.safetensors").read_bytes()
        fails = says_so(trainer.save_model)
        return fails and (disk / "out" / "model.safetensors").read_bytes() == before


def cache(folder: Path) -> bool:
    """The shards that were finished are kept and are whole."""
    with small_disk(folder, kib=64) as disk:
        make = functools.partial(
            make_trainer, folder, data=rows(700), precompute_ref_log_probs=True, reference_cache_dir=str(disk / "cache")
        )
        fails = says_so(make)
        shards = {path for path in disk.rglob("*.json") if TokenCache(path.parent)}
        enlarge(disk)
        make()
        return fails and shards <= set(disk.rglob("*.json"))


def report(folder: Path) -> bool:
    """An earlier page stays whole; that None means exit code 1 is tested with the command line."""
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    with small_disk(folder, kib=400) as disk:
        page = write_report(disk, history)
        before = page and page.read_bytes()
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096 - 8192))
        return (
            before is not None and write_report(disk, history) is None and (disk / "report.html").read_bytes() == before
        )


def tokenised_dataset(folder: Path) -> bool:
    (folder / "data").mkdir()
    lines = [json.dumps({"prompt": f"{i}" * 50, "chosen": "a" * 50, "rejected": "b" * 50}) for i in range(4000)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines))
    with small_disk(folder, kib=200) as disk, mock.patch.object(datasets.config, "HF_DATASETS_CACHE", disk):
        fails = says_so(lambda: load_splits(str(folder / "data")))
        enlarge(disk)
        return fails and len(load_splits(str(folder / "data"))["train"]) == len(lines)


WRITES = {
    "the model": "transformers.PreTrainedModel.save_pretrained",
    "the optimizer": "torch.save",
    "the state": "transformers.TrainerState.save_to_json",
    "the sums since the last log": "fastdpo.trainer.saving.write_file",
    "the manifest": "fastdpo.checkpoint.manifest.write_file",
    "bringing it to the disk": "os.fsync",
}
DISKS = {
    "a checkpoint": checkpoint,
    "the final model": final_model,
    "the reference cache": cache,
    "the report": report,
    "the tokenised dataset": tokenised_dataset,
}


def cases() -> list[tuple[str, Callable[[Path], bool]]]:
    writes = [(f"a checkpoint, at {name}", functools.partial(failing_write, target)) for name, target in WRITES.items()]
    return [*writes, *(DISKS.items() if os.geteuid() == 0 else ())]

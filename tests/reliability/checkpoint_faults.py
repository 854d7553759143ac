"""Damage to the newest checkpoint of a run: it is skipped for the one before, and refused if it is named."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastdpo.checkpoint import resume
from fastdpo.checkpoint.manifest import MANIFEST
from tests.helpers.trainers import make_trainer, rows

OLD, NEW = 2, 4


@functools.cache
def saved() -> tuple[Path, dict[str, object]]:
    """The output folder of a run with two checkpoints, and what the run is."""
    folder = Path(tempfile.mkdtemp())
    trainer = make_trainer(folder, save_strategy="steps", save_steps=OLD, max_steps=NEW, data=rows(16))
    trainer.train()
    return folder / "out", trainer._identity


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def of_another_shape(path: Path) -> None:
    save_file({name: torch.zeros(1, *tensor.shape) for name, tensor in load_file(path).items()}, path)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def swapped(*names: str) -> Callable[[Path], None]:
    """Files of the run's other checkpoint, each of them undamaged."""

    def swap(new: Path) -> None:
        for name in names:
            shutil.copy(new.with_name(f"checkpoint-{OLD}") / name, new / name)

    return swap


def renumbered(new: Path) -> None:
    """All of the older checkpoint, under the name of the newer one."""
    shutil.rmtree(new)
    shutil.copytree(new.with_name(f"checkpoint-{OLD}"), new)


def other_hash(new: Path) -> None:
    said = json.loads((new / MANIFEST).read_text())
    said["files"]["model.safetensors"]["sha256"] = "0" * 64
    (new / MANIFEST).write_text(json.dumps(said))


def on(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage to one file of a checkpoint."""
    return lambda new: damage(new / name)


FAULTS: dict[str, Callable[[Path], None]] = {
    "a bit flipped in the model": on("model.safetensors", flip),
    "a bit flipped in the optimizer": on("optimizer.pt", flip),
    "a bit flipped in the sums since the last log": on("window_0.json", flip),
    "the model cut short": on("model.safetensors", cut),
    "the model full of zeros": on("model.safetensors", zeroed),
    "a header of 2^60 bytes": on("model.safetensors", huge_header),
    "a tensor missing": on("model.safetensors", without_a_tensor),
    "tensors of another shape": on("model.safetensors", of_another_shape),
    "the optimizer cut short": on("optimizer.pt", cut),
    "the optimizer missing": on("optimizer.pt", Path.unlink),
    "the scheduler missing": on("scheduler.pt", Path.unlink),
    "the random state missing": on("rng_state.pth", Path.unlink),
    "trainer_state.json missing": on("trainer_state.json", Path.unlink),
    "trainer_state.json cut short": on("trainer_state.json", cut),
    "an empty newer folder": emptied,
    "the manifest missing, as after a kill in a copy": on(MANIFEST, Path.unlink),
    "the manifest cut short": on(MANIFEST, cut),
    "a hash changed in the manifest": other_hash,
}
SWAPS: dict[str, Callable[[Path], None]] = {
    "the model of another step": swapped("model.safetensors"),
    "the optimizer of another step": swapped("optimizer.pt", "scheduler.pt"),
    "the state of another step": swapped("trainer_state.json"),
    "the manifest of another step": swapped(MANIFEST),
    "a whole checkpoint of another step": renumbered,
}


def handled(damage: Callable[[Path], None], folder: Path) -> bool:
    """Damage the newest checkpoint: the one before is chosen, and naming the damaged one is an error that helps."""
    source, identity = saved()
    output = folder / "out"
    shutil.copytree(source, output)
    old, new = output / f"checkpoint-{OLD}", output / f"checkpoint-{NEW}"
    whole = resume.begin(output, "auto", identity)
    damage(new)
    try:
        resume.begin(output, str(new), identity)
    except ValueError as error:
        named = str(new) in str(error) and str(old) in str(error)
    else:
        return False
    found = resume.begin(output, "auto", identity)
    aside = not new.exists() and (output / f"set-aside-{new.name}").exists()
    return whole is not None and whole.folder == new and named and found is not None and found.folder == old and aside


def cases() -> list[tuple[str, Callable[[Path], bool]]]:
    return [(name, functools.partial(handled, damage)) for name, damage in (FAULTS | SWAPS).items()]

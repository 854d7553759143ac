"""`fastdpo demo`: the quickstart, without the repository: its files are written to a folder, and trained there."""

import os
import shutil
from pathlib import Path
from typing import Any

import fastdpo

FOLDER = "fastdpo-demo"
CONFIG = "quickstart.yaml"


def demo(folder: str | None, options: dict[str, Any]) -> Path:
    """Write a small example of config, data and model to a folder, and train it: two minutes, without a GPU.

    Args:
        folder: a new or empty folder, or one that an earlier demo wrote; None: `fastdpo-demo`, in the current folder.
        options: must be empty.

    Raises:
        ValueError: the folder holds other files, or is none.
        OSError: the files can't be written.
    """
    path = Path(os.path.expanduser(folder or FOLDER))
    if path.exists() and not path.is_dir():
        raise ValueError(f"demo: {str(path)!r} is a file; name a new folder")
    if not (path / CONFIG).exists():  # else it is kept with what the user has changed in it
        _write(path)
    again = f"fastdpo train {path / CONFIG} --beta 0.5 --output_dir {path / 'beta'}"
    print(f"The example is in {path}. To train it with other settings: {again}")  # noqa: T201
    return path / CONFIG


def _write(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"demo: the folder {str(path)!r} has files in it; name a new folder")
    example = _examples()
    for name in ("train.jsonl", "test.jsonl", "model"):
        source = example / "quickstart" / name
        (path / "data").mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, path / name)
        else:
            shutil.copyfile(source, path / "data" / name)
    (path / CONFIG).write_text(_at(path, (example / CONFIG).read_text(encoding="utf-8")), encoding="utf-8")


def _examples() -> Path:
    """Return the folder of the examples: in the package if it was installed, beside it in the repository."""
    package = Path(fastdpo.__file__).parent
    return package / "examples" if (package / "examples").is_dir() else package.parent / "examples"


def _at(folder: Path, config: str) -> str:
    """Return the text of the quickstart's config with the paths of a folder."""
    for theirs, ours in (
        ("examples/quickstart/model", folder / "model"),
        ("examples/quickstart #", f"{folder / 'data'} #"),
        ("runs/quickstart", folder / "run"),
        ("examples/quickstart.yaml", folder / CONFIG),
    ):
        config = config.replace(theirs, str(ours))
    return "".join(line for line in config.splitlines(keepends=True) if "make_data.py" not in line)

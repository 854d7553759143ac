"""Find the images that the rows of a folder name, and the files of rows among the images."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value

COLUMNS = ("images", "image")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in a file's name that say to which split it belongs, as the datasets library reads them."""


def splits_among_images(folder: Path, files: Sequence[Path]) -> dict[str, list[str]] | None:
    """Return the files of rows of each split, if the folder also has images; None if it needs no such help.

    The datasets library would take the folder for one of images alone. It does read one whose `metadata` file names the
    images as `file_name`.

    Args:
        folder: the folder.
        files: its files of rows.
    """
    if not files or any(file.name.startswith("metadata.") for file in files) or _has_card(folder):
        return None
    if not any(file.suffix.lower() in _SUFFIXES for file in folder.rglob("*")):
        return None
    splits: dict[str, list[str]] = {}
    for file in files:
        words = set(re.split(r"[-._ 0-9/\\]+", str(file.relative_to(folder)).lower()))
        split = next((name for name, known in _WORDS.items() if not words.isdisjoint(known)), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _has_card(folder: Path) -> bool:
    """Whether a README.md begins with settings, in which a dataset may say what its files are."""
    card = folder / "README.md"
    return card.exists() and card.read_text(errors="replace").startswith("---")


def with_image_paths(splits: Mapping[str, Any], folder: Path) -> Any:
    """Return splits in which the paths of images, given relative to the folder, are whole.

    Raises:
        ValueError: a path leads out of the folder; the message names it.
    """
    for name, rows in splits.items():
        features = rows.features or {}
        for column in COLUMNS:
            kind = features.get(column)
            if kind not in (Value("string"), List(Value("string"))):
                continue
            if isinstance(rows, Dataset):
                whole = [_whole(value, folder, column) for value in rows[column]]
                rows = rows.remove_columns(column).add_column(column, whole, feature=kind)
            else:
                rows = rows.map(functools.partial(_in_row, folder=folder, column=column))
        splits[name] = rows  # type: ignore[index]  # a DatasetDict is a dict
    return splits


def _in_row(row: dict[str, Any], *, folder: Path, column: str) -> dict[str, Any]:
    return {column: _whole(row[column], folder, column)}


def _whole(value: Any, folder: Path, column: str) -> Any:
    if isinstance(value, list):
        return [_whole(each, folder, column) for each in value]
    if value is None or "://" in value:  # a row with a URL is named where rows are read
        return value
    path = os.path.abspath(folder / value)
    if not Path(path).is_relative_to(folder.absolute()):
        raise ValueError(
            f"dataset_name: the column {column!r} names {value!r}, which is not in the folder {str(folder)!r}; move it "
            "or a link to it there, or load the dataset in Python"
        )
    return path

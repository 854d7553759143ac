"""Find the images that the rows of a folder name, and the files of rows among the images."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, concatenate_datasets

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
        for column in COLUMNS:
            kind = (rows.features or {}).get(column)
            if kind is None or _has_bytes(kind):
                continue
            if isinstance(rows, Dataset):
                whole = [_whole(value, folder, column, row) for row, value in enumerate(rows[column])]
                named = Dataset.from_dict({column: whole}, features=Features({column: kind}))
                rows = concatenate_datasets([rows.remove_columns(column), named], axis=1)
            else:
                place = functools.partial(_in_row, folder=folder, column=column)
                rows = rows.map(place, with_indices=True, features=rows.features)
        splits[name] = rows  # type: ignore[index]  # a DatasetDict is a dict
    return splits


def _has_bytes(kind: Any) -> bool:
    """Whether a column's values hold images themselves, as no file of text can."""
    if isinstance(kind, dict):
        return any(map(_has_bytes, kind.values()))
    if isinstance(kind, list):
        return any(map(_has_bytes, kind))
    if hasattr(kind, "feature"):
        return _has_bytes(kind.feature)
    return isinstance(kind, Image) or "binary" in str(getattr(kind, "dtype", ""))


def _in_row(row: dict[str, Any], index: int, *, folder: Path, column: str) -> dict[str, Any]:
    return {column: _whole(row[column], folder, column, index)}


def _whole(value: Any, folder: Path, column: str, row: int) -> Any:
    """Return an image's path, whole, or what else stands in its place, in which paths are whole."""
    if isinstance(value, list):
        return [_whole(each, folder, column, row) for each in value]
    if isinstance(value, dict):  # as datasets.Image writes an image
        return value | {key: _whole(value[key], folder, column, row) for key in ("bytes", "path") if key in value}
    if not isinstance(value, str) or "://" in value:  # such a row is named where rows are read
        return value
    path = os.path.abspath(folder / value)
    if not Path(path).is_relative_to(folder.absolute()):
        raise ValueError(
            f"dataset_name: row {row}: the column {column!r} names {value!r}, which is not in the folder "
            f"{str(folder)!r}; move it or a link to it there, or load the dataset in Python"
        )
    return path

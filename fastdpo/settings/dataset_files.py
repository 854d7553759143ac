"""Load datasets from files, folders and the Hub; an error about a broken file names the file and the line."""

import bz2
import gzip
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError

from fastdpo.settings.config_file import data_kind
from fastdpo.settings.failures import loading
from fastdpo.settings.image_files import splits_among_images, with_image_paths
from fastdpo.settings.names import nearest
from fastdpo.untrusted.json_files import MAX_DEPTH, read_json, too_deep

FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset", "imagefolder", "audiofolder")
_TEXTS = ("prompt", "chosen", "rejected", "completion")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_splits(name: str, config: str | None = None, *, streaming: bool = False) -> Any:
    """Load the splits of a file, a folder or a dataset on the Hub; a file is one split, called train.

    A folder may also hold images, which its rows name by paths in a column `image` or `images`.

    Args:
        name: path or name on the Hub.
        config: one of the dataset's configurations; None: its only one, or its default.
        streaming: return streams, which are read during training.

    Raises:
        ValueError: a file is broken or empty; the message names it and, if it is a text file, the line. Or the dataset
            can't have configurations.
        OSError: a file can't be opened, or the Hub has no such dataset or can't be reached.
    """
    path = Path(name)
    if not path.exists():
        if name in FORMATS:  # for which the datasets library would read all files below the working directory
            raise ValueError(f"dataset_name: {name!r} is a file format; give the file or the folder to read")
        return _as_splits(load_dataset(name, config, streaming=streaming))
    if config is not None and not any(path.glob("README.md")):  # where a folder lists its configurations
        raise ValueError(f"dataset_config={config!r}: {name!r} has no configurations; leave it out")
    if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
        with _naming(path):
            _check_saved(path)
            splits = _as_splits(load_from_disk(name))
            _validate(splits)
            return {split: rows.to_iterable_dataset() for split, rows in splits.items()} if streaming else splits
    with _naming(path), _quiet():
        if path.is_file():
            _check_depth(path)
            splits = load_dataset(data_kind(path), data_files=name, streaming=streaming, **_options(path))
        else:  # a bare json, csv or text names a format there, and all files below the working directory are read
            example = _one_kind(path)
            for file in _data_files(path):
                _check_depth(file)
            _check_inside(path, **_options(example))
            if (files := splits_among_images(path, _data_files(path))) and config is None:
                kind = data_kind(example)
                splits = load_dataset(kind, data_files=files, streaming=streaming, **_options(example))
            else:
                splits = load_dataset(str(path.absolute()), config, streaming=streaming, **_options(example))
        splits = _as_splits(splits)
        if not streaming:
            _validate(splits)
    return with_image_paths(splits, path if path.is_dir() else path.parent)


def _validate(splits: Any) -> None:
    """Find text that is not UTF-8, and offsets that lead out of a memory-mapped file, before rows are tokenised."""
    for split in splits.values():
        split.data.table.validate(full=True)


class _Unsafe(ValueError):
    """What is wrong with a file that was refused before it was read."""


def _check_depth(file: Path, *, is_json: bool = False) -> None:
    """Refuse deep nesting in a file that is JSON by its name or as `is_json` says; it would end the process."""
    if not is_json and data_kind(file) != "json":
        return
    opener: Any = OPENERS.get(file.suffix, open)
    if file.suffix == ".zst":
        opener = import_module("zstandard").open
    with opener(file, "rb") as text:
        if line := too_deep(text):
            raise _Unsafe(f"{str(file)!r}, line {line}: JSON nested more than {MAX_DEPTH} levels deep; mend that row")


def _check_saved(folder: Path) -> None:
    """Refuse a folder written by `save_to_disk` that names splits or files outside it."""
    if (splits := folder / "dataset_dict.json").exists():
        for name in map(str, read_json(splits, 2**24)["splits"]):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise _Unsafe(f"{str(splits)!r} names the split {name!r}, which is not in the folder")
    for state in (*folder.glob("state.json"), *folder.glob("*/state.json")):
        files = read_json(state, 2**24)["_data_files"]
        for name in (str(file["filename"]) for file in files):
            if not (state.parent / name).resolve().is_relative_to(folder.resolve()):
                raise _Unsafe(f"{str(state)!r} names the file {name!r}, which is not in the folder")


def _check_inside(folder: Path, **options: Any) -> None:
    """Refuse a README.md whose `data_files` lie outside the folder."""
    if not (folder / "README.md").exists():
        return
    files = load_dataset_builder(str(folder.absolute()), **options).config.data_files or {}
    for name in (str(name) for names in files.values() for name in names):
        if not os.path.isabs(name) or not Path(os.path.abspath(name)).is_relative_to(folder.absolute()):  # or a URL
            raise _Unsafe(f"{str(folder / 'README.md')!r} names the data file {name!r}, which is not in the folder")


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and data_kind(file) is not None)


MIXED = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
"""What an entry of a mixture may hold."""


def load_mixture(
    entries: Sequence[Mapping[str, Any]],
    *,
    streaming: bool = False,
    test_split_size: float | None = None,
    seed: int = 0,
) -> Any:
    """Load several datasets as one, with a split `train` and, if some rows are to be held out, a split `test`.

    Args:
        entries: a mapping for each dataset, see `MIXED`: `path` as in `load_splits` or with what `load_dataset` takes.
            If all have a `fraction`, the mixture is as large as it can be with these shares (their sum counts as 1)
            while no row is used twice, and each dataset gives its first rows.
        streaming: return streams.
        test_split_size: share (below 1) or number of rows to hold out, drawn at random.
        seed: decides which rows are held out.

    Raises:
        ValueError: an entry can't be read; the message has its number.
    """
    parts = []
    for i, entry in enumerate(entries):
        where = f"datasets[{i}]"
        if not isinstance(entry, Mapping) or not entry.get("path"):
            raise ValueError(f"{where} must be a mapping with a path, got {entry!r}")
        if unknown := [key for key in entry if key not in MIXED]:
            raise ValueError(f"{where} has an unknown entry {unknown[0]!r}{nearest(unknown[0], MIXED)}")
        parts.append(_part(where, entry, streaming))
    fractions: list[Any] = [entry.get("fraction") for entry in entries]
    if any(fraction is not None for fraction in fractions):
        if streaming or not all(isinstance(f, (int, float)) and f > 0 for f in fractions):
            why = "streams have no length" if streaming else f"got {fractions}"
            raise ValueError(f"fraction in datasets must be a number above 0 in all entries or in none: {why}")
        size = min(len(rows) * sum(fractions) / f for rows, f in zip(parts, fractions, strict=True))
        parts = [rows.select(range(round(size * f / sum(fractions)))) for rows, f in zip(parts, fractions, strict=True)]
    try:
        rows = concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "datasets: their columns differ in name or type; name those to take in `columns` of each entry, or make "
            f"their types alike: {error}"
        ) from error
    if test_split_size is None:
        return {"train": rows}
    if streaming:
        raise ValueError("test_split_size can't be combined with streaming, because a stream has no length")
    size = int(test_split_size) if test_split_size >= 1 else test_split_size
    if not 0 < size < len(rows):
        raise ValueError(f"test_split_size must be a share below 1, or fewer than all {len(rows):,} rows; got {size}")
    return rows.train_test_split(test_size=size, seed=seed)


def _part(where: str, entry: Mapping[str, Any], streaming: bool) -> Any:
    """Return the rows of one entry of a mixture."""
    path, split = str(entry["path"]), entry.get("split") or "train"
    with loading(where, path):
        if "data_files" in entry or "data_dir" in entry:
            files = {name: entry[name] for name in ("data_dir", "data_files") if name in entry}
            named = load_dataset_builder(path, entry.get("name"), **files).config.data_files or {}
            local = [file for each in named.values() for file in map(Path, each) if file.is_file()]
            with _naming(local[0] if local else Path(path), where), _quiet():
                for file in local:
                    _check_depth(file, is_json=path == "json")
                splits = load_dataset(path, entry.get("name"), streaming=streaming, **files)
            splits = with_image_paths(splits, local[0].parent) if local else splits
        else:
            splits = load_splits(path, entry.get("name"), streaming=streaming)
    name, bracket, rest = split.partition("[")
    if name not in splits:
        raise ValueError(f"{where}: {path} has no split {name!r}; it has {', '.join(splits)}{nearest(name, splits)}")
    rows = splits[name]
    if bracket:
        raise ValueError(f"{where}: split {split!r} names a part of a split; set fraction instead of [{rest}")
    if columns := entry.get("columns"):
        if missing := [column for column in columns if column not in (rows.column_names or columns)]:
            raise ValueError(f"{where}: {path} has no column {missing[0]!r}{nearest(missing[0], rows.column_names)}")
        rows = rows.select_columns(columns)
    return _with_plain_text(rows)


def _with_plain_text(rows: Any) -> Any:
    """Return rows whose text has the type `string`; CSV is read as `large_string`, which can't be mixed with it."""
    if rows.features is None:  # of some streams
        return rows
    text = json.dumps(rows.features.to_dict())
    plain = Features.from_dict(json.loads(text.replace('"large_string"', '"string"')))
    return rows if plain == rows.features else rows.cast(plain)


def _one_kind(folder: Path) -> Path:
    """Return a data file of a folder, whose data files must be of one kind: the datasets library reads only one."""
    kinds = {data_kind(file): file for file in _data_files(folder)}
    if len(kinds) > 1:
        names = " and ".join(sorted(repr(file.name) for file in kinds.values()))
        raise ValueError(f"the folder {str(folder)!r} holds files of several kinds, such as {names}; keep one kind")
    return next(iter(kinds.values()), folder)


def _options(file: Path) -> dict[str, Any]:
    """Return options for reading a file: a CSV file's texts stay texts, even "100" and "None"."""
    if data_kind(file) != "csv":
        return {}
    return {"converters": dict.fromkeys(_TEXTS, str), "keep_default_na": False}


def _as_splits(found: Any) -> DatasetDict:
    return DatasetDict({"train": found}) if isinstance(found, Dataset) else found


@contextmanager
def _naming(path: Path, setting: str = "dataset_name") -> Iterator[None]:
    """Inside the block, turn any error of the datasets library about a file into a one-line ValueError."""
    try:
        yield
    except (PermissionError, ImportError, DatasetNotFoundError):
        raise
    except _Unsafe as error:
        raise ValueError(f"{setting}: {error}") from None
    except Exception as error:  # by pyarrow, pandas, json or gzip; StopIteration for an empty file
        raise ValueError(f"{setting}: {_broken(path, error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, silence the datasets library, which logs the errors that it also raises."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _broken(path: Path, error: Exception) -> str:
    """Say what is wrong with a file, or with the first unreadable file of a folder."""
    if path.is_file():
        kind = f" as {data_kind(path)}" if data_kind(path) else ""
        return _broken_file(path) or f"{str(path)!r} can't be read{kind}: {_innermost(error)}"
    if not (files := _data_files(path)):
        return f"the folder {str(path)!r} holds no .jsonl, .json, .csv or .parquet file"
    for file in files:
        if found := _broken_file(file):
            return found
        try:
            load_dataset(data_kind(file), data_files=str(file))
        except Exception as alone:
            return f"{str(file)!r} can't be read as {data_kind(file)}: {_innermost(alone)}"
    return f"{str(path)!r} can't be read: {_innermost(error)}"


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _broken_file(path: Path) -> str | None:
    """Describe the first fault of a JSON file, or say that a file is empty; None if there is no such fault."""
    opener: Any = OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            if not file.read(1):
                return f"{str(path)!r} is empty"
            file.seek(0)
            return _broken_json(path, file) if data_kind(path) == "json" and path.suffix != ".zst" else None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        return f"{str(path)!r} can't be decompressed: {error}"


def _broken_json(path: Path, file: IO[bytes]) -> str | None:
    first = file.read(1)
    file.seek(0)
    if first == b"[":  # the whole file is one list of rows
        try:
            json.loads(file.read())
        except json.JSONDecodeError as error:
            return f"{str(path)!r}, line {error.lineno}, column {error.colno}: not valid JSON, {error.msg}"
        return None
    columns: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(file, 1):
        where = f"{str(path)!r}, line {number}"
        try:
            row = json.loads(line.rstrip() or b"{}")  # without the end of the line, where no column could be named
        except UnicodeDecodeError:
            return f"{where}: not UTF-8 text"
        except json.JSONDecodeError as error:
            return f"{where}, column {error.colno}: not valid JSON, {error.msg}"
        if not isinstance(row, dict):
            return f'{where}: each line must be an object such as {{"prompt": ...}}, got {line.decode()[:40].strip()}'
        for column, value in row.items():
            kind = type(value).__name__
            line_before, before = columns.setdefault(column, (number, kind))
            if value is not None and before not in (kind, "NoneType"):
                return f"{where}: {column} is {kind}, but {before} in line {line_before}"
    return None

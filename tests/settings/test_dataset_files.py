"""fastdpo.settings.dataset_files: what a dataset library reads is read, and a broken file is named with its line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from fastdpo.settings.dataset_files import load_splits

ROWS = [{"prompt": f"{i} + 2 =", "chosen": f"It is {i + 2}.", "rejected": " 7é"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(path: Path) -> None:
    Dataset.from_list(ROWS).to_csv(str(path))


def write_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_text(LINES, encoding="utf-8")),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("a.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(LINES.encode()))),
        ("a.json.xz", lambda path: path.write_bytes(lzma.compress(LINES.encode()))),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("saved", lambda path: Dataset.from_list(ROWS).save_to_disk(str(path))),
        ("splits", lambda path: DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(path))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_and_folders_are_read(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    write(tmp_path / name)
    assert load_splits(str(tmp_path / name))["train"].to_list() == ROWS


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert {name: len(split) for name, split in load_splits(str(tmp_path)).items()} == {"train": 3, "test": 3}


@pytest.mark.parametrize("name", ["json", "text"])
def test_a_folder_may_have_the_name_of_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for folder in (name, "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(LINES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_splits(name)["train"].to_list() == ROWS


BROKEN = LINES.encode() + b'{"prompt": "x", "chosen" "y"}\n' + LINES.encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", BROKEN, "line 4, column 26: not valid JSON, Expecting ':' delimiter"),
        ("a.jsonl.gz", gzip.compress(BROKEN), "line 4, column 26: not valid JSON"),
        ("a.jsonl", LINES.encode() + b'{"prompt": "cut o', "line 4, column 12: not valid JSON"),
        ("a.jsonl", LINES.encode() + b'{"prompt": "cut"\n' + LINES.encode(), "line 4, column 17: not valid JSON"),
        ("a.jsonl", LINES.encode() + b'["no", "columns"]\n', r"line 4: each line must be an object such as .* got \["),
        ("a.jsonl", LINES.encode("latin-1"), "line 1: not UTF-8 text"),
        ("a.jsonl", b"\n \n", "a.jsonl' can't be read as json|holds no rows"),
        ("a.json", b'[{"prompt": 1},\n {"prompt": 2}', "line 2, column 15: not valid JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv' can't be read as csv: .* Expected 2 fields in line 3, saw 3"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet' can't be read as parquet: "),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:40], "can't be decompressed: Compressed file ended"),
        ("a.jsonl.gz", b"no gzip file", "a.jsonl.gz"),
    ],
    ids=range(12),
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_splits(str(tmp_path / name))
    assert str(error.value).startswith(f"dataset_name: {str(tmp_path / name)!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_broken_file_in_a_folder_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "train.csv").write_text("prompt,chosen\na,b\n")
    (tmp_path / "test.csv").write_text("prompt,chosen\na,b\na,b,c\n" if where == "file" else "")
    with pytest.raises(ValueError, match=r"test.csv' (can't be read as csv|is empty)"):
        load_splits(str(tmp_path))


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("nothing to see")
    with pytest.raises(ValueError, match=r"holds no \.jsonl, \.json, \.csv or \.parquet file"):
        load_splits(str(tmp_path))


def test_a_file_format_is_no_dataset() -> None:
    with pytest.raises(ValueError, match="'parquet' is a file format; give the file or the folder to read"):
        load_splits("parquet")


def test_the_text_of_a_csv_file_stays_text(tmp_path: Path) -> None:
    (tmp_path / "sums.csv").write_text("prompt,chosen,rejected,weight\n4*25=,100,None,0.5\nIs it null?,null,007,2\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text((tmp_path / "sums.csv").read_text())
    for name in ("sums.csv", "folder"):
        rows = load_splits(str(tmp_path / name))["train"].to_list()
        assert [row["chosen"] for row in rows] == ["100", "null"]
        assert [row["rejected"] for row in rows] == ["None", "007"]
        assert [row["weight"] for row in rows] == [0.5, 2.0]


def test_a_folder_of_several_kinds_of_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "more.csv").write_text("prompt,chosen\na,b\n")
    with pytest.raises(ValueError, match=r"holds files of several kinds, such as 'more.csv' and 'train.jsonl'"):
        load_splits(str(tmp_path))


def test_the_splits_of_a_saved_dataset_lie_in_its_folder(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "elsewhere"}]).save_to_disk(str(tmp_path / "elsewhere"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(ValueError, match=r"names the split '../elsewhere', which is not in the folder"):
        load_splits(str(tmp_path / "data"))

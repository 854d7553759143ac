"""fastdpo.untrusted.json_files: what is too deep or too large is found before a parser sees it."""

import io
import os
from pathlib import Path

import pytest

from fastdpo.untrusted.json_files import MAX_DEPTH, read_bytes, read_json, too_deep


def line_of(text: str, limit: int = 3) -> int | None:
    return too_deep(io.BytesIO(text.encode()), limit)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[[]]]", None),
        ("[[[[]]]]", 1),
        ("[]" * 9, None),
        ('{"a": [{}]}\n' * 9, None),
        ('{"a": 1}\n{"a": [[[[]]]]}\n{"a": 1}\n', 2),
        ('{"a": [], "b": [], "c": [], "d": []}\n' * 2, None),
        ("[\n[\n[\n\n[\n", 5),
        ("[\n]\n" * 5, None),
        ('{"a": "[[[[[["}\n', None),
        ('{"a": "\\"[[[[[["}\n', None),
        ('{"a": "\\\\"}[[[[\n', 1),
        ('{"a": "\\\\", "b": [[[1]]]}\r\n', 1),
    ],
)
def test_the_first_line_that_is_too_deep_is_named(text: str, line: int | None) -> None:
    assert line_of(text) == line


def test_levels_that_other_chunks_opened_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.untrusted.json_files._CHUNK", 4)
    assert line_of("[\n" * 3 + "1,\n" * 9 + "[\n") == 13


def test_size_is_bounded_at_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("[12]")
    assert read_json(path, 4) == [12]
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_json(path, 3)


def test_a_deep_file_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[1,\n" + "[" * 10**5)
    with pytest.raises(ValueError, match=rf"nested more than {MAX_DEPTH} levels deep in line 2"):
        read_json(tmp_path / "deep.json", 2**20)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", 9)

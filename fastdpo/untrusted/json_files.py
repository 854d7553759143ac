"""Bound JSON in size and depth before a parser sees it.

A parser that calls itself for each level overflows its stack on deep nesting: Arrow's ends the process by a
segmentation fault. The check is a scan in linear time, which looks closely only at lines that are unlike a row.
"""

import io
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MAX_DEPTH = 100
"""Levels of lists and objects; rows of chats with tools have about ten."""

_CHUNK = 2**22
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def too_deep(file: IO[bytes], limit: int = MAX_DEPTH) -> int | None:
    """Return the number of the first line, from 1, in which JSON is nested more than `limit` levels deep.

    A line that begins with { and ends with } is a whole row if it follows one: behind an unfinished row it would be a
    syntax error, at which every parser stops. So its brackets need only be counted, for many lines at once.
    """
    depth, number = 0, 1
    while chunk := file.read(_CHUNK):
        chunk += file.readline()
        if depth == 0 and (count := _rows(chunk, limit)):
            number += count
            continue
        for line in chunk.removesuffix(b"\n").split(b"\n"):
            if b"\\" in line:
                line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
            brackets = b"".join(line.split(b'"')[::2]).translate(None, _NO_BRACKETS)  # every second piece is a string
            opened = brackets.count(b"{") + brackets.count(b"[")
            if depth + opened <= limit:
                depth = max(depth + 2 * opened - len(brackets), 0)
            else:
                for bracket in brackets:
                    depth = max(depth + (1 if bracket in b"[{" else -1), 0)
                    if depth > limit:
                        return number
            number += 1
    return None


def _rows(chunk: bytes, limit: int) -> int:
    """Return the number of lines if each is a row with at most `limit` opening brackets; else 0."""
    first, _, more = chunk.partition(b"\n")
    if not more or not first.startswith(b"{") or not first.rstrip(b"\r").endswith(b"}"):
        return 0
    import numpy as np  # late, because a model's config, which is no row, is read before the slow imports

    data = np.frombuffer(chunk, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not len(ends) or ends[0] == 0 or ends[-1] != len(data) - 1 or data[0] != ord("{"):
        return 0
    last = np.where(data[ends - 1] == ord("\r"), data[ends - 2], data[ends - 1])
    if (last != ord("}")).any() or (data[ends[:-1] + 1] != ord("{")).any():
        return 0
    opening = np.flatnonzero((data | 32) == ord("{"))  # 32 makes a [ a {
    lines = np.searchsorted(ends, opening)
    if len(lines) > limit and (lines[limit:] == lines[: len(lines) - limit]).any():
        return 0
    return len(ends)


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file, without waiting if it is a pipe.

    Raises:
        ValueError: it is no regular file, or larger than `most_bytes`.
        OSError: it can't be read.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return data


def read_json(path: Path, most_bytes: int) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is no regular file, larger than `most_bytes`, nested more than `MAX_DEPTH` levels deep, or not
            valid JSON.
        OSError: it can't be read.
    """
    data = read_bytes(path, most_bytes)
    if line := too_deep(io.BytesIO(data)):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep in line {line}")
    return json.loads(data)

"""Measure time, peak memory and provenance, in the same way for every benchmark.

Variants take turns within each repetition, in alternating order, so a busy or throttled machine slows all of them
alike, and a ratio is the median of per-repetition ratios. Memory is measured in a separate call, after a warm-up and
before the timed calls.
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch

from fastdpo import __version__
from fastdpo.commands.doctor import head_check
from fastdpo.settings.config_file import UsageError
from fastdpo.settings.names import check_name, nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
"""The clone of the repository, if this is one."""


@dataclass(frozen=True)
class Measured:
    """The time and the memory of one call."""

    times: list[float]
    """Milliseconds of each repetition, in order."""
    peak_mib: float
    """Largest extra memory during a call, results included; see `peak_memory`."""

    @property
    def ms(self) -> float:
        return median(self.times)

    @property
    def min_ms(self) -> float:
        return min(self.times)

    @property
    def spread(self) -> float:
        """Return the range of the times, relative to their median."""
        return (max(self.times) - min(self.times)) / self.ms

    def ratio_to(self, other: "Measured") -> float:
        """Return the time relative to that of `other`, which was measured in the same run."""
        return median(a / b for a, b in zip(self.times, other.times, strict=True))


def measure(variants: Mapping[str, Callable[[], object]], repetitions: int = 5) -> dict[str, Measured]:
    """Measure the functions in turns; each must drop what it computes."""
    peaks = {}
    for name, fn in variants.items():
        fn()  # compile, fill caches
        peaks[name] = peak_memory(fn)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions):
        for name in reversed(list(variants)) if repetition % 2 else variants:
            times[name].append(milliseconds(variants[name]))
    return {name: Measured(times[name], peaks[name]) for name in variants}


def milliseconds(fn: Callable[[], object]) -> float:
    """Time one call from an idle device to an idle device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def peak_memory(fn: Callable[[], object]) -> float:
    """Return the MiB that a call needs at its worst moment, see `fastdpo.commands.doctor.head_check.peak_memory`.

    Raises:
        OSError: this machine can't tell.
    """
    peak = head_check.peak_memory(fn, torch.device(DEVICE))
    if peak is None:
        raise OSError("the benchmarks measure memory, which works on CUDA and on the CPU of Linux, but not here")
    return peak


WRITTEN = (":!docs", ":!benchmarks/results")
"""What measuring itself rewrites; changes of all other files make a commit dirty."""


def provenance() -> dict[str, str]:
    """Return where, when and on what a number was measured. Without git, the variable COMMIT names the commit."""
    if DEVICE == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
        threads = torch.get_num_threads()
        machine = f"{model}, {threads} thread{'s' * (threads > 1)}"
    commit = os.environ.get("COMMIT") or _git("rev-parse", "--short", "HEAD") or "none"
    return {
        "machine": machine,
        "fastdpo": __version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "trl": _version("trl"),
        "liger-kernel": _version("liger-kernel"),
        "cut-cross-entropy": _version("cut-cross-entropy"),
        "commit": commit + ("+dirty" if _git("status", "--porcelain", "--", *WRITTEN) else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*args: str) -> str:
    """Return what git says about the clone; nothing in an installed package, which may lie in another repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return ""
    return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def save(path: Path, found: dict[str, Any]) -> None:
    """Write what a study has found, and where and when, in the place of what it found before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance()} | found, indent=1) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `record` wrote; none if there is no such file.

    Raises:
        ValueError: a line is no JSON object, as the last one is if its process was killed while it wrote.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is not a row of results; remove it: {line[:40]!r}")
        rows.append(row)
    return rows


def results_folder() -> Path:
    """Return the folder of this machine's results: in benchmarks/results/ of a clone, else in bench-results/."""
    name = f"cpu-{os.cpu_count()}-cores" if DEVICE == "cpu" else torch.cuda.get_device_name()
    parent = Path("benchmarks", "results")
    return (parent if parent.is_dir() else Path("bench-results")) / re.sub(r"[^a-z0-9]+", "-", name.lower())


OUT = "File to which one JSON line per variant is appended (default: in the folder of this machine's results)."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line of the command line's, and whose flags may be written with underscores."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"fastdpo bench {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_seconds(self) -> None:
        self.add_argument(
            "--seconds",
            type=_seconds,
            default=math.inf,
            help="Time limit; a case starts only if the longest so far would fit (default: none).",
        )

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            if action.choices is not None:
                check_name(action.option_strings[-1], value, action.choices)
        except ValueError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('fastdpo ')}: {message}")

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Return the arguments; a flag is the same with `_` as with `-`."""
        args, rest = self.parse_known_args([_dashed(word) if word.startswith("--") else word for word in words])
        if rest:
            flag = rest[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"expected an option, got {rest[0]!r}")
            self.error(f"unknown option {flag}{nearest(flag, self._option_string_actions)}")
        return args


def _seconds(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value

"""Measure time, peak memory and provenance, in the same way for every benchmark.

Variants take turns within each repetition, so a busy or throttled machine slows all of them alike, and a ratio is the
median of per-repetition ratios. Memory is measured in a separate call, after a warm-up and before the timed calls.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdpo.commands.doctor import head_check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    for _ in range(repetitions):
        for name, fn in variants.items():
            times[name].append(milliseconds(fn))
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
    """Return the MiB that a call needs at its worst moment, see `fastdpo.commands.doctor.head_check.peak_memory`."""
    peak = head_check.peak_memory(fn, torch.device(DEVICE))
    assert peak is not None, "memory can't be measured on this device"
    return peak


def provenance() -> dict[str, str]:
    """Return where, when and on what a number was measured. Without git, the variable COMMIT names the commit."""
    if DEVICE == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
        machine = f"{model}, {torch.get_num_threads()} threads"
    commit = os.environ.get("COMMIT") or _git("rev-parse", "--short", "HEAD") or "none"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "trl": _version("trl"),
        "liger-kernel": _version("liger-kernel"),
        "cut-cross-entropy": _version("cut-cross-entropy"),
        "commit": commit + ("+dirty" if _git("status", "--porcelain") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*args: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))

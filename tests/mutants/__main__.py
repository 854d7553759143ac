"""Plant the faults one at a time, and see whether the tests catch them: `python -m tests.mutants`.

The sources are copied to a temporary folder and changed there. The tests of every fault pass without it, which is
checked first.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SOURCES = ("fastdpo", "kernels", "tests")
BAR = 0.95
"""Least share of the faults to be caught."""


def copy_sources(source: Path, folder: Path) -> None:
    """Copy what the tests need; fastdpo/kernels stays a link."""
    for name in SOURCES:
        shutil.copytree(source / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sources in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def outcome_of(folder: Path, tests: str) -> str:
    """Say whether tests "survived" what is in `folder`, or "caught" it; "error" if they cannot be run."""
    try:
        returncode = run(folder, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)).returncode
    except subprocess.TimeoutExpired:
        return "error"
    return {0: "survived", 1: "caught"}.get(returncode, "error")


def plant(source: Path, file: str, fault: Fault) -> str:
    """Return the outcome of a fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(source, folder)
        text = (folder / file).read_text()
        if text.count(fault.old) != 1:
            return "error"
        (folder / file).write_text(text.replace(fault.old, fault.new))
        return outcome_of(folder, fault.tests)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args()
    faults = [(file, f) for file, some in FAULTS.items() for f in some if not options.only or f.name in options.only]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        source = Path(name).resolve()  # what is edited meanwhile does not matter
        copy_sources(ROOT, source)
        imported = run(source, "-c", "import fastdpo.head.op; print(fastdpo.head.op.__file__)").stdout
        if not imported.startswith(str(source)):
            print(f"not a copy is imported, but {imported}")  # noqa: T201
            return 1
        tests = sorted({fault.tests for _, fault in faults})
        for some, outcome in zip(tests, pool.map(partial(outcome_of, source), tests), strict=True):
            if outcome != "survived":
                print(f"fails without a fault: {some}")  # noqa: T201
                return 1
        caught = 0
        outcomes = pool.map(lambda pair: plant(source, *pair), faults)
        for (file, fault), outcome in zip(faults, outcomes, strict=True):
            caught += outcome == "caught"
            print(f"{outcome:9}{fault.name:23}{file:41}{fault.description}", flush=True)  # noqa: T201
    print(f"{caught} of {len(faults)} caught")  # noqa: T201
    return 0 if caught >= BAR * len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())

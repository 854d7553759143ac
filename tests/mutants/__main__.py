"""Plant the faults one at a time, and see whether the tests catch them: `python -m tests.mutants`.

The sources are copied to a temporary folder and changed there. The tests of every fault pass without it, which is
checked first. PyTorch and pytest are imported once; each fault is planted for a fork of this process.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SOURCES = ("fastdpo", "kernels", "tests")
SECONDS = 600
"""After them, tests that still run are stopped, which is an error."""
BAR = 0.95
"""Least share of the faults to be caught."""
Planted = tuple[str, Fault] | None
"""A file of the sources and what to change in it; None for no change."""


def copy_sources(source: Path, folder: Path) -> None:
    """Copy what the tests need; fastdpo/kernels stays a link."""
    for name in SOURCES:
        shutil.copytree(source / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)


def import_once() -> None:
    """Import what the tests of all faults need, as `tests/conftest.py` does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import pytest  # noqa: F401
    import torch.distributed.run
    import triton.language
    import triton.runtime.interpreter  # noqa: F401


def run_tests(folder: Path, tests: str) -> int:
    """Run tests on the sources in `folder`, in this process, and return pytest's exit code."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)  # of processes that the tests start
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    import fastdpo

    assert str(fastdpo.__file__).startswith(str(folder)), f"not the copy is imported, but {fastdpo.__file__}"
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


def start(source: Path, folder: Path, planted: Planted, tests: str) -> int:
    """Plant a fault in a copy of `source` in `folder`, run tests on it in a fork, and return the fork's id."""
    copy_sources(source, folder)
    if planted is not None:
        file, fault = planted
        (folder / file).write_text((folder / file).read_text().replace(fault.old, fault.new))
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        signal.alarm(SECONDS)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        code = run_tests(folder, tests)
    finally:
        os._exit(code)


def outcomes(source: Path, work: Iterable[tuple[Planted, str]], jobs: int) -> Iterator[str]:
    """Yield, in order, whether tests "survived" what is planted, or "caught" it; "error" if they cannot be run."""
    waiting, running, found = list(enumerate(work)), {}, {}
    following, count = 0, len(waiting)
    while following < count:
        while waiting and len(running) < jobs:
            index, (planted, tests) = waiting.pop(0)
            if planted is not None and (source / planted[0]).read_text().count(planted[1].old) != 1:
                found[index] = "error"
                continue
            folder = tempfile.TemporaryDirectory()
            running[start(source, Path(folder.name).resolve(), planted, tests)] = index, folder
        if running:
            pid, status = os.wait()
            index, folder = running.pop(pid)
            folder.cleanup()
            found[index] = {0: "survived", 1: "caught"}.get(os.waitstatus_to_exitcode(status), "error")
        while following in found:
            yield found[following]
            following += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args()
    faults = [(file, f) for file, some in FAULTS.items() for f in some if not options.only or f.name in options.only]
    import_once()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name).resolve()  # what is edited meanwhile does not matter
        copy_sources(ROOT, source)
        tests = sorted({fault.tests for _, fault in faults})
        for some, outcome in zip(tests, outcomes(source, [(None, some) for some in tests], options.jobs), strict=True):
            if outcome != "survived":
                print(f"fails without a fault: {some}")  # noqa: T201
                return 1
        caught = 0
        found = outcomes(source, [(planted, planted[1].tests) for planted in faults], options.jobs)
        for (file, fault), outcome in zip(faults, found, strict=True):
            caught += outcome == "caught"
            print(f"{outcome:9}{fault.name:23}{file:41}{fault.description}", flush=True)  # noqa: T201
    print(f"{caught} of {len(faults)} caught")  # noqa: T201
    return 0 if caught >= BAR * len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())

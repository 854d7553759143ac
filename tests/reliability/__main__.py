"""Count the faults that are handled right: `python -m tests.reliability [NAME...]`.

Each module named here has `cases()`: pairs of a fault's name and a function that gets an empty folder, makes the fault
in it, and returns whether it was handled right. The table of docs/reliability.md is what this prints.
"""

import argparse
import importlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

Case = tuple[str, Callable[[Path], bool]]

MODULES = {
    "checkpoint_faults": "a checkpoint that was damaged, swapped or never completed is not resumed from",
    "changed_settings": "a checkpoint of another run is refused, or the change is said and applied",
    "not_finite": "a weight that is not finite is never saved",
    "disk_full": "a full disk is said in one line and leaves nothing corrupt",
    "kills": "a run killed at a random moment resumes by itself, bitwise as if it had not been",
}
"""The modules by name, each with what its score counts."""


def score(name: str) -> tuple[int, int]:
    """Run the cases of a module, print those that fail, and return how many were handled right, of how many."""
    cases: list[Case] = importlib.import_module(f"tests.reliability.{name}").cases()
    right = 0
    for case, handles in cases:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FASTDPO_CACHE"] = f"{folder}/.cache"
            try:
                passed = handles(Path(folder))
            except Exception:
                traceback.print_exc()
                passed = False
        right += passed
        if not passed:
            print(f"  {name}: {case} is not handled right", flush=True)  # noqa: T201
    return right, len(cases)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*MODULES], help=f"of {', '.join(MODULES)}")
    failed = False
    logging.disable(logging.WARNING)
    print("| what holds | command | score |\n|---|---|---|", flush=True)  # noqa: T201
    for name in parser.parse_args().names:
        right, count = score(name)
        failed |= right < count
        command = f"`python -m tests.reliability {name}`"
        print(f"| {MODULES.get(name, name)} | {command} | {right} of {count} |", flush=True)  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

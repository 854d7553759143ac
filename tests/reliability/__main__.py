"""Make faults, and count those that are handled right: `python -m tests.reliability [NAME...]`.

The table of docs/reliability.md is what this prints. Each module has `cases()`: pairs of a fault's name and a function
that gets an empty folder, makes the fault in it, and returns whether it was handled right.
"""

import argparse
import importlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

Case = tuple[str, Callable[[Path], bool]]

MODULES = {
    "checkpoint_faults": "a checkpoint that was damaged, swapped or never completed is not resumed from",
    "changed_settings": "a checkpoint of another run is refused, or the change is said and applied",
    "not_finite": "a weight that is not finite is never saved",
    "disk_full": "a full disk is said in one line and leaves nothing corrupt",
    "malicious_files": "a file that a stranger wrote runs no code, and leads to no file outside its folder",
    "data_cases": "a bad row is named by its number, or counted in a warning",
    "kernel_cases": "the fused head gives the exact result or an error, on inputs that are bad or extreme",
    "cache_cases": "of a damaged cache, only what is damaged is computed again",
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
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description="Make faults, and count those that are handled right. The exit code is 1 if one is not.",
        epilog="modules, and what holds for each of their faults:\n"
        + "\n".join(f"  {name:19}{what}" for name, what in MODULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modules = "modules to run (default: all, some 25 minutes on two cores, most of them for kills)"
    parser.add_argument("names", nargs="*", metavar="NAME", choices=MODULES, help=modules)
    names = parser.parse_args().names or MODULES
    prepare()
    failed = False
    print("| what holds | command | score |\n|---|---|---|", flush=True)  # noqa: T201
    for name in names:
        right, count = score(name)
        failed |= right < count
        command = f"`python -m tests.reliability {name}`"
        print(f"| {MODULES[name]} | {command} | {right} of {count} |", flush=True)  # noqa: T201
    return int(failed)


def prepare() -> None:
    """Let kernels run without a GPU, ask the Hub for nothing, and show no warnings: most cases make one."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # before the libraries that read them are imported
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())

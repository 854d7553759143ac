"""Train for long and watch memory and open files: `python -m tests.soak --minutes 30`.

Each round trains a tiny model with evaluation, logging and saving: in turn on a dataset, on a stream, with precomputed
references, and with an adapter. After the first minute, memory may grow by 1 % and no file may stay open.
"""

import argparse
import ctypes
import gc
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WARM_UP = 60.0
ALLOWED = 0.01
"""Growth of memory after the warm-up, as a share."""


class Round(NamedTuple):
    """What one round left behind."""

    kind: str
    seconds: float
    """Since the start."""
    mib: float
    """Resident memory of the process."""
    files: int
    """Open file descriptors."""


KINDS = ("dataset", "stream", "precomputed", "adapter")


def one_round(kind: str, number: int) -> None:
    """Train, evaluate, log and save in a folder that is removed afterwards."""
    from tests.helpers.trainers import lora, make_trainer, rows

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTDPO_CACHE"] = f"{folder}/cache"
        data: Any = rows(48, seed=number % 7)
        options: dict[str, Any] = {"precompute_ref_log_probs": kind == "precomputed"}
        if kind == "adapter":
            options["peft_config"] = lora()
        trainer = make_trainer(
            Path(folder),
            data=data.to_iterable_dataset() if kind == "stream" else data,
            eval_dataset=rows(8, seed=1),
            max_steps=12,
            save_strategy="steps",
            save_steps=4,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=6,
            **options,
        )
        trainer.train()


def measure(kind: str, started: float) -> Round:
    """Collect what is free, and read the memory and the open files of this process."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no leak
    process = psutil.Process()
    return Round(kind, time.monotonic() - started, process.memory_info().rss / 2**20, process.num_fds())


def growth(rounds: Sequence[Round], warm_up: float = WARM_UP) -> tuple[float, int]:
    """Return the growth of memory, as a share, and of open files.

    Of the rounds after the warm-up, the lowest of the first and of the last quarter are compared: a peak is no leak.
    """
    late = [each for each in rounds if each.seconds >= warm_up]
    quarter = max(len(late) // 4, 1)
    if len(late) < 2:
        return 0.0, 0
    first, last = late[:quarter], late[-quarter:]
    mib = [min(each.mib for each in part) for part in (first, last)]
    return mib[1] / mib[0] - 1, min(each.files for each in last) - min(each.files for each in first)


def soak(minutes: float) -> list[Round]:
    """Run rounds for so many minutes, at least one of each kind, and print a line for each."""
    started, rounds = time.monotonic(), []
    print("| round | kind | seconds | MiB | open files |\n|---|---|---|---|---|", flush=True)  # noqa: T201
    for number in itertools.count():
        if number >= len(KINDS) and time.monotonic() - started >= 60 * minutes:
            return rounds
        kind = KINDS[number % len(KINDS)]
        one_round(kind, number)
        found = measure(kind, started)
        rounds.append(found)
        print(f"| {number} | {kind} | {found.seconds:.0f} | {found.mib:.1f} | {found.files} |", flush=True)  # noqa: T201
    raise AssertionError("unreachable")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to train (default: 30)")
    minutes = parser.parse_args().minutes
    logging.disable(logging.WARNING)
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    rounds = soak(minutes)
    memory, files = growth(rounds)
    print(f"memory grew by {memory:.2%} after the first minute, open files by {files}")  # noqa: T201
    return int(memory > ALLOWED or files > 0)


if __name__ == "__main__":
    sys.exit(main())

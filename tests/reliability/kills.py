"""Kill a training at random moments: the same call resumes it, bitwise as if nothing had happened.

Half of the kills fall anywhere in the run, the others inside of a save. The model is so large that a save takes about
a second.
"""

import functools
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import forks
from tests.helpers.forks import PATIENCE
from tests.helpers.resumable import train

KILLS = 20


def start(folder: Path, large: bool) -> Any:
    return forks.start(functools.partial(train, folder, large=large), log=folder / "log")


def finish(folder: Path, large: bool) -> dict[str, Any]:
    process = start(folder, large)
    process.join(PATIENCE)
    if process.exitcode != 0:
        raise RuntimeError((folder / "log").read_text())
    end: dict[str, Any] = json.loads((folder / "end.json").read_text())
    return end


@functools.cache
def uninterrupted(large: bool) -> tuple[dict[str, Any], float]:
    """The end of a run that nobody kills, and its seconds of training."""
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    process = start(folder, large)
    wait_for(lambda: "training" in log_of(folder), process)
    began = time.monotonic()
    process.join(PATIENCE)
    seconds = time.monotonic() - began
    assert started < began
    return json.loads((folder / "end.json").read_text()), seconds


def log_of(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def wait_for(there: Callable[[], Any], process: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)


def killed(number: int, in_save: bool, large: bool, folder: Path) -> bool:
    """Kill once, then start again as a scheduler would, without looking."""
    expected, seconds = uninterrupted(large)
    chance = random.Random(number)
    process = start(folder, large)
    wait_for(lambda: "training" in log_of(folder), process)
    if in_save:
        step = chance.choice((2, 4, 6))
        wait_for((folder / "out" / f".checkpoint-{step}.tmp").exists, process)
        time.sleep(chance.uniform(0.0, seconds / 8))
    else:
        time.sleep(chance.uniform(0.0, 0.6 * seconds))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError("the run ended before it was killed")
    leftovers = [path.name for path in (folder / "out").glob(".checkpoint*")]
    found = finish(folder, large)
    print(f"kill {number}: {'in a save' if leftovers else 'between saves'}", flush=True)  # noqa: T201
    clean = not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]
    return found == expected and clean


def cases(kills: int = KILLS, large: bool = True) -> list[tuple[str, Callable[[Path], bool]]]:
    return [(f"kill {number}", functools.partial(killed, number, number % 2 == 0, large)) for number in range(kills)]

"""Processes killed at random moments of a fill: nothing finished is lost, nothing unfinished is read."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fastdpo.reference.cache import TokenCache, entry_key
from tests.helpers.cache_fill import fill

KILLS = 20
N = 4000  # more than any of the processes gets to; one that did would wait to be killed
PATIENCE = 120.0


def _fill_into(folder: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.set_blocking(1, True)
    sys.stdout = os.fdopen(1, "w")
    fill(folder, N, seconds=0.0)
    time.sleep(PATIENCE)


def _wait_until_it_grows(log: Path, size: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while log.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.001)


def test_twenty_kills_lose_nothing_finished(tmp_path: Path) -> None:
    """Each process continues where the one before was killed; the moments fall before, in and after every step.

    Every other process has finished an entry before its moment comes, on however busy a machine.
    """
    folder, log = tmp_path / "cache", tmp_path / "log"
    log.touch()
    chance = random.Random(0)
    finished_before = 0
    context = multiprocessing.get_context("forkserver")  # threads of this process might hold locks in a fork
    context.set_forkserver_preload(["tests.helpers.cache_fill"])
    grew = 0
    for kill in range(KILLS):
        process = context.Process(target=_fill_into, args=(folder, log))
        size = log.stat().st_size
        process.start()
        if kill % 2:
            _wait_until_it_grows(log, size)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        # a torn last line is of an entry whose shard was finished, too
        said = [line for line in log.read_text().splitlines() if line.startswith("done ")]
        finished = {int(line.split()[1]) for line in said}
        assert len(said) == len(finished), "an entry was computed twice"
        found = TokenCache(folder)
        for i in finished:
            assert np.array_equal(found[entry_key([1, i], [i])], np.linspace(-9, -i - 1, i % 5, dtype=np.float32))
        assert len(found) >= len(finished) >= finished_before
        grew += len(finished) > finished_before
        finished_before = len(finished)
    assert grew >= KILLS // 2, "the kills came before anything was written"

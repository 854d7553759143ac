"""Processes forked from one that has only imported: an import of torch and transformers would cost each ten seconds."""

import functools
import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0
"""Seconds after which a process is killed; on a busy machine, a few minutes are usual."""


@functools.cache
def context() -> Any:
    """A fork of this process could wait for ever for a lock that a thread held, so another process forks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.helpers.resumable", "peft"])
    return found


def start(function: Callable[..., Any], *args: Any, log: Path, **environment: str) -> Any:
    """Start `function(*args)` in a process of its own that writes to the end of a log all that it says."""
    process = context().Process(target=_run, args=(function, args, log, os.environ | environment))
    process.start()
    return process


def _run(function: Callable[..., Any], args: Any, log: Path, environment: dict[str, str]) -> None:
    gc.freeze()  # what is imported, through which each training would walk
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def python(*words: str, log: Path) -> int:
    """Do what `python -m MODULE ...` or `python -c CODE` does in the root of the repository; return the exit code."""
    process = start(_python, words, log=log)
    process.join(PATIENCE)
    process.kill()
    process.join()
    return process.exitcode


def _python(words: tuple[str, ...]) -> None:
    option, what, *arguments = words
    os.chdir(ROOT)
    sys.argv = [what, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def run_ranks(function: Callable[..., Any], *args: Any, log: Path, processes: int = 2, **environment: str) -> list[int]:
    """Run `function(*args)` in each process of a group, as torchrun does; return the exit codes."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        start(_alone, function, *args, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **group, **environment)
        for rank in range(processes)
    ]
    deadline = time.monotonic() + PATIENCE
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def _alone(function: Callable[..., Any], *args: Any) -> None:
    """Run it on one core, which the other processes need too."""
    import torch

    torch.set_num_threads(1)
    function(*args)

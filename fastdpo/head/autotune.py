"""Which implementation of the head is the fastest here: measured on the first calls of a shape, remembered on disk.

The candidates take turns: each serves ROUNDS calls, between two events of the device's own clock. Nobody waits for the
events; once a later call finds that all have passed, the sums of the medians decide, and the verdict goes to
`choices.json`, where this and later processes find it. The first round, which compiles, does not count.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastdpo.head.impl.interface import Needs
from fastdpo.settings.files import cache_home, write_file

logger = logging.getLogger("fastdpo")

ROUNDS = 4

Event = torch.cuda.Event
_verdicts: dict[str, str] | None = None  # what the file holds, once it has been read
_calls: dict[str, int] = {}
_events: dict[str, dict[tuple[str, str], list[tuple[Any, Any]]]] = {}  # by key, then implementation and phase


def cache_file() -> Path:
    """Return the file of verdicts."""
    return cache_home() / "choices.json"


def pick(key: str, candidates: tuple[str, ...]) -> str:
    """Return the candidate that serves this call: the fastest, where that is known."""
    verdict = _read().get(key)
    if verdict in candidates:
        return str(verdict)
    call = _calls.get(key, 0)
    _calls[key] = call + 1
    if call < ROUNDS * len(candidates):
        return candidates[call % len(candidates)]
    events = [pair for pairs in _events.get(key, {}).values() for pair in pairs]
    if not all(end.query() for _, end in events):
        return candidates[0]
    times = {name: _milliseconds(key, name) for name in candidates}
    winner = min(candidates, key=lambda name: times[name])
    logger.debug("head: %s is the fastest of %s for %s", winner, {k: f"{t:.2f} ms" for k, t in times.items()}, key)
    _write(key, winner)
    _events.pop(key, None)
    return winner


@contextmanager
def timed(key: str, impl: str, phase: str) -> Iterator[None]:
    """Time a phase, forward or backward, of a call that is a trial; what comes after would keep the verdict waiting."""
    if not key or key in _read() or len(_events.get(key, {}).get((impl, phase), ())) == ROUNDS:
        yield
        return
    start, end = Event(enable_timing=True), Event(enable_timing=True)
    start.record()
    yield
    end.record()
    _events.setdefault(key, {}).setdefault((impl, phase), []).append((start, end))


def _milliseconds(key: str, impl: str) -> float:
    """Sum the medians of the phases; infinite where there was only a first round, or none."""
    phases = [pairs[1:] for (name, _), pairs in _events.get(key, {}).items() if name == impl]
    if not phases or not all(phases):
        return float("inf")
    return sum(float(median(start.elapsed_time(end) for start, end in pairs)) for pairs in phases)


def _read() -> dict[str, str]:
    global _verdicts
    if _verdicts is None:
        try:
            _verdicts = dict(json.loads(cache_file().read_text()))
        except FileNotFoundError:
            _verdicts = {}
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the head is measured again", cache_file(), error)
            _verdicts = {}
    return _verdicts


def _write(key: str, verdict: str) -> None:
    """Add a verdict to the file, with those that other processes have added since."""
    global _verdicts
    known, _verdicts = _read(), None
    _verdicts = known | _read() | {key: verdict}
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_file(cache_file(), json.dumps(_verdicts, indent=1, sort_keys=True).encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s): the head is measured again next time", cache_file(), error)


@cache
def has_triton() -> bool:
    """Whether Triton is installed; logs a warning once if it is not."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: linear_logprobs runs on CUDA in PyTorch.")
    return found


def choose_impl(impl: str, hidden: Tensor, weight: Tensor, needs: list[bool], sparse: bool) -> tuple[str, str]:
    """Return the implementation that serves "auto", and the key of the trial that the call is part of, or nothing."""
    measures = impl == "auto" and hidden.device.type == "cuda" and not torch.compiler.is_compiling()
    if not measures or not has_triton():
        return impl, ""
    wants = Needs(*needs)
    key = [
        torch.cuda.get_device_name(hidden.device),
        f"torch {torch.__version__}",
        str(hidden.dtype).removeprefix("torch."),
        f"D={weight.shape[1]}",
        f"V={weight.shape[0]}",
        f"N<{1 << hidden.shape[0].bit_length()}",
        "forward" if not any(needs) else "trained" if wants.weight or wants.bias or wants.weight2 else "frozen",
        "sparse" if sparse and any(needs) else "dense",
    ]
    return pick(", ".join(key), ("triton", "blas")), ", ".join(key)

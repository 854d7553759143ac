"""Choose the fastest implementation of the head: time the first calls of a shape, and remember the winner on disk.

These first calls are a trial, in which the candidates take turns. Each serves ROUNDS calls, and device events before
and after each phase time it. No call waits for an event. Once a later call finds all events complete, the candidate
with the smallest sum of median times wins. Its name, the verdict, goes to `choices.json`, where this and later
processes find it. The first round does not count, because it compiles.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.head.impl.interface import Needs, is_captured
from fastdpo.settings.files import cache_home, write_file
from fastdpo.untrusted.json_files import read_json

logger = logging.getLogger("fastdpo")

ROUNDS = 4
GLUON_FORWARD = "fastdpo.kernels.linear_logprobs_forward_gluon"

Event = torch.cuda.Event
_verdicts: dict[str, str] | None = None  # the content of the file, after it was read
_calls: dict[str, int] = {}
_events: dict[str, dict[tuple[str, str], list[tuple[Any, Any]]]] = {}  # by key, then implementation and phase


def cache_file() -> Path:
    """Return the path of the file of verdicts."""
    return cache_home() / "choices.json"


def pick(key: str, candidates: tuple[str, ...]) -> str:
    """Return the candidate that serves this call: the fastest if it is known, else the one whose turn it is."""
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
def timed(key: str, impl: str, phase: str, x: Tensor) -> Iterator[None]:
    """Time the block, a forward or backward on the device of `x`, if it is part of a trial.

    A candidate that has its ROUNDS timings is not timed again, because new events would delay the verdict.
    """
    known = key in _read() or len(_events.get(key, {}).get((impl, phase), ())) == ROUNDS
    if not key or known or is_captured(x):
        yield
        return
    with torch.cuda.device_of(x):  # an event is recorded on a stream of the current device
        start, end = Event(enable_timing=True), Event(enable_timing=True)
        start.record()
        yield
        end.record()
    _events.setdefault(key, {}).setdefault((impl, phase), []).append((start, end))


def _milliseconds(key: str, impl: str) -> float:
    """Return the sum of the phases' median times; infinity if a phase was not timed after the first round."""
    phases = [pairs[1:] for (name, _), pairs in _events.get(key, {}).items() if name == impl]
    if not phases or not all(phases):
        return float("inf")
    return sum(float(median(start.elapsed_time(end) for start, end in pairs)) for pairs in phases)


def _read() -> dict[str, str]:
    global _verdicts
    if _verdicts is None:
        try:
            found = read_json(cache_file(), 2**20)
            _verdicts = {key: name for key, name in dict(found).items() if isinstance(name, str)}
        except FileNotFoundError:
            _verdicts = {}
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the head's implementations are timed again", cache_file(), error)
            _verdicts = {}
    return _verdicts


def _write(key: str, verdict: str) -> None:
    """Add a verdict to the file, and keep those that other processes have added since it was read."""
    global _verdicts
    known, _verdicts = _read(), None
    _verdicts = known | _read() | {key: verdict}
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_file(cache_file(), json.dumps(_verdicts, indent=1, sort_keys=True).encode())
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the head's implementations are timed again next time", cache_file(), error
        )


def several_ranks() -> bool:
    """Whether this process is one of several of a job: they would decide apart, and their results differ in bits."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def version_of_kernels() -> str:
    """Return a short name of what is timed: it changes with Triton's version and with the code of the head."""
    code = hashlib.sha256(import_module("triton").__version__.encode())
    folders = Path(__file__).parent / "impl", Path(__file__).parent.parent / "kernels"
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()[:8]


@cache
def has_triton() -> bool:
    """Whether Triton is installed; logs a warning once if it is not."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: on CUDA, linear_logprobs runs in PyTorch.")
    return found


@cache
def has_gluon() -> bool:
    """Whether the installed Triton has what the warp-specialised forward is written in."""
    if not has_triton():
        return False
    try:
        import_module(GLUON_FORWARD)
    except (ImportError, AttributeError) as error:  # Gluon is experimental: its names may change, or be left out
        logger.debug("head: this Triton can't compile the warp-specialised forward (%s)", error)
        return False
    return True


def may_try_gluon(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the user has allowed the warp-specialised forward, and it fits the device and the inputs."""
    if os.environ.get("FASTDPO_GLUON", "0") != "1" or not has_gluon():
        return False
    return bool(import_module(GLUON_FORWARD).fits_gluon(hidden, weight))


def choose_impl(
    impl: str, hidden: Tensor, weight: Tensor, needs: list[bool], sparse: bool, workspace: int, plain: bool = False
) -> tuple[str, str]:
    """Return the implementation that serves the call, and the key of the trial it is part of ("" if none).

    `plain` says that the call has neither a bias nor a low-rank addition and asks for no statistics.
    """
    measures = impl == "auto" and hidden.device.type == "cuda" and not torch.compiler.is_compiling()
    if not measures or not has_triton():
        return impl, ""
    if is_captured(hidden) or several_ranks():
        return "triton", ""
    wants = Needs(*needs)
    key = [
        torch.cuda.get_device_name(hidden.device),
        f"torch {torch.__version__}",
        f"kernels {version_of_kernels()}",
        str(hidden.dtype).removeprefix("torch."),
        f"D={weight.shape[1]}",
        f"V={weight.shape[0]}",
        f"N<{1 << hidden.shape[0].bit_length()}",
        "forward" if not any(needs) else "trained" if wants.weight or wants.bias or wants.weight2 else "frozen",
        "sparse" if sparse and any(needs) else "dense",
        f"workspace {workspace}",
    ]
    candidates: tuple[str, ...] = ("triton", "blas")
    if plain and may_try_gluon(hidden, weight):
        candidates += ("gluon",)
        key.append("gluon")
    return pick(", ".join(key), candidates), ", ".join(key)

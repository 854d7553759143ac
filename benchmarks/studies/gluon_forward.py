"""Run the warp-specialised forward on a Hopper GPU: against float64 and the TMA kernel, three times, and timed.

    timeout 120 python -m benchmarks.studies.gluon_forward

Production tiles, ragged shapes. A kernel that is still running after PATIENCE seconds is taken for a deadlock. Nothing
in the process can end it, so the process ends with exit code 4, and the line before says in which case. Exit code 1
means wrong results, 0 that all is well or that the GPU or Triton can't run this kernel.

Shapes: N rows, D hidden size, V vocabulary.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.benchmarks.harness import DEVICE
from fastdpo.head.autotune import GLUON_FORWARD, has_gluon
from fastdpo.head.impl.interface import Transform

PATIENCE = 20
ROWS = 512
"""Rows of float64 logits at a time."""
Launch = Callable[..., Any]


class Case(NamedTuple):
    """Shapes, transform and what is asked for."""

    N: int
    D: int
    V: int
    scale: float = 1.0
    softcap: float | None = None
    masses: bool = True
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case(1, 64, 300),
    Case(300, 40, 1000),
    Case(2049, 896, 32001),
    Case(2049, 4096, 32001, masses=False),
    Case(2049, 1000, 32001, scale=-0.3),
    Case(2049, 1024, 32001, dtype=torch.float16),
    Case(513, 1024, 32001, softcap=5.0),
    Case(513, 1024, 32001, softcap=5.0, masses=False),
    Case(65, 1024, 128256),
]
TIMED = [Case(8192, D, 128256) for D in (1024, 2048, 4096)]


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets, some of which are outside the vocabulary."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = 2 * torch.randn(case.N, case.D, generator=generator, device=DEVICE)
    weight = torch.randn(case.V, case.D, generator=generator, device=DEVICE) / math.sqrt(case.D)
    targets = torch.randint(case.V, (case.N,), generator=generator, device=DEVICE)
    targets[1::100] = case.V
    return hidden.to(case.dtype), weight.to(case.dtype), targets


def launched(launch: Launch, case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Launch a forward, and wait for its results."""
    result = launch(*inputs, None, *Transform.of(case.scale, case.softcap), False, tile_masses=case.masses)
    if DEVICE == "cuda":
        end = torch.cuda.Event()
        end.record()
        wait(end, case)
    return [result.target_logits, result.others, *([result.tile_masses] if case.masses else [])]


def wait(end: Any, case: Case) -> None:
    """Wait for an event of the device; end the process if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not end.query():
        if time.monotonic() > deadline:
            say(f"{case}: still running after {PATIENCE} s, probably a deadlock")
            os._exit(4)
        time.sleep(0.001)


def exact(case: Case, inputs: tuple[Tensor, Tensor, Tensor], tile: int) -> list[Tensor]:
    """Compute the same in float64."""
    hidden, weight, targets = inputs
    wide = weight.double()
    parts = []
    for start in range(0, case.N, ROWS):
        z = hidden[start : start + ROWS].double() @ wide.T
        x, slope = case.scale * z, torch.zeros((), dtype=torch.float64, device=z.device)
        if case.softcap is not None:
            y = x / case.softcap
            x, slope = case.softcap * y.tanh(), -2 * y.cosh().log()
        index = targets[start : start + ROWS, None]
        inside = index < case.V
        index = index.where(inside, 0)
        target = x.gather(1, index)
        x = x.scatter(1, index, target.masked_fill(inside, -torch.inf))
        masses = torch.nn.functional.pad(x + slope, (0, -case.V % tile), value=-torch.inf).unflatten(1, (-1, tile))
        parts.append((target.masked_fill(~inside, -torch.inf)[:, 0], x.logsumexp(1), masses.logsumexp(2)))
    found = [torch.cat(each) for each in zip(*parts, strict=True)]
    return found if case.masses else found[:2]


def problem(launch: Launch, other: Launch, case: Case, tile: int) -> str:
    """Say what is wrong with `launch`, or nothing: its error may be twice that of `other`, and its bits are fixed."""
    inputs = make_inputs(case)
    runs = [launched(launch, case, inputs) for _ in range(3)]
    for run in runs[1:]:
        if not all(map(torch.equal, run, runs[0])):
            return "the bits differ from run to run"
    reference, truth = launched(other, case, inputs), exact(case, inputs, tile)
    for name, value, same, true in zip(("target_logits", "others", "masses"), runs[0], reference, truth, strict=False):
        possible = true > -torch.inf
        if not torch.equal(value > -torch.inf, possible):
            return f"{name}: -inf in wrong places"
        value, same, true = (x.double().where(possible, 0.0) for x in (value, same, true))
        error, bound = (value - true).norm(), 2 * ((same - true).norm() + 1e-6 * true.norm())
        if not error <= bound:
            return f"{name}: off by {error:.2e}, more than {bound:.2e}"
    return ""


def timed(launches: dict[str, Launch], case: Case) -> dict[str, float]:
    """Return milliseconds, the median of five, of forwards that take turns with the matmul of the logits."""
    inputs = make_inputs(case)
    block = torch.empty(case.N // 4, case.V, dtype=case.dtype, device=DEVICE)

    def matmul() -> None:
        for rows in inputs[0].chunk(4):
            torch.mm(rows, inputs[1].T, out=block[: len(rows)])

    calls: dict[str, Callable[[], object]] = {"matmul": matmul}
    for name, launch in launches.items():
        calls[name] = partial(launch, *inputs, None, *Transform.of(), False, tile_masses=True)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            wait(end, case)
            times[name].append(start.elapsed_time(end))
    return {name: sorted(some[1:])[2] for name, some in times.items()}


def say(text: str) -> None:
    """Print at once, because the process may be ended."""
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Check all cases, then time the head's shapes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.gluon_forward", description=__doc__)
    parser.parse_args(argv)
    if DEVICE != "cuda" or torch.version.hip or torch.cuda.get_device_capability() != (9, 0) or not has_gluon():
        say("needs a GPU of compute capability 9.0 and a Triton with Gluon")
        return 0
    from fastdpo.kernels.linear_logprobs_forward import linear_logprobs_forward
    from fastdpo.kernels.row_lists import TILE

    module = import_module(GLUON_FORWARD)
    gluon, config = module.linear_logprobs_forward_gluon, module.CONFIG
    wrong = 0
    for case in CASES:
        found = problem(gluon, linear_logprobs_forward, case, TILE)
        say(f"{case}: {found or 'as accurate as the TMA kernel, three times the same bits'}")
        wrong += bool(found)
        if case is CASES[2]:  # the other transforms compile more kernels, which takes its time
            half = config._replace(BLOCK_D=config.BLOCK_D // 2, num_stages=2 * config.num_stages)
            launches = {"TMA": linear_logprobs_forward, "Gluon": gluon, "half blocks": partial(gluon, config=half)}
            for shape in TIMED:
                rate = 2e-9 * shape.N * shape.D * shape.V
                times = timed(launches, shape).items()
                say(f"D={shape.D}: " + ", ".join(f"{k} {ms:.2f} ms {rate / ms:.0f} TFLOP/s" for k, ms in times))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

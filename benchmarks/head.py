"""Compare linear_logprobs with its peers, forward and backward: time, memory and error on the same tensors.

    python -m fastdpo.benchmarks.head --rows 2048 --hidden 1024 --vocab 64000 --dtype float32
    python -m fastdpo.benchmarks.head --cases cpu --out benchmarks/results/cpu-2-cores/head.jsonl

Time and memory are for one forward and backward, and for a forward alone, without gradients; memory includes the
results. Errors are against float64 on the same rounded inputs: the largest error of logps, and the relative Frobenius
norm of the errors of dhidden, over a sample of rows, and of dweight, over a sample of vocabulary entries (half of them
targets). Density is the share of cells (a row by some neighbouring tokens) that a sparse backward computes; above a
limit it computes all cells. On CUDA, "of matmul" says how near the forward comes to the speed of the logits' matmul
alone in torch.mm.

With --cases, cases that --out already holds from this machine are skipped, so that a second call goes on where the
first was cut off. A variant that cannot run is left out and named. The exit code is 4 if that variant was fastdpo. It
is 3 if a variant never returned or took the device down, which ends the process; a second call with the same --out runs
the other variants. The benchmark needs torch, `fastdpo[bench]` for TRL, and the packages liger-kernel and
cut-cross-entropy for these peers.
"""

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.benchmarks import peers
from fastdpo.benchmarks.harness import DEVICE, Measured, measure, provenance, record
from fastdpo.benchmarks.peers import Logps
from fastdpo.head.impl import sparsity
from fastdpo.head.linear_logprobs import Backward, Impl, linear_logprobs, linear_logprobs_with_stats
from fastdpo.head.op import implementation

SAMPLE = 256  # rows and vocabulary entries whose gradients are compared
MATMUL_ROWS = 2048  # rows of the logits that torch.mm is timed with
PATIENCE = 180.0
"""Seconds that a variant may take for its first forward and backward, compilation included."""


@dataclass(frozen=True)
class Case:
    """The sizes and settings that the variants are compared on."""

    N: int
    D: int
    V: int
    dtype: str = "bfloat16"
    frozen: bool = False
    flat: bool = False

    @property
    def key(self) -> dict[str, Any]:
        shape = {"N": self.N, "D": self.D, "V": self.V}
        return {"shape": shape, "dtype": self.dtype, "frozen": self.frozen, "flat": self.flat}

    def __str__(self) -> str:
        head, rows = "frozen" if self.frozen else "trained", "flat" if self.flat else "peaked"
        return f"N={self.N} D={self.D} V={self.V} {self.dtype}, {head} head, {rows} rows"


_HEADS = (False, True)
_H200 = ((8192, 4096, 128256), (8192, 2048, 151936), (16384, 896, 151936))
CASES = {
    "smoke": [Case(32, 16, 500), Case(32, 16, 500, "float32", frozen=True, flat=True)],
    "cpu": [
        *(Case(2048, 1024, 64000, dtype, frozen) for dtype in ("bfloat16", "float32") for frozen in _HEADS),
        *(Case(2048, 1024, 64000, "bfloat16", frozen, flat=True) for frozen in _HEADS),
    ],
    "h200": [Case(*shape, "bfloat16", frozen, flat) for flat in (False, True) for shape in _H200 for frozen in _HEADS],
}


@dataclass(frozen=True)
class Variant:
    """An implementation to measure; `impl` and `backward` are set if it is fastdpo's."""

    name: str
    logps: Logps
    impl: Impl | None = None
    backward: Backward | None = None


Fatal = Callable[[str, str], None]
"""A function that ends the process; its arguments are the name of the variant at fault and what it did."""


class Inputs(NamedTuple):
    """Inputs of a variant; those that are trained require gradients, and dlogps is the upstream gradient."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    dlogps: Tensor  # [N] float32


def make_inputs(case: Case) -> Inputs:
    """Make rows like a language model's: a power-law rank curve over Zipf-distributed candidates.

    Targets are drawn from the rows' own distributions. A `flat` case has random rows and targets instead, where no
    token has more than a few thousandths of the probability.
    """
    N, D, V, dtype = case.N, case.D, case.V, getattr(torch, case.dtype)
    torch.manual_seed(0)
    weight = torch.randn(V, D, device=DEVICE) / math.sqrt(D)
    hidden = torch.randn(N, D, device=DEVICE)
    if case.flat:
        targets = torch.randint(V, (N,), device=DEVICE)
    else:
        zipf = 1 / (torch.arange(V, device=DEVICE) + 10.0)
        candidates = torch.multinomial(zipf, N * 24, replacement=True).view(N, 24)
        height = 15 + torch.randn(N, 1, device=DEVICE)
        slope = 2 + 4 * torch.rand(N, 1, device=DEVICE)
        for rank in range(24):
            hidden += (height - slope * math.log(rank + 1)) * weight[candidates[:, rank]]
        drawn = [torch.multinomial((rows @ weight.T).softmax(-1), 1) for rows in hidden.split(128)]
        targets = torch.cat(drawn).squeeze(1)
    dlogps = torch.randn(N, device=DEVICE)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not case.frozen), targets, dlogps)


def ours(case: Case) -> list[Variant]:
    """Return every implementation with every backward that differs: "auto" is "exact" for 32-bit inputs."""
    found = []
    impls: list[Impl] = ["torch", "blas", "triton"] if DEVICE == "cuda" else ["torch"]
    for impl in impls:
        backwards: list[Backward] = ["exact"]
        if implementation(impl, torch.device(DEVICE)).cell_columns(torch.device(DEVICE)) is not None:
            backwards += ["sparse"] if case.dtype == "float32" else ["auto", "sparse"]
        for backward in backwards:
            logps = remembering(partial(linear_logprobs, impl=impl, backward=backward))
            found.append(Variant(f"fastdpo {impl}, {backward}", logps, impl, backward))
    if DEVICE == "cuda" and not case.frozen and case.dtype != "float32":
        logps = remembering(partial(linear_logprobs, impl="triton", backward="auto", workspace_bytes=3 * 2**30))
        found.append(Variant("fastdpo triton, auto, 3 GiB", logps, "triton", "auto"))
    return found


def remembering(logps: Logps) -> Logps:
    """Give a variant its own record of densities, which chooses its algorithm as in training."""
    densities: dict[Any, Any] = {}
    calls: dict[Any, int] = {}

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        sparsity._densities, sparsity._calls = densities, calls  # the backward runs before the next variant
        return logps(hidden, weight, targets)

    return call


def density(variant: Variant, inputs: Inputs) -> float | None:
    """Return the share of the cells that a sparse backward computes; None if the backward is dense."""
    if variant.backward in (None, "exact"):
        return None
    sparsity._densities, sparsity._calls = {}, {}
    options: dict[str, Any] = {"impl": variant.impl, "backward": variant.backward}
    _, stats = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets, **options)
    return None if stats.density is None else stats.density.mean().item()


def pytorch(case: Case) -> list[Variant]:
    """Return the eager baseline if logits, log-probabilities and the gradients of both fit into memory."""
    if 4 * case.N * case.V * getattr(torch, case.dtype).itemsize < free_bytes():
        return [Variant("PyTorch", peers.pytorch)]
    print("left out: PyTorch: its logits do not fit")
    return []


def free_bytes() -> int:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1])


class Exact(NamedTuple):
    """The float64 truth, with gradients of the sampled rows and vocabulary entries only."""

    logps: Tensor
    rows: Tensor
    dhidden: Tensor
    entries: Tensor
    dweight: Tensor


def exact_results(inputs: Inputs) -> Exact:
    """Compute everything in float64, in blocks of rows."""
    hidden, weight, dlogps = (t.detach().double() for t in (inputs.hidden, inputs.weight, inputs.dlogps))
    N, V = hidden.shape[0], weight.shape[0]
    rows = torch.linspace(0, N - 1, min(N, SAMPLE), device=DEVICE).long()
    entries = torch.cat([torch.linspace(0, V - 1, SAMPLE // 2, device=DEVICE).long(), inputs.targets[: SAMPLE // 2]])
    entries = entries.unique()
    dweight = weight.new_zeros(len(entries), weight.shape[1])
    logps, dhidden = [], []
    for block in torch.arange(N, device=DEVICE).split(128):
        log_probs = (hidden[block] @ weight.T).log_softmax(-1)
        targets = inputs.targets[block].unsqueeze(1)
        logps.append(log_probs.gather(1, targets).squeeze(1))
        dlogits = log_probs.exp_().mul_(-dlogps[block].unsqueeze(1))
        dlogits.scatter_add_(1, targets, dlogps[block].unsqueeze(1))
        dweight += dlogits[:, entries].T @ hidden[block]
        dhidden.append(dlogits[torch.isin(block, rows)] @ weight)
    return Exact(torch.cat(logps), rows, torch.cat(dhidden), entries, dweight)


def step(logps: Logps, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run forward and backward, and return logps, dhidden and dweight (None if the weight is frozen)."""
    hidden, weight, targets, dlogps = inputs
    wrt = [t for t in (hidden, weight) if t.requires_grad]
    result = logps(hidden, weight, targets)
    dhidden, *dweight = torch.autograd.grad(result, wrt, dlogps.to(result.dtype))
    return result.detach(), dhidden, dweight[0] if dweight else None


def forward(logps: Logps, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return logps(inputs.hidden.detach(), inputs.weight.detach(), inputs.targets)


def matmul(inputs: Inputs) -> None:
    """Compute all logits, the least that any forward does, in blocks that share one buffer."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    workspace = hidden.new_empty(min(MATMUL_ROWS, len(hidden)), len(weight))
    for rows in hidden.split(MATMUL_ROWS):
        torch.mm(rows, weight.T, out=workspace[: len(rows)])


def errors(logps: Logps, inputs: Inputs, exact: Exact) -> dict[str, float | None]:
    result, dhidden, dweight = step(logps, inputs)
    return {
        "logps": (result.double() - exact.logps).abs().max().item(),
        "dhidden": relative(dhidden[exact.rows], exact.dhidden),
        "dweight": None if dweight is None else relative(dweight[exact.entries], exact.dweight),
    }


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def examined(variant: Variant, inputs: Inputs, exact: Exact, fatal: Fatal) -> dict[str, Any] | None:
    """Run a variant once and return its errors and density; print a line and return None if it fails in any way."""
    timer = Timer(PATIENCE, fatal, (variant.name, f"did not return within {PATIENCE:.0f} s"))
    timer.daemon = True
    timer.start()
    try:
        return {"errors": errors(variant.logps, inputs, exact), "density": density(variant, inputs)}
    except Exception as error:
        why = peers.first_line(error)
        print(f"left out: {variant.name}: {why}")
        try:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:  # an illegal memory access: nothing runs on this device until the process ends
            fatal(variant.name, why)
    finally:
        timer.cancel()
    return None


def run(case: Case, variants: list[Variant], fatal: Fatal, repetitions: int) -> list[dict[str, Any]]:
    """Measure the variants that can run, and return one row of results for each."""
    inputs = make_inputs(case)
    exact = exact_results(inputs)
    found = {v.name: examined(v, inputs, exact, fatal) for v in variants}
    del exact
    variants = [v for v in variants if found[v.name]]
    forwards: dict[str, Callable[[], object]] = {v.name: partial(forward, v.logps, inputs) for v in variants}
    if DEVICE == "cuda":
        forwards["matmul"] = partial(matmul, inputs)
    alone = measure(forwards, repetitions)
    both = measure({v.name: partial(step, v.logps, inputs) for v in variants}, repetitions)

    def row(variant: Variant) -> dict[str, Any]:
        m, f = both[variant.name], alone[variant.name]
        return {
            "op": "linear_logprobs",
            "impl": variant.name,
            "backward": variant.backward,
            **case.key,
            **costs(m, both.get("TRL")),
            "forward": costs(f, alone.get("TRL"))
            | {
                "tflops": 2e-9 * case.N * case.D * case.V / f.ms,
                "of_matmul": alone["matmul"].ratio_to(f) if "matmul" in alone else None,
            },
            **(found[variant.name] or {}),
        }

    return [row(variant) for variant in variants]


def costs(m: Measured, trl: Measured | None) -> dict[str, Any]:
    ratio = None if trl is None else m.ratio_to(trl)
    return {"ms": m.ms, "min_ms": m.min_ms, "times_ms": m.times, "ratio_to_trl": ratio, "peak_mib": m.peak_mib}


def table(rows: list[dict[str, Any]]) -> str:
    def cells(form: str, *path: str) -> list[str]:
        values: list[Any] = rows
        for name in path:
            values = [value[name] for value in values]
        return ["-" if value is None else form.format(value) for value in values]

    columns = {
        "impl": cells("{}", "impl"),
        "forward ms": cells("{:.1f}", "forward", "ms"),
        "TFLOP/s": cells("{:.2f}", "forward", "tflops"),
        "of matmul": cells("{:.0%}", "forward", "of_matmul"),
        "ms": cells("{:.1f}", "ms"),
        "min ms": cells("{:.1f}", "min_ms"),
        "vs TRL": cells("{:.2f}", "ratio_to_trl"),
        "peak MiB": cells("{:.0f}", "peak_mib"),
        "density": cells("{:.1%}", "density"),
    } | {f"{name} error": cells("{:.1e}", "errors", name) for name in ("logps", "dhidden", "dweight")}
    widths = [max(map(len, (name, *column))) for name, column in columns.items()]
    lines = [columns, *zip(*columns.values(), strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def results(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=CASES, help="run a list of cases instead of one")
    parser.add_argument("--rows", type=int, default=2048, help="N, completion tokens")
    parser.add_argument("--hidden", type=int, default=1024, help="D")
    parser.add_argument("--vocab", type=int, default=64000, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained")
    parser.add_argument("--flat", action="store_true", help="random rows instead of peaked ones")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="append one JSON line per variant to this file")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rows, args.hidden, args.vocab, args.repetitions = 32, 16, 500, 2

    where = provenance()
    one = Case(args.rows, args.hidden, args.vocab, args.dtype, args.frozen, args.flat)
    here = [row for row in results(args.out) if row["provenance"]["machine"] == where["machine"]]
    fatalities = {row["impl"] for row in here if "fatal" in row}

    def fatal(name: str, why: str) -> None:
        print(f"left out from now on: {name}: {why}", flush=True)
        if args.out:
            record(args.out, [{"op": "linear_logprobs", "impl": name, "fatal": why, "provenance": where}])
        os._exit(3)  # its thread or its device cannot be recovered

    others = [Variant(name, logps) for name, logps in peers.installed().items()]
    failed = False
    for case in CASES[args.cases] if args.cases else [one]:
        if args.cases and any("forward" in row and case.key.items() <= row.items() for row in here):
            print(f"{case}: measured before")
            continue
        variants = [v for v in (*ours(case), *others, *pytorch(case)) if v.name not in fatalities]
        rows = [row | {"provenance": where} for row in run(case, variants, fatal, args.repetitions)]
        failed |= not {v.name for v in ours(case)} <= {row["impl"] for row in rows}
        print(f"{case}; {where}\n{table(rows)}", flush=True)
        if args.out:
            record(args.out, rows)
    if failed:
        sys.exit(4)


if __name__ == "__main__":
    main()

"""Compare linear_logprobs with its peers, forward and backward: time, memory and error on the same tensors.

    fastdpo bench head --model llama-3-8b
    fastdpo bench head --rows 2048 --hidden 1024 --vocab 64000 --dtype float32 --frozen
    fastdpo bench head --cases models --seconds 450

Time and memory are for one forward and backward, and for a forward alone, without gradients; memory includes the
results. Times are medians, and the spread is the range of all repetitions relative to the median. Errors are against
float64 on the same rounded inputs: the largest error of a row's log-prob and of a response's, and the relative
Frobenius norm of the errors of dhidden, over a sample of rows, and of dweight, over a sample of vocabulary entries
(half of them targets). Density is the share of cells (a row by some neighbouring tokens) that a sparse backward
computes; above a limit it computes all cells. On CUDA, "of matmul" says how near the forward comes to the speed of the
logits' matmul alone in torch.mm.

The sizes of a model are divided by a power of two, so that the work suits the machine; the title of a table names it.
A variant that can't run is listed with the reason. With --cases, cases that the file of results already holds from this
machine are skipped, so that a second call goes on where the first was cut off.

The exit code is 4 if fastdpo itself could not run, and 5 if --seconds were over before all cases were measured. It is 3
if a variant never returned or took the device down, which ends the process; a second call runs the other variants.
"""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from fastdpo.benchmarks import peers
from fastdpo.benchmarks.harness import (
    DEVICE,
    OUT,
    Measured,
    Parser,
    measure,
    provenance,
    record,
    results_folder,
    rows_of,
)
from fastdpo.benchmarks.head.cases import DTYPES, MODELS, SMALL_LM, Case, case_lists, rows_that_fit, shape_of
from fastdpo.benchmarks.head.rows import SYNTHETIC, Exact, Inputs, exact_results, make_inputs, responses, shape_of_model
from fastdpo.benchmarks.peers import PEERS, Logps
from fastdpo.head.impl import sparsity
from fastdpo.head.linear_logprobs import Backward, Impl, linear_logprobs, linear_logprobs_with_stats
from fastdpo.head.op import implementation
from fastdpo.plan.free_memory import available_on_cpu

MATMUL_ROWS = 2048  # rows of the logits that torch.mm is timed with
SIZES = {"rows": 2048, "hidden": 1024, "vocab": 64000}
"""The sizes of a case for which none are given."""
PATIENCE = 180.0
"""Seconds that a variant may take for its first forward and backward, compilation included."""


@dataclass(frozen=True)
class Variant:
    """An implementation to measure; `impl` and `backward` are set if it is fastdpo's."""

    name: str
    logps: Logps
    impl: Impl | None = None
    backward: Backward | None = None
    is_loss: bool = False
    """Whether it returns DPO's loss in place of log-probs, see `fastdpo.benchmarks.peers.Peer`."""


Fatal = Callable[[str, str], None]
"""A function that ends the process; its arguments are the name of the variant at fault and what it did."""


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


def others(case: Case, names: list[str]) -> tuple[list[Variant], dict[str, str]]:
    """Return the peers that can run a case, and the reasons why others can't."""
    found, left_out = [], {}
    for name in names:
        logps = peers.loaded(name)
        # logits, log-probs and the gradients of both
        needed = 4 * case.N * case.V * getattr(torch, case.dtype).itemsize
        if isinstance(logps, str):
            left_out[name] = logps
        elif PEERS[name].whole_logits and (free := free_bytes()) is not None and needed > free:
            left_out[name] = f"its logits need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        else:
            found.append(Variant(name, logps, is_loss=PEERS[name].is_loss))
    return found, left_out


def free_bytes() -> int | None:
    gc.collect()
    if DEVICE == "cpu":
        return available_on_cpu()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def step(variant: Variant, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run forward and backward, and return logps (or the loss), dhidden and dweight (None if the weight is frozen)."""
    wrt = [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]
    result = call(variant, inputs.hidden, inputs.weight, inputs)
    upstream = None if variant.is_loss else inputs.dlogps.to(result.dtype)
    dhidden, *dweight = torch.autograd.grad(result, wrt, upstream)
    return result.detach(), dhidden, dweight[0] if dweight else None


def forward(variant: Variant, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return call(variant, inputs.hidden.detach(), inputs.weight.detach(), inputs)


def call(variant: Variant, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    targets = inputs.targets
    if variant.is_loss:
        hidden, targets = hidden.view(2 * inputs.pairs, -1, hidden.shape[1]), targets.view(2 * inputs.pairs, -1)
    return variant.logps(hidden, weight, targets)


def matmul(inputs: Inputs) -> None:
    """Compute all logits, the least that any forward does, in blocks that share one buffer."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    workspace = hidden.new_empty(min(MATMUL_ROWS, len(hidden)), len(weight))
    for rows in hidden.split(MATMUL_ROWS):
        torch.mm(rows, weight.T, out=workspace[: len(rows)])


def errors(variant: Variant, inputs: Inputs, exact: Exact) -> dict[str, float | None]:
    result, dhidden, dweight = step(variant, inputs)
    found: dict[str, float | None] = {"logps": None, "responses": None}
    if not variant.is_loss:
        error = result.double() - exact.logps
        found = {
            "logps": error.abs().max().item(),
            "responses": responses(error, inputs.pairs).abs().max().item(),
        }
    return found | {
        "dhidden": relative(dhidden[exact.rows], exact.dhidden),
        "dweight": None if dweight is None else relative(dweight[exact.entries], exact.dweight),
    }


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def examined(variant: Variant, inputs: Inputs, exact: Exact, fatal: Fatal) -> dict[str, Any] | str:
    """Run a variant once and return its errors and density, or the reason why it failed."""
    timer = Timer(PATIENCE, fatal, (variant.name, f"did not return within {PATIENCE:.0f} s"))
    timer.daemon = True
    timer.start()
    try:
        return {"errors": errors(variant, inputs, exact), "density": density(variant, inputs)}
    except Exception as error:
        why = peers.first_line(error)
        try:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:  # an illegal memory access: nothing runs on this device until the process ends
            fatal(variant.name, why)
        return why
    finally:
        timer.cancel()


def run(
    case: Case, variants: list[Variant], left_out: dict[str, str], fatal: Fatal, repetitions: int
) -> list[dict[str, Any]]:
    """Measure the variants that can run, and return one row of results for each; the others' rows have the reason."""
    inputs = make_inputs(case)
    exact = exact_results(inputs)
    found = {v.name: examined(v, inputs, exact, fatal) for v in variants}
    del exact
    left_out = left_out | {name: why for name, why in found.items() if isinstance(why, str)}
    variants = [v for v in variants if v.name not in left_out]
    forwards: dict[str, Callable[[], object]] = {v.name: partial(forward, v, inputs) for v in variants}
    if DEVICE == "cuda":
        forwards["matmul"] = partial(matmul, inputs)
    alone = measure(forwards, repetitions)
    both = measure({v.name: partial(step, v, inputs) for v in variants}, repetitions)

    def row(variant: Variant) -> dict[str, Any]:
        m, f = both[variant.name], alone[variant.name]
        result = found[variant.name]
        assert not isinstance(result, str)
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
            **result,
        }

    reasons = [{"op": "linear_logprobs", "impl": name, **case.key, "left_out": why} for name, why in left_out.items()]
    return [row(variant) for variant in variants] + reasons


def costs(m: Measured, trl: Measured | None) -> dict[str, Any]:
    ratio = None if trl is None else m.ratio_to(trl)
    return {
        "ms": m.ms,
        "min_ms": m.min_ms,
        "spread": m.spread,
        "times_ms": m.times,
        "ratio_to_trl": ratio,
        "peak_mib": m.peak_mib,
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = [row for row in results if "left_out" not in row]

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
        "spread": cells("{:.0%}", "spread"),
        "vs TRL": cells("{:.2f}", "ratio_to_trl"),
        "peak MiB": cells("{:.0f}", "peak_mib"),
        "density": cells("{:.1%}", "density"),
    } | {f"{name} error": cells("{:.1e}", "errors", name) for name in ("logps", "responses", "dhidden", "dweight")}
    widths = [max(map(len, (name, *column))) for name, column in columns.items()]
    lines = [columns, *zip(*columns.values(), strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text + [f"left out: {row['impl']}: {row['left_out']}" for row in results if "left_out" in row])


def main(argv: list[str] | None = None) -> None:
    """Run `fastdpo bench head` with the words behind it."""
    args = parse(sys.argv[1:] if argv is None else argv)
    names = list(PEERS) if args.peers is None else args.peers
    if args.peers is None:
        peers.require_trl("fastdpo bench head", "--peers PyTorch")
    out = args.out or results_folder() / "head.jsonl"
    cases = case_lists()[args.cases] if args.cases else [one_case(args)]
    where = provenance()
    here = [row for row in rows_of(out) if row["provenance"]["machine"] == where["machine"]]
    fatalities = {row["impl"]: row["fatal"] for row in here if "fatal" in row}

    def fatal(name: str, why: str) -> None:
        print(f"left out from now on: {name}: {why}", flush=True)
        record(out, [{"op": "linear_logprobs", "impl": name, "fatal": why, "provenance": where}])
        os._exit(3)  # its thread or its device cannot be recovered

    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    record(out, [])  # so that a file that can't be written shows before hours of measuring
    print(f"results: {out}\n{', '.join(f'{name}: {value}' for name, value in where.items())}", flush=True)
    failed, start, longest = False, time.monotonic(), 0.0
    for case in cases:
        if args.cases and any("forward" in row and case.key.items() <= row.items() for row in here):
            print(f"{case}: measured before")
            continue
        began = time.monotonic()
        if began - start + longest > args.seconds:
            print(f"{case}: no time left; the same command goes on here")
            sys.exit(5)
        print(f"\n{case}", flush=True)
        variants, left_out = others(case, [name for name in names if name not in fatalities])
        left_out |= {name: why for name, why in fatalities.items() if name in names}
        variants[:0] = [variant for variant in ours(case) if variant.name not in fatalities]
        found = run(case, variants, left_out, fatal, args.repetitions)
        failed |= not {v.name for v in ours(case)} <= {row["impl"] for row in found if "left_out" not in row}
        print(table(found), flush=True)
        record(out, [row | {"provenance": where} for row in found])
        longest = max(longest, time.monotonic() - began)
    if failed:
        sys.exit(4)


def parse(words: list[str]) -> Any:
    parser = Parser("head", __doc__)
    parser.add_argument(
        "--cases", choices=case_lists(), help="Measure a list of cases instead of the one of the options below."
    )
    parser.add_argument(
        "--model", choices=MODELS, help="Take the shape of this model's head, divided to suit this machine."
    )
    parser.add_argument("--rows", type=int, help="N: completion tokens, an even number (default: 2048).")
    parser.add_argument("--hidden", type=int, help="D: the hidden size (default: 1024).")
    parser.add_argument("--vocab", type=int, help="V: tokens of the vocabulary (default: 64000).")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Dtype of the inputs (default: bfloat16 on CUDA, float32 elsewhere)."
    )
    parser.add_argument("--frozen", action="store_true", help="Compute no gradient for the head's weight.")
    parser.add_argument(
        "--inputs",
        help="Rows: peaked or flat synthetic ones, small-lm for those of a small language model that is trained first, "
        "or the folder or repository of a causal LM, for its own (default: peaked).",
    )
    names = ", ".join(map(repr, PEERS))
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"Peers to compare with (default: all): {names}."
    )
    parser.add_argument("--repetitions", type=int, default=5, help="Timed calls of each variant (default: 5).")
    parser.add_seconds()
    parser.add_argument("--smoke", action="store_true", help="Measure toy sizes, to see that it runs.")
    parser.add_argument("--out", type=Path, help=OUT)
    args = parser.parse(words)
    given = {name for name in ("model", "dtype", "frozen", "inputs", *SIZES, "smoke") if getattr(args, name)}
    for named, fixed in (
        ("cases", given),
        ("model", given & {*SIZES, "smoke"}),
        ("smoke", given & {*SIZES, "model"}),
        ("inputs", given & {*SIZES, "model"} if args.inputs not in (None, "peaked", "flat") else set()),
    ):
        if getattr(args, named) and fixed:
            flags = ", ".join(f"--{name}" for name in sorted(fixed))
            parser.error(f"--{named} has its own settings in place of {flags}; leave out one or the other")
    args.inputs = args.inputs or "peaked"
    for name, size in (SIZES | {"rows": 32, "hidden": 16, "vocab": 500} if args.smoke else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if args.smoke:
        args.repetitions = 2
    if args.rows < 2 or args.rows % 2:
        parser.error(f"--rows {args.rows}: half of the rows are those of chosen responses, so give an even number")
    if args.vocab == 1:
        parser.error("--vocab must be at least 2, got 1: the only token of a vocabulary has a log-prob of 0")
    if (least := min(args.hidden, args.vocab, args.repetitions)) < 1:
        parser.error(f"--hidden, --vocab and --repetitions must be positive, got {least}")
    return args


def one_case(args: Any) -> Case:
    """Return the case that the arguments describe."""
    dtype = args.dtype or ("bfloat16" if DEVICE == "cuda" else "float32")
    if args.inputs == "small-lm":
        return Case(*SMALL_LM, dtype, args.frozen, args.inputs)
    if args.inputs not in SYNTHETIC:
        D, V = shape_of_model(args.inputs)
        return Case(rows_that_fit(D, V), D, V, dtype, args.frozen, args.inputs)
    N, D, V = shape_of(args.model) if args.model else (args.rows, args.hidden, args.vocab)
    return Case(N, D, V, dtype, args.frozen, args.inputs, args.model)

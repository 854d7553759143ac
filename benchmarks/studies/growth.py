"""Measure how time and memory grow with N, V, D, T and the number of pairs, and write the table of docs/scaling.md.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.growth            # measure (minutes), and write all files
    rm benchmarks/results/cpu-2-cores/growth.json                    # before it, to measure all sweeps again
    OMP_NUM_THREADS=1 python -m benchmarks.studies.growth --table    # write table and picture from the numbers

Each sweep doubles one size and keeps the others. A time is the process's CPU time on one thread, the least of several
rounds in which all sizes, fastdpo and plain PyTorch take turns, so that other work on the machine matters little. The
exponent is the slope of log time over log size by least squares, with its standard error. The floating-point operations
of matrix products are counted. Memory is the exact peak of what PyTorch's allocator handed out, inputs and the head's
gradients left out. Everything is forward and backward, in float32.

Shapes: N rows (tokens of responses), D hidden size, V vocabulary, T tokens of a pair.
"""

import argparse
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import linear_logprobs, shared_prefix_batch
from fastdpo.benchmarks import peers
from fastdpo.benchmarks.harness import provenance
from fastdpo.benchmarks.report import replace
from fastdpo.model.scoring_forward import patch_forward

ROOT = Path(__file__).parent.parent.parent
PAGE, PICTURE = ROOT / "docs/scaling.md", ROOT / "docs/figures/growth.png"
NUMBERS = ROOT / "benchmarks/results/cpu-2-cores/growth.json"
MARK = "<!-- python -m benchmarks.studies.growth {} the table of growth -->\n"

OURS, PLAIN = "fastdpo", "PyTorch"
SMALL_WORKSPACE = 8 * 2**20
MIB = 2**20


class Run(NamedTuple):
    """A forward and backward that can be repeated."""

    call: Callable[[], object]
    gradients: int
    """Bytes of the gradients that it returns, where they are not to count."""


def head(N: int, V: int, D: int, *, frozen: bool, workspace: int | None = None) -> dict[str, Run]:
    """Return the head alone, on random rows; the weight is trained unless `frozen`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).div_(math.sqrt(D)).requires_grad_(not frozen)
    targets = torch.randint(V, (N,), generator=generator)
    inputs = [hidden] if frozen else [hidden, weight]
    options: dict[str, Any] = {} if workspace is None else {"workspace_bytes": workspace}

    def run(logps: Callable[..., Tensor]) -> Run:
        def call() -> object:
            return torch.autograd.grad(logps(hidden, weight, targets).sum(), inputs)

        return Run(call, sum(x.nbytes for x in inputs))

    return {OURS: run(lambda *args: linear_logprobs(*args, **options)), PLAIN: run(peers.pytorch)}


def step(T: int, pairs: int, *, layers: int = 1, D: int = 512, V: int = 4096) -> dict[str, Run]:
    """Return the policy's part of a training step of a Llama on pairs of T tokens, half of them in the prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=layers, num_attention_heads=D // 64,
        num_key_value_heads=D // 256 or 1, max_position_embeddings=T, attn_implementation="sdpa",
    )  # fmt: skip
    plain = LlamaForCausalLM(config).train()
    packed = LlamaForCausalLM(config).train()
    packed.load_state_dict(plain.state_dict())
    patch_forward(packed)
    ids = torch.randint(3, V, (pairs, T)).tolist()
    prompt, middle = T // 2, 3 * T // 4
    rows = [
        {"prompt_ids": each[:prompt], "chosen_ids": each[prompt:middle], "rejected_ids": each[middle:]} for each in ids
    ]
    batch = shared_prefix_batch(rows)
    longest = T - middle + prompt
    padded = torch.zeros(2 * pairs, longest, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            whole = row["prompt_ids"] + row[name]
            padded[side * pairs + i, : len(whole)] = torch.tensor(whole)
            mask[side * pairs + i, : len(whole)] = 1
    scored = mask[:, 1:].clone()
    scored[:, : prompt - 1] = 0

    def loss_of(sums: Tensor) -> Tensor:
        chosen, rejected = sums.chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    def ours() -> object:
        logps = packed(**batch).logps
        loss = loss_of(torch.segment_reduce(logps, "sum", offsets=batch["cu_target"]))
        return torch.autograd.grad(loss, list(packed.parameters()))

    def theirs() -> object:
        logits = plain(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
        return torch.autograd.grad(loss_of((logps * scored).sum(1)), list(plain.parameters()))

    return {OURS: Run(ours, 0), PLAIN: Run(theirs, 0)}


class Sweep(NamedTuple):
    """One size that grows while the others are kept."""

    what: str
    letter: str
    sizes: tuple[int, ...]
    make: Callable[[int], dict[str, Run]]


def heads(what: str, **options: Any) -> Iterator[Sweep]:
    yield Sweep(what, "N", (1000, 2000, 4000, 8000), lambda N: head(N, 8000, 128, **options))
    yield Sweep(what, "V", (8000, 16000, 32000, 64000), lambda V: head(1000, V, 128, **options))


SWEEPS = (
    *heads("head, frozen", frozen=True),
    *heads("head, trained", frozen=False),
    *heads("head, trained, workspace of 8 MiB", frozen=False, workspace=SMALL_WORKSPACE),
    Sweep("head, frozen", "D", (128, 256, 512, 1024), lambda D: head(1000, 8000, D, frozen=True)),
    Sweep("step", "T", (128, 256, 512, 1024), lambda T: step(T, 1)),
    Sweep("step", "pairs", (2, 4, 8, 16), lambda pairs: step(192, pairs)),
)


FORMULAS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
"""Operations of PyTorch's operators; its own registry leaves out the one that works in place."""


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products but for attention's, those inside fastdpo's ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdpo":
            with self:  # straight to the implementation, under this mode again
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None and "attention" not in func.name():
            self.products += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def flops_of(call: Callable[[], object]) -> int:
    """Return the floating-point operations of a call's matrix products."""
    with Flops() as flops:
        call()
    products: int = flops.products
    return products


def peak_of(run: Run) -> int:
    """Return the most bytes that PyTorch's allocator handed out at any moment of a run, its gradients left out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run.call()
    kineto = found.profiler
    assert kineto is not None
    events = [each for each in kineto.kineto_results.events() if each.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak - run.gradients


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory whatever its size, as PyTorch's allocator does on GPUs.

    By default it returns blocks of more than 32 MiB to the system, whose pages are then cleared in each call: time that
    sets in at one size and would bend the curves of both sides.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(sweep: Sweep, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds, peak bytes and operations of fastdpo and plain PyTorch, by size."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "peak_bytes": [], "flops": []} for name in (OURS, PLAIN)
    }
    made = [sweep.make(size) for size in sweep.sizes]
    for runs in made:
        for name, run in runs.items():
            found[name]["peak_bytes"].append(peak_of(run))
            found[name]["flops"].append(flops_of(run.call))
            found[name]["seconds"].append(math.inf)
    for _ in range(rounds):  # over all sizes, so that a slow minute does not bend the curve
        for at, runs in enumerate(made):
            for name, run in runs.items():
                found[name]["seconds"][at] = min(found[name]["seconds"][at], cpu_seconds(run.call))
    return found


def fit(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """Return the exponent of a power law through the points, and its standard error."""
    x, y = (torch.tensor(each, dtype=torch.float64).log() for each in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    rest = y - slope * x
    return float(slope), float((rest @ rest / (len(x) - 2) / (x @ x)).sqrt())


def table(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    names = (
        "what",
        "grows",
        "exponent of time",
        "PyTorch's",
        "of operations",
        "time, ratio",
        "memory, MiB",
        "PyTorch's",
    )
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in found["sweeps"]:
        sizes = row["sizes"]

        def time_of(name: str, row: Any = row) -> str:
            slope, error = fit(row["sizes"], row[name]["seconds"])
            return f"{slope:.2f} ± {error:.2f}"

        def memory_of(name: str, row: Any = row) -> str:
            first, *_, last = (each / MIB for each in row[name]["peak_bytes"])
            return f"{first:,.0f} to {last:,.0f}"

        operations = fit(sizes, row[OURS]["flops"])[0]
        ratio = max(a / b for a, b in zip(row[OURS]["seconds"], row[PLAIN]["seconds"], strict=True))
        lines.append(
            f"| {row['what']} | {row['letter']}, {sizes[0]:,} to {sizes[-1]:,} | {time_of(OURS)} | {time_of(PLAIN)} "
            f"| {operations:.2f} | {ratio:.2f} | {memory_of(OURS)} | {memory_of(PLAIN)} |"
        )
    facts = found["provenance"]
    where = f"Measured on {facts['machine']}, with PyTorch {facts['torch']}, {facts['date']}."
    return "\n".join([*lines, "", where, ""])


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw time and memory of the frozen head against N and V, and of the step against T, on logarithmic axes."""
    from matplotlib.figure import Figure

    shown = [("head, frozen", letter) for letter in ("N", "V")] + [("step", "T")]
    rows = {(row["what"], row["letter"]): row for row in found["sweeps"]}
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    panels = figure.subplots(2, 3)
    quantities = (("seconds", "seconds of CPU", 1.0), ("peak_bytes", "memory, MiB", MIB))
    for line, (key, label, unit) in zip(panels, quantities, strict=True):
        for panel, (what, letter) in zip(line, shown, strict=True):
            row = rows[what, letter]
            for name, colour in ((PLAIN, "#b8bcc4"), (OURS, "#2563eb")):
                values = [value / unit for value in row[name][key]]
                panel.plot(row["sizes"], values, "o-", color=colour, label=name, markersize=4)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(row["sizes"], [f"{size:,}" for size in row["sizes"]], fontsize=7)
            panel.minorticks_off()
            panel.tick_params(axis="y", labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            if key == "seconds":
                panel.set_title(f"{what.split(',')[0]}, {letter} grows", fontsize=9, loc="left")
        line[0].set_ylabel(label, fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def write(found: dict[str, Any]) -> None:
    """Replace the table in the page, and draw the picture."""
    replace(PAGE, MARK.format("writes"), MARK.format("has written"), f"\n{table(found)}\n")
    draw(found, PICTURE)


def main() -> None:
    """Measure, or read the numbers, and write the page."""
    parser = argparse.ArgumentParser(description="Write the table of growth in docs/scaling.md.")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    parser.add_argument("--rounds", type=int, default=7, help="Timed rounds, of which the fastest counts (default: 7).")
    args = parser.parse_args()
    if not args.table:
        if torch.get_num_threads() > 1:
            parser.error("set OMP_NUM_THREADS=1: the time of the CPU is measured on one thread")
        keep_freed_memory()
        sweeps = json.loads(NUMBERS.read_text())["sweeps"] if NUMBERS.exists() else []
        before = {(row["what"], row["letter"]) for row in sweeps}
        for sweep in SWEEPS:
            if (sweep.what, sweep.letter) not in before:
                row = {"what": sweep.what, "letter": sweep.letter, "sizes": list(sweep.sizes)}
                sweeps.append(row | measure(sweep, args.rounds))
                NUMBERS.write_text(json.dumps({"provenance": provenance(), "sweeps": sweeps}, indent=1) + "\n")
                print(sweep.what, sweep.letter, flush=True)
    write(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    main()

"""Compute how long the head should take on an H200, from its compiled kernels: nothing is measured.

    python -m benchmarks.studies.head_time_model --out benchmarks/results/computed/head_time.json
    python -m benchmarks.studies.head_time_model --rows 8192 --hidden 4096 --vocab 128256

Each Triton kernel is compiled for the chip. Its registers and shared memory say how many programs share a
multiprocessor, and its machine code how many instructions a warp issues for a tile. A tile takes

    tensor = 2 BLOCK_N BLOCK_V D / 4096 clocks / 0.95          the matmul, as fed as the best kernels are
    exposed = warps / 4 * instructions outside the loop * 1.25 + 1200          its epilogue's stalls, first copies

in sequence if one program runs at a time, and side by side if several do. A kernel also takes no less time than its
bytes from L2 and from memory. Vendor matmuls run at 790 TFLOP/s, 88 % of the clocks of 132 multiprocessors at 1.66 GHz
sustained; the model counts the same clocks for both.

The sparse kernels are described by `fastdpo.head.impl.sparsity.Chip`, which the head decides with, too: `chip` computes
those numbers, and `relative_time` makes milliseconds of them. So a backward that the head chooses never takes longer
here than the dense one. How long it takes depends on where the active cells are: spread evenly over rows and tiles, or
as `ROWS` has them, which `benchmarks.studies.where_cells_are` measured. Density is the share of cells that are active.

None of it knows bank conflicts, cache misses or the power limit: it finds what is far from its goal, not what is 5 %
from it.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.studies.ahead_of_time import Compiled, Job, compile_kernel
from benchmarks.studies.ahead_of_time_gluon import compile_gluon
from fastdpo.benchmarks.harness import save
from fastdpo.benchmarks.report import RESULTS

PROCESSORS = 132
TENSOR = 4096  # FLOP of a multiprocessor in a clock
VENDOR, VENDOR_SHARE = 790e12, 0.88  # FLOP/s of a vendor matmul, which is this share of the tensor cores' clocks
CLOCK = VENDOR / VENDOR_SHARE / TENSOR / PROCESSORS
FED, FILL, STALLS = 0.95, 1200, 1.25
L2, MEMORY = 39, 20  # bytes of a multiprocessor in a clock
BANDWIDTH = 4.3e12  # bytes of memory in a second
STEP = 2000  # clocks of a step of sparse_dhidden: bounds, rows, cells, a matmul and a store wait for each other
ROWS = {
    round(row["density"], 2): (row["in_dense_blocks"], row["elsewhere"])
    for row in reversed(json.loads((RESULTS / "cells.json").read_text())["rows"][1:])
}
"""Of all cells, the share in dense blocks and that of active cells elsewhere, by density."""
LIMIT = 0.12  # density for which the sparse kernels' times are computed: lists are as long as where it matters
JOBS = {
    "forward": ("forward-tma", "masses"),
    "forward, keeping": ("forward-tma", "bias masses kept"),
    "dlogits": ("backward", ""),
    "sparse dlogits": ("sparse-dlogits", ""),
    "sparse dhidden": ("sparse-dhidden", ""),
    "dense blocks": ("sparse-dhidden-blocks", ""),
    "sparse dweight": ("sparse-dweight", ""),
}
SPARSE = ("sparse dlogits", "sparse dhidden", "dense blocks", "sparse dweight")
FORWARDS = {80: "forward", 100: "forward-tma"}


class Kernel(NamedTuple):
    """What the model reads of a compiled kernel."""

    block: tuple[int, int, int]
    warps: int
    registers: int
    shared: int
    loops: list[int]
    """Instructions in a step of the loop, before it, and after it."""
    programs: int
    """Programs that share a multiprocessor."""

    @property
    def exposed(self) -> float:
        """Clocks of a tile in which its own matmul stands still."""
        return self.warps / 4 * sum(self.loops[1:]) * STALLS + FILL

    def clocks(self, depth: int, tensor: int = TENSOR) -> float:
        """Clocks of a multiprocessor for a tile whose sums are over `depth`."""
        n, v, _ = self.block
        matmul = 2 * n * v * depth / tensor / FED
        return max(matmul, (matmul + self.exposed) / self.programs)

    def tiles(self, count: float, depth: int) -> float:
        """Seconds for so many tiles on the whole chip, whose sums are over `depth`."""
        return count * self.clocks(depth) / CLOCK / PROCESSORS


class Gpu(NamedTuple):
    """A chip, in what a multiprocessor does in a clock."""

    processors: int
    tensor: int  # FLOP on bfloat16
    cache: float  # bytes from L2
    memory: float  # bytes from memory


GPUS = {80: Gpu(108, 2048, 47, 13), 90: Gpu(PROCESSORS, TENSOR, L2, MEMORY), 100: Gpu(148, 8192, 39, 29)}
"""A100, H200 and B200, by their published rates at the clocks that a matmul sustains."""


class Shape(NamedTuple):
    """Rows, hidden size and vocabulary."""

    N: int
    D: int
    V: int

    @property
    def unit(self) -> float:
        """Seconds of a vendor matmul of all rows by the vocabulary."""
        return 2 * self.N * self.D * self.V / VENDOR


def compile_kernels(arch: int = 90) -> dict[str, Kernel]:
    """Compile for a chip, in processes of their own, because Triton's interpreter cannot be left."""
    os.environ.pop("TRITON_INTERPRET", None)
    named = JOBS if arch == 90 else {name: JOBS[name] for name in SPARSE} | {"forward": (FORWARDS[arch], "masses")}
    jobs = [Job(kernel, arch, "bf16", variant) for kernel, variant in named.values()]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_kernel, jobs))
    return {name: read(compiled) for name, compiled in zip(named, found, strict=True)}


def read(compiled: Compiled) -> Kernel:
    """Return what the model reads of a `benchmarks.studies.ahead_of_time.Compiled`."""
    launch = compiled.launch
    block = launch["BLOCK_N"], launch["BLOCK_V"], launch["BLOCK_D"]
    numbers = compiled.registers, compiled.shared_bytes, compiled.loops, compiled.at_once
    return Kernel(block, launch["num_warps"], *numbers)


def forward(kernel: Kernel, shape: Shape) -> float:
    """Seconds of the persistent forward; its busiest multiprocessor ends last."""
    count = busiest_tiles(kernel, shape) * PROCESSORS
    return max(kernel.tiles(count, shape.D), copies(kernel, shape))


def busiest_tiles(kernel: Kernel, shape: Shape, processors: int = PROCESSORS) -> int:
    """Return the tiles of the busiest multiprocessor."""
    from fastdpo.kernels import linear_logprobs_forward as module

    blocks, tiles = (-(-size // block) for size, block in zip((shape.N, shape.V), kernel.block, strict=False))
    splits = module.default_splits(blocks, tiles, processors)
    return module.busiest(blocks, tiles, processors, splits)


def copies(kernel: Kernel, shape: Shape) -> float:
    """Seconds that L2 needs for the operands of all tiles; while one program folds, it serves the others."""
    n, v, _ = kernel.block
    return 2 * shape.N * shape.V * shape.D * (1 / n + 1 / v) / L2 / CLOCK / PROCESSORS


def forward_in_gluon(epilogue: int, shape: Shape, config: tuple[int, int, int, int, int]) -> float:
    """Seconds of the warp-specialised forward, whose two consumers share the tensor cores; see `clocks_of_turns`."""
    n, v, d, _, stages = config
    steps = -(-shape.D // d)
    kernel = Kernel((n, v, d), 4, 240, 0, [0, 0, epilogue], 1)
    tiles = busiest_tiles(kernel, shape)
    clocks = clocks_of_turns(min(tiles, 40), steps, stages, 2 * (n // 2) * v * d / TENSOR / FED, STALLS * epilogue)
    return max(tiles * clocks / min(tiles, 40) / CLOCK, copies(kernel, shape))


def clocks_of_turns(tiles: int, steps: int, stages: int, matmul: float, epilogue: float) -> float:
    """Clocks of one multiprocessor for so many tiles, by events.

    Each of two consumers multiplies its half of a slot of the ring, for `matmul` clocks of the tensor cores, and folds
    a tile after `steps` slots. A slot is copied again when both have read it, which takes FILL clocks.
    """
    filled = [float(FILL)] * stages  # when a slot holds its next block
    read = [[0.0] * stages, [0.0] * stages]  # when each consumer read it last
    taken, ready, done = 0.0, [0.0, 0.0], [0, 0]  # the tensor cores and the consumers are busy until then
    total = tiles * steps
    while min(done) < total:
        can = [k for k in (0, 1) if done[k] < total and (done[k] - done[1 - k] < stages)]
        k = min(can, key=lambda k: max(ready[k], filled[done[k] % stages]))
        slot = done[k] % stages
        taken = max(taken, ready[k], filled[slot]) + matmul
        read[k][slot] = ready[k] = taken
        done[k] += 1
        if done[k] <= done[1 - k]:
            filled[slot] = max(read[0][slot], read[1][slot]) + FILL
        if done[k] % steps == 0:
            ready[k] += epilogue
    return max(ready)


def chip(kernels: dict[str, Kernel], shape: Shape, density: float = LIMIT, gpu: Gpu = GPUS[90]) -> Any:
    """Return the `Chip` of these kernels: clocks of a cell relative to a vendor matmul's.

    A tile of dlogits and of dense blocks takes its matmul or its operands from L2, whichever is longer, and its
    prologue and epilogue. The last block of a list is half empty on average. A program of dense blocks has as many
    columns as are dense in a chunk of 12,000. A tile of dweight has steps over a list instead of D. A cell elsewhere
    reads and writes D float32 of dhidden, and reads its dlogits for every slice of D. Each range of rows loads the
    weight of each tile once, and takes at least one step for it.
    """
    from fastdpo.head.impl.sparsity import Chip
    from fastdpo.kernels import sparse_dhidden

    D, rows = shape.D, density * shape.N
    vendor = 1 / gpu.tensor / VENDOR_SHARE  # clocks of an operation
    unit = 2 * shape.N * D * shape.V * vendor  # of a multiprocessor that had to do all of it

    def operations(n: int, v: int) -> float:
        return max(1 / gpu.tensor / FED, (1 / n + 1 / v) / gpu.cache)

    forward, dlogits, blocks = kernels["forward"], kernels["sparse dlogits"], kernels["dense blocks"]
    lists, dweight = kernels["sparse dhidden"], kernels["sparse dweight"]
    n, v, _ = dlogits.block
    in_lists = operations(n, v) + dlogits.exposed / (2 * n * v * D) / dlogits.programs
    block, _, columns = blocks.block
    in_blocks = operations(block, columns) + blocks.exposed / (2 * block * columns * density * 12000) / blocks.programs
    tile, slices = lists.block[1], D / lists.block[2]
    ranges = max(1, sparse_dhidden.PROGRAMS * gpu.processors // slices)
    of_cell = 2 * tile * D * vendor
    m, v, d = dweight.block
    fed = operations(v, d) * (1 + m / 2 / rows)
    of_forward = max(
        busiest_tiles(forward, shape, gpu.processors) * forward.clocks(D, gpu.tensor),
        operations(*forward.block[:2]) * unit / vendor / gpu.processors,
    )
    return Chip(
        forward=max(1.0, of_forward / unit * gpu.processors),  # no kernel counts as faster than the vendor's
        dlogits=in_lists / vendor * (1 + n / 2 / rows),
        blocks=in_blocks / vendor,
        memory=8 * D / gpu.memory / of_cell,
        cache=(8 * D + 2 * tile * slices) / gpu.cache / of_cell,
        weight=ranges * 2 * shape.V * D / gpu.cache / unit,
        step=STEP * shape.V / tile * gpu.processors / unit,
        dweight=(fed + dweight.exposed / (2 * v * d * rows)) / vendor,
    )


def rounding(shape: Shape) -> float:
    """Seconds for rounding dweight from its float32 sum."""
    return 6 * shape.V * shape.D / BANDWIDTH


def kept_share(shape: Shape, workspace: int) -> float:
    """Share of the vocabulary whose probabilities the Triton head keeps."""
    impl: Any = import_module("fastdpo.head.impl.triton")
    interface: Any = import_module("fastdpo.head.impl.interface")
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, shape.D, dtype=torch.bfloat16) for n in (shape.N, shape.V))
    keep = interface.Keep(shares=True, probs=True)
    kept = impl.kept_like(hidden, interface.LinearHead(weight), keep, workspace)
    return 0.0 if kept.probs is None else min(1.0, kept.probs.shape[1] / shape.V)


def recompute(kernel: Kernel, shape: Shape) -> float:
    """Seconds of the kernel that computes dlogits in all cells."""
    blocks = -(-shape.N // kernel.block[0]) * -(-shape.V // kernel.block[1])
    return max(kernel.tiles(blocks, shape.D), copies(kernel, shape))


def steps(
    kernels: dict[str, Kernel], shape: Shape, times: Any, density: float, blocks: float, others: float
) -> dict[str, float]:
    """Seconds of a forward and backward of each kind; with all cells in `blocks`, without skipping any."""
    from fastdpo.head.impl.sparsity import relative_time

    def relative(trained: bool, exact_weight: bool) -> float:
        return min(1.0, relative_time(times, density, blocks, others, trained, exact_weight))

    def trained(workspace: int, dhidden: float) -> float:
        share = kept_share(shape, workspace)
        first = forward(kernels["forward, keeping" if share else "forward"], shape)
        again = (1 - share) * recompute(kernels["dlogits"], shape) + share * 4 * shape.N * shape.V / BANDWIDTH
        return first + again + (1 + dhidden) * shape.unit + rounding(shape)

    auto, sparse = relative(True, True), relative(True, False)
    return {
        "frozen": (1 + relative(False, True)) * shape.unit,  # a dense one is a matmul more in the forward
        "trained auto": trained(2**28, auto),
        "trained auto, 3 GiB": trained(3 * 2**30, auto),
        "sparse": trained(2**28, 1.0) if sparse == 1 else forward(kernels["forward"], shape) + 2 * sparse * shape.unit,
    }


GOALS = {
    ("frozen", 0.05): 15.0, ("trained auto", 0.05): 37.0, ("trained auto, 3 GiB", 0.05): 26.0, ("sparse", 0.05): 18.0,
    ("frozen", 0.18): 19.0, ("sparse", 0.18): 26.0,
}  # fmt: skip
HEADLINE = Shape(8192, 4096, 128256)


def computed(kernels: dict[str, Kernel], shape: Shape, times: Any) -> dict[str, Any]:
    """Return milliseconds with no cell skipped and, by where the active cells are, by density and the limits."""
    dense = steps(kernels, shape, times, 1.0, 1.0, 0.0)
    found: dict[str, Any] = {"dense_ms": {name: 1e3 * seconds for name, seconds in dense.items()}}
    for cells, where in (("spread evenly", {d: (0.0, d) for d in ROWS}), ("where a model has them", ROWS)):
        by_density = {d: steps(kernels, shape, times, d, *shares) for d, shares in where.items()}
        kinds = {"frozen": (False, True), "auto": (True, True), "sparse": (True, False)}
        ms = {name: {d: 1e3 * x[name] for d, x in by_density.items()} for name in dense}
        found[cells] = {"ms": ms, "limits": {name: limit(times, where, *kind) for name, kind in kinds.items()}}
    return found


def report(kernels: dict[str, Kernel], shape: Shape, gluon: tuple[int, Any] | None = None) -> str:
    """Return the tables: kernels, steps beside their goals, and the forward at other hidden sizes.

    `gluon` is the epilogue and the configuration of the warp-specialised forward; None leaves it out.
    """
    import triton

    from fastdpo.head.impl import sparsity

    lines = [
        f"computed, not measured: H200, bfloat16, N={shape.N} D={shape.D} V={shape.V}, Triton {triton.__version__}"
    ]
    lines.append(f"{'kernel (computed)':22}{'tile':>14}{'regs':>6}{'KiB':>5}{'programs':>10}{'instructions':>16}")
    for name, k in kernels.items():
        block = "x".join(map(str, k.block))
        counts = "+".join(map(str, k.loops))
        lines.append(f"{name:22}{block:>14}{k.registers:6}{k.shared / 1024:5.0f}{k.programs:10}{counts:>16}")
    times = chip(kernels, shape)
    lines += [described(times), f"a block is dense from {sparsity.dense_block(times):.2f} of its rows on"]
    found = computed(kernels, shape, times)
    for cells in ("spread evenly", "where a model has them"):
        lines.append(f"{f'ms (computed), {cells}':34}" + "".join(f"{f'density {d:.2f}':>30}" for d in ROWS))
        for name, of_dense in found["dense_ms"].items():
            row = ""
            for density, ms in found[cells]["ms"][name].items():
                goal = GOALS.get((name, density)) if shape == HEADLINE else None
                said = " dense" if ms == of_dense else ""
                said += "" if goal is None else f" (goal {goal:.0f}{'' if ms <= goal else ', missed'})"
                row += f"{f'{ms:.1f}{said}':>30}"
            lines.append(f"{name:34}{row}   dense {of_dense:.1f}")
        limits = (f"{name} {density:.2f}" for name, density in found[cells]["limits"].items())
        lines.append(f"dense from a density of, computed: {', '.join(limits)}")
    for size in (1024, 2048, 4096):
        other = shape._replace(D=size)
        shares = []
        for name, seconds in (
            ("TMA", forward(kernels["forward"], other)),
            *([("Gluon", forward_in_gluon(gluon[0], other, gluon[1]))] if gluon else []),
        ):
            share = other.unit / seconds
            shares.append(f"{name} {share:.0%} (goal 90%{'' if share >= 0.9 else ', missed'})")
        lines.append(f"forward at D={size}, of the matmul's rate, computed: {', '.join(shares)}")
    return "\n".join(lines)


def described(times: Any) -> str:
    """Return a line with the numbers of a `Chip`."""
    return "beside a vendor matmul, computed: " + ", ".join(
        f"{name} {value:.3g}" for name, value in times._asdict().items()
    )


def limit(times: Any, where: dict[float, tuple[float, float]], trained: bool, exact_weight: bool) -> float:
    """Return the density above which the head computes all cells; shares of `where` are interpolated."""
    from fastdpo.head.impl.sparsity import relative_time

    dense_at_last = any(blocks for blocks, _ in where.values())
    known = {0.0: (0.0, 0.0)} | where | {1.0: (1.0, 0.0) if dense_at_last else (0.0, 1.0)}

    def between(density: float) -> tuple[float, float]:
        below, above = max(d for d in known if d <= density), min(d for d in known if d >= density)
        part = (density - below) / (above - below) if above > below else 0.0
        (a, b), (c, d) = known[below], known[above]
        return a + part * (c - a), b + part * (d - b)

    densities = (k / 100 for k in range(101))
    paying = [d for d in densities if relative_time(times, d, *between(d), trained, exact_weight) <= 1]
    return max(paying, default=0.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=HEADLINE.N, help=f"N: completion tokens (default: {HEADLINE.N}).")
    parser.add_argument("--hidden", type=int, default=HEADLINE.D, help=f"D: the hidden size (default: {HEADLINE.D}).")
    parser.add_argument(
        "--vocab", type=int, default=HEADLINE.V, help=f"V: tokens of the vocabulary (default: {HEADLINE.V})."
    )
    parser.add_argument("--chips", action="store_true", help="Print only the numbers of sm_80, sm_90 and sm_100.")
    parser.add_argument(
        "--out", type=Path, help="JSON file to which milliseconds and limits are written (default: none)."
    )
    args = parser.parse_args(argv)
    if args.chips:
        for arch, gpu in GPUS.items():
            sys.stdout.write(f"sm_{arch}: {described(chip(compile_kernels(arch), HEADLINE, gpu=gpu))}\n")
        return
    kernels, shape = compile_kernels(), Shape(args.rows, args.hidden, args.vocab)
    sys.stdout.write(report(kernels, shape, compile_gluon()) + "\n")
    if args.out:
        save(args.out, {"shape": shape._asdict()} | computed(kernels, shape, chip(kernels, shape)))


if __name__ == "__main__":
    main()

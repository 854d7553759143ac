"""Compute how long the head should take on an H200, from its compiled kernels: nothing is measured.

    python -m benchmarks.head_time_model
    python -m benchmarks.head_time_model --rows 8192 --hidden 4096 --vocab 128256

Each Triton kernel is compiled for sm_90. Its registers and shared memory say how many programs share a multiprocessor,
and its machine code how many instructions a warp issues for a tile. A tile takes

    tensor = 2 BLOCK_N BLOCK_V D / 4096 clocks / 0.95          the matmul, as fed as the best kernels are
    exposed = warps / 4 * instructions outside the loop * 1.25 + 1200          epilogue with its stalls, and the first
                                                               copies of a tile

in sequence if one program runs at a time, and side by side if several do. A kernel also takes no less time than its
bytes from L2 and from memory. Vendor matmuls run at 790 TFLOP/s, 88 % of the clocks of 132 multiprocessors at 1.66 GHz
sustained; the model counts the same clocks for both. Latencies of 2000 clocks are added where a program walks a chain
of dependent loads. A PyTorch operation on small tensors takes 3 microseconds. Density is the share of cells that are
active. None of it knows bank conflicts, cache misses or the power limit: it finds what is far from its goal, not what
is 5 % from it.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

PROCESSORS = 132
TENSOR = 4096  # FLOP of a multiprocessor in a clock
VENDOR, VENDOR_SHARE = 790e12, 0.88  # FLOP/s of a vendor matmul, which is this share of the tensor cores' clocks
CLOCK = VENDOR / VENDOR_SHARE / TENSOR / PROCESSORS
FED, FILL, STALLS, CHAIN = 0.95, 1200, 1.25, 2000
L2, MEMORY = 5100 * CLOCK, 4.3e12  # bytes in a second
L2_BYTES = 40e6
OPERATION = 3e-6  # seconds
DENSITIES = (0.05, 0.18, 0.35)
JOBS = {
    "forward": ("forward-tma", "masses"),
    "forward, keeping": ("forward-tma", "bias masses kept"),
    "dlogits": ("backward", ""),
    "sparse dlogits": ("sparse-dlogits", ""),
    "sparse dhidden": ("sparse-dhidden", ""),
    "sparse dweight": ("sparse-dweight", ""),
}


class Kernel(NamedTuple):
    """What the model reads of a compiled kernel."""

    block: tuple[int, int, int]
    warps: int
    registers: int
    shared: int
    loops: list[int]
    """Instructions in a step of the loop, before it, and after it."""

    @property
    def programs(self) -> int:
        """Programs that share a multiprocessor."""
        return programs(self.registers, 32 * self.warps, self.shared, 90)

    @property
    def exposed(self) -> float:
        """Clocks of a tile in which its own matmul stands still."""
        return self.warps / 4 * sum(self.loops[1:]) * STALLS + FILL

    def tiles(self, count: float, depth: int) -> float:
        """Seconds for so many tiles on the whole chip, whose sums are over `depth`."""
        n, v, _ = self.block
        tensor = 2 * n * v * depth / TENSOR / FED
        clocks = max(tensor, (tensor + self.exposed) / self.programs)
        return count * clocks / CLOCK / PROCESSORS


def programs(registers: int, threads: int, shared: int, arch: int) -> int:
    """Return how many programs share a multiprocessor: CUDA C++ Programming Guide, table 24."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    kib = {80: 164, 90: 228, 100: 228}[arch]
    return min(by_registers, kib * 1024 // (shared + 1024), 2048 // threads, 32)


class Shape(NamedTuple):
    """Rows, hidden size and vocabulary."""

    N: int
    D: int
    V: int

    @property
    def unit(self) -> float:
        """Seconds of a vendor matmul of all rows by the vocabulary."""
        return 2 * self.N * self.D * self.V / VENDOR


def compile_kernels() -> dict[str, Kernel]:
    """Compile for sm_90, in processes of their own, because Triton's interpreter cannot be left."""
    os.environ.pop("TRITON_INTERPRET", None)
    aot = import_module("tests.kernels.test_aot")
    jobs = [aot.Job(kernel, 90, "bf16", variant) for kernel, variant in JOBS.values()]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = pool.map(aot.compile_kernel, jobs)
    made = {}
    for name, compiled in zip(JOBS, found, strict=True):
        launch = compiled.launch
        block = launch["BLOCK_N"], launch["BLOCK_V"], launch["BLOCK_D"]
        made[name] = Kernel(block, launch["num_warps"], compiled.registers, compiled.shared_bytes, compiled.loops)
    return made


def forward(kernel: Kernel, shape: Shape) -> float:
    """Seconds of the persistent forward; its busiest multiprocessor ends last."""
    from fastdpo.kernels import linear_logprobs_forward as module

    blocks, tiles = (-(-size // block) for size, block in zip((shape.N, shape.V), kernel.block, strict=False))
    splits = module.default_splits(blocks, tiles, PROCESSORS)
    return kernel.tiles(module.busiest(blocks, tiles, PROCESSORS, splits) * PROCESSORS, shape.D)


def cells(kernel: Kernel, shape: Shape, density: float) -> tuple[float, float]:
    """Return the blocks of rows in all lists, of which the last of each list is not full, and the active cells."""
    tiles = -(-shape.V // kernel.block[1])
    return tiles * -(-shape.N * density // kernel.block[0]), tiles * shape.N * density


def gather(kernel: Kernel, blocks: float, depth: int) -> float:
    """Seconds that L2 needs for the operands of so many tiles."""
    return blocks * 2 * (kernel.block[0] + kernel.block[1]) * depth / L2


def sparse_dlogits(kernel: Kernel, shape: Shape, density: float) -> float:
    """Seconds for the active cells' dlogits."""
    blocks, _ = cells(kernel, shape, density)
    return max(kernel.tiles(blocks, shape.D), gather(kernel, blocks, shape.D))


def sparse_dhidden(kernel: Kernel, shape: Shape, density: float) -> float:
    """Seconds of the grouped matmul into dhidden, whose rows are read and written once for each active cell."""
    module: Any = import_module("fastdpo.kernels.sparse_dhidden")
    n, v, d = kernel.block
    blocks, active = cells(kernel, shape, density)
    slices = -(-shape.D // d)
    at_once = kernel.programs * PROCESSORS
    grid = -(-getattr(module, "PROGRAMS", kernel.programs) * PROCESSORS // slices) * slices
    waves = -(-grid // at_once)
    chain = waves * -(-shape.V // v) * max(1.0, shape.N * density * slices / n / grid) * CHAIN / CLOCK
    rows = 8 * active * shape.D  # float32, read and written
    live = at_once / slices / (grid / slices) * shape.N * shape.D * 4
    traffic = (
        rows / (MEMORY if live > L2_BYTES else L2) + 2 * active * v * slices / L2 + blocks * slices * 2 * v * d / L2
    )
    matmul = blocks * 2 * n * v * shape.D / TENSOR / FED / CLOCK / PROCESSORS
    return max(chain, traffic, matmul)


def sparse_dweight(kernel: Kernel, shape: Shape, density: float) -> float:
    """Seconds of the grouped matmul into dweight, where each step waits for its rows unless programs take turns."""
    n, v, d = kernel.block
    blocks, _ = cells(kernel, shape, density)
    steps = blocks * -(-shape.D // d)
    tensor = 2 * n * v * d / TENSOR / FED
    clocks = max(tensor, (tensor + CHAIN / 2) / kernel.programs)
    return max(steps * clocks / CLOCK / PROCESSORS, steps * 2 * n * (v + d) / L2) + rounding(shape)


def rounding(shape: Shape) -> float:
    """Seconds for rounding dweight from its float32 sum."""
    return 6 * shape.V * shape.D / MEMORY


def kept_share(shape: Shape, workspace: int) -> float:
    """Share of the vocabulary whose probabilities the Triton head keeps."""
    impl: Any = import_module("fastdpo.head.impl.triton")
    interface: Any = import_module("fastdpo.head.impl.interface")
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, shape.D, dtype=torch.bfloat16) for n in (shape.N, shape.V))
    keep = interface.Keep(shares=True, probs=True)
    kept = impl.kept_like(hidden, interface.LinearHead(weight), keep, workspace)
    return 0.0 if kept.probs is None else min(1.0, kept.probs.shape[1] / shape.V)


def glue() -> int:
    """PyTorch operations of a sparse step around the kernels: counted before they were kernels, or at most."""
    sparsity: Any = import_module("fastdpo.head.impl.sparsity")
    return 1515 if hasattr(sparsity, "_select") else 60


def steps(kernels: dict[str, Kernel], shape: Shape, density: float) -> dict[str, float]:
    """Seconds of a forward and backward of each kind, if cells are skipped as asked for."""
    dhidden = sparse_dhidden(kernels["sparse dhidden"], shape, density)
    dlogits = sparse_dlogits(kernels["sparse dlogits"], shape, density)
    plain, around = forward(kernels["forward"], shape), glue() * OPERATION
    dense = kernels["dlogits"]
    blocks = -(-shape.N // dense.block[0]) * -(-shape.V // dense.block[1])
    recompute = max(dense.tiles(blocks, shape.D), 0.0)

    def trained(workspace: int) -> float:
        share = kept_share(shape, workspace)
        first = forward(kernels["forward, keeping"], shape) if share else plain
        again = (1 - share) * recompute + share * 4 * shape.N * shape.V / MEMORY
        return first + around + again + dhidden + shape.unit + rounding(shape)

    return {
        "frozen": plain + around + dlogits + dhidden,
        "trained auto": trained(2**28),
        "trained auto, 3 GiB": trained(3 * 2**30),
        "sparse": plain + around + dlogits + dhidden + sparse_dweight(kernels["sparse dweight"], shape, density),
    }


def dense(kernels: dict[str, Kernel], shape: Shape) -> dict[str, float]:
    """Seconds without skipping any cell: by vendor matmuls if the head is frozen, by Triton else."""
    blocks = -(-shape.N // kernels["dlogits"].block[0]) * -(-shape.V // kernels["dlogits"].block[1])
    exact = forward(kernels["forward"], shape) + kernels["dlogits"].tiles(blocks, shape.D) + 2 * shape.unit
    exact += rounding(shape)
    return {"frozen": 2 * shape.unit} | dict.fromkeys(("trained auto", "trained auto, 3 GiB", "sparse"), exact)


GOALS = {
    ("frozen", 0.05): 15.0, ("trained auto", 0.05): 37.0, ("trained auto, 3 GiB", 0.05): 26.0, ("sparse", 0.05): 18.0,
    ("frozen", 0.18): 19.0, ("sparse", 0.18): 26.0,
}  # fmt: skip
HEADLINE = Shape(8192, 4096, 128256)


def report(kernels: dict[str, Kernel], shape: Shape) -> str:
    """Return the tables: kernels, steps beside their goals, and the forward at other hidden sizes."""
    import triton

    lines = [
        f"computed, not measured: H200, bfloat16, N={shape.N} D={shape.D} V={shape.V}, Triton {triton.__version__}"
    ]
    lines.append(f"{'kernel (computed)':22}{'tile':>14}{'regs':>6}{'KiB':>5}{'programs':>10}{'instructions':>16}")
    for name, k in kernels.items():
        block = "x".join(map(str, k.block))
        counts = "+".join(map(str, k.loops))
        lines.append(f"{name:22}{block:>14}{k.registers:6}{k.shared / 1024:5.0f}{k.programs:10}{counts:>16}")
    lines.append(f"{'ms (computed)':22}" + "".join(f"{f'density {d:.2f}':>26}" for d in DENSITIES))
    without = dense(kernels, shape)
    found = {density: steps(kernels, shape, density) for density in DENSITIES}
    for name, of_dense in without.items():
        row = ""
        for density in DENSITIES:
            ms, goal = 1e3 * found[density][name], GOALS.get((name, density)) if shape == HEADLINE else None
            said = "" if goal is None else f" (goal {goal:.0f}{'' if ms <= goal else ', missed'})"
            said += "" if found[density][name] <= of_dense else " > dense"
            row += f"{f'{ms:.1f}{said}':>26}"
        lines.append(f"{name:22}{row}   dense {1e3 * of_dense:.1f}")
    for size in (1024, 2048, 4096):
        other = shape._replace(D=size)
        share = other.unit / forward(kernels["forward"], other)
        of_goal = "goal 90%" + ("" if share >= 0.9 else ", missed")
        lines.append(f"forward at D={size}: {share:.0%} of the matmul's rate, computed ({of_goal})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=HEADLINE.N)
    parser.add_argument("--hidden", type=int, default=HEADLINE.D)
    parser.add_argument("--vocab", type=int, default=HEADLINE.V)
    args = parser.parse_args(argv)
    sys.stdout.write(report(compile_kernels(), Shape(args.rows, args.hidden, args.vocab)) + "\n")


if __name__ == "__main__":
    main()

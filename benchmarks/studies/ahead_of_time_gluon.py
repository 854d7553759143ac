"""Compile the warp-specialised forward for Hopper, up to its launch, on a machine that has none."""

import contextlib
import io
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class Compiled(NamedTuple):
    """What came of a variant."""

    spilled: int
    shared_bytes: int
    threads: int
    registers_of_all: int
    consumers: int
    """Registers per thread that a consumer has while it works."""
    producer: int
    matmuls: dict[str, int]
    """How often each shape of matmul is in the machine code."""
    local: int
    """Loads and stores of local memory in the machine code."""
    epilogues: list[int]
    """Instructions of each consumer from the end of a tile's matmuls to the next tile, without those that few take."""
    unguarded_arrivals: int
    """Arrivals of consumers that do not wait for the other warps of the consumer first."""
    recompiled: bool
    """Whether another number of rows, of tokens and of shares compiled it again."""


def compile_variant(variant: str) -> Compiled:
    """Launch the kernel as far as Triton compiles it for a GPU that a driver invents."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    module: Any = import_module("fastdpo.kernels.linear_logprobs_forward_gluon")

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    run: Any = JITFunction.run
    kernels: list[Any] = []

    def until_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    def launch(N: int, V: int, splits: int) -> None:
        hidden, weight = torch.zeros(N, 512, dtype=torch.bfloat16), torch.zeros(V, 512, dtype=torch.bfloat16)
        scale, cap = -1.3 if "negative" in variant else 1.3, 30.0 if "softcap" in variant else None
        targets = torch.zeros(N, dtype=torch.int64)
        module.linear_logprobs_forward_gluon(
            hidden, weight, targets, None, scale, cap, False, tile_masses="masses" in variant, splits=splits
        )

    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = until_launch
    module.fits_gluon = lambda hidden, weight: True
    module.processors = lambda x: 132
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.cache.dir = folder  # a cached kernel has no log
        launch(1000, 2000, 12)
        launch(2048, 4111, 1)
    kernel = kernels[0]
    ptx, code = kernel.asm["ptx"], disassemble(kernel.asm["cubin"])
    levels = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)]
    shapes = re.findall(r"HGMMA\.(\d+x\d+x\d+)", "\n".join(code))
    arrivals = re.findall(r"((?:.*\n){12}).*mbarrier\.arrive\.shared", ptx)
    return Compiled(
        sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        kernel.metadata.shared,
        int(re.findall(r"\.reqntid\s+(\d+)", ptx)[0]),
        int(re.findall(r"\.maxnreg\s+(\d+)", ptx)[0]),
        module.CONSUMER_REGISTERS * (levels.count(module.CONSUMER_REGISTERS) == 2),
        min(levels),
        {shape: shapes.count(shape) for shape in sorted(set(shapes))},
        sum(re.search(r"\b(LDL|STL)\b", line) is not None for line in code),
        epilogues(code),
        sum("bar.sync" not in before for before in arrivals) + (len(arrivals) != 4),
        kernels[0] is not kernels[1],
    )


def disassemble(cubin: bytes) -> list[str]:
    """Return the lines of the machine code that are instructions or labels."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([program, "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*(?:\.(L_x_\d+:)|/\*[0-9a-f]{4,}\*/\s+([^;]*);)", text, re.MULTILINE)
    return [label or instruction for label, instruction in found]


def epilogues(code: list[str]) -> list[int]:
    """Count the instructions of each consumer between its loop over the hidden size and the end of its loop over tiles.

    What lies behind the widest jump forward is left out: the few tiles with a target or the end of the vocabulary.
    """
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    jumps = [(i, labels[m[1]]) for i, line in enumerate(code) if (m := re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", line))]
    loops = sorted(((to, at) for at, to in jumps if to < at), key=lambda loop: loop[1] - loop[0])
    counts, inner_loops = [], set()
    for i, line in enumerate(code):
        if "HGMMA" in line:
            inner_loops.add(next((start, end) for start, end in loops if start <= i <= end))
    for inner in sorted(inner_loops):
        outer = next(loop for loop in loops if loop[0] < inner[0] and inner[1] < loop[1])
        rare = max(((at, to) for at, to in jumps if inner[1] < at < to < outer[1]), key=lambda jump: jump[1] - jump[0])
        body = [*code[inner[1] + 1 : rare[0] + 1], *code[rare[1] : outer[1] + 1]]
        counts.append(sum(not line.endswith(":") and "NOP" not in line for line in body))
    return counts


def compile_gluon() -> tuple[int, Any] | None:
    """Return the epilogue and the configuration of the warp-specialised forward; None if Triton lacks Gluon."""
    from fastdpo.head.autotune import GLUON_FORWARD, has_gluon

    if not has_gluon():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        compiled = pool.submit(compile_variant, "masses").result()
    return max(compiled.epilogues), import_module(GLUON_FORWARD).CONFIG

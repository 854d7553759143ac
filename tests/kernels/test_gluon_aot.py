"""The warp-specialised forward, compiled for Hopper up to its launch: registers, memory and instructions.

`python -m tests.kernels.test_gluon_aot` prints what the compiler made of each variant.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = 227 * 1024
EPILOGUE = 750
"""Most instructions of a thread for the 128 logits of a tile that it holds, without a soft-cap."""
VARIANTS = ("masses", "negative", "softcap", "softcap masses")
TESTED = ("masses",)
"""That of a training; `python -m tests.kernels.test_gluon_aot` compiles the others too."""


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

    from fastdpo.kernels import linear_logprobs_forward_gluon as module

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


def compile_all() -> Any:
    """Compile those of TESTED in another process: Triton's interpreter, once chosen, cannot be left."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.test_gluon_aot", "--json"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def compilations(once: Any) -> dict[str, Compiled]:
    return {variant: Compiled(*compiled) for variant, compiled in once("gluon-aot", compile_all)}


@pytest.mark.slow
@pytest.mark.parametrize("variant", TESTED)
def test_compiles_for_hopper(variant: str, compilations: dict[str, Compiled]) -> None:
    compiled = compilations[variant]
    assert compiled.spilled == compiled.local == 0
    assert compiled.shared_bytes <= SHARED_BYTES
    assert (compiled.consumers, compiled.producer) == (240, 24)
    assert compiled.threads == 3 * 128, "the producer's warpgroup is filled up with idle warps"
    assert 2 * compiled.consumers + compiled.producer <= 3 * compiled.registers_of_all, "or setmaxnreg waits for ever"
    columns = 128 if variant == "softcap masses" else 256
    assert compiled.matmuls == {f"64x{columns}x16": 2 * 4}, "two consumers, four steps of 16 in a block"
    assert compiled.unguarded_arrivals == 0
    assert not compiled.recompiled
    assert len(compiled.epilogues) == 2
    if "softcap" not in variant:
        assert max(compiled.epilogues) <= EPILOGUE


def main() -> None:
    if "--json" in sys.argv:
        json.dump([(variant, compile_variant(variant)) for variant in TESTED], sys.stdout)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # importing costs as much as compiling
        for variant, compiled in zip(VARIANTS, pool.map(compile_variant, VARIANTS), strict=True):
            sys.stdout.write(f"{variant:15} {' '.join(f'{k}={v}' for k, v in compiled._asdict().items())}\n")


if __name__ == "__main__":
    main()

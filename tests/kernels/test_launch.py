"""The head's launches on CUDA, up to the launch: what Triton's binder makes of the arguments, and its compiler of that.

The interpreter takes arguments its own way, and ahead-of-time compilation (`tests.kernels.test_aot`) is told their
types. Here a driver says that it is a GPU, and each launch of `fastdpo.head.impl.triton` and `fastdpo.head.impl.blas`
goes through Triton's JIT until the kernel is compiled for it. Nothing runs.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
SHARED = {"8.0": 163 * 1024, "9.0": 227 * 1024}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged-vocabulary": {"V": 1000},
    "odd-hidden-size": {"D": 100},
    "low-rank-of-8": {"rank": 8},
    "softcap-and-bias": {"softcap": 30.0, "bias": True},
    "statistics-and-entropy": {"stats": True, "entropy": True},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
}
RUNS = [*(("9.0", name) for name in CASES), ("8.0", "plain")]


class Launch(NamedTuple):
    """A kernel that was compiled for a launch."""

    kernel: str
    spilled_bytes: int
    shared_bytes: int
    tma: bool


def pretend(capability: tuple[int, int]) -> list[Launch]:
    """Let Triton believe in a GPU, compile where it would launch, and note in the returned list what it compiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastdpo.kernels import linear_logprobs_backward as backward
    from fastdpo.kernels import linear_logprobs_forward as forward
    from fastdpo.kernels import linear_logprobs_forward_tma as tma
    from fastdpo.kernels import logits_tile, sparse_dhidden, sparse_dlogits, sparse_dweight

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    compiled: list[Launch] = []
    run: Any = JITFunction.run

    def until_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # of ptxas: it was not in the cache of this process
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
            loads = "cp.async.bulk.tensor" in kernel.asm["ptx"]
            compiled.append(Launch(self.fn.__name__, spilled, kernel.metadata.shared, loads))
        return kernel

    def config(x: Any, configs: Any, fallback: Any = logits_tile.FALLBACK) -> Any:
        return configs.get((capability, x.element_size()), fallback[x.element_size()])

    triton.runtime.driver.set_active(Driver())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = until_launch
    for module in (forward, backward, sparse_dhidden, sparse_dlogits, sparse_dweight):
        module.default_config = config
    forward.fits_tma = lambda hidden, weight: capability >= (9, 0) and tma.aligned(hidden) and tma.aligned(weight)
    forward.processors = lambda x: 132
    return compiled


def launch(
    N: int,
    *,
    D: int = 256,
    V: int = 1024,
    dtype: str = "bfloat16",
    rank: int = 0,
    softcap: float | None = None,
    bias: bool = False,
    stats: bool = False,
    entropy: bool = False,
) -> None:
    """Launch the forward and every backward; what kernels would have written is made up."""
    import torch

    from fastdpo.head.impl import blas, sparsity
    from fastdpo.head.impl import triton as impl
    from fastdpo.head.impl.interface import Grads, Keep, LinearHead, Needs, Transform
    from fastdpo.kernels import select_cells

    def make(*shape: int) -> Any:
        return torch.randn(*shape).to(getattr(torch, dtype))

    hidden2, weight2 = (make(n, rank) if rank else None for n in (N, V))
    head = LinearHead(make(V, D), make(V) if bias else None, weight2, Transform.of(softcap=softcap))
    inputs = make(N, D), hidden2, torch.randint(V, (N,)), head
    result = impl.forward(*inputs, stats, Keep(shares=True))
    shares = torch.rand(N, -(-V // impl.TILE)).to(inputs[0].dtype)
    result = result._replace(target=torch.rand(N), others=torch.rand(N), kept=result.kept._replace(shares=shares))
    grads = Grads(torch.rand(N), torch.rand(N), torch.rand(N) if entropy else None)
    every = Needs(True, True, bias, bool(rank), bool(rank))
    impl.backward(grads, *inputs, result, every)
    blas.backward(grads, *inputs, blas.forward(*inputs, stats, Keep(probs=True)), every)
    if not entropy:
        found = torch.zeros(3)
        selection = sparsity.Selection(*select_cells.select_cells(shares, grads.others, 0.005, 2.0**-12), found)
        select_cells.mean_density(selection.active, found)
        impl.backward(grads, *inputs, result, every, selection, True)
        impl.backward(grads, *inputs, result, every, selection, False)
        impl.backward(grads, *inputs, result, Needs(hidden=True), selection)


def compile_launches() -> Any:
    """Run all cases in another process: Triton's interpreter, once chosen, cannot be left."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_launch"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def launches(once: Any) -> dict[str, dict[str, list[Launch]]]:
    found = once("launches", compile_launches)
    return {
        capability: {name: [Launch(*each) for each in some] for name, some in of_it.items()}
        for capability, of_it in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), RUNS, ids="-".join)
def test_launches(capability: str, name: str, launches: Any) -> None:
    compiled = launches[capability][name]
    assert compiled
    for each in compiled:
        assert each.spilled_bytes == 0, each
        assert each.shared_bytes <= SHARED[capability], each
        by_tma = capability == "9.0" and name not in ("odd-hidden-size", "float32") and "forward" in each.kernel
        assert each.tma == by_tma, each


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_another_number_of_rows_compiles_nothing(capability: str, launches: Any) -> None:
    assert launches[capability]["other numbers of rows"] == []


def launch_all(capability: str) -> dict[str, list[Launch]]:
    major, minor = map(int, capability.split("."))
    compiled = pretend((major, minor))
    found: dict[str, list[Launch]] = {}
    for of, name in RUNS:
        if of == capability:
            launch(304, **CASES[name])
            found[name] = compiled[:]
            compiled.clear()
    for N in (1, 17, 64, 1000):
        launch(N)
    found["other numbers of rows"] = compiled
    return found


def main() -> None:
    importlib.import_module("fastdpo.head.impl.triton")  # before the forks, for both
    with get_context("fork").Pool(len(SHARED), maxtasksperchild=1) as pool:
        json.dump(dict(zip(SHARED, pool.map(launch_all, SHARED, chunksize=1), strict=True)), sys.stdout)


if __name__ == "__main__":
    main()

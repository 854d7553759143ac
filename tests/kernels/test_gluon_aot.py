"""The warp-specialised forward, compiled for Hopper up to its launch: registers, memory and instructions.

`python -m tests.kernels.test_gluon_aot` prints what the compiler made of each variant.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.ahead_of_time_gluon import Compiled, compile_variant

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = 227 * 1024
EPILOGUE = 750
"""Most instructions of a thread for the 128 logits of a tile that it holds, without a soft-cap."""
VARIANTS = ("masses", "negative", "softcap", "softcap masses")
TESTED = ("masses",)
"""That of a training; `python -m tests.kernels.test_gluon_aot` compiles the others too."""


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

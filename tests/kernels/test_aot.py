"""The default configurations, compiled ahead of time for chips this machine does not have, NVIDIA's and one of AMD's.

A tile that does not fit the registers is spilled to memory and runs several times slower, silently; one that does not
fit shared memory does not run at all. `python -m tests.kernels.test_aot` prints what the compiler made of each. The
tests compile those of `TESTED`, because all of them take minutes.
"""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import head_time_model
from benchmarks.studies.ahead_of_time import (
    AMD,
    JOBS,
    MATMULS,
    SHARED_KIB,
    TENSOR_CORE,
    VARIANTS,
    Compiled,
    Job,
    compile_kernel,
)
from fastdpo.head.impl import sparsity
from fastdpo.kernels import sparse_dhidden

ROOT = Path(__file__).parent.parent.parent
OLDEST = "triton==3.6.0"  # of pyproject.toml
EPILOGUES = ["", "masses"]  # variants of forward-tma
WIDE = ("backward", "sparse-dlogits", "sparse-dhidden", "sparse-dhidden-blocks", "skipped-mass", "kept-dlogits")


def is_tested(job: Job) -> bool:
    """Whether the tests compile it: nearly all for sm_90, and what needs most elsewhere."""
    variants = VARIANTS[job.kernel]
    if job.arch == 90 and job.dtype == "bf16":
        return job.kernel not in ("forward", "backward") or job.variant in (variants[0], variants[-1])
    if job.arch in (80, 100) and job.dtype == "bf16":
        return job.kernel in MATMULS and job.variant == variants[-1]
    most = variants[2] if job.arch == 86 else variants[-1]
    return job.kernel in ("forward", "backward") and job.arch in (80, 86, AMD) and job.variant == most


TESTED = [job for job in JOBS if is_tested(job)]


# Every kernel, for the chip that matters most, and the configuration that Triton's version decides on the other one
OLDEST_JOBS = [Job(k, 90, "bf16", VARIANTS[k][-1]) for k in VARIANTS if k != "forward"]
OLDEST_JOBS += [Job("forward-tma", 90, "bf16", "masses"), Job("forward", 80, "bf16", "bias masses kept low-rank")]
OLDEST_JOBS += [Job("backward", 90, "bf16", "")]


def compile_all(which: str = "--newest", packages: Path | None = None) -> Any:
    """Compile in another process: Triton's interpreter, once chosen, cannot be left; `packages` go before others."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if packages is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tests.kernels.test_aot", "--json", which]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def compilations(once: Any) -> dict[Job, Compiled]:
    return {Job(*job): Compiled(*compiled) for job, compiled in once("aot", compile_all)}


@pytest.fixture(scope="module")
def of_the_oldest(once: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Job, Compiled]:
    """What Triton 3.6 makes, the oldest that is supported; it is unpacked beside the one installed."""

    def unpacked() -> Any:
        folder = tmp_path_factory.mktemp("triton")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), OLDEST]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            return process.stderr[-500:] or "pip failed"
        try:
            return compile_all("--oldest", folder)
        finally:
            shutil.rmtree(folder)

    found = once("aot-oldest", unpacked)
    if isinstance(found, str):
        assert not os.environ.get("CI"), found
        pytest.skip(f"{OLDEST} cannot be had: {found}")
    return {Job(*job): Compiled(*compiled) for job, compiled in found}


@pytest.mark.slow
def test_the_table_of_the_kernels_says_what_the_compiler_made(compilations: dict[Job, Compiled]) -> None:
    """For the version of Triton that it names; another version needs other registers, but may not spill either."""
    import triton

    spec = importlib.util.spec_from_file_location("kernels_table", ROOT / "docs" / "kernels_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made, page = module.rows(compilations), module.PAGE.read_text()
    shown = page[page.index(module.START) + len(module.START) : page.index(module.END)]
    assert len(made) >= len(module.VARIANTS), "those of sm_90"
    assert all(row.partition(",")[0] in shown for row in made), "run python docs/kernels_table.py"
    if f"Triton {triton.__version__}," in shown:
        assert all(row in shown for row in made), "run python docs/kernels_table.py"


@pytest.mark.slow
def test_the_head_decides_by_what_was_compiled(compilations: dict[Job, Compiled]) -> None:
    """The times of the kernels on sm_90 are those that `benchmarks.studies.head_time_model` computes."""
    model = head_time_model
    kernels = {name: model.read(compilations[Job(kernel, 90, "bf16", v)]) for name, (kernel, v) in model.JOBS.items()}
    times = model.chip(kernels, model.HEADLINE)
    assert times == pytest.approx(sparsity.CHIPS[9, 0], rel=0.03), (
        "set it to what python -m benchmarks.studies.head_time_model prints"
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", EPILOGUES)
def test_the_epilogue_is_short(variant: str, compilations: dict[Job, Compiled]) -> None:
    """Nothing hides the forward's epilogue, so each instruction of it costs time."""
    *_, after = compilations[Job("forward-tma", 90, "bf16", variant)].loops
    assert 300 < after <= 750


@pytest.mark.slow
@pytest.mark.parametrize("job", OLDEST_JOBS, ids=lambda job: "-".join(map(str, job)).replace(" ", "-").strip("-"))
def test_default_configuration_fits_with_the_oldest_triton(job: Job, of_the_oldest: dict[Job, Compiled]) -> None:
    test_default_configuration_fits(job, of_the_oldest)


@pytest.mark.slow
@pytest.mark.parametrize("job", TESTED, ids=lambda job: "-".join(map(str, job)).replace(" ", "-").strip("-"))
def test_default_configuration_fits(job: Job, compilations: dict[Job, Compiled]) -> None:
    compiled = compilations[job]
    assert compiled.spilled == 0
    assert compiled.shared_bytes <= SHARED_KIB[job.arch] * 1024
    if job.dtype == "bf16" and job.kernel in MATMULS:
        assert TENSOR_CORE[job.arch] in compiled.instructions
    assert compiled.barriers == (job.kernel == "sparse-dhidden")
    aligned = not {"odd", "ragged"} & {*job.variant.split()}
    if job.arch != AMD and aligned and job.kernel not in ("row-lists", "dense-tiles"):  # of small numbers
        assert not [store for store in compiled.stores if store.endswith(("16", "u8", "b8"))], "2 bytes at a time"
    if job.kernel == "sparse-dhidden" and not job.variant and job.arch in (80, 90, 100) and job.dtype == "bf16":
        assert compiled.at_once >= sparse_dhidden.PROGRAMS
    if job.arch != AMD and aligned and job.kernel in WIDE and job.dtype == "bf16":
        assert compiled.stores == ["st.global.v4.b32"], "16 bytes at a time"
    assert ("cp.async.bulk.tensor" in compiled.instructions) == (job.kernel == "forward-tma")


def main() -> None:
    jobs = {"--oldest": OLDEST_JOBS, "--newest": TESTED}.get(sys.argv[-1], JOBS)
    importlib.import_module("triton.backends.compiler")  # before the fork, for all processes
    counted = {Job("forward-tma", 90, "bf16", variant) for variant in EPILOGUES}
    counted |= {Job(kernel, 90, "bf16", variant) for kernel, variant in head_time_model.JOBS.values()}
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        results = zip(jobs, pool.map(compile_kernel, jobs, [job in counted for job in jobs]), strict=True)
        if "--json" in sys.argv:
            json.dump(list(results), sys.stdout)
            return
        for job, compiled in results:
            launch = " ".join(map(str, compiled.launch.values()))
            sys.stdout.write(
                f"{job.kernel:14} {job.arch:3} {job.dtype} {job.variant:38} {launch:16}: "
                f"{compiled.registers:3} registers, {compiled.spilled} spilled, "
                f"{compiled.shared_bytes / 1024:3.0f} KiB shared, {' '.join(compiled.instructions)}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The default configurations, compiled ahead of time for chips this machine does not have.

A tile that does not fit the registers is spilled to memory and runs several times slower, silently; one that does not
fit shared memory does not run at all. `python -m tests.test_aot` prints what the compiler made of each.
"""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}  # what one program may use: CUDA C++ Programming Guide, table 24
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05"}
VARIANTS = {
    "forward": ["", "bias", "softcap", "stats", "bias softcap stats"],
    "backward": ["", "bias", "bias softcap"],
}


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    arch: int
    dtype: str
    variant: str


class Compiled(NamedTuple):
    """What came of it."""

    config: list[int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: list[str]


JOBS = [Job(k, arch, "bf16", v) for k in VARIANTS for arch, v in product((80, 90, 100), VARIANTS[k])]
JOBS += [Job(k, arch, "fp32", VARIANTS[k][-1]) for k, arch in product(VARIANTS, (80, 90, 100))]
JOBS += [Job(k, 80, "fp64", VARIANTS[k][-1]) for k in VARIANTS]
JOBS += [Job(k, 86, "bf16", VARIANTS[k][-1]) for k in VARIANTS]  # has no entry in the tables


def compile_kernel(job: Job) -> Compiled:
    """Compile for D and strides that are multiples of 16, and any N and V."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdpo.kernels import linear_logprobs_backward as backward
    from fastdpo.kernels import linear_logprobs_forward as forward

    if job.kernel == "forward":
        kernel = forward._linear_logprobs_forward_kernel
        configs = forward.STATS_CONFIGS if "stats" in job.variant else forward.CONFIGS
    else:
        kernel = backward._linear_logprobs_backward_kernel
        configs = backward.SOFTCAP_CONFIGS if "softcap" in job.variant else backward.CONFIGS
    itemsize = int(job.dtype[2:]) // 8
    config = configs.get((divmod(job.arch, 10), itemsize), forward.FALLBACK[itemsize])

    acc = "fp64" if job.dtype == "fp64" else "fp32"
    constants: dict[str, Any] = {
        "HAS_SOFTCAP": "softcap" in job.variant,
        "HAS_STATS": "stats" in job.variant,
        "ACC": getattr(tl, acc.replace("fp", "float")),
        "UPCAST": False,
        "GROUP_N": forward.GROUP_N,
        "stride_hd": 1,
        "stride_wd": 1,
    } | config._asdict()
    if "bias" not in job.variant:
        constants["bias_ptr"] = None
    inputs = dict.fromkeys(("dlogits_ptr", "hidden_ptr", "weight_ptr", "bias_ptr"), f"*{job.dtype}")
    types = inputs | {"targets_ptr": "*i64", "scale": "fp64", "cap": "fp64"}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, f"*{acc}" if name.endswith("_ptr") else "i32")
            if name.endswith("_ptr") or name == "D" or name.startswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]

    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constexprs, attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    spilled = re.findall(r"(\d+) bytes spill", log.getvalue())
    ptx = compiled.asm["ptx"]
    return Compiled(
        list(config), int(registers[0]), sum(map(int, spilled)), compiled.metadata.shared,
        [name for name in ("mma.sync", "wgmma", "tcgen05") if f"{name}." in ptx],
    )  # fmt: skip


@functools.cache
def compile_all() -> dict[Job, Compiled]:
    """Compile in another process: Triton's interpreter, once chosen, cannot be left."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_aot", "--json"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return {Job(*job): Compiled(*compiled) for job, compiled in json.loads(process.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job)).replace(" ", "-").strip("-"))
def test_default_configuration_fits(job: Job) -> None:
    compiled = compile_all()[job]
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= SHARED_KIB[job.arch] * 1024
    if job.dtype == "bf16":
        assert TENSOR_CORE[job.arch] in compiled.instructions


def main() -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = zip(JOBS, pool.map(compile_kernel, JOBS), strict=True)
        if "--json" in sys.argv:
            json.dump(list(results), sys.stdout)
            return
        for job, (config, registers, spilled, shared, _) in results:
            sys.stdout.write(
                f"{job.kernel:8} sm_{job.arch:<3} {job.dtype} {job.variant:18} {'x'.join(map(str, config[:3])):10} "
                f"{config[3]} warps {config[4]} stages: {registers:3} registers, {spilled} bytes spilled, "
                f"{shared / 1024:3.0f} KiB shared\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Compile the Triton kernels ahead of time, for chips this machine does not have: NVIDIA's and one of AMD's.

The tests check what comes of it, `docs/kernels_table.py` shows it, and `benchmarks.studies.head_time_model` computes
times from it.
"""

import contextlib
import importlib
import inspect
import io
import re
from itertools import product
from typing import Any, NamedTuple

from benchmarks.studies.sass import count_loops

AMD = 942  # MI300
# What one program may use: CUDA C++ Programming Guide, table 24; AMD's CDNA 3 instruction set, section 2.2
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99, AMD: 64}
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync", AMD: "mfma"}
FORWARD = [
    "",
    "stats",
    "bias masses low-rank",
    "bias softcap masses",
    "bias softcap stats masses low-rank",
]
# odd: sizes and strides are no multiples of 16; ragged: V is none. Of variants with one configuration, those that need
# fewer registers than another are left out
VARIANTS = {
    "forward": [*(v for v in FORWARD if v != "stats"), "odd bias softcap stats masses low-rank"],
    "forward-tma": [*FORWARD, "bias masses kept"],
    "backward": [
        "",
        "bias low-rank",
        "bias softcap low-rank",
        "bias softcap low-rank entropy",
        "odd bias softcap low-rank entropy",
    ],
    "sparse-dlogits": ["", "ragged bias low-rank", "bias softcap low-rank", "odd bias softcap low-rank"],
    "sparse-dhidden": ["", "ragged", "odd"],
    "sparse-dhidden-blocks": ["", "ragged", "odd"],
    "sparse-dweight": ["", "ragged bias", "bias before boost", "odd bias before boost"],
    "select-cells": [""],
    "row-lists": [""],
    "dense-tiles": [""],
    "skipped-mass": ["", "odd"],
    "cell-means": ["", "odd"],
    "fold-logits": ["masses", "odd softcap stats masses"],
    "dlogits-rows": ["", "odd softcap entropy"],
    "kept-dlogits": ["kept"],
}
SPARSE = ("sparse-dlogits", "sparse-dhidden", "sparse-dhidden-blocks", "sparse-dweight")
MODULES = {"sparse-dhidden-blocks": "sparse_dhidden", "dense-tiles": "row_lists"}
MODULES |= dict.fromkeys(("skipped-mass", "cell-means"), "row_lists")
MATMULS = ("forward", "forward-tma", "backward", *SPARSE)
GLUE = {
    "select-cells": {"BLOCK": 1024, "STEPS": 5},
    "row-lists": {"BLOCK_N": 256},
    "dense-tiles": {"BLOCK_J": 1024},
    "skipped-mass": {"BLOCK_J": 1024},
    "cell-means": {"BLOCK_V": 32, "BLOCK_D": 256},
}
POINTERS = [k for k in VARIANTS if k != "forward-tma"]


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    arch: int
    dtype: str
    variant: str


class Compiled(NamedTuple):
    """What came of it."""

    launch: dict[str, int]
    registers: int
    spilled: int
    shared_bytes: int
    instructions: list[str]
    barriers: int
    stores: list[str]
    loops: list[int]
    """`benchmarks.studies.sass.Loops` of a matmul on tensor cores; empty for others, or if not counted."""
    at_once: int


JOBS = [Job(k, arch, "bf16", v) for k in POINTERS for arch, v in product((80, 90, 100), VARIANTS[k])]
JOBS += [Job("forward-tma", arch, "bf16", v) for arch, v in product((90, 100), VARIANTS["forward-tma"])]
JOBS += [Job(k, arch, "fp32", VARIANTS[k][-1]) for k, arch in product(("forward", "backward"), (80, 90, 100))]
JOBS += [Job(k, 80, "fp32", v) for k in POINTERS[2:] for v in VARIANTS[k][1:]]
JOBS += [Job("forward", 80, "bf16", f"{v} bias masses kept low-rank") for v in ("", "odd stats")]
JOBS += [Job("forward", 80, "fp32", "bias masses kept"), Job("forward-tma", 90, "bf16", "bias stats masses kept")]
JOBS += [Job("forward-tma", 90, "bf16", "masses")]
JOBS += [Job(k, 80, "fp64", VARIANTS[k][-1]) for k in ("forward", "backward")]
# Has no entry in the tables
JOBS += [Job(k, 86, "bf16", v) for k in POINTERS[:3] for v in VARIANTS[k][1:3]]
JOBS += [Job(k, 86, "bf16", VARIANTS[k][1]) for k in SPARSE[1:]]
JOBS += [Job("forward-tma", 120, "bf16", v) for v in FORWARD[2:4]]
JOBS += [Job(k, AMD, "bf16", v) for k in POINTERS for v in VARIANTS[k]]


def compile_kernel(job: Job, counts_loops: bool = True) -> Compiled:
    """Compile for sizes and strides that are multiples of 16 where the kernel is specialised to it, or odd ones.

    To count the loops takes half a second, as long as a small kernel takes to compile.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdpo.head.impl import torch as torch_impl
    from fastdpo.kernels import kept_probs, logits_tile, row_lists
    from fastdpo.kernels import linear_logprobs_backward as backward

    forward: Any = importlib.import_module("fastdpo.kernels.linear_logprobs_forward")
    module: Any = None

    has = set(job.variant.split())
    vectors = "odd" not in has
    itemsize = int(job.dtype[2:]) // 8
    acc = "fp64" if job.dtype == "fp64" else "fp32"
    if job.kernel in ("forward", "forward-tma"):
        tma = job.kernel == "forward-tma"
        kernel = forward.linear_logprobs_forward_tma_kernel if tma else forward._linear_logprobs_forward_kernel
        epilogue = "stats" in has, {"softcap", "masses"} <= has, "low-rank" in has, "kept" in has
        configs, fallback = forward.default_configs(tma, vectors, *epilogue)
    elif job.kernel == "backward":
        kernel = backward._linear_logprobs_backward_kernel
        configs, fallback = backward.default_configs(vectors, "softcap" in has, "entropy" in has)
    elif job.kernel == "kept-dlogits":
        module = kept_probs
        kernel = kept_probs._kept_dlogits_kernel
    else:
        name = job.kernel.replace("-", "_")
        module = importlib.import_module(f"fastdpo.kernels.{MODULES.get(job.kernel, name)}")
        kernel = getattr(module, f"_{job.kernel.replace('-', '_')}_kernel")
    if job.kernel == "sparse-dlogits":
        configs, fallback = module.default_configs(vectors, "softcap" in has)
    elif job.kernel == "sparse-dhidden-blocks":
        configs, fallback = module.block_configs(vectors and "ragged" not in has)
    elif job.kernel == "sparse-dweight":
        configs, fallback = module.default_configs(vectors, bool(has & {"ragged", "bias"}))
    elif job.kernel in SPARSE:
        configs, fallback = module.default_configs(vectors)
    if job.kernel in MATMULS:
        launch = configs.get((divmod(job.arch, 10), itemsize), fallback[itemsize])._asdict()
    elif job.kernel in GLUE:
        launch = GLUE[job.kernel] | {"num_warps": 4}
    else:
        launch = {"BLOCK": module.BLOCK, "T": torch_impl.CELL, "num_warps": 8}

    constants: dict[str, Any] = {
        "HAS_SOFTCAP": "softcap" in has,
        "IS_NEGATIVE": False,
        "HAS_STATS": "stats" in has,
        "ACC": getattr(tl, acc.replace("fp", "float")),
        "UPCAST": False,
        "TILE": forward.TILE,
        "LIST_BLOCK": row_lists.BLOCK_N,
        "GROUP_N": logits_tile.GROUP_N,
        "stride_hd": 1,
        "stride_wd": 1,
    } | launch
    optional = {
        "bias": ["bias", "dbias", "bias_spread"],
        "before": ["before", "bias_before"],
        "boost": ["boost"],
        "masses": ["masses"],
        "kept": ["probs", "factors"],
        "low-rank": ["hidden2", "weight2"],
        "entropy": ["dentropy", "entropy"],
        "stats": ["sum_dz", "sum_sq", "sum_z", "top_before"],
    }
    missing = [name for option, names in optional.items() if option not in has for name in names]
    constants |= {f"{name}_{kind}": None for name in missing for kind in ("ptr", "desc")}
    inputs: tuple[str, ...] = ("dlogits", "e", "hidden", "weight", "bias", "hidden2", "weight2")
    inputs += ("shares", "skipped", "means", "dweight")
    types = dict.fromkeys((f"{name}_ptr" for name in inputs), f"*{job.dtype}") | {
        "targets_ptr": "*i64",
        "masses_ptr": "*fp32",
    }
    types |= {"probs_ptr": "*i16" if itemsize == 2 else f"*{job.dtype}"}
    types |= dict.fromkeys(("rows_ptr", "counts_ptr", "bounds_ptr", "order_ptr", "starts_ptr"), "*i32")
    types |= {"dense_ptr": "*i8", "tiles_ptr": "*i16"} | ({} if job.kernel == "select-cells" else {"active_ptr": "*i8"})
    types |= dict.fromkeys(("scale", "cap", "c", "beta", "factor"), "fp64")
    types |= dict.fromkeys(("row", "cell", "full"), "fp32")
    if job.kernel == "forward-tma":
        for name, rows in (("hidden_desc", "BLOCK_N"), ("weight_desc", "BLOCK_V")):
            types[name] = f"tensordesc<{job.dtype}[{launch[rows]}, {launch['BLOCK_D']}]>"
        types["probs_desc"] = f"tensordesc<i16[{launch['BLOCK_N']}, {launch['BLOCK_V']}]>"
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, f"*{acc}" if name.endswith("_ptr") else "i32")
            multiple = name == "R" or (vectors and (name in ("D", "first") or name.startswith("stride")))
            multiple |= name in ("V", "C", "columns") and not has & {"odd", "ragged"}
            if name.endswith("_ptr") or (multiple and not kernel.params[i].do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]

    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    options = {k: launch[k] for k in ("num_warps", "num_stages") if k in launch} | {"enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = GPUTarget("hip", f"gfx{AMD}", 64) if job.arch == AMD else GPUTarget("cuda", job.arch, 32)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=options)
    if job.arch == AMD:
        assembly, barrier = compiled.asm["amdgcn"], r"(s_waitcnt.*\n\s*)*s_barrier"
        registers = re.findall(r"\.vgpr_count: +(\d+)", assembly)
        spilled = re.findall(r"\.vgpr_spill_count: +(\d+)", assembly)  # 4 bytes each; scalars go to vector registers
        instructions = {"mfma": "v_mfma_"}
    else:
        assembly, barrier = compiled.asm["ptx"], r"bar\.sync"
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        spilled = re.findall(r"(\d+) bytes spill", log.getvalue())
        instructions = {name: f"{name}." for name in ("mma.sync", "wgmma", "tcgen05", "cp.async.bulk.tensor")}
    loops = []
    if counts_loops and job.arch in (80, 90, 100) and TENSOR_CORE[job.arch] in assembly:
        loops = list(count_loops(compiled.asm["cubin"]) or ())
    lines, start = inspect.getsourcelines(kernel.fn)
    barriers = [i for i, line in enumerate(lines, start) if "tl.debug_barrier()" in line]
    return Compiled(
        launch, int(registers[0]), sum(map(int, spilled)), compiled.metadata.shared,
        [name for name, text in instructions.items() if text in assembly],
        sum(bool(re.search(rf"\.loc\s+1 {line} .*\n\s*{barrier}", assembly)) for line in barriers),
        sorted(set(re.findall(r"\bst\.global\S*", assembly))), loops,
        at_once(int(registers[0]), compiled.metadata.shared, launch["num_warps"], job.arch),
    )  # fmt: skip


def at_once(registers: int, shared_bytes: int, warps: int, arch: int) -> int:
    """Count the programs that a multiprocessor has room for: CUDA C++ Programming Guide, table 24.

    It has 65,536 registers, given to a warp by 256, and its shared memory; a program takes 1 KiB more than it asks for.
    """
    by_registers = 65536 // (-(-32 * registers // 256) * 256 * warps)
    return min(by_registers, (SHARED_KIB[arch] + 1) * 1024 // (shared_bytes + 1024), 64 // warps)

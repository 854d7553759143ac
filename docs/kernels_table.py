"""Write the table of docs/kernels.md: python docs/kernels_table.py.

Each kernel's default configuration is compiled for three chips; no GPU is needed.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

PAGE = Path(__file__).with_name("kernels.md")
START, END = "<!-- python docs/kernels_table.py writes the table -->\n", "<!-- up to here -->\n"
VARIANTS = {
    "forward": "",
    "forward-tma": "",
    "forward-tma kept": "bias masses kept",
    "backward": "",
    "kept-dlogits": "kept",
    "sparse-dlogits": "",
    "sparse-dhidden": "",
    "sparse-dhidden-blocks": "",
    "sparse-dweight": "",
    "select-cells": "",
    "row-lists": "",
    "dense-tiles": "",
    "skipped-mass": "",
    "cell-means": "",
    "fold-logits": "masses",
    "dlogits-rows": "",
}
CHIPS = (80, 90, 100)


def jobs() -> list[Any]:
    """Return what is compiled, without what no chip runs: TMA before sm_90."""
    from benchmarks.studies.ahead_of_time import JOBS, Job

    wanted = [Job(name.split()[0], chip, "bf16", v) for name, v in VARIANTS.items() for chip in CHIPS]
    return [job for job in wanted if job in JOBS]


def rows(compiled: dict[Any, Any]) -> list[str]:
    """Return the rows of those jobs that are among `benchmarks.studies.ahead_of_time.Compiled` by job."""
    lines = []
    for job in jobs():
        if (made := compiled.get(job)) is None:
            continue
        tile = "x".join(str(size) for name, size in made.launch.items() if name.startswith("BLOCK"))
        name = job.kernel + (", keeping" if job.variant.endswith("masses kept") else "")
        numbers = made.registers, made.spilled, round(made.shared_bytes / 1024), made.at_once
        cells = f"`{name}`", f"sm_{job.arch}", f"{tile}, {made.launch['num_warps']}", *map(str, numbers)
        lines.append("| " + " | ".join(cells) + " |\n")
    return lines


def table(compiled: dict[Any, Any]) -> str:
    """Return the whole table, with the version of Triton that made it."""
    import triton

    names = ("kernel", "chip", "tile and warps", "registers", "spilled bytes", "shared KiB", "programs per SM")
    head = "| " + " | ".join(names) + " |\n" + "| " + " | ".join(["---"] * len(names)) + " |\n"
    return f"Triton {triton.__version__}, bfloat16:\n\n{head}{''.join(rows(compiled))}"


def write() -> None:
    """Replace the table of the page."""
    from benchmarks.studies.ahead_of_time import compile_kernel
    from fastdpo.benchmarks.report import replace

    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = dict(zip(jobs(), pool.map(compile_kernel, jobs()), strict=True))
    replace(PAGE, START, END, table(found))


if __name__ == "__main__":
    write()

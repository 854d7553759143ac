"""What one tile of a matmul kernel costs, counted in its machine code, as Triton's nvdisasm prints it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SKIPPED = 150
"""The rare branch, of tiles that hold a target or the vocabulary's end, has more instructions than this."""


class Loops(NamedTuple):
    """Instructions that a warp issues."""

    step: int
    """In one step of the loop over the hidden size."""
    before: int
    """For a tile, before that loop."""
    after: int
    """For a tile, after that loop: the epilogue, with the rare branch left out."""


def count_loops(cubin: bytes) -> Loops:
    """Count the instructions of the innermost loop with a matmul, and of what follows it until the next tile."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()
    code, labels = [], {}
    for line in lines:
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    jumps = {k: labels[to[1]] for k, text in enumerate(code) if (to := re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", text))}
    matmuls = [k for k, text in enumerate(code) if re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", text)]
    around = [(start, k) for k, start in jumps.items() if start <= min(matmuls) and k >= max(matmuls)]
    around = sorted(around, key=lambda loop: loop[1] - loop[0])
    start, end = around[0]
    step = sum("NOP" not in text for text in code[start : end + 1])
    first, last = next(((a, b) for a, b in around if a < start and b > end), (0, len(code) - 1))
    after, k, skipped = 0, end + 1, False
    while k <= last:
        after += "NOP" not in code[k]
        to = jumps.get(k, k)
        if not skipped and code[k].startswith("@") and to - k > SKIPPED and to <= last:
            skipped, k = True, to
        else:
            k += 1
    return Loops(step, start - first, after)

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


def count_loops(cubin: bytes) -> Loops | None:
    """Count the instructions of the innermost loop with most matmuls, and of what follows it until the next tile.

    None for a kernel whose matmuls are in no loop.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    jumps = {k: labels[to[1]] for k, text in enumerate(code) if (to := re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", text))}
    matmuls = [k for k, text in enumerate(code) if re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", text)]
    loops = [(start, k) for k, start in jumps.items() if any(start <= at <= k for at in matmuls)]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (a, b) != (c, d))]
    if not inner:
        return None
    # A matmul may stand outside, of a step that the compiler has peeled off
    start, end = max(inner, key=lambda loop: sum(loop[0] <= at <= loop[1] for at in matmuls))
    around = sorted((loop for loop in loops if loop[0] <= start and end <= loop[1]), key=lambda loop: loop[1] - loop[0])
    step = sum("NOP" not in text for text in code[start : end + 1])
    first, last = next(((a, b) for a, b in around if a < start and b > end), (0, len(code) - 1))
    after, k, skipped = 0, end + 1, False
    while k <= last:
        after += "NOP" not in code[k]
        target = jumps.get(k, k)
        if not skipped and code[k].startswith("@") and target - k > SKIPPED and target <= last:
            skipped, k = True, target
        else:
            k += 1
    return Loops(step, start - first, after)

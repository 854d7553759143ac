"""Tables of docs/benchmarks.md about whole training steps, from the measurements in benchmarks/results/."""

import json
from pathlib import Path
from typing import Any

from fastdpo.benchmarks.report import LENGTHS, machine
from fastdpo.benchmarks.training import PHASES
from fastdpo.benchmarks.training_cases import VARIANTS

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "cpu-2-cores"
RESULT = ("ms", "min_ms", "times_ms", "ratio_to_trl", "pairs_per_second", "tokens_per_second", "peak_mib")
RESULT += ("split_ms", "loss", "grad_norm", "provenance")


def ratios() -> str:
    """Return how many times as fast as TRL each variant is, by lengths."""
    rows = {(row["lengths"], row["impl"]): row for row in newest("training.jsonl")}
    columns = [name for name in LENGTHS if (name, "fastdpo") in rows]
    lines = [("variant", *(LENGTHS[name] for name in columns))]
    for impl in VARIANTS:
        found = [rows.get((name, impl)) for name in columns]
        if any(found):
            lines.append((impl, *(f"{1 / row['ratio_to_trl']:.2f}" if row else "" for row in found)))
    return markdown(lines)


def splits() -> str:
    """Return where the time of a step goes, of fastdpo and of TRL, by lengths."""
    rows = {(row["lengths"], row["impl"]): row for row in newest("training.jsonl")}
    lines = [("lengths like", "", *(f"{phase}, ms" for phase in PHASES))]
    for name, title in LENGTHS.items():
        for impl in ("fastdpo", "TRL"):
            if row := rows.get((name, impl)):
                lines.append((title, impl, *(f"{row['split_ms'][phase]:.0f}" for phase in PHASES)))
    return markdown(lines)


def real_model() -> str:
    """Return the steps of a real model on real pairs."""
    if not (RESULTS / "smollm2.jsonl").exists():
        return "Not measured on this machine yet.\n"
    head = ("pairs", "trained", "variant", "seconds per step", "times TRL", "memory, MiB", *PHASES, "loss of step 2")
    lines, rows = [head], newest("smollm2.jsonl")
    for row in rows:
        data = {"natural": "cut at 384 tokens", "full": "all rows of 384 tokens"}[row["lengths"]]
        lines.append(
            (
                *(data, f"LoRA, r={row['lora_r']}" if "lora_r" in row else "all weights", row["impl"]),
                *(f"{row['ms'] / 1e3 / row['steps']:.1f}", f"{1 / row['ratio_to_trl']:.2f}", f"{row['peak_mib']:.0f}"),
                *(f"{row['split_ms'][phase] / 1e3:.1f}" for phase in PHASES),
                f"{row['loss']:.5f}",
            )
        )
    return f"{markdown(lines)}\n{machine(rows)}\n"


def newest(name: str) -> list[dict[str, Any]]:
    """Return the measurements of one file, of each variant of a case the newest."""
    found = {}
    for line in (RESULTS / name).read_text().splitlines():
        row = json.loads(line)
        found[json.dumps({key: value for key, value in row.items() if key not in RESULT})] = row
    return list(found.values())


def markdown(lines: list[tuple[str, ...]]) -> str:
    """Return a table, whose first line is its head."""
    head, *rows = lines
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ("---",) * len(head), *rows))

"""Tables and pictures of README and docs/benchmarks.md, drawn from the measurements in benchmarks/results/.

    python -m fastdpo.benchmarks.report

draws the pictures; `python -m docs.tables` writes the tables. Neither measures anything.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
PICTURE = ROOT / "docs" / "figures" / "step.png"
LENGTHS = {"ultrafeedback": "UltraFeedback", "hh": "HH", "tldr": "TL;DR"}
HEADS = {"fastdpo torch, auto": "**fastdpo**", "TRL": "TRL 1.16", "PyTorch": "PyTorch with `[N, V]` logits"}
"""The variants of the head that are shown; of float32, whose `auto` is exact, the exact one."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the measurements of one file, of each variant the newest."""
    newest = {}
    for line in (RESULTS / name).read_text().splitlines():
        row = json.loads(line)
        newest[json.dumps([row.get(key) for key in ("impl", "lengths", "shape", "dtype", "frozen", "flat")])] = row
    return list(newest.values())


def machine(rows: list[dict[str, Any]]) -> str:
    """Return where and when measurements were made, in a sentence."""
    facts = [row["provenance"] for row in rows]
    dates = sorted({fact["date"] for fact in facts})
    versions = f"PyTorch {facts[0]['torch']}, TRL {facts[0]['trl']}"
    return f"Measured on {facts[0]['machine']}, with {versions}, {' and '.join(dict.fromkeys((dates[0], dates[-1])))}."


def steps() -> str:
    """Return the table of whole training steps beside TRL, in Markdown."""
    rows = {(row["lengths"], row["impl"]): row for row in rows_of("training.jsonl")}
    lines = [
        "| lengths like | pairs per second | TRL's | ratio | peak memory, MiB | TRL's |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in LENGTHS.items():
        ours, theirs = rows[key, "fastdpo"], rows[key, "TRL"]
        speeds = (ours["pairs_per_second"], theirs["pairs_per_second"])
        lines.append(
            f"| {name} | {speeds[0]:.2f} | {speeds[1]:.2f} | **{1 / ours['ratio_to_trl']:.1f}** "
            f"| {ours['peak_mib']:.0f} | {theirs['peak_mib']:.0f} |"
        )
    return "\n".join([*lines, "", machine(list(rows.values())), ""])


def levers() -> str:
    """Return the table of steps with one lever of fastdpo switched off at a time, in Markdown."""
    rows = [row for row in rows_of("training.jsonl") if row["lengths"] == "hh"]
    lines = ["| variant | pairs per second | peak memory, MiB | loss |", "|---|---|---|---|"]
    lines += [f"| {r['impl']} | {r['pairs_per_second']:.2f} | {r['peak_mib']:.0f} | {r['loss']:.6f} |" for r in rows]
    return "\n".join([*lines, ""])


def head() -> str:
    """Return the table of the head alone, forward and backward, in Markdown."""
    rows = [row for row in rows_of("head.jsonl") if not row["flat"]]
    lines = [
        "| inputs | head | | time, ratio to TRL | peak memory, MiB | error of log-probs, nats "
        "| relative error of gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in ("bfloat16", "float32"):
        for frozen in (True, False):
            ours = "fastdpo torch, auto" if dtype == "bfloat16" else "fastdpo torch, exact"
            for impl in (ours, "TRL", "PyTorch"):
                row = next(r for r in rows if (r["impl"], r["dtype"], r["frozen"]) == (impl, dtype, frozen))
                logps, *gradients = (error for error in row["errors"].values() if error is not None)
                errors = f"{_short(logps)} | {_short(max(gradients), 1)}"
                lines.append(
                    f"| {dtype} | {'frozen' if frozen else 'trained'} | {HEADS.get(impl, '**fastdpo**')} "
                    f"| {row['ratio_to_trl']:.2f} | {row['peak_mib']:.0f} | {errors} |"
                )
    return "\n".join([*lines, "", machine(rows), ""])


def _short(number: float, digits: int = 0) -> str:
    mantissa, exponent = f"{number:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def draw(path: Path) -> None:
    """Draw time and memory of a training step beside TRL's, as bars."""
    from matplotlib.figure import Figure

    rows = {(row["lengths"], row["impl"]): row for row in rows_of("training.jsonl")}
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (title, value) in zip(
        panels,
        (
            ("Seconds per training step (4 pairs)", lambda row: row["ms"] / 1000 / row["steps"]),
            ("Memory beyond the weights, GiB", lambda row: row["peak_mib"] / 1024),
        ),
        strict=True,
    ):
        for shift, (impl, colour) in enumerate((("TRL", "#b8bcc4"), ("fastdpo", "#2563eb"))):
            values = [value(rows[key, impl]) for key in LENGTHS]
            places = [place + 0.38 * shift for place in range(len(LENGTHS))]
            label = "TRL 1.16" if impl == "TRL" else impl
            bars = panel.barh(places, values, 0.36, color=colour, label=label)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.set_yticks([place + 0.19 for place in range(len(LENGTHS))], list(LENGTHS.values()))
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
        panel.margins(x=0.12)
        panel.invert_yaxis()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside right center", reverse=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    draw(PICTURE)

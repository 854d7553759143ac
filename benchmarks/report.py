"""Tables and pictures of what the benchmarks have measured. Nothing is measured here.

    fastdpo bench report                                        # of this machine's results
    fastdpo bench report benchmarks/results/cpu-2-cores --docs  # renews README and docs/ of a clone

Without --docs, report.md and its pictures are written beside the results, and the tables are printed too.
"""

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo.benchmarks import harness
from fastdpo.benchmarks.harness import ROOT, Parser, results_folder

RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
"""The results that README and docs/ show."""
LENGTHS = {
    "ultrafeedback": "UltraFeedback",
    "hh": "HH",
    "tldr": "TL;DR",
    "helpsteer": "HelpSteer",
    "metamath": "MetaMath",
    "shp": "SHP",
}
SETTINGS = {
    "model": "{}",
    "dtype": "{}",
    "pairs_per_device": "{} pairs a step",
    "tokens_per_batch": "{} tokens a batch",
    "pairs_per_prompt": "{} pairs of a prompt",
    "responses": "{} responses",
    "max_length": "at most {} tokens",
    "lora_r": "LoRA of rank {}",
    "gradient_checkpointing": "checkpointing: {}",
    "steps": "{} steps timed",
    "machine": "{}",
}
"""What else a training step depends on, and how a table says it."""
KEYS = ("impl", "lengths", "shape", "frozen", "inputs", *SETTINGS)


def rows_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the measurements of one file, of each variant the newest."""
    rows = [row | {"machine": row["provenance"]["machine"]} for row in harness.rows_of(folder / name)]
    newest = {json.dumps([row.get(key) for key in KEYS]): row for row in rows}
    return [row for row in newest.values() if "fatal" not in row]


def replace(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        ValueError: the page lacks one of them.
    """
    before, _, rest = page.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no {start.strip()} that is followed by {end.strip()}")
    page.write_text(before + start + text + end + after)


def machine(rows: list[dict[str, Any]]) -> str:
    """Return where and when measurements were made, in a sentence."""
    facts = [row["provenance"] for row in rows]
    dates = sorted({fact["date"] for fact in facts})
    machines = " and ".join(dict.fromkeys(fact["machine"] for fact in facts))
    versions = f"PyTorch {facts[0]['torch']}" + (f", TRL {facts[0]['trl']}" if facts[0]["trl"] != "none" else "")
    clock = " Times are those of the CPU." if any("time" in fact for fact in facts) else ""
    return f"Measured on {machines}, with {versions}, {' and '.join(dict.fromkeys((dates[0], dates[-1])))}.{clock}"


def step_cases(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the measurements of training steps by case and variant.

    A case is named by its lengths, and by each setting that is not the same in all cases.
    """
    rows = rows_of("training.jsonl", folder)
    order = list(LENGTHS)
    rows.sort(key=lambda row: order.index(row["lengths"]) if row["lengths"] in order else len(order))
    differ = [key for key in SETTINGS if len({row.get(key) for row in rows}) > 1]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        told = [SETTINGS[key].format(row[key]) for key in differ if row.get(key) is not None]
        found.setdefault(", ".join([LENGTHS.get(row["lengths"], row["lengths"]), *told]), {})[row["impl"]] = row
    return found


def steps(folder: Path = RESULTS) -> str:
    """Return the table of whole training steps beside TRL, in Markdown."""
    found = step_cases(folder)
    lines = [
        "| lengths like | pairs per second | TRL's | ratio | peak memory, MiB | TRL's | difference of losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        if (ours := rows.get("fastdpo")) is None:
            continue
        cells = [name, f"{ours['pairs_per_second']:.2f}", "-", "-", f"{ours['peak_mib']:.0f}", "-", "-"]
        if theirs := rows.get("TRL"):
            cells[2:4] = f"{theirs['pairs_per_second']:.2f}", f"**{_times_trl(ours, theirs):.1f}**"
            cells[5:7] = f"{theirs['peak_mib']:.0f}", _short(abs(ours["loss"] - theirs["loss"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine([row for rows in found.values() for row in rows.values()]), ""])


def _times_trl(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the ratio that was measured in turns, or that of the speeds if the two were not measured in one call."""
    if ours["ratio_to_trl"] is None:
        return float(ours["pairs_per_second"] / theirs["pairs_per_second"])
    return 1 / float(ours["ratio_to_trl"])


def most_variants(folder: Path) -> str:
    """Return the name of the case of which most variants were measured; HH's if several have as many."""
    found = step_cases(folder)
    return max(found, key=lambda name: (len(found[name]), name.startswith(LENGTHS["hh"])))


def levers(folder: Path = RESULTS) -> str:
    """Return the table of steps with one lever of fastdpo switched off at a time, in Markdown."""
    rows = step_cases(folder)[most_variants(folder)].values()
    lines = ["| variant | pairs per second | peak memory, MiB | loss |", "|---|---|---|---|"]
    lines += [f"| {r['impl']} | {r['pairs_per_second']:.2f} | {r['peak_mib']:.0f} | {r['loss']:.6f} |" for r in rows]
    return "\n".join([*lines, ""])


def head(folder: Path = RESULTS) -> str:
    """Return the table of the head alone beside TRL's and plain PyTorch, a line for each case, in Markdown."""
    lines = [
        "| shape | rows | inputs | head | time, ratio to TRL | spread | peak memory, MiB | error of log-probs, nats "
        "| relative error of gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = cases(folder)
    for (shape, dtype, frozen, inputs), rows in found.items():
        ours = fastest(rows)
        if ours is None:
            continue
        beside = [ours, *(rows.get(name, {}) for name in ("TRL", "PyTorch"))]
        time, *rest = (" / ".join(map(value, beside)) for value in (_ratio, _memory, _logps, _gradients))
        cells = (shape, inputs, dtype, "frozen" if frozen else "trained", time, f"{ours['spread']:.0%}", *rest)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine([row for rows in found.values() for row in rows.values()]), ""])


def peers(folder: Path = RESULTS) -> str:
    """Return the table of all variants on the first case and, if there is one, its counterpart, in Markdown."""
    found = cases(folder)
    (shape, dtype, _, inputs), *_ = found
    kinds = {kind: found.get((shape, dtype, kind == "frozen", inputs), {}) for kind in ("frozen", "trained")}
    names = list(dict.fromkeys(name for rows in kinds.values() for name in rows))
    lines = [
        "| head | "
        + " | ".join(f"{kind}: time, ratio to TRL | spread | peak memory, MiB" for kind in kinds)
        + " | error of log-probs, nats | relative error of gradients |",
        "|---|" + "---|---|---|" * 2 + "---|---|",
    ]
    reasons = []
    for name in names:
        rows = [kinds[kind].get(name, {}) for kind in kinds]
        if why := next((row["left_out"] for row in rows if "left_out" in row), None):
            reasons.append(f"| {name} | {why} |" + " |" * 7)
            continue
        costs = " | ".join(map(_costs, rows))
        row = next(row for row in reversed(rows) if row)
        lines.append(f"| {_bold(name)} | {costs} | {_logps(row)} | {_gradients(row)} |")
    rows = [row for kind in kinds.values() for row in kind.values()]
    return "\n".join([f"{shape}, {dtype}, {inputs} rows.", "", *lines, *reasons, "", machine(rows), ""])


Key = tuple[str, str, bool, str]
"""Shape, dtype, whether the head is frozen, and the kind of rows."""


def cases(folder: Path) -> dict[Key, dict[str, dict[str, Any]]]:
    """Return the measurements of the head by case and variant."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    rows = rows_of("head.jsonl", folder)
    several = len({row["machine"] for row in rows}) > 1
    for row in rows:
        shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
        shape += f", {row['machine']}" * several
        key = (f"{row['model']}: {shape}" if row["model"] else shape, row["dtype"], row["frozen"], row["inputs"])
        found.setdefault(key, {})[row["impl"]] = row
    return found


def fastest(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return fastdpo's fastest variant, of those that the trainer chooses among by default."""
    ours = [row for row in rows.values() if "ms" in row and row["backward"] in ("exact", "auto")]
    return min(ours, key=lambda row: float(row["ms"]), default=None)


def _costs(row: dict[str, Any]) -> str:
    return f"{_ratio(row)} | {row['spread']:.0%} | {_memory(row)}" if row else "- | - | -"


def _ratio(row: dict[str, Any]) -> str:
    """Return the time in proportion to TRL's; in milliseconds if TRL was not measured."""
    if row.get("ratio_to_trl") is not None:
        return f"{row['ratio_to_trl']:.2f}"
    return f"{row['ms']:.3g} ms" if "ms" in row else "-"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-"


def _logps(row: dict[str, Any]) -> str:
    error = row.get("errors", {}).get("logps")
    return "-" if error is None else _short(error)


def _gradients(row: dict[str, Any]) -> str:
    errors = row.get("errors", {})
    return _short(max(errors[name] or 0.0 for name in ("dhidden", "dweight")), 1) if errors else "-"


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith("fastdpo") else name


def _short(number: float, digits: int = 0) -> str:
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def draw_steps(path: Path, folder: Path = RESULTS) -> None:
    """Draw time and memory of a training step beside TRL's, as bars."""
    from matplotlib.figure import Figure

    found = {name: rows for name, rows in step_cases(folder).items() if "fastdpo" in rows}
    ours = [rows["fastdpo"] for rows in found.values()]
    pairs = {row.get("pairs_per_device") for row in ours}
    trl = next((rows["TRL"]["provenance"]["trl"] for rows in found.values() if "TRL" in rows), None)
    names = [textwrap.fill(name, 24) for name in found]
    lines = sum(max(3, name.count("\n") + 1) for name in names)
    figure = Figure(figsize=(8.5, 0.8 + 0.2 * max(lines, 3)), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (title, value) in zip(
        panels,
        (
            (
                f"Seconds per training step ({pairs.pop()} pairs)" if len(pairs) == 1 else "Seconds per training step",
                lambda row: row["ms"] / 1000 / row["steps"],
            ),
            ("Memory beyond the weights, GiB", lambda row: row["peak_mib"] / 1024),
        ),
        strict=True,
    ):
        for shift, (impl, colour) in enumerate((("TRL", "#b8bcc4"), ("fastdpo", "#2563eb"))):
            values = [value(rows[impl]) if impl in rows else math.nan for rows in found.values()]
            places = [place + 0.38 * shift for place in range(len(found))]
            label = "TRL " + ".".join(trl.split(".")[:2]) if impl == "TRL" and trl else impl
            bars = panel.barh(places, values, 0.36, color=colour, label=label)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.set_yticks([place + 0.19 for place in range(len(names))], names)
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
        panel.margins(x=0.12)
        panel.invert_yaxis()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside right center", reverse=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_head(path: Path, folder: Path = RESULTS) -> None:
    """Draw time, memory and error of all variants on the first case whose head is trained, as bars."""
    from matplotlib.figure import Figure

    found = cases(folder)
    key = next((key for key in found if not key[2]), next(iter(found)))
    rows = {name: row for name, row in found[key].items() if "ms" in row}
    figure = Figure(figsize=(8.5, 0.6 + 0.24 * len(rows)), layout="constrained")
    panels = (
        ("Milliseconds", "%.0f", [row["ms"] for row in rows.values()]),
        ("Peak memory, MiB", "%.0f", [row["peak_mib"] for row in rows.values()]),
        ("Error of gradients", "%.0e", [float(_gradients(row)) for row in rows.values()]),
    )
    for panel, (title, form, values) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        colours = ["#2563eb" if name.startswith("fastdpo") else "#b8bcc4" for name in rows]
        panel.bar_label(panel.barh(list(rows), values, color=colours), fmt=form, padding=3, fontsize=8)
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.set_xticks([])
        panel.margins(x=0.25)
    panel.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _levers_of(folder: Path) -> str:
    return f"Lengths like {most_variants(folder)}.\n\n{levers(folder)}"


def _head_of(folder: Path) -> str:
    return f"Numbers with slashes between them are those of fastdpo / TRL / plain PyTorch.\n\n{head(folder)}"


Part = tuple[str, dict[str, Callable[[Path], str]], dict[str, Callable[[Path, Path], None]]]
PARTS: dict[str, Part] = {
    "training.jsonl": (
        "Whole training steps",
        {"Beside TRL": steps, "One part of fastdpo switched off at a time": _levers_of},
        {"step.png": draw_steps},
    ),
    "head.jsonl": (
        "The head alone, forward and backward",
        {"Beside TRL": _head_of, "Beside all peers": peers},
        {"head.png": draw_head},
    ),
}
"""For each file of results: its title, its tables and its pictures."""


def report(folder: Path, pictures: Path) -> str:
    """Draw the pictures of a folder of results, and return its tables in Markdown.

    Raises:
        ValueError: the folder has no results.
    """
    lines = ["# Benchmarks", ""]
    for file, (title, tables, drawings) in PARTS.items():
        if not any("ms" in row for row in rows_of(file, folder)):
            continue
        lines += [f"## {title}", ""]
        for picture, draw in drawings.items():
            draw(pictures / picture, folder)
            lines += [f"![{title}]({picture})", ""]
        for name, table in tables.items():
            lines += [f"### {name}", "", table(folder)]
    if len(lines) == 2:
        raise ValueError(f"{str(folder)!r} has no results; measure first: fastdpo bench head or fastdpo bench training")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run `fastdpo bench report` with the words behind it.

    Raises:
        ValueError: the folder has no results, or this is no clone of the repository, whose docs/ could be renewed.
    """
    parser = Parser("report", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="Folder of results (default: this machine's).")
    parser.add_argument("--docs", action="store_true", help="Renew README and docs/ of this clone from its results.")
    args = parser.parse(sys.argv[1:] if argv is None else argv)
    folder = args.folder or (RESULTS if args.docs else results_folder())
    if args.docs:
        if folder.resolve() != RESULTS or not (ROOT / "docs" / "tables.py").exists():
            raise ValueError(f"--docs renews the pages of a clone from {RESULTS}, not from {str(folder)!r}")
        report(RESULTS, ROOT / "docs" / "figures")
        subprocess.run([sys.executable, "-m", "docs.tables"], cwd=ROOT, check=True)
        print("renewed: README.md, docs/benchmarks.md, docs/figures/")
        return
    text = report(folder, folder)
    (folder / "report.md").write_text(text)
    print(f"{text}\nreport: {folder / 'report.md'}")

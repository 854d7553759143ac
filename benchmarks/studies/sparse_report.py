"""Make the tables and figures of docs/sparse_backward.md from its data. Only means and ratios are computed here."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdpo.head.impl.sparsity import MAX_ROW_MASS
from fastdpo.report.plots import BLUE, GREEN, GREY, GRID, VERMILION

Study = dict[str, Any]
COLOURS = {"exact": BLUE, "noise": GREY, "auto": GREEN, "sparse": VERMILION}


def fill(document: str, study: Study) -> str:
    """Write every table between its markers in the document, `<!-- name -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        found = re.search(f"<!-- {name} -->\n(.*?)<!-- end -->", document, re.DOTALL)
        if not found:
            raise ValueError(f"the document must have the marker <!-- {name} -->")
        document = document[: found.start(1)] + table(study) + "\n" + document[found.end(1) :]
    return document


def markdown(headers: str, rows: list[list[str]]) -> str:
    titles = headers.split(" | ")
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _machine(study: Study) -> str:
    where = study["provenance"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "numpy", "transformers", "tokenizers"))
    return f"{where['machine']}; {versions}; commit {where['commit']}, {where['date']}."


def _name(row: dict[str, Any]) -> str:
    return f"{row['kind']}, T = {row['tile']}"


def _swept(study: Study) -> list[dict[str, Any]]:
    """Return the rows of the sweep that have the shipped limit and skip something."""
    return [row for row in study["cells"] if row["limit"] == MAX_ROW_MASS and row["density"] < 1]


def _cells(study: Study) -> str:
    rows = []
    for row in _swept(study):
        both = row["conserved"], row["dropped"]
        rows.append([
            _name(row), percent(row["density"]),
            *(f"{scheme[name]:.1e}" for name in ("dhidden", "dweight") for scheme in both),
            f"{row['predicted']['sum']['all']:.2f}",
        ])  # fmt: skip
    return markdown(
        "rows, tile | cells computed | dhidden, conserved | dropped | dweight, conserved | dropped | error / bound",
        rows,
    )


def _rules(study: Study) -> str:
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in study["rules"]):
        some = [row for row in study["rules"] if row["kind"] == kind]
        if some[0]["density"] < 1:
            rows.append([_name(some[0]), *(f"{percent(row['density'])}, {row['dhidden']:.1e}" for row in some)])
    return markdown("rows, tile | both limits | row alone | row alone, half | cell alone", rows)


def _rare(study: Study) -> str:
    rows = []
    for row in _swept(study):
        names = ("rare_cosine", "rare_cosine_5", "rare_norm")
        rows.append([
            _name(row), *(f"{row[scheme][name]:.2f}" for scheme in ("conserved", "dropped") for name in names),
        ])  # fmt: skip
    return markdown(
        "rows, tile | median cosine | 5 % are below | norm ratio | dropped: median cosine | 5 % are below | norm ratio",
        rows,
    )


def _shipped(study: Study) -> str:
    rows = []
    for row in study["shipped"]:
        names = ("bf16 logits", "exact", "auto", "sparse")
        rows.append([
            _name(row), f"{row['nll']:.1f}", percent(row["confident"]), percent(row["density"]),
            *(f"{row['dhidden'][name]:.1e}" for name in names),
            *(f"{row['dweight'][name]:.1e}" for name in (names[0], names[1], names[3])),
        ])  # fmt: skip
    return markdown(
        "rows, tile | nll | rows with p > 0.9 | density | dhidden: bf16 logits | exact | auto | sparse | "
        "dweight: bf16 logits | exact | sparse",
        rows,
    )


def _bound(study: Study) -> str:
    rows = []
    for row in _swept(study):
        said = [row["predicted"][name] for name in ("sum", "squares", "residual")]
        rows.append([_name(row), *(f"{one[where]:.2f}" for one in said for where in ("all", "worst"))])
    return markdown(
        "rows, tile | sum of mass: all rows | worst row | squares: all rows | worst row | "
        "residual: all rows | worst row",
        rows,
    )


def _runs(study: Study, backward: str) -> list[dict[str, Any]]:
    return [run for run in study["training"] if run["backward"] == backward]


def _end(run: dict[str, Any]) -> float:
    return float(mean(run["losses"][-10:]))


def _away(runs: list[dict[str, Any]], base: list[dict[str, Any]], loss: Callable[[dict[str, Any]], float]) -> str:
    away = [loss(a) - loss(b) for a, b in zip(runs, base, strict=True)]
    return f"{mean(away):+.5f} ± {stdev(away):.5f}"


def _training(study: Study) -> str:
    exact = _runs(study, "exact")
    rows = []
    for backward in COLOURS:
        runs = _runs(study, backward)
        densities = [density for run in runs for density in run["densities"]]
        rows.append([
            backward,
            *(f"{run['held_out'] - (0 if run is base else base['held_out']):+.5f}"
              for run, base in zip(runs, exact, strict=True)),
            _away(runs, exact, lambda run: run["held_out"]), _away(runs, exact, _end),
            percent(mean(densities)) if densities else "-",
        ])  # fmt: skip
    seeds = [f"seed {run['seed']}" for run in exact]
    titles = ["backward", *seeds, "mean ± standard deviation", "training loss", "cells computed"]
    return markdown(" | ".join(titles), rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "machine": _machine, "shipped": _shipped, "cells": _cells, "rules": _rules, "bound": _bound, "rare": _rare,
    "training": _training,
}  # fmt: skip


def draw(study: Study, folder: Path) -> None:
    """Write `errors.png` and `training.png`."""
    kinds = list(dict.fromkeys(row["kind"] for row in study["cells"]))
    figure = Figure(figsize=(3.1 * len(kinds), 6), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(kinds), sharex="col", sharey="row")
    for (above, below), kind in zip(panels.T, kinds, strict=True):
        rows = [row for row in study["cells"] if row["kind"] == kind]
        tiles = sorted({row["tile"] for row in rows})
        for T, colour in zip(tiles, (BLUE, GREEN, VERMILION), strict=False):
            some = [row for row in rows if row["tile"] == T]
            x = [row["limit"] for row in some]
            for scheme, line in (("conserved", "-"), ("dropped", ":")):
                errors = [row[scheme]["dhidden"] for row in some]
                above.plot(x, errors, line, color=colour, marker="o", markersize=3, label=f"T = {T}, {scheme}")
            below.plot(x, [row["density"] for row in some], color=colour, marker="o", markersize=3, label=f"T = {T}")
        above.set_yscale("log")
        above.set_xscale("log")
        _style(above, f"{kind}", "relative error of dhidden")
        _style(below, "", "share of cells computed")
        below.set_xlabel("limit of a row")
    figure.savefig(folder / "errors.png", facecolor="white")

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    losses, densities = figure.subplots(1, 2)
    for backward, colour in COLOURS.items():
        for i, run in enumerate(_runs(study, backward)):
            window = min(10, len(run["losses"]))
            smooth = [mean(run["losses"][k - window : k]) for k in range(window, len(run["losses"]) + 1)]
            label = backward if i == 0 else None
            losses.plot(range(window, len(run["losses"]) + 1), smooth, color=colour, linewidth=1, label=label)
            if run["densities"]:
                densities.plot(run["densities"], color=colour, linewidth=1, label=label)
    _style(losses, "Training loss, mean of 10 steps, all seeds", "nats per token")
    _style(densities, "Cells computed", "share")
    for panel in (losses, densities):
        panel.set_xlabel("step")
    figure.savefig(folder / "training.png", facecolor="white")


def _style(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_ylabel(unit, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.grid(color=GRID, linewidth=0.8)
    if panel.lines:
        panel.legend(frameon=False, fontsize=7)

"""What `fastdpo plan` shows of a plan: tables, advice and a drawing of the lengths."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastdpo.config.auto import AUTO
from fastdpo.plan.free_memory import GIB, KEPT_FREE, RESERVED, size_text
from fastdpo.plan.memory import Memory
from fastdpo.plan.plan import Plan
from fastdpo.plan.token_stats import TokenStats
from fastdpo.reference.share import when_it_pays
from fastdpo.report.page import summary_table
from fastdpo.report.plots import BLUE, GREEN, GREY, GRID, INK, PURPLE

WORTH_GROUPING = 0.1
"""Share of the computed tokens that grouping must save to be recommended, because it changes the order of examples."""
ENOUGH_PROMPTS = 8
"""Prompts in an optimizer step with which grouping costs nothing that shows, see docs/grouping.md."""
BUDGETS = (4096, 8192, 16384, 32768, 65536)


def tables(plan: Plan) -> str:
    """Show all of a plan in plain-text tables."""
    stats, batches = plan.stats, plan.batches
    lengths = [(name, *_spread(values)) for name, values in stats.lengths.items()]
    what = "computed for an example" if stats.groups is None else "computed for a group of examples"
    sizes = stats.sizes if stats.groups is None else stats.groups.sizes
    lengths.append((what, *_spread(sizes.prod(1))))
    counted = [
        ("rows of the dataset", f"{stats.given:,}"),
        *((f"left out: {reason}", _rows(rows)) for reason, rows in stats.dropped.items()),
        *((f"{name} cut to its limit", _rows(rows)) for name, rows in stats.cut.items()),
        ("examples trained on", f"{len(stats.prompts):,}"),
        ("batches of an epoch, all processes", f"{len(batches.rows):,}"),
        ("optimizer steps of an epoch", f"{plan.steps:,}"),
        ("tokens computed in a batch, in one random order: median", f"{np.median(batches.rows):,.0f}"),
        ("tokens computed in a batch, in one random order: largest", f"{batches.rows.max():,}"),
        ("padding avoided, share of the padded batch", f"{batches.padding_avoided:.1%}"),
        ("tokens shared within prompts, share of the unpadded batch", f"{batches.shared:.1%}"),
        *_grouping(stats, len(stats.prompts) / plan.steps),
    ]
    n, job = plan.job.processes, plan.job
    title = "memory (computed, not measured)" if n == 1 else f"memory of each of {n} GPUs, {job.strategy} (computed)"
    shown = [
        summary_table(lengths, ("tokens", "min", "median", "p95", "max", "mean")),
        summary_table(counted, ("data (counted)", "")),
    ]
    if not plan.memory:
        return "\n".join([*shown, "memory: not computed, because batches are padded", *_reference_advice(plan)])
    on, off = plan.memory[True], plan.memory[False]
    constant = [
        ("weights", on.weights),
        ("gradients", on.gradients),
        ("optimizer state", on.optimizer),
        ("reference", on.reference),
        *([("gathered weights and sent gradients", on.buffers)] if n > 1 else []),
        ("largest head workspace (of two)", on.workspace(int(batches.rows.max()))),
    ]
    needed: list[tuple[str, ...]] = [(name, size_text(size), size_text(size)) for name, size in constant]
    needed.append(("kept for the backward, per token", size_text(on.kept_per_row), size_text(off.kept_per_row)))
    largest = int(batches.rows.max())
    for rows, label in [(largest, "largest batch of that order"), *((n, f"tokens_per_batch={n}") for n in BUDGETS)]:
        needed.append((f"peak, {label}", size_text(on.peak(rows)), size_text(off.peak(rows))))
    if plan.gpu_memory is not None:
        label = f"largest tokens_per_batch in {plan.gpu_memory:g} GiB"
        needed.append((label, *(f"{plan.fits[kind]:,}" if plan.fits[kind] else "none" for kind in (True, False))))
    if n > 1:
        needed.append(("sent by each GPU in an optimizer step", size_text(on.sent), size_text(off.sent)))
    kind = {True: "with gradient checkpointing", False: "without"}
    return "\n".join(
        [
            *shown,
            summary_table(needed, (title, kind[True], kind[False])),
            f"memory assumes: {'; '.join(plan.assumed)}; the config has gradient checkpointing {_checkpointing(plan)}",
            *_head_advice(on, largest),
            *_reference_advice(plan),
            *_what_fits(plan),
        ]
    )


def _what_fits(plan: Plan) -> list[str]:
    if plan.gpu_memory is None or not plan.fits:
        return []
    kept = f"{RESERVED / GIB:.0f} GiB and {KEPT_FREE:.0%} of the rest are kept free"
    if any(plan.fits.values()):
        return [f"fits: {kept}"]
    return [f"nothing fits into {plan.gpu_memory:g} GiB, of which {kept}; docs/memory.md says what takes less"]


def _checkpointing(plan: Plan) -> str:
    if plan.checkpointing != AUTO:
        return "on" if plan.checkpointing else "off"
    if plan.recomputed is None:
        return "on auto, which recomputes as few layers as the memory of the device allows"
    after = " after its first steps" if plan.job.processes > 1 else ""
    return f"on auto, which recomputes {plan.recomputed} of {plan.layers} layers{after} for the largest batch"


def _head_advice(memory: Memory, rows: int) -> list[str]:
    """Say what a larger `head_workspace` would save, if not all probabilities of a batch with so many rows fit."""
    needed = memory.workspace_per_row * rows * 1.03  # 16-bit probabilities, their factors and the shares of tiles
    if not memory.keeps_probs or needed <= memory.head_workspace:
        return []
    kept = memory.head_workspace / needed
    larger = f"{math.ceil(needed / GIB * 10) / 10:.1f}GiB"
    return [
        f"head: head_workspace={size_text(memory.head_workspace)} holds {kept:.0%} of the probabilities of the largest "
        f"batch, and the backward computes the others again; head_workspace={larger} holds all of them, for "
        f"{size_text(needed - memory.head_workspace)} more memory and {(1 - kept) / (4 - kept):.0%} fewer "
        "multiplications in the head if its backward is exact (not with a soft-cap)"
    ]


def _reference_advice(plan: Plan) -> list[str]:
    """Say what precomputing the reference saves and when that pays, if it is possible."""
    if plan.reference_share is None or plan.epochs <= 0:
        return []
    return [
        f"reference: about {plan.reference_share:.0%} of the multiplications of a step; `fastdpo precompute` computes "
        f"it once for all epochs and for later runs on these rows, and pays {when_it_pays(plan.epochs)}"
    ]


def _grouping(stats: TokenStats, examples_per_step: float) -> list[tuple[str, str]]:
    """Say what `group_by_prompt` would save, and which value is the smallest that saves nearly as much as any."""
    if not stats.grouped:
        return []
    saved = {n: 1 - grouped.rows / stats.ungrouped for n, grouped in stats.grouped.items()}
    lines = [
        ("examples of one prompt and its later turns: largest number", f"{stats.per_prompt:,}"),
        *((f"tokens saved by group_by_prompt={n}", f"{share:.1%}") for n, share in saved.items()),
    ]
    best = max(saved.values())
    if best < WORTH_GROUPING:
        return [*lines, ("recommended (see docs/grouping.md)", "no group_by_prompt")]
    most = next(n for n, share in saved.items() if share >= 0.9 * best)
    prompts = max(examples_per_step * stats.grouped[most].families, 1)
    advice = f"about {prompts:.0f}"
    if prompts < ENOUGH_PROMPTS:
        advice += f", which is few: make steps {math.ceil(ENOUGH_PROMPTS / prompts)} times as large"
    return [
        *lines,
        ("recommended (see docs/grouping.md)", f"group_by_prompt={most}"),
        ("prompts in an optimizer step with it", advice),
    ]


def _spread(values: np.ndarray[Any, Any]) -> tuple[str, ...]:
    low, median, high, top = np.quantile(values, (0, 0.5, 0.95, 1))
    return (f"{low:,.0f}", f"{median:,.0f}", f"{high:,.0f}", f"{top:,.0f}", f"{values.mean():,.1f}")


def _rows(rows: Sequence[int]) -> str:
    return f"{len(rows):,} (first: row {rows[0]})"


def draw_lengths(stats: TokenStats, path: str | PathLike[str]) -> None:
    """Draw histograms of the lengths of prompts and responses, as a PNG that is 1650 pixels wide.

    Args:
        stats: token counts of a dataset.
        path: the file to write.
    """
    colours = {"prompt": BLUE, "chosen": GREEN, "rejected": PURPLE}
    figure = Figure(figsize=(11, 2.4 * len(stats.lengths)), dpi=150, layout="constrained")
    panels = figure.subplots(len(stats.lengths), 1, sharex=True, squeeze=False)[:, 0]
    top = max(values.max() for values in stats.lengths.values())
    bins = np.linspace(0, top, 1 + min(60, top)).tolist()
    for panel, (name, values) in zip(panels, stats.lengths.items(), strict=True):
        panel.hist(values, bins=bins, color=colours.get(name, GREEN), alpha=0.85)
        median = float(np.median(values))
        panel.axvline(median, color=GREY, linewidth=1, linestyle=(0, (6, 4)))
        title = f"{name}, median {median:,.0f}"
        panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        panel.set_ylabel("examples" if name != "response" else "responses", color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=GREY, labelcolor=INK)
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
    panels[-1].set_xlabel("tokens", color=INK)
    figure.savefig(path, format="png", facecolor="white")

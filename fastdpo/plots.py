"""The pictures of a run. Only draws: what was not logged is left out, and a panel without data says so.

`log_history` is `trainer.state.log_history`: dicts with a `step` and what was logged there, keys of held-out splits
beginning with `eval_` (and the split's name, where there are several). Values that are not finite leave gaps.
`histograms` are the first and the last of each name, `{name: [(step, fastdpo.metrics.Histogram), ...]}`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

LogHistory: TypeAlias = Sequence[Mapping[str, Any]]
Histograms: TypeAlias = Mapping[str, Sequence[tuple[int, Any]]]

# colour-blind readers can tell these apart: Okabe and Ito's (https://jfly.uni-koeln.de/color/), and Tol's purple
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, GREY, GRID = "#333333", "#767676", "#E6E6E6"
FEW_POINTS = 60  # up to here each logged value gets a dot, so that a lone one shows
MARKERS = "os^Dv"  # of held-out splits
MINUS = "\N{MINUS SIGN}"
DISPLAY_BINS = 48


def training(log_history: LogHistory) -> Figure:
    """Draw loss, reward margin, reward accuracy and log-probs over the optimizer steps."""
    figure, ((loss, margin), (accuracy, logps)) = _figure(2, 2)
    if _draw(loss, log_history, {"loss": ""}, "Loss", "nats per pair"):
        _reference_line(loss, math.log(2), "ln 2: policy = reference")
        loss.set_ylim(bottom=min(0.0, loss.dataLim.ymin))
    if _draw(margin, log_history, {"rewards/margins": ""}, f"Reward margin, chosen {MINUS} rejected", "nats"):
        _reference_line(margin, 0, "0: no preference")
    unit = "share of pairs with margin > 0"
    if _draw(accuracy, log_history, {"rewards/accuracies": ""}, "Reward accuracy", unit):
        _reference_line(accuracy, 0.5, "0.5: chance")
        accuracy.set_ylim(-0.03, 1.03)
    curves = {"logps/chosen": "chosen", "logps/rejected": "rejected"}
    _draw(logps, log_history, curves, "Log-probability of the responses", "nats per response")
    return figure


def reference(log_history: LogHistory) -> Figure:
    """Draw where the policy went from the reference: rewards, chosen responses below it, drift."""
    figure, ((rewards, below, drift),) = _figure(1, 3)
    curves = {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    if _draw(rewards, log_history, curves, "Rewards", "nats"):
        _reference_line(rewards, 0, "0: as likely as under the reference")
    unit = "share less likely than under the reference"
    if _draw(below, log_history, {"logps/chosen_below_ref": ""}, "Displaced chosen responses", unit):
        below.set_ylim(-0.03, 1.03)
    if _draw(drift, log_history, {"kl_per_token": ""}, "Drift, estimated KL from the reference", "nats per token"):
        _reference_line(drift, 0, "0: none")
    return figure


def rewards(histograms: Histograms) -> Figure:
    """Draw how rewards and margins were distributed first and last, of a held-out split if any."""
    figure, ((before, after, margin),) = _figure(1, 3)
    prefix, split = _split_with(histograms, "rewards/chosen")
    chosen, rejected = (histograms.get(f"{prefix}rewards/{side}", ()) for side in ("chosen", "rejected"))
    limits = _limits([histogram for _, histogram in (*chosen, *rejected)])
    for panel, when, title in ((before, 0, "First rewards"), (after, 1, "Last rewards")):
        for label, colour, snapshots in (("chosen", GREEN, chosen), ("rejected", PURPLE, rejected)):
            if len(snapshots) > when:
                step, histogram = snapshots[when]
                title = f"Rewards at step {step}, {split}"
                _stairs(panel, histogram, limits, label, colour)
        _style(panel, title, "share of responses", "reward, nats")
    margins = histograms.get(f"{prefix}rewards/margins", ())
    limits = _limits([histogram for _, histogram in margins])
    for (step, histogram), colour in zip(margins, (GREY, BLUE), strict=False):
        _stairs(margin, histogram, limits, f"step {step}", colour, relative=True)
    _style(margin, f"Reward margin, {split}", "pairs, relative to the fullest bin", f"chosen {MINUS} rejected, nats")
    for panel in (before, after, margin):
        if panel.has_data():
            panel.axvline(0, color=GREY, linewidth=1, linestyle=(0, (6, 4)), zorder=2)
            panel.set_ylim(0, 1.2 * panel.get_ylim()[1])  # room for the legend
    return figure


def lengths(log_history: LogHistory, histograms: Histograms) -> Figure:
    """Draw whether longer responses get higher rewards: margins by difference of lengths."""
    figure, ((profile, correlation),) = _figure(1, 2)
    prefix, split = _split_with(histograms, "length")
    for (step, (edges, counts, means)), colour in zip(
        histograms.get(f"{prefix}length", ()), (GREY, BLUE), strict=False
    ):
        centres, share = (np.array(edges[1:]) + edges[:-1]) / 2, np.array(counts) / max(sum(counts), 1)
        profile.scatter(
            centres, means, s=12 + 600 * share, color=colour, alpha=0.75, linewidths=0, label=f"step {step}"
        )
    unit = "mean reward margin, nats"
    _style(profile, f"Margin by length, {split}", unit, f"tokens of chosen {MINUS} rejected; area: share of pairs")
    if profile.has_data():
        _reference_line(profile, 0, "")
        for handle in profile.get_legend().legend_handles:
            handle.set_sizes([40])
    title = "Correlation of margin and difference of lengths"
    if _draw(correlation, log_history, {"rewards/length_correlation": ""}, title, "Pearson's r"):
        _reference_line(correlation, 0, "0: length does not matter")
        correlation.set_ylim(-1.05, 1.05)
    return figure


def running(log_history: LogHistory) -> Figure:
    """Draw throughput, memory, work saved and the gradient norm."""
    figure, ((speed, memory), (saved, norm)) = _figure(2, 2)
    if _draw(speed, log_history, {"tokens_per_second": ""}, "Throughput", "tokens per second"):
        _from_zero(speed)
        speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if _draw(memory, log_history, {"peak_memory_gib": ""}, "Peak memory", "GiB, of the process that needed most"):
        _from_zero(memory)
    curves = {"padding_saved": "padding avoided", "prompt_shared": "shared between responses"}
    curves["head/density"] = "computed cells of the head's backward"
    if _draw(saved, log_history, curves, "Shares of work", "share"):
        saved.set_ylim(-0.03, 1.03)
        saved.yaxis.set_major_formatter(PercentFormatter(1))
    if _draw(norm, log_history, {"grad_norm": ""}, "Gradient norm, before clipping", "norm"):
        _from_zero(norm)
    return figure


# Curves over steps


def _draw(panel: Axes, log_history: LogHistory, curves: Mapping[str, str], title: str, unit: str) -> bool:
    """Draw quantities, `{key: label}`, of training and of the held-out splits; False if none was logged."""
    colours = (BLUE,) if len(curves) == 1 else (GREEN, PURPLE, BLUE)
    for (key, label), colour in zip(curves.items(), colours, strict=False):
        _plot(panel, _points(log_history, key), label or "training", colour, None)
        for prefix, marker in zip(_prefixes(log_history), MARKERS, strict=False):
            name = _split_name(prefix)
            points = _points(log_history, prefix + key)
            _plot(panel, points, f"{label}, {name}" if label else name, colour if label else VERMILION, marker)
    _style(panel, title, unit, "optimizer step")
    if panel.has_data():
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return panel.has_data()


def _points(log_history: LogHistory, key: str) -> list[tuple[float, float]]:
    points = [(entry["step"], entry[key]) for entry in log_history if "step" in entry and key in entry]
    return [point for point in points if all(isinstance(x, (int, float)) for x in point)]


def values(log_history: LogHistory, key: str) -> list[float]:
    """What was logged under a key over the steps, in their order."""
    return [value for _, value in _points(log_history, key)]


def _prefixes(log_history: LogHistory) -> list[str]:
    """Of the held-out splits."""
    probe = "rewards/chosen"
    found = {key.removesuffix(probe) for entry in log_history for key in entry if key.endswith(probe)} - {"", "eval_"}
    return ["eval_", *sorted(found)]


def _split_name(prefix: str) -> str:
    name = prefix.removeprefix("eval_").removesuffix("_")
    return f"held out ({name})" if name else "held out"


def _plot(panel: Axes, points: list[tuple[float, float]], label: str, colour: str, marker: str | None) -> None:
    if not any(math.isfinite(value) for _, value in points):
        return
    steps, values = zip(*points, strict=True)
    if marker:
        style: dict[str, Any] = {"linestyle": (0, (1, 1.5)), "marker": marker, "markersize": 6, "zorder": 4}
        style |= {"linewidth": 1.2, "markeredgewidth": 1.6, "markerfacecolor": "white"}
    else:
        style = {"linewidth": 1.6, "marker": "o" if len(points) <= FEW_POINTS else "", "markersize": 2.8, "zorder": 3}
    panel.plot(steps, values, color=colour, label=label, clip_on=False, **style)


# Histograms


def _split_with(histograms: Histograms, name: str) -> tuple[str, str]:
    """Prefix and name of a held-out split that has this histogram, else of the training."""
    prefixes = sorted(key.removesuffix(name) for key in histograms if key.startswith("eval_") and key.endswith(name))
    return (prefixes[0], _split_name(prefixes[0])) if prefixes else ("", "training")


def _limits(histograms: Sequence[Any]) -> tuple[float, float]:
    """What holds 99 % of each histogram, and 0."""
    low = high = 0.0
    for edges, counts, _ in histograms:
        shares = np.cumsum([0.0, *counts]) / sum(counts)
        low = min(low, float(np.interp(0.005, shares, edges)))
        high = max(high, float(np.interp(0.995, shares, edges)))
    return low, high


def _stairs(
    panel: Axes, histogram: Any, limits: tuple[float, float], label: str, colour: str, relative: bool = False
) -> None:
    """Shares of bins of one width, over which those logged are spread evenly; `relative` to the fullest one."""
    edges, counts, _ = histogram
    width = (limits[1] - limits[0]) / DISPLAY_BINS or 1.0
    bins = width * np.arange(math.floor(limits[0] / width), math.ceil(limits[1] / width) + 1)  # 0 is an edge
    shares = np.diff(np.interp(bins, edges, np.cumsum([0.0, *counts]) / sum(counts)))
    if relative:
        shares /= shares.max() or 1.0
    panel.stairs(shares, bins, fill=True, color=colour, alpha=0.3, zorder=3)
    panel.stairs(shares, bins, color=colour, linewidth=1.6, label=label, zorder=3)


# Looks


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    size = (11, 7.5 if rows == 2 else 4)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(panel: Axes, title: str, unit: str, over: str) -> None:
    """Put on titles, axes and legend, after the data."""
    panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    panel.set_ylabel(unit, color=INK)
    panel.set_xlabel(over, color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(colors=GREY, labelcolor=INK)
    if not panel.has_data():
        panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color=GREY)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.margins(x=0.02, y=0.08)
    panel.legend(frameon=False, labelcolor=INK, fontsize=9.5)


def _from_zero(panel: Axes) -> None:
    panel.set_ylim(0, 1.1 * panel.dataLim.ymax or 1.0)


def _reference_line(panel: Axes, value: float, label: str) -> None:
    panel.axhline(value, color=GREY, linewidth=1, linestyle=(0, (6, 4)), zorder=2)
    panel.annotate(
        label,
        (1, value),
        xycoords=panel.get_yaxis_transform(),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        color=GREY,
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=2.5,  # over the grid, under the curves
    )

"""Draw the pictures of a run. A panel for which nothing was logged is omitted.

Each picture is a list of figures of one size with one panel each, so that a page can lay them out as its width allows.
`log_history` is `trainer.state.log_history`: dicts with a `step` and the numbers logged there; keys of held-out splits
begin with `eval_`, and with the split's name if there are several. Values that are not finite leave gaps.
`histograms` are the first and the last of each name, `{name: [(step, fastdpo.report.metrics.Histogram), ...]}`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

LogHistory: TypeAlias = Sequence[Mapping[str, Any]]
Histograms: TypeAlias = Mapping[str, Sequence[tuple[int, Any]]]
Points: TypeAlias = list[tuple[float, float]]

# colours that colour-blind readers can tell apart: Okabe and Ito's (https://jfly.uni-koeln.de/color/), Tol's purple
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, GREY, GRID = "#333333", "#767676", "#E6E6E6"
DASHES = (0, (6, 4))
SIZE, DPI = (4.8, 3.6), 150  # a panel's width and height in inches, and pixels per inch
LEGEND_SIZE, LEGEND_WIDTH = 9.5, 270.0  # font size, and the most width of a legend, in points
FEW_POINTS = 60  # curves of at most this many values get dots, so that a single value is visible
MANY_POINTS = 400  # of longer curves, neighbouring values are drawn as their mean and range
THINNED = 200  # at most this many means
MARKERS, MARKED = "os^Dv", 20  # markers of held-out splits, and the most markers of a curve
LONGEST_NAME = 24  # characters of a held-out split's name
MINUS = "\N{MINUS SIGN}"
DISPLAY_BINS = 48


def training(log_history: LogHistory, first_loss: float | None = math.log(2)) -> list[Figure]:
    """Draw loss, reward margin, reward accuracy and log-probs over the optimizer steps.

    Args:
        log_history: see the module's docstring.
        first_loss: the loss while the policy is its reference; None if that is not known.
    """
    start = None if first_loss is None else (first_loss, f"{_tick(round(first_loss, 3))}: policy = reference")
    if not _points(log_history, "loss"):  # the run was shorter than logging_steps
        log_history = [e | {"loss": e["train_loss"]} if "train_loss" in e else e for e in map(dict, log_history)]
    curve = partial(_draw, log_history)
    margin, accuracy = {"rewards/margins": ""}, {"rewards/accuracies": ""}
    logps = {"logps/chosen": "chosen", "logps/rejected": "rejected"}
    return _figures(
        partial(curve, {"loss": ""}, "Loss", "nats per example", line=start, low=0.0),
        partial(curve, margin, f"Reward margin, chosen {MINUS} rejected", "nats", line=(0, "no preference")),
        partial(curve, accuracy, "Reward accuracy", "pairs with margin > 0", line=(0.5, "chance"), percent=True),
        partial(curve, logps, "Log-probability of the responses", "nats per response"),
    )


def reference(log_history: LogHistory) -> list[Figure]:
    """Draw how far the policy is from the reference: rewards, displaced chosen responses and drift."""
    curve = partial(_draw, log_history)
    sides = {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    unit = "less likely than under the reference"
    return _figures(
        partial(curve, sides, "Rewards", "nats", line=(0, "as under the reference")),
        partial(curve, {"logps/chosen_below_ref": ""}, "Displaced chosen responses", unit, percent=True),
        partial(curve, {"kl_per_token": ""}, "Drift from the reference", "estimated KL, nats per token", low=0.0),
    )


def rewards(histograms: Histograms) -> list[Figure]:
    """Draw the first and last distributions of rewards and margins, of a held-out split if there is one."""
    prefix, split = _split_with(histograms, "rewards/chosen")
    sides = {side: histograms.get(f"{prefix}rewards/{side}", ()) for side in ("chosen", "rejected")}
    margins = histograms.get(f"{prefix}rewards/margins", ())
    limits = _limits([histogram for snapshots in sides.values() for _, histogram in snapshots])
    draws = []
    for when in (0, 1):
        shown = {side: snapshots[when] for side, snapshots in sides.items() if len(snapshots) > when}
        colours = {"chosen": GREEN, "rejected": PURPLE}
        layers = [(histogram, side, colours[side]) for side, (_, histogram) in shown.items()]
        step = max((step for step, _ in shown.values()), default=0)
        title = f"Rewards at step {_tick(step)}"
        draws.append(partial(_stairs, layers, limits, title, "share of responses", _over("reward in nats", split)))
    layers = [
        (histogram, f"step {_tick(step)}", colour)
        for (step, histogram), colour in zip(margins, (GREY, BLUE), strict=False)
    ]
    limits = _limits([histogram for _, histogram in margins])
    unit, over = "pairs, relative to the fullest bin", _over(f"chosen {MINUS} rejected in nats", split)
    draws.append(partial(_stairs, layers, limits, "Reward margin", unit, over, relative=True))
    return _figures(*draws)


def lengths(log_history: LogHistory, histograms: Histograms) -> list[Figure]:
    """Draw whether longer responses get higher rewards: margins by difference of lengths."""
    prefix, split = _split_with(histograms, "length")
    profiles = histograms.get(f"{prefix}length", ())
    correlation = partial(_draw, log_history, {"rewards/length_correlation": ""}, "Correlation of margin and length")
    return _figures(
        partial(_profile, profiles, _over(f"tokens of chosen {MINUS} rejected", split)),
        partial(correlation, "Pearson's r", line=(0, "length does not matter"), low=-1.05, high=1.05),
    )


def running(log_history: LogHistory) -> list[Figure]:
    """Draw throughput, memory, work saved, the gradient norm and the learning rate."""
    curve = partial(_draw, log_history)
    shares = {"padding_saved": "padding avoided", "prompt_shared": "shared between responses"}
    shares["head/density"] = "computed in the head's backward"
    unit = "GiB"
    return _figures(
        partial(curve, {"tokens_per_second": ""}, "Throughput", "tokens per second", low=0.0),
        partial(curve, {"peak_memory_gib": ""}, "Peak memory", unit, low=0.0),
        partial(curve, shares, "Shares of work", "share", percent=True),
        partial(curve, {"grad_norm": ""}, "Gradient norm, before clipping", "norm", low=0.0),
        partial(curve, {"learning_rate": ""}, "Learning rate", "learning rate", low=0.0),
    )


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure's pixels, RGBA `[height, width, 4]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def tile(panels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Join panels of one size into one picture, in rows of two or three; the last row is filled up with white."""
    columns = columns_of(len(panels))
    filled = [*panels, *[np.full_like(panels[0], 255)] * (-len(panels) % columns)]
    rows = [np.concatenate(filled[i : i + columns], 1) for i in range(0, len(filled), columns)]
    return np.concatenate(rows)


def columns_of(panels: int) -> int:
    """Return in how many columns a wide page shows this number of panels."""
    return panels if panels < 3 else 2 if panels == 4 else 3


# Curves over steps


def _draw(
    log_history: LogHistory,
    curves: Mapping[str, str],
    title: str,
    unit: str,
    panel: Axes,
    *,
    line: tuple[float, str] | None = None,
    low: float | None = None,
    high: float | None = None,
    percent: bool = False,
) -> None:
    """Draw the curves of quantities, of training and of the held-out splits.

    Args:
        log_history: see the module's docstring.
        curves: the quantities' labels by key; a single quantity has the label "".
        title: title of the panel.
        unit: unit of the quantities.
        panel: where to draw.
        line: height and label of a horizontal line for comparison.
        low: lower end of the axis, unless a value is below it.
        high: upper end of the axis, unless a value is above it.
        percent: the quantities are shares, and the axis goes from 0 to 100 percent.
    """
    alone = len(curves) == 1
    splits = list(zip(prefixes(log_history), MARKERS, strict=False))
    in_one_dot = 1
    for (key, label), colour in zip(curves.items(), (BLUE,) if alone else (GREEN, PURPLE, BLUE), strict=False):
        in_one_dot = max(in_one_dot, _plot(panel, _points(log_history, key), label or "training", colour))
        for prefix, marker in splits:
            name, of_split = (split_name(prefix), VERMILION) if alone else ("", colour)
            _plot(panel, _points(log_history, prefix + key), name, of_split, marker)
    for prefix, marker in splits:  # each quantity has a colour, and each split a marker
        if not alone and any(_points(log_history, prefix + key) for key in curves):
            panel.plot([], [], color=GREY, label=split_name(prefix), **_held_out(marker))
    if not panel.has_data():
        return
    bottom, top = panel.dataLim.intervaly
    if line:
        panel.axhline(line[0], color=GREY, linewidth=1, linestyle=DASHES, zorder=2, label=line[1])
    over = "optimizer step" + (f" (mean and range of {in_one_dot} records)" if in_one_dot > 1 else "")
    _style(panel, title, unit, over)
    panel.set_xlim(left=-0.02 * panel.dataLim.xmax)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    if percent:
        low, high = -0.03, 1.03
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    if low is not None:
        panel.set_ylim(bottom=min(low, bottom))
        if bottom >= low == 0:
            panel.set_ylim(top=1.08 * max(top, line[0] if line else 0) or 1.0)
    if high is not None:
        panel.set_ylim(top=max(high, top))


def _points(log_history: LogHistory, key: str) -> Points:
    points = [(entry["step"], entry[key]) for entry in log_history if "step" in entry and key in entry]
    return [point for point in points if all(isinstance(x, (int, float)) for x in point)]


def values(log_history: LogHistory, key: str) -> list[float]:
    """Return the values logged under a key, in the order of the steps."""
    return [value for _, value in _points(log_history, key)]


def prefixes(log_history: LogHistory) -> list[str]:
    """Return the prefixes that the keys of held-out splits have, `eval_` first and always."""
    probe = "rewards/chosen"
    found = {key.removesuffix(probe) for entry in log_history for key in entry if key.endswith(probe)} - {"", "eval_"}
    return ["eval_", *sorted(found)]


def split_name(prefix: str) -> str:
    """Return the name of the split whose keys have this prefix; a long name is cut in the middle."""
    name = prefix.removeprefix("eval_").removesuffix("_")
    if len(name) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        name = f"{name[:half]}…{name[-half + 1 :]}"
    return f"held out ({name})" if name else "held out"


def _plot(panel: Axes, points: Points, label: str, colour: str, marker: str | None = None) -> int:
    """Draw one curve; return how many logged values each of its points stands for."""
    if not any(math.isfinite(value) for _, value in points):
        return 1
    steps, means = np.array(points, dtype=float).T
    in_one = 1
    if len(points) > MANY_POINTS:
        in_one = math.ceil(len(points) / THINNED)
        chunks = [np.array(points[i : i + in_one], dtype=float).T for i in range(0, len(points), in_one)]
        steps = np.array([chunk[0].mean() for chunk in chunks])
        finite = [np.where(np.isfinite(chunk[1]).all(), chunk[1], math.nan) for chunk in chunks]
        means = np.array([each.mean() for each in finite])
        lows, highs = (np.array([reduce(each) for each in finite]) for reduce in (np.min, np.max))
        if not marker:
            panel.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0, zorder=2.5)
    if marker:
        marked = np.unique(np.linspace(0, len(steps) - 1, MARKED).round().astype(int))
        style = _held_out(marker) | {"markevery": marked.tolist()}
    else:
        style = {"linewidth": 1.6, "marker": "o" if len(steps) <= FEW_POINTS else "", "zorder": 3}
        style["markersize"] = 2.8 if len(steps) > 3 else 5.0
    panel.plot(steps, means, color=colour, label=label or "_", clip_on=False, **style)
    return in_one


def _held_out(marker: str) -> dict[str, Any]:
    style = {"linestyle": (0, (1, 1.5)), "linewidth": 1.2, "zorder": 4}
    return style | {"marker": marker, "markersize": 6, "markeredgewidth": 1.6, "markerfacecolor": "white"}


# Histograms


def _split_with(histograms: Histograms, name: str) -> tuple[str, str]:
    """Return prefix and name of a held-out split that has this histogram, else those of training."""
    found = sorted(key.removesuffix(name) for key in histograms if key.startswith("eval_") and key.endswith(name))
    return (found[0], split_name(found[0])) if found else ("", "training")


def _over(unit: str, split: str) -> str:
    """Return the label of an axis, in two lines if one would be wider than a panel."""
    return f"{unit},{' ' if len(unit + split) < 40 else chr(10)}{split}"


def _limits(histograms: Sequence[Any]) -> tuple[float, float]:
    """Return limits that enclose 0 and the central 99 % of each histogram."""
    low = high = 0.0
    for edges, counts, _ in histograms:
        shares = np.cumsum([0.0, *counts]) / sum(counts)
        low = min(low, float(np.interp(0.005, shares, edges)))
        high = max(high, float(np.interp(0.995, shares, edges)))
    return low, high


def _stairs(
    layers: Sequence[tuple[Any, str, str]],
    limits: tuple[float, float],
    title: str,
    unit: str,
    over: str,
    panel: Axes,
    *,
    relative: bool = False,
) -> None:
    """Draw histograms, `(histogram, label, colour)`, in bins of equal width.

    The counts of a logged bin are spread evenly over the bins drawn. `relative` divides each histogram by its fullest
    bin, in place of its total.
    """
    width = (limits[1] - limits[0]) / DISPLAY_BINS or 1.0
    bins = width * np.arange(math.floor(limits[0] / width), math.ceil(limits[1] / width) + 1)  # 0 is an edge
    for (edges, counts, _), label, colour in layers:
        shares = np.diff(np.interp(bins, edges, np.cumsum([0.0, *counts]) / sum(counts)))
        if relative:
            shares /= shares.max() or 1.0
        panel.stairs(shares, bins, fill=True, color=colour, alpha=0.3, zorder=3)
        panel.stairs(shares, bins, color=colour, linewidth=1.6, label=label, zorder=3)
    if layers:
        panel.axvline(0, color=GREY, linewidth=1, linestyle=DASHES, zorder=2)
        _style(panel, title, unit, over)


def _profile(profiles: Sequence[tuple[int, Any]], over: str, panel: Axes) -> None:
    """Draw the mean reward margin for each difference of lengths; the areas are shares of pairs."""
    for (step, (edges, counts, means)), colour in zip(profiles, (GREY, BLUE), strict=False):
        centres, share = (np.array(edges[1:]) + edges[:-1]) / 2, np.array(counts) / max(sum(counts), 1)
        label = f"step {_tick(step)}"
        panel.scatter(centres, means, s=12 + 600 * share, color=colour, alpha=0.75, linewidths=0, label=label)
    if profiles:
        panel.axhline(0, color=GREY, linewidth=1, linestyle=DASHES, zorder=2)
        _style(panel, "Margin by length (area: share of pairs)", "mean reward margin, nats", over)
        panel.margins(0.12)  # room for wide dots
        legend = panel.get_legend()
        assert legend is not None
        for handle in legend.legend_handles:
            handle.set_sizes([40])  # type: ignore[union-attr]


# Looks


def _figures(*draws: Callable[[Axes], None]) -> list[Figure]:
    """Return a figure for each panel into which something was drawn."""
    figures = []
    for draw in draws:
        figure = Figure(
            figsize=SIZE, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        )
        panel = figure.subplots()
        draw(panel)
        if panel.has_data():
            figures.append(figure)
    return figures


def _style(panel: Axes, title: str, unit: str, over: str) -> None:
    """Add title, axes and legend to a panel with data; the legend stands between title and data, covering neither."""
    panel.set_ylabel(unit, color=INK)
    panel.set_xlabel(over, color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(colors=GREY, labelcolor=INK)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_tick))
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.margins(x=0.02, y=0.08)
    low, high = panel.dataLim.intervaly
    if high - low < (least := 1e-3 * max(abs(low), abs(high))):  # else rounding errors would look like a curve
        panel.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    handles, labels = panel.get_legend_handles_labels()
    columns = _legend_columns(labels)
    panel.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=LEGEND_SIZE,
        borderpad=0,
        borderaxespad=0.2,
        labelspacing=0.35,
        handlelength=1.8,
        columnspacing=1.2,
    )
    rows = math.ceil(len(labels) / columns)
    panel.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=9 + 13.8 * rows)


def _legend_columns(labels: Sequence[str]) -> int:
    """Return the largest number of columns with which the legend fits into a panel."""
    widths = [TextPath((0, 0), label, size=LEGEND_SIZE).get_extents().width + 4 * LEGEND_SIZE for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(max(column) for column in np.array_split(widths, columns)) <= LEGEND_WIDTH:
            return columns
    return 1


def _tick(value: float, position: int | None = None) -> str:
    """Format a number for an axis: thousands are separated; very large and very small numbers get an exponent."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        text = f"{value:,.6g}"
    elif 1e5 <= abs(value) < 1e9:
        text = f"{value:,.0f}"
    else:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        text = f"{mantissa}e{int(exponent or 0)}"
    return text.replace("-", MINUS)

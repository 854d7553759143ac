"""What a finished run leaves to look at: `training.png` and plain-text tables. Only draws; computes nothing."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

# colour-blind readers can tell these apart: Okabe and Ito's (https://jfly.uni-koeln.de/color/), and Tol's purple
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, GREY, GRID = "#333333", "#767676", "#E6E6E6"
FEW_POINTS = 60  # up to here each logged value gets a dot, so that a lone one shows


def draw_training(log_history: Sequence[dict[str, Any]], path: str | PathLike[str]) -> None:
    """Draw loss, reward margin, reward accuracy and log-probs over the optimizer steps, as a PNG of 1650 x 1125 pixels.

    Args:
        log_history: `trainer.state.log_history`; keys as logged by `DPOTrainer`, those of the held-out split begin with
            `eval_`. What was not logged is left out, and a panel without any data says so. Values that are not finite
            leave gaps.
        path: the file to write.
    """
    figure = Figure(figsize=(11, 7.5), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (loss, margin), (accuracy, logps) = figure.subplots(2, 2, sharex=True)

    drawn = _draw_both(loss, log_history, "loss")
    _style(loss, "Loss", "nats per pair", drawn)
    if drawn:
        _reference_line(loss, math.log(2), "ln 2: policy = reference")
        loss.set_ylim(bottom=min(0.0, loss.dataLim.ymin))

    drawn = _draw_both(margin, log_history, "rewards/margins")
    _style(margin, "Reward margin, chosen \N{MINUS SIGN} rejected", "nats", drawn)
    if drawn:
        _reference_line(margin, 0, "0: no preference")

    drawn = _draw_both(accuracy, log_history, "rewards/accuracies")
    _style(accuracy, "Reward accuracy", "share of pairs with margin > 0", drawn)
    if drawn:
        _reference_line(accuracy, 0.5, "0.5: chance")
        accuracy.set_ylim(-0.03, 1.03)

    for response, colour in (("chosen", GREEN), ("rejected", PURPLE)):
        _draw(logps, log_history, f"logps/{response}", response, colour, held_out=False)
        _draw(logps, log_history, f"eval_logps/{response}", f"{response}, held out", colour, held_out=True)
    _style(logps, "Log-probability of the responses", "nats per response", bool(logps.lines))

    for panel in (accuracy, logps):
        panel.set_xlabel("optimizer step", color=INK)
    figure.savefig(path, format="png", facecolor="white")


def _draw_both(panel: Axes, log_history: Sequence[dict[str, Any]], key: str) -> bool:
    """Draw one quantity of training and of the held-out split; False if neither was logged."""
    train = _draw(panel, log_history, key, "training", BLUE, held_out=False)
    held_out = _draw(panel, log_history, f"eval_{key}", "held out", VERMILION, held_out=True)
    return train or held_out


def _draw(
    panel: Axes, log_history: Sequence[dict[str, Any]], key: str, label: str, colour: str, held_out: bool
) -> bool:
    points = [(entry["step"], entry[key]) for entry in log_history if "step" in entry and key in entry]
    if not any(math.isfinite(value) for _, value in points):
        return False
    steps, values = zip(*points, strict=True)
    if held_out:
        style: dict[str, Any] = {"linestyle": (0, (1, 1.5)), "marker": "o", "markersize": 6, "markerfacecolor": "white"}
        style |= {"linewidth": 1.2, "markeredgewidth": 1.6, "zorder": 4}
    else:
        style = {"linewidth": 1.6, "marker": "o" if len(points) <= FEW_POINTS else "", "markersize": 2.8, "zorder": 3}
    panel.plot(steps, values, color=colour, label=label, clip_on=False, **style)
    return True


def _style(panel: Axes, title: str, unit: str, drawn: bool) -> None:
    panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    panel.set_ylabel(unit, color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(colors=GREY, labelcolor=INK, labelbottom=True)
    if not drawn:
        panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color=GREY)
        panel.set_yticks([])
        return
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.margins(x=0.02, y=0.08)
    panel.legend(frameon=False, labelcolor=INK, fontsize=9.5)


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


def summary_table(rows: Sequence[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    """A table in box-drawing characters, first column to the left, the others to the right.

    Raises:
        ValueError: a row is not as long as `headers`.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "│ " + " │ ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " │"

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * (width + 2) for width in widths) + right

    return "\n".join([rule("┌", "┬", "┐"), line(headers), rule("├", "┼", "┤"), *map(line, rows), rule("└", "┴", "┘")])

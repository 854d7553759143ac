"""The picture of `run.py`: only draws, computes nothing but means over seeds."""

from os import PathLike
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdpo.report.plots import BLUE, GREEN, GREY, GRID, INK, PURPLE, VERMILION


def draw(results: dict[str, Any], path: str | PathLike[str]) -> None:
    """Draw true reward over KL(policy || SFT): DPO by either implementation, best-of-n, SFT and the optimum."""
    figure = Figure(figsize=(9, 6.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    sft, runs = results["sft"], results["runs"]

    line = [sft, *results["optimum"]]  # beta without limit is SFT
    panel.plot(*columns(line), color=INK, linewidth=1.4, zorder=2, label="optimum: SFT $\\cdot$ exp(reward / $\\beta$)")
    panel.plot(
        *columns(results["best_of"], "kl_bound"),
        color=GREEN,
        linestyle=(0, (5, 2)),
        marker="s",
        markersize=4,
        label="best of n, KL as its upper bound log n \N{MINUS SIGN} (n \N{MINUS SIGN} 1) / n",
    )
    panel.plot(
        *columns(results["best_of"]),
        color=GREEN,
        linestyle="none",
        marker="s",
        markersize=4,
        markerfacecolor="white",
        label="best of n, exact KL",
    )
    means = []
    for beta in results["settings"]["betas"]:
        same = [run["fused"] for run in runs if run["beta"] == beta]
        means.append({key: mean(run[key] for run in same) for key in ("kl", "reward")} | {"beta": beta})
    panel.plot(*columns(means), color=BLUE, linewidth=1.6, zorder=3, label="DPO by fastdpo: mean over seeds")
    panel.plot(
        *columns([run["fused"] for run in runs]),
        color=BLUE,
        linestyle="none",
        marker="o",
        markersize=5,
        zorder=4,
        label="DPO by fastdpo: each seed",
    )
    panel.plot(
        *columns([run["reference"] for run in runs]),
        color=VERMILION,
        linestyle="none",
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgewidth=1.3,
        zorder=4,
        label="DPO by the plain loop: each seed",
    )
    for point in means:
        note(panel, f"$\\beta$ = {point['beta']:g}", (point["kl"], point["reward"]), BLUE)
    for point in results["best_of"][2::4]:
        note(panel, f"n = {point['n']}", (point["kl_bound"], point["reward"]), GREEN)
    panel.plot(
        [sft["kl"]],
        [sft["reward"]],
        color=PURPLE,
        marker="D",
        markersize=8,
        linestyle="none",
        zorder=5,
        label="SFT",
        clip_on=False,
    )

    shown = [*(run["fused"]["kl"] for run in runs), *(point["kl_bound"] for point in results["best_of"])]
    panel.set_xlim(-0.04 * max(shown), 1.12 * max(shown))
    panel.set_ylim(top=1.04 * max(point["reward"] for point in line if point["kl"] < 1.12 * max(shown)))
    panel.set_title("True reward against KL: DPO, best of n, and the optimum", loc="left", fontsize=11.5, color=INK)
    panel.set_xlabel("KL(policy || SFT), nats per response", color=INK)
    panel.set_ylabel("true reward per response, expected", color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(colors=GREY, labelcolor=INK)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(frameon=False, labelcolor=INK, fontsize=9.5, loc="lower right")
    figure.savefig(path, format="png", facecolor="white")


def note(panel: Axes, text: str, at: tuple[float, float], colour: str) -> None:
    """Write beside a point, to its lower right."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    panel.annotate(text, at, xytext=(9, -13), textcoords="offset points", color=colour, fontsize=8.5, bbox=box)


def columns(points: list[dict[str, Any]], x: str = "kl") -> tuple[list[float], list[float]]:
    return [point[x] for point in points], [point["reward"] for point in points]

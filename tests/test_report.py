"""fastdpo.report: the picture of a run and the tables."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.colors import to_rgb
from torch import Tensor

from fastdpo import report

METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


def log(step: int, value: float, prefix: str = "", metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, **{prefix + metric: value for metric in metrics}}


def draw(log_history: list[dict[str, Any]], folder: Path) -> Tensor:
    """The picture drawn, [height, width, 3] in [0, 1]."""
    path = folder / "training.png"
    report.draw_training(log_history, path)
    return torch.from_numpy(matplotlib.image.imread(path))[..., :3]


def pixels_of(image: Tensor, colour: str) -> Tensor:
    """Where the picture has the colour, [height, width]."""
    return (image - torch.tensor(to_rgb(colour))).abs().amax(-1) < 0.02


def where_drawn(image: Tensor, colour: str) -> set[str]:
    """The quadrants of the picture that hold the colour."""
    found = pixels_of(image, colour)
    halves = [half for rows in found.chunk(2, 0) for half in rows.chunk(2, 1)]
    return {name for name, half in zip(QUADRANTS, halves, strict=True) if half.any()}


WHOLE_RUN = [
    log(0, 0.5, "eval_"),
    *(log(step, 0.5 + step / 100) for step in range(1, 40)),
    log(39, 0.9, "eval_"),
    {"step": 39, "train_runtime": 1.0, "train_loss": 0.3},
]


def test_picture_of_a_whole_run(tmp_path: Path) -> None:
    image = draw(WHOLE_RUN, tmp_path)
    assert image.shape == (1125, 1650, 3)
    assert where_drawn(image, report.BLUE) == where_drawn(image, report.VERMILION) == set(QUADRANTS[:3])
    assert where_drawn(image, report.GREEN) == where_drawn(image, report.PURPLE) == {"bottom right"}
    assert 0.8 < (image == 1).all(-1).float().mean() < 0.99  # mostly white, and not only


@pytest.mark.parametrize("prefix", ["", "eval_"], ids=["training", "held-out"])
@pytest.mark.parametrize(("metric", "quadrant"), list(zip(METRICS, [*QUADRANTS, "bottom right"], strict=True)), ids=str)
def test_each_metric_alone_is_drawn_in_its_panel(metric: str, quadrant: str, prefix: str, tmp_path: Path) -> None:
    colours = {"logps/chosen": report.GREEN, "logps/rejected": report.PURPLE}
    colour = colours.get(metric, report.VERMILION if prefix else report.BLUE)
    image = draw([log(7, 0.6, prefix, (metric,))], tmp_path)  # one point: too short for a line
    assert where_drawn(image, colour) == {quadrant}
    for other in {report.BLUE, report.VERMILION, report.GREEN, report.PURPLE} - {colour}:
        assert not where_drawn(image, other)


@pytest.mark.parametrize(
    "log_history",
    [
        pytest.param([], id="nothing-logged"),
        pytest.param([{"step": 3, "train_runtime": 1.0}], id="only-the-summary"),
        pytest.param([log(step, math.nan) for step in range(3)], id="all-nan"),
        pytest.param([{"loss": 0.5}], id="no-step"),
    ],
)
def test_without_data_there_are_empty_panels(log_history: list[dict[str, Any]], tmp_path: Path) -> None:
    image = draw(log_history, tmp_path)
    assert torch.equal(image, draw([], tmp_path))
    assert not (image == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_leave_a_gap(value: float, tmp_path: Path) -> None:
    image = draw([log(1, 0.7), log(2, value), log(3, 0.4)], tmp_path)
    assert where_drawn(image, report.BLUE) == set(QUADRANTS[:3])


def test_long_runs_are_lines_without_dots(tmp_path: Path) -> None:
    ink = []
    for points in (report.FEW_POINTS, report.FEW_POINTS + 1):
        image = draw([log(step, 0.5, metrics=("loss",)) for step in range(points)], tmp_path)
        ink.append(pixels_of(image, report.BLUE).sum())
    assert ink[0] > 1.2 * ink[1]


def test_draws_without_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyplot has global state, and looks for a display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    importlib.reload(report)
    draw(WHOLE_RUN, tmp_path)


def test_table() -> None:
    rows = [("reward accuracy", "0.500", "0.994"), ("loss", "0.6931", "0.05")]
    assert report.summary_table(rows, ("held out", "before", "after")).splitlines() == [
        "┌─────────────────┬────────┬───────┐",
        "│ held out        │ before │ after │",
        "├─────────────────┼────────┼───────┤",
        "│ reward accuracy │  0.500 │ 0.994 │",
        "│ loss            │ 0.6931 │  0.05 │",
        "└─────────────────┴────────┴───────┘",
    ]


def test_table_of_two_columns_without_rows() -> None:
    assert report.summary_table([], ("a", "b")).splitlines() == [
        "┌───┬───┐",
        "│ a │ b │",
        "├───┼───┤",
        "└───┴───┘",
    ]


def test_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.summary_table([("a",)], ("a", "b"))

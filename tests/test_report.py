"""fastdpo.report and fastdpo.plots: the pictures of a run, the page and the tables."""

import base64
import hashlib
import importlib
import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fastdpo import plots, report
from fastdpo.metrics import Histogram

METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
PICTURES = ("training", "rewards", "reference", "lengths", "running")


def log(step: int, value: float, prefix: str = "", metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, **{prefix + metric: value for metric in metrics}}


def curves(panel: Axes) -> dict[str, str]:
    """Colours of the panel's curves by their labels."""
    return {str(line.get_label()): to_hex(line.get_color()).upper() for line in panel.lines if line.get_gid() is None}


def drawn(panel: Axes) -> set[str]:
    return {label for label in curves(panel) if not label.startswith("_")}  # those of reference lines do


def is_empty(panel: Axes) -> bool:
    return any(text.get_text() == "not logged" for text in panel.texts) and not panel.has_data()


WHOLE_RUN = [
    log(0, 0.5, "eval_"),
    *(log(step, 0.5 + step / 100) | {"tokens_per_second": 9.0} for step in range(1, 40)),
    log(39, 0.9, "eval_"),
    {"step": 39, "train_runtime": 1.0, "train_loss": 0.3},
]
SNAPSHOT = Histogram([-2.0, -1.0, 0.0, 1.0], [1.0, 0.0, 3.0])
HISTOGRAMS = {f"eval_rewards/{name}": [(0, SNAPSHOT), (39, SNAPSHOT)] for name in ("chosen", "rejected", "margins")}
HISTOGRAMS["eval_length"] = [(39, SNAPSHOT._replace(means=[0.5, math.nan, 1.0]))]


# Pictures


def test_curves_of_a_whole_run() -> None:
    loss, margin, accuracy, logps = plots.training(WHOLE_RUN).axes
    for panel in (loss, margin, accuracy):
        named = curves(panel)
        assert (named["training"], named["held out"]) == (plots.BLUE, plots.VERMILION)
    assert drawn(logps) == {"chosen", "chosen, held out", "rejected", "rejected, held out"}
    assert curves(logps)["chosen"] == curves(logps)["chosen, held out"] == plots.GREEN
    assert loss.lines[0].get_xydata().tolist() == [[step, 0.5 + step / 100] for step in range(1, 40)]


@pytest.mark.parametrize("prefix", ["", "eval_"], ids=["training", "held-out"])
@pytest.mark.parametrize(("metric", "index"), list(zip(METRICS, (0, 1, 2, 3, 3), strict=True)), ids=str)
def test_each_metric_alone_is_drawn_in_its_panel(metric: str, index: int, prefix: str) -> None:
    panels = plots.training([log(7, 0.6, prefix, (metric,))]).axes
    assert [is_empty(panel) for panel in panels] == [i != index for i in range(4)]
    curve = panels[index].lines[0]
    assert curve.get_marker() == "o"  # one point: too short for a line
    assert curve.get_xydata().tolist() == [[7, 0.6]]


@pytest.mark.parametrize(
    ("draw", "key", "index"),
    [
        (plots.reference, "rewards/chosen", 0),
        (plots.reference, "logps/chosen_below_ref", 1),
        (plots.reference, "kl_per_token", 2),
        (plots.running, "tokens_per_second", 0),
        (plots.running, "peak_memory_gib", 1),
        (plots.running, "padding_saved", 2),
        (plots.running, "head/density", 2),
        (plots.running, "grad_norm", 3),
        (lambda log_history: plots.lengths(log_history, {}), "rewards/length_correlation", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_else_is_logged_is_drawn_in_its_panel(
    draw: Callable[[list[dict[str, Any]]], Figure], key: str, index: int
) -> None:
    panels = draw([{"step": 3, key: 0.25}, {"step": 4, key: 0.0}]).axes
    assert [is_empty(panel) for panel in panels] == [i != index for i in range(len(panels))]
    assert panels[index].lines[0].get_xydata().tolist() == [[3, 0.25], [4, 0.0]]


@pytest.mark.parametrize(
    "log_history",
    [
        pytest.param([], id="nothing-logged"),
        pytest.param([{"step": 3, "train_runtime": 1.0}], id="only-the-summary"),
        pytest.param([log(step, math.nan) for step in range(3)], id="all-nan"),
        pytest.param([{"loss": 0.5}], id="no-step"),
        pytest.param([{"step": 1, "loss": "0.5", "logps/chosen": None}], id="no-numbers"),
    ],
)
def test_without_data_there_are_empty_panels(log_history: list[dict[str, Any]]) -> None:
    pictures = (plots.training(log_history), plots.reference(log_history), plots.running(log_history))
    for picture in (*pictures, plots.rewards({}), plots.lengths(log_history, {})):
        assert all(is_empty(panel) for panel in picture.axes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_leave_a_gap(value: float) -> None:
    loss = plots.training([log(1, 0.7), log(2, value), log(3, 0.4)]).axes[0]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([0.7, value, 0.4], nan_ok=True)
    assert all(map(math.isfinite, loss.get_ylim()))


def test_long_runs_are_lines_without_dots() -> None:
    for points, marker in ((plots.FEW_POINTS, "o"), (plots.FEW_POINTS + 1, "")):
        loss = plots.training([log(step, 0.5, metrics=("loss",)) for step in range(points)]).axes[0]
        assert loss.lines[0].get_marker() == marker


def test_every_held_out_split_is_drawn_and_told_apart() -> None:
    names = ("loss", "nll_loss", "rewards/chosen")
    log_history = [log(1, 0.5, f"eval_{split}", names) for split in ("math_", "chat_")]
    loss = plots.training(log_history).axes[0]
    assert drawn(loss) == {"held out (chat)", "held out (math)"}
    assert len({line.get_marker() for line in loss.lines[:2]}) == 2


def test_histograms_keep_their_shares() -> None:
    before, after, margin = plots.rewards(HISTOGRAMS).axes
    assert before.get_title("left") == "Rewards at step 0, held out"
    assert after.get_title("left") == "Rewards at step 39, held out"
    for panel, total in ((before, 1.0), (after, 1.0)):
        for side in panel.patches[1::2]:  # of the two of each side, the outline
            shares, edges, _ = side.get_data()
            assert shares.sum() == pytest.approx(total, abs=0.02)  # half a percent is off either end
            assert shares[edges[:-1] >= -1e-9].sum() == pytest.approx(0.75, abs=0.01)
            assert np.abs(edges).min() < 1e-9
    assert margin.patches[0].get_data().values.max() == 1


def test_histograms_of_training_serve_where_nothing_was_held_out() -> None:
    before, after, margin = plots.rewards({"rewards/chosen": [(10, SNAPSHOT)]}).axes
    assert before.get_title("left") == "Rewards at step 10, training"
    assert is_empty(after)
    assert is_empty(margin)


def test_a_histogram_of_nothing_but_zeros_is_drawn() -> None:
    at_zero = Histogram([0.0, 0.0005], [8.0])
    plots.rewards({f"rewards/{name}": [(0, at_zero)] for name in ("chosen", "rejected", "margins")})


def test_lengths_show_the_mean_margin_of_each_bin() -> None:
    profile = plots.lengths([], HISTOGRAMS).axes[0]
    offsets = np.ma.getdata(profile.collections[0].get_offsets())
    assert offsets[[0, 2]].tolist() == [[-1.5, 0.5], [0.5, 1.0]]


def test_draws_without_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyplot has global state, and looks for a display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    importlib.reload(plots)
    plots.training(WHOLE_RUN)


# The page


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are not rendered: that takes longer than everything else."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"png"))


def write(folder: Path, log_history: list[dict[str, Any]], **options: Any) -> Page:
    path = report.write_report(folder, log_history, **options)
    assert path == folder / "report.html"
    return Page(path)


def test_a_whole_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, WHOLE_RUN, histograms=HISTOGRAMS)
    images = page.attributes("img")
    for name, image in zip(PICTURES, images, strict=True):
        source = image["src"]
        assert source is not None
        assert (
            base64.b64decode(source.removeprefix("data:image/png;base64,")) == (tmp_path / f"{name}.png").read_bytes()
        )
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert pixels.shape[1] == 1650
        assert 0.5 < (pixels == 1).all(-1).mean() < 0.999  # mostly white, and not only
    assert not [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "srcset")]
    assert "://" not in page.source
    meta = next(meta for meta in page.attributes("meta") if "http-equiv" in meta)
    style = re.search(r"<style>(.*)</style>", page.source, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert meta == {"http-equiv": "Content-Security-Policy", "content": policy}


def test_everything_shown_is_escaped(tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "</title></style><script>alert(1)</script>\"'>&lt;"

    def fail(*_: Any) -> Figure:
        raise RuntimeError(evil)

    monkeypatch.setattr(plots, "running", fail)
    page = write(
        tmp_path,
        [{"step": 1, evil: 0.5, "loss": 0.1}],
        title=evil,
        config={evil: evil, "nested": {evil: [evil]}},
        defaults={evil: None},
        facts={evil: {evil: evil}},
        failure=evil,
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert {key for _, attributes in page.tags for key in attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "src", "alt")
    }
    assert (
        page.source.count(html_of(evil)) == 12
    )  # title, failure, picture, metric, settings, facts: 2 + 1 + 1 + 1 + 4 + 3


def html_of(text: str) -> str:
    return (
        text.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        .replace("'", "&#x27;")
    )


@pytest.mark.parametrize("log_history", [[], [{"step": 3}], [{"loss": 0.1}]], ids=["nothing", "only-a-step", "no-step"])
def test_a_run_that_logged_nothing_has_a_report(
    log_history: list[dict[str, Any]], tmp_path: Path, undrawn: None
) -> None:
    page = write(tmp_path / "new" / "folder", log_history)
    assert "Numbers" not in page.text
    assert len(page.attributes("img")) == len(PICTURES)


def test_settings_that_differ_come_first_and_secrets_never(tmp_path: Path, undrawn: None) -> None:
    config = {"beta": 0.123456789, "epochs": 1, "hub_token": "hf_secret1", "pad_token": "<pad>"}
    config |= {"model_init_kwargs": {"token": "hf_secret2", "dtype": "bfloat16"}}
    page = write(tmp_path, [], config=config, defaults={"epochs": 1, "beta": 0.1})
    differing, everything = page.source.split("<details>")
    assert "0.123456789" in differing
    assert "epochs" not in differing
    assert "epochs" in everything
    assert "secret" not in page.source
    assert all(name in page.source for name in ("hub_token", "bfloat16", "&lt;pad&gt;"))


def test_numbers_first_and_last(tmp_path: Path, undrawn: None) -> None:
    page = write(tmp_path, WHOLE_RUN)
    assert "<tr><td>eval_loss</td><td>0.5</td><td>0.9</td></tr>" in page.source
    assert "<dt>held-out reward accuracy</dt><dd>0.5 → 0.9</dd>" in page.source
    assert "<dt>tokens per second</dt><dd>9</dd>" in page.source


def test_a_run_that_broke_off_says_so(tmp_path: Path, undrawn: None) -> None:
    page = write(tmp_path, WHOLE_RUN[:5], failure="FloatingPointError: the loss of rows [3] is not finite")
    assert any("Broke off: FloatingPointError" in text for text in page.text)


def test_a_picture_that_fails_costs_only_itself(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plots, "rewards", lambda _: 1 / 0)
    page = write(tmp_path, WHOLE_RUN)
    assert len(page.attributes("img")) == len(PICTURES) - 1
    assert any("Could not be drawn: division by zero" in text for text in page.text)
    assert "rewards.png could not be drawn" in caplog.text


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.touch()
    assert report.write_report(file, WHOLE_RUN) is None
    assert "the report could not be written" in caplog.text


def test_versions_are_those_installed() -> None:
    assert report.versions()["torch"] == torch.__version__
    assert {"Python", "transformers"} <= report.versions().keys()


# Tables


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

"""fastdpo.report: the pictures of a run, the page and the tables."""

import base64
import errno
import hashlib
import importlib
import io
import math
import os
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

from fastdpo.report import facts, plots, samples
from fastdpo.report import page as page_module
from fastdpo.report.metrics import Histogram

METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def log(step: int, value: float, prefix: str = "", metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, **{prefix + metric: value for metric in metrics}}


def curves(panel: Axes) -> dict[str, str]:
    """Colours of the panel's curves by their labels."""
    return {str(line.get_label()): to_hex(line.get_color()).upper() for line in panel.lines if line.get_gid() is None}


def drawn(panel: Axes) -> set[str]:
    return {label for label in curves(panel) if not label.startswith("_")}  # those of reference lines do


def panels(figures: list[Figure]) -> dict[str, Axes]:
    """The panels of a picture by their titles."""
    return {figure.axes[0].get_title("left"): figure.axes[0] for figure in figures}


MARGIN = f"Reward margin, chosen {plots.MINUS} rejected"
LOGPS = "Log-probability of the responses"


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
    loss, margin, accuracy, logps = panels(plots.training(WHOLE_RUN)).values()
    for panel in (loss, margin, accuracy):
        named = curves(panel)
        assert (named["training"], named["held out"]) == (plots.BLUE, plots.VERMILION)
    assert drawn(logps) == {"chosen", "rejected", "held out"}
    colours = [to_hex(line.get_color()).upper() for line in logps.lines if len(np.asarray(line.get_xdata()))]
    assert colours == [plots.GREEN] * 2 + [plots.PURPLE] * 2  # each side's held-out curve has its colour
    assert loss.lines[0].get_xydata().tolist() == [[step, 0.5 + step / 100] for step in range(1, 40)]


@pytest.mark.parametrize("prefix", ["", "eval_"], ids=["training", "held-out"])
@pytest.mark.parametrize(
    ("metric", "title"),
    list(zip(METRICS, ("Loss", MARGIN, "Reward accuracy", LOGPS, LOGPS), strict=True)),
    ids=METRICS,
)
def test_each_metric_alone_is_drawn_in_its_panel(metric: str, title: str, prefix: str) -> None:
    found = panels(plots.training([log(7, 0.6, prefix, (metric,))]))
    assert [*found] == [title]
    curve = found[title].lines[0]
    assert curve.get_marker() == "o"  # one point: too short for a line
    assert curve.get_xydata().tolist() == [[7, 0.6]]


@pytest.mark.parametrize(
    ("draw", "key", "title"),
    [
        (plots.reference, "rewards/chosen", "Rewards"),
        (plots.reference, "logps/chosen_below_ref", "Displaced chosen responses"),
        (plots.reference, "kl_per_token", "Drift from the reference"),
        (plots.running, "tokens_per_second", "Throughput"),
        (plots.running, "peak_memory_gib", "Peak memory"),
        (plots.running, "padding_saved", "Shares of work"),
        (plots.running, "head/density", "Shares of work"),
        (plots.running, "grad_norm", "Gradient norm, before clipping"),
        (plots.running, "learning_rate", "Learning rate"),
        (
            lambda log_history: plots.lengths(log_history, {}),
            "rewards/length_correlation",
            "Correlation of margin and length",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_else_is_logged_is_drawn_in_its_panel(
    draw: Callable[[list[dict[str, Any]]], list[Figure]], key: str, title: str
) -> None:
    found = panels(draw([{"step": 3, key: 0.25}, {"step": 4, key: 0.0}]))
    assert [*found] == [title]
    assert found[title].lines[0].get_xydata().tolist() == [[3, 0.25], [4, 0.0]]


def test_a_run_shorter_than_logging_steps_has_a_loss() -> None:
    found = panels(plots.training([{"step": 3, "train_loss": 0.25}]))
    assert found["Loss"].lines[0].get_xydata().tolist() == [[3, 0.25]]
    both = panels(plots.training([{"step": 2, "loss": 0.5}, {"step": 3, "train_loss": 0.25}]))
    assert both["Loss"].lines[0].get_xydata().tolist() == [[2, 0.5]]


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
def test_without_data_there_are_no_panels(log_history: list[dict[str, Any]]) -> None:
    pictures = (plots.training(log_history), plots.reference(log_history), plots.running(log_history))
    for picture in (*pictures, plots.rewards({}), plots.lengths(log_history, {})):
        assert picture == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_leave_a_gap(value: float) -> None:
    loss = panels(plots.training([log(1, 0.7), log(2, value), log(3, 0.4)]))["Loss"]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([0.7, value, 0.4], nan_ok=True)
    assert all(map(math.isfinite, loss.get_ylim()))


def test_long_runs_are_lines_without_dots() -> None:
    for points, marker in ((plots.FEW_POINTS, "o"), (plots.FEW_POINTS + 1, "")):
        loss = panels(plots.training([log(step, 0.5, metrics=("loss",)) for step in range(points)]))["Loss"]
        assert loss.lines[0].get_marker() == marker


def test_very_long_runs_are_drawn_as_means_and_ranges() -> None:
    """A spike stays visible, a value that is not finite still leaves a gap, and no step is left out."""
    values = [1.0 + step % 2 for step in range(5000)]
    values[1000], values[3000] = 9.0, math.nan
    [figure] = plots.training([{"step": step, "loss": value} for step, value in enumerate(values)])
    panel = figure.axes[0]
    steps, means = np.asarray(panel.lines[0].get_xydata()).T
    assert len(steps) == 5000 / 25
    assert "mean and range of 25 records" in panel.get_xlabel()
    assert np.isnan(means).sum() == 1
    assert steps[np.isnan(means)] == np.mean(range(3000, 3025))
    assert means[0] == pytest.approx(np.mean(values[:25]))
    band = panel.collections[0].get_paths()[0].vertices
    assert np.nanmax(band[:, 1]) == 9.0
    assert np.nanmin(band[:, 1]) == 1.0


def test_every_held_out_split_is_drawn_and_told_apart() -> None:
    names = ("loss", "nll_loss", "rewards/chosen")
    log_history = [log(1, 0.5, f"eval_{split}", names) for split in ("math_", "chat_")]
    loss = panels(plots.training(log_history))["Loss"]
    assert drawn(loss) >= {"held out (chat)", "held out (math)"}
    assert len({line.get_marker() for line in loss.lines[:2]}) == 2


def test_histograms_keep_their_shares() -> None:
    before, after, margin = panels(plots.rewards(HISTOGRAMS)).values()
    assert (before.get_title("left"), after.get_title("left")) == ("Rewards at step 0", "Rewards at step 39")
    assert "held out" in before.get_xlabel()
    for panel, total in ((before, 1.0), (after, 1.0)):
        for side in panel.patches[1::2]:  # of the two of each side, the outline
            shares, edges, _ = side.get_data()
            assert shares.sum() == pytest.approx(total, abs=0.02)  # half a percent is off either end
            assert shares[edges[:-1] >= -1e-9].sum() == pytest.approx(0.75, abs=0.01)
            assert np.abs(edges).min() < 1e-9
    assert margin.patches[0].get_data().values.max() == 1


def test_histograms_of_training_serve_where_nothing_was_held_out() -> None:
    found = panels(plots.rewards({"rewards/chosen": [(10, SNAPSHOT)]}))
    assert [*found] == ["Rewards at step 10"]
    assert "training" in found["Rewards at step 10"].get_xlabel()


def test_a_histogram_of_nothing_but_zeros_is_drawn() -> None:
    at_zero = Histogram([0.0, 0.0005], [8.0])
    plots.rewards({f"rewards/{name}": [(0, at_zero)] for name in ("chosen", "rejected", "margins")})


def test_lengths_show_the_mean_margin_of_each_bin() -> None:
    [figure] = plots.lengths([], HISTOGRAMS)
    profile = figure.axes[0]
    offsets = np.ma.getdata(profile.collections[0].get_offsets())
    assert offsets[[0, 2]].tolist() == [[-1.5, 0.5], [0.5, 1.0]]


def test_draws_without_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyplot has global state, and looks for a display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    importlib.reload(plots)
    plots.training(WHOLE_RUN)


# What a reader sees of them


LONG = "a_split_whose_name_is_longer_than_any_legend_of_a_panel_may_be"


def run_of(records: int, every: int = 1, splits: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    """A log history with every metric that is drawn, and ten evaluations."""
    metrics = (*METRICS, "rewards/chosen", "rewards/rejected", "kl_per_token", "logps/chosen_below_ref")
    history = []
    for i in range(records):
        step = every * (i + 1)
        history.append(log(step, math.sin(i) - 1e-6 * i, "", metrics) | {"grad_norm": 12.5 + i, "learning_rate": 1e-6})
        history[-1] |= {"tokens_per_second": 1.2e6 + i, "peak_memory_gib": 61.0, "padding_saved": 0.4}
        if i % max(records // 10, 1) == 0:
            history += [log(step, math.cos(i), f"eval_{split}", metrics) for split in splits]
    return history


LAYOUTS = {
    "one-record": run_of(1),
    "few": run_of(5),
    "many": run_of(1000, every=1000),
    "splits": run_of(30, splits=(f"{LONG}_", "chat_", "mathematics_", f"z{LONG}_", "code_", "law_")),
    "diverged": [log(step, 0.69 * 7.0**step, metrics=("loss", "logps/chosen")) for step in range(60)],
    "flat": [log(step, 0.6931 + 1e-9 * step) for step in range(20)],
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_nothing_covers_anything(case: str) -> None:
    """Title, legend, data and each axis' labels have places of their own, all inside the picture."""
    history = LAYOUTS[case]
    step = max(entry["step"] for entry in history)
    named = f"eval_{LONG}_" if case == "splits" else "eval_"
    histograms = {
        name.replace("eval_", named): [(0, each[-1][1]), (step, each[-1][1])] for name, each in HISTOGRAMS.items()
    }
    figures = [*plots.training(history), *plots.reference(history), *plots.running(history)]
    for figure in figures + plots.rewards(histograms) + plots.lengths(history, histograms):
        plots.pixels(figure)
        [panel] = figure.axes
        legend = panel.get_legend()
        assert legend is not None
        boxes = [panel.get_window_extent(), legend.get_window_extent(), panel._left_title.get_window_extent()]
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [label.get_window_extent() for label in shown]
            assert 2 <= len(labels) <= 8
            assert len({label.get_text() for label in shown}) == len(labels)
            assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i]), shown
            assert not any(label.overlaps(box) for label in labels for box in boxes[1:])
            assert not axis.get_offset_text().get_text()
            boxes.append(axis.label.get_window_extent())
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), panel.get_title("left")
            assert figure.bbox.contains(box.x0, box.y0), (panel.get_title("left"), box)
            assert figure.bbox.contains(box.x1, box.y1), (panel.get_title("left"), box)
        assert panel.get_window_extent().height > 0.2 * figure.bbox.height
        assert panel.get_window_extent().width > 0.5 * figure.bbox.width


def test_shares_are_in_percent() -> None:
    for figures in (plots.training(WHOLE_RUN), plots.reference([{"step": 1, "logps/chosen_below_ref": 0.2}])):
        for title, panel in panels(figures).items():
            labels = [label.get_text() for label in panel.yaxis.get_ticklabels()]
            assert all(label.endswith("%") for label in labels) == (title in ("Reward accuracy", *PERCENT)), title


PERCENT = ("Displaced chosen responses",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.25, "0.25"), (-81.5, "\N{MINUS SIGN}81.5"), (50000, "50,000"), (1.2e6, "1,200,000")),
        *((2e-7, "2e\N{MINUS SIGN}7"), (6.9e30, "6.9e30"), (0.1 + 0.2, "0.3")),
    ],
)
def test_numbers_beside_an_axis_are_short(value: float, text: str) -> None:
    assert plots._tick(value) == text


def test_rounding_does_not_look_like_a_curve() -> None:
    [figure] = plots.training([log(step, -81.0 + 1e-6 * step, metrics=("logps/chosen",)) for step in range(9)])
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 0.08


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
    monkeypatch.setattr(plots, "pixels", lambda _: np.zeros((1, 1, 4), np.uint8))


def write(folder: Path, log_history: list[dict[str, Any]], **options: Any) -> Page:
    path = page_module.write_report(folder, log_history, **options)
    assert path == folder / "report.html"
    return Page(path)


def test_a_whole_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, WHOLE_RUN, histograms=HISTOGRAMS)
    images = page.attributes("img")
    assert [image["alt"] for image in images] == [
        *("Loss", MARGIN, "Reward accuracy", LOGPS, "Rewards at step 0", "Rewards at step 39", "Reward margin"),
        *("Margin by length (area: share of pairs)", "Throughput"),
    ]
    width, height = (int(inches * plots.DPI) for inches in plots.SIZE)
    for image in images:
        source = image["src"]
        assert source is not None
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        pixels = matplotlib.image.imread(io.BytesIO(png), format="png")
        assert pixels.shape[:2] == (height, width)
        assert 0.5 < (pixels == 1).all(-1).mean() < 0.999  # mostly white, and not only
    files = {path.name: path for path in tmp_path.iterdir()}
    assert files.keys() == {"report.html", "training.png", "rewards.png", "lengths.png", "running.png"}
    assert matplotlib.image.imread(files["training.png"]).shape[:2] == (2 * height, 2 * width)
    assert matplotlib.image.imread(files["rewards.png"]).shape[:2] == (height, 3 * width)
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
        about={"command": facts.command_line([evil]), evil: evil},
        config={evil: evil, "nested": {evil: [evil]}},
        given={evil: evil},
        facts={evil: {evil: evil}},
        samples=[samples.Sample([1], evil, evil, evil, evil)],
        failure=evil,
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert {key for _, attributes in page.tags for key in attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "src", "alt")
    }
    # title 2, failure 1, fact about the run 2, metric 1, picture 1, samples 4, settings 4, facts 3
    assert page.source.count(html_of(evil)) == 18


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
    assert not page.attributes("img")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]


def test_pictures_of_an_earlier_run_do_not_stay(tmp_path: Path, undrawn: None) -> None:
    write(tmp_path, WHOLE_RUN, histograms=HISTOGRAMS)
    write(tmp_path, WHOLE_RUN)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "training.png", "running.png"}


def test_settings_that_were_set_come_first_and_secrets_never(tmp_path: Path, undrawn: None) -> None:
    config = {"beta": 0.123456789, "epochs": 1, "hub_token": "hf_secret1", "pad_token": "<pad>"}
    config |= {"model_init_kwargs": {"token": "hf_secret2", "dtype": "bfloat16"}}
    page = write(tmp_path, [], config=config, given={name: config[name] for name in ("beta", "hub_token")})
    differing, everything = page.source.split("<details>")
    assert "0.123456789" in differing
    assert "epochs" not in differing
    assert "epochs" in everything
    assert "secret" not in page.source
    assert all(name in page.source for name in ("hub_<wbr>token", "bfloat16", "&lt;pad&gt;"))


def test_numbers_first_and_last(tmp_path: Path, undrawn: None) -> None:
    page = write(tmp_path, WHOLE_RUN)
    assert "<tr><td>eval_<wbr>loss</td><td>0.5</td><td>0.9</td></tr>" in page.source
    assert "<dt>held out: reward accuracy</dt><dd>50.0% → 90.0%</dd>" in page.source
    assert "<dt>tokens per second</dt><dd>9</dd>" in page.source


def test_a_run_that_broke_off_says_so(tmp_path: Path, undrawn: None) -> None:
    page = write(tmp_path, WHOLE_RUN[:5], failure="FloatingPointError: the loss of rows [3] is not finite")
    assert any("Broke off: FloatingPointError" in text for text in page.text)
    assert "<title>DPO run (broke off)</title>" in page.source


def test_what_is_told_about_the_run_and_its_samples(tmp_path: Path, undrawn: None) -> None:
    shown = [samples.Sample([1], "2+2=", "4", "22 …", None), samples.Sample([2], "Say nothing.", "", "", "No.")]
    page = write(tmp_path, WHOLE_RUN, about={"device": "an abacus"}, samples=shown)
    text = [part for part in page.text if part.strip()]
    assert text[text.index("device") + 1] == "an abacus"
    cards = text[text.index("Sample generations") :][2 : 2 + 16]
    names = ("prompt", "before", "after", "chosen, in the dataset")
    first, second = ("2+2=", "22 …", "(not generated)", "4"), ("Say nothing.", "(nothing)", "No.", "(nothing)")
    assert cards == [part for card in (first, second) for pair in zip(names, card, strict=True) for part in pair]
    assert "Sample generations" not in write(tmp_path, WHOLE_RUN).text


@pytest.mark.parametrize(
    ("config", "known"),
    [
        *(({}, True), ({"loss_type": ["robust"]}, True), ({"loss_type": ["kto"]}, False)),
        *(({"use_weighting": True}, False), ({"loss_type": ["sigmoid", "sft"]}, False)),
    ],
    ids=str,
)
def test_the_loss_is_compared_with_ln_2_only_where_it_starts_there(config: dict[str, Any], known: bool) -> None:
    assert page_module.first_loss(config) == (math.log(2) if known else None)


def test_a_run_that_logged_nothing_leaves_an_earlier_report(
    tmp_path: Path, undrawn: None, caplog: pytest.LogCaptureFixture
) -> None:
    before = write(tmp_path, WHOLE_RUN).source
    assert page_module.write_report(tmp_path, [], failure="interrupted", keep=True) is None
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert "report.html is still that of an earlier run" in caplog.text
    write(tmp_path / "new", [], failure="interrupted", keep=True)  # nothing to keep there


@pytest.mark.parametrize("full_at", [0, 1], ids=["page", "picture"])
def test_a_full_disk_leaves_whole_files(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full_at: int
) -> None:
    write(tmp_path, WHOLE_RUN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:  # of a file, then of its folder
        calls.append(descriptor)
        if len(calls) <= 2 * full_at:
            return fsync(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert page_module.write_report(tmp_path, WHOLE_RUN[:5], title="another") is None
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()  # nothing half-written is left
    assert after["training.png"] == before["training.png"]
    assert (after["report.html"] == before["report.html"]) == (full_at == 0)
    [line] = caplog.messages
    assert "No space left on device" in line
    assert "\n" not in line


def test_a_picture_that_fails_costs_only_itself(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plots, "rewards", lambda _: 1 / 0)
    page = write(tmp_path, WHOLE_RUN)
    assert len(page.attributes("img")) == 5
    assert any("Could not be drawn: ZeroDivisionError: division by zero" in text for text in page.text)
    assert "rewards.png could not be drawn" in caplog.text


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.touch()
    assert page_module.write_report(file, WHOLE_RUN) is None
    assert "the report could not be written" in caplog.text


# Facts


def test_versions_are_those_installed() -> None:
    assert facts.versions()["torch"] == torch.__version__
    assert {"Python", "transformers"} <= facts.versions().keys()


def test_the_device_has_a_name() -> None:
    assert facts.device(torch.device("cpu"), 2).endswith(", 2 processes")
    assert facts.device(torch.device("cpu"), 1).endswith(", 1 process")
    assert len(facts.device(torch.device("cpu"), 1).split(",")[0]) > 2


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train", "my run.yaml", "--beta", "0.2"], "fastdpo train 'my run.yaml' --beta 0.2"),
        (["--hub_token", "abc", "--beta=1"], "fastdpo --hub_token '(hidden)' --beta=1"),
        (["--hub-token=abc"], "fastdpo '--hub-token=(hidden)'"),
        (["--model_init_kwargs", "{token: abc}"], "fastdpo --model_init_kwargs '(hidden)'"),
        (["--model_init_kwargs={dtype: bfloat16}"], "fastdpo '--model_init_kwargs={dtype: bfloat16}'"),
        (["--run_name", "a: b: c", "x"], "fastdpo --run_name 'a: b: c' x"),
        (["--dataset_name", "https://me:abc@host/a"], "fastdpo --dataset_name 'https://(hidden)@host/a'"),
        (["--run_name", "hf_ABCDEFGHIJKLMNOPQRST"], "fastdpo --run_name '(hidden)'"),
        (["--pad_token", "<pad>", "--learning_rate", "1e-6"], "fastdpo --pad_token '<pad>' --learning_rate 1e-6"),
        (["--x", "$(rm -rf ~); `id`"], "fastdpo --x '$(rm -rf ~); `id`'"),
    ],
)
def test_the_command_can_be_typed_again_and_holds_no_secret(words: list[str], command: str) -> None:
    assert facts.command_line(words) == command
    assert "abc" not in command


# Tables


def test_table() -> None:
    rows = [("reward accuracy", "0.500", "0.994"), ("loss", "0.6931", "0.05")]
    assert page_module.summary_table(rows, ("held out", "before", "after")).splitlines() == [
        "┌─────────────────┬────────┬───────┐",
        "│ held out        │ before │ after │",
        "├─────────────────┼────────┼───────┤",
        "│ reward accuracy │  0.500 │ 0.994 │",
        "│ loss            │ 0.6931 │  0.05 │",
        "└─────────────────┴────────┴───────┘",
    ]


def test_table_of_two_columns_without_rows() -> None:
    assert page_module.summary_table([], ("a", "b")).splitlines() == [
        "┌───┬───┐",
        "│ a │ b │",
        "├───┼───┤",
        "└───┴───┘",
    ]


def test_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="shorter"):
        page_module.summary_table([("a",)], ("a", "b"))

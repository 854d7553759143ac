"""Write a run's `report.html` with its PNGs, and plain-text tables. Nothing is computed here.

The page is one file that loads nothing and runs no scripts: pictures are data URIs, all text is escaped, and a
Content-Security-Policy forbids everything else.
"""

import base64
import hashlib
import html
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.image import imsave

from fastdpo.checks import LN_2_AT_FIRST
from fastdpo.report import plots
from fastdpo.report.facts import without_secrets
from fastdpo.settings.files import write_file

logger = logging.getLogger("fastdpo")

CSS = """
:root { color-scheme: light dark; --ink: #333; --soft: #595959; --line: #E6E6E6; --page: #fff; --link: #0072B2;
  --warn: #FDF3EC; --card: #F7F7F7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #DDD; --soft: #A8A8A8; --line: #3A3A3A; --page: #121212; --link: #6CB8E6; --warn: #3A2418;
    --card: #1E1E1E; }
  img { filter: invert(.93) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1100px;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: clamp(1.25rem, 4vw, 1.7rem); line-height: 1.2; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: .6rem 0 .1rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 75ch; }
pre { font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  max-height: 15rem; overflow-y: auto; }
.stopped { border-left: 4px solid #D55E00; background: var(--warn); color: var(--ink); padding: .7rem 1rem;
  max-width: none; overflow-wrap: anywhere; }
dl { display: grid; gap: .8rem; margin: 1.2rem 0; grid-template-columns: repeat(2, minmax(0, 1fr)); }
dl div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; overflow-wrap: anywhere; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.panels, .responses { display: grid; gap: .6rem 1rem; grid-template-columns: minmax(0, 1fr); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .4rem 1rem 1rem;
  margin: .8rem 0; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
td:first-child { overflow-wrap: normal; }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap; padding: .25rem 0 .25rem .9rem; }
.code td { font-family: ui-monospace, monospace; font-size: .8rem; }
summary { cursor: pointer; margin: .8rem 0; color: var(--link); }
@media (min-width: 700px) {
  dl { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .of2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .of3, .responses { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
"""

# metric, label and format; None: a number of four digits
TILES = (
    ("rewards/accuracies", "reward accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin, nats", None),
    ("loss", "loss", None),
    ("logps/chosen_below_ref", "displaced chosen responses", "{:.1%}"),
    ("kl_per_token", "drift, nats per token", None),
    ("tokens_per_second", "tokens per second", None),
    ("peak_memory_gib", "peak memory, GiB", None),
)
# what the tables of results show: metric, label, format
RESULTS = (
    ("rewards/accuracies", "reward accuracy", "{:.3f}"),
    ("rewards/margins", "reward margin", "{:+.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("logps/chosen", "log-prob of chosen", "{:.2f}"),
    ("logps/rejected", "log-prob of rejected", "{:.2f}"),
)
_MOVES_THE_START = ("loss_weights", "use_weighting", "rpo_alpha", "reference_free")


def write_report(
    folder: str | PathLike[str],
    log_history: Sequence[Mapping[str, Any]],
    *,
    title: str = "DPO run",
    about: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    histograms: plots.Histograms | None = None,
    samples: Sequence[Any] = (),
    failure: str | None = None,
    keep: bool = False,
) -> Path | None:
    """Write `report.html` and its PNGs into `folder`, which is made if it does not exist.

    It never raises, so that a picture can't spoil a finished training: what can't be drawn or written is logged and
    omitted. Metrics that were not logged, by an older version or in a run that stopped early, are omitted too. An
    earlier page is replaced only once the new one is complete.

    Args:
        folder: where to write; files of an earlier report are replaced.
        log_history: `trainer.state.log_history`.
        title: heading of the page.
        about: facts shown below the heading: command line, date, device.
        config: all settings of the run. Values of names like `hub_token` are not shown, at any depth.
        given: the settings that the user set; the page shows them first.
        facts: further tables by heading, such as versions.
        histograms: the first and the last of each name, `{name: [(step, fastdpo.report.metrics.Histogram), ...]}`.
        samples: generations, see `fastdpo.report.samples.Sample`.
        failure: why the run stopped early; None if it did not.
        keep: keep the report of an earlier run if there is one, because this run logged no training step.

    Returns:
        The page's path; None if it was not written.
    """
    folder = Path(folder)
    page = folder / "report.html"
    if keep and page.is_file():
        logger.warning("%s is still that of an earlier run, because this run logged no training step", page)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = config or {}
        pictures, drawings = _draw_all(log_history, histograms or {}, config)
        stopped = [] if failure is None else [f'<p class="stopped">Broke off: {_text(failure)}</p>']
        body = [f"<h1>{_text(title)}</h1>", *stopped, _table((about or {}).items()) if about else ""]
        body += [_tiles(log_history), _splits_note(log_history), *drawings]
        body += [_samples(samples), _numbers(log_history), _settings(config, given or {})]
        for heading, table in (facts or {}).items():
            body.append(f"<h2>{_text(heading)}</h2>" + _table(table.items()))
        write_file(page, _page(title + " (broke off)" * bool(failure), body).encode())
        for name in PICTURES:
            if name in pictures:
                write_file(folder / f"{name}.png", pictures[name])
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)  # left by an earlier run
    except Exception as error:
        left = "; the report of an earlier run is still there" * page.is_file()
        debug = logger.isEnabledFor(logging.DEBUG)
        logger.warning("the report could not be written to %s: %s%s", folder, _reason(error), left, exc_info=debug)
        return None
    return page


def _page(title: str, body: Iterable[str]) -> str:
    style = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>",
            *filter(None, body),
            "</body>\n</html>\n",
        )
    )


PICTURES = {
    "training": ("Training", "Curves over the optimizer steps; those of held-out examples are dotted."),
    "rewards": (
        "Rewards, first and last",
        "Chosen and rejected should separate. If both move left, all responses lose probability to unseen ones.",
    ),
    "reference": (
        "Against the reference",
        "While the margin grows, chosen responses can still become less likely. This is called displacement.",
    ),
    "lengths": (
        "Length bias",
        "If margins grow with the difference of lengths, the policy may simply prefer long responses.",
    ),
    "running": (
        "How it ran",
        "Tokens are those of full sequences, in which a prompt counts once for each response. Memory is that of the "
        "process that needed most.",
    ),
}
"""From the name of each PNG to its heading and caption."""


def _draw_all(
    log_history: plots.LogHistory, histograms: plots.Histograms, config: Mapping[str, Any]
) -> tuple[dict[str, bytes], list[str]]:
    """Draw all pictures that have data; return their PNGs by name, and their headings and panels as HTML."""
    draw = {
        "training": lambda: plots.training(log_history, first_loss(config)),
        "rewards": lambda: plots.rewards(histograms),
        "reference": lambda: plots.reference(log_history),
        "lengths": lambda: plots.lengths(log_history, histograms),
        "running": lambda: plots.running(log_history),
    }
    pngs, parts = {}, []
    for name, (heading, caption) in PICTURES.items():
        try:
            if not (figures := draw[name]()):
                continue
            panels = [plots.pixels(figure) for figure in figures]
            pngs[name] = _png(plots.tile(panels))
            images = [_image(figure, _png(panel)) for figure, panel in zip(figures, panels, strict=True)]
            shown = f'<div class="panels of{plots.columns_of(len(panels))}">\n' + "\n".join(images) + "\n</div>"
        except Exception as error:
            debug = logger.isEnabledFor(logging.DEBUG)
            logger.warning("the picture %s.png could not be drawn: %s", name, _reason(error), exc_info=debug)
            shown = f'<p class="stopped">Could not be drawn: {_text(_reason(error))}</p>'
        parts.append(f"<h2>{_text(heading)}</h2>\n<p>{_text(caption)}</p>\n{shown}")
    return pngs, parts


def first_loss(config: Mapping[str, Any]) -> float | None:
    """Return ln 2 if that is the objective's loss while the policy is its reference; else None."""
    names = config.get("loss_type", ["sigmoid"])
    known = len(names) == 1 and names[0] in LN_2_AT_FIRST and not any(map(config.get, _MOVES_THE_START))
    return math.log(2) if known else None


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    imsave(file, picture, format="png", dpi=plots.DPI)
    return file.getvalue()


def _image(figure: Figure, png: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<img src="{source}" alt="{_text(figure.axes[0].get_title("left"))}">'


def _tiles(log_history: plots.LogHistory) -> str:
    """Return tiles with the first and last value of main metrics, of the first held-out split if there is one."""
    tiles = []
    for key, label, form in TILES:
        splits = [prefix for prefix in plots.prefixes(log_history) if plots.values(log_history, prefix + key)]
        values = plots.values(log_history, (splits[0] if splits else "") + key)
        if not values:
            continue
        first, last = (form.format(value) if form else _number(value) for value in (values[0], values[-1]))
        shown = f"{first} → {last}" if splits and first != last else last
        where = f"{plots.split_name(splits[0])}: " if splits else ""
        tiles.append(f"<div><dt>{_text(where)}{label}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(tiles)}</dl>" if tiles else ""


def _splits_note(log_history: plots.LogHistory) -> str:
    drawn, found = len(plots.MARKERS), len(plots.prefixes(log_history)) - 1
    if found < drawn:
        return ""
    return f"<p>The pictures show the first {drawn - 1} of {found} held-out splits; the numbers cover all.</p>"


def _samples(samples: Sequence[Any]) -> str:
    """Return each prompt with the answers before and after training, and the dataset's response, as HTML."""
    cards = []
    for sample in samples:
        responses = (("before", sample.before), ("after", sample.after), ("chosen, in the dataset", sample.chosen))
        columns = "".join(
            f"<div><h3>{name}</h3><pre>{_text('(not generated)' if text is None else text or '(nothing)')}</pre></div>"
            for name, text in responses
        )
        cards.append(
            f'<div class="sample"><h3>prompt</h3><pre>{_text(sample.prompt)}</pre>\n'
            f'<div class="responses">{columns}</div></div>'
        )
    heading = "<h2>Sample generations</h2>\n<p>Answers to held-out prompts, decoded greedily; … ends a cut one.</p>\n"
    return heading + "\n".join(cards) if cards else ""


def _numbers(log_history: plots.LogHistory) -> str:
    """Return a table with the first and last value of everything that was logged over the steps."""
    keys = dict.fromkeys(key for entry in log_history for key in entry if key not in ("step", "epoch"))
    rows = [
        (key, _number(values[0]), _number(values[-1])) for key in keys if (values := plots.values(log_history, key))
    ]
    return "<h2>Numbers</h2>\n" + _table(rows, ("metric", "first", "last")) if rows else ""


def _settings(config: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if not config and not given:
        return ""
    everything = sorted(without_secrets(config).items())
    shown = _table(without_secrets(given).items(), kind="code") if given else "<p>None was set.</p>"
    details = f"<details><summary>All {len(config)} settings</summary>{_table(everything, kind='code')}</details>"
    return f"<h2>Settings</h2>\n{shown}\n{details}"


def _table(rows: Iterable[tuple[Any, ...]], headers: tuple[str, ...] = (), kind: str = "") -> str:
    def line(cells: tuple[Any, ...], tag: str) -> str:
        name, *others = map(_text, cells)
        name = name.replace("_", "_<wbr>")  # a browser may break a long name here
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in (name, *others)) + "</tr>"

    kind = "numbers code" if headers else kind
    lines = [line(headers, "th")] if headers else []
    body = "\n".join(lines + [line(row, "td") for row in rows])
    return f'<div class="scroll"><table class="{kind}">\n{body}\n</table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _number(value: float) -> str:
    """Format a number with four digits, or with all digits before the point if it is large."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def results(log_history: plots.LogHistory, prefix: str = "eval_") -> list[tuple[str, str, str]]:
    """Return label, first and last value of the main metrics that were logged under a prefix; empty if none was."""
    return [
        (label, form.format(values[0]), form.format(values[-1]))
        for name, label, form in RESULTS
        if (values := plots.values(log_history, prefix + name))
    ]


def summary_table(rows: Sequence[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    """Return a table in box-drawing characters; the first column is aligned left, the others right.

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

"""What a finished run leaves to look at: `report.html` with its PNGs, and plain-text tables. Computes nothing.

The page is one file that loads nothing and runs nothing: pictures are data URIs, everything shown is escaped, and a
Content-Security-Policy forbids the rest.
"""

import base64
import contextlib
import hashlib
import html
import logging
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastdpo import plots

logger = logging.getLogger("fastdpo")

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #333; background: #fff; max-width: 1100px; margin: 2.5rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; }
p { margin: .2rem 0 .8rem; color: #595959; max-width: 75ch; }
.stopped { border-left: 4px solid #D55E00; background: #FDF3EC; color: #333; padding: .7rem 1rem; max-width: none;
  overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
dl div { flex: 1 1 11rem; border: 1px solid #E6E6E6; border-radius: 8px; padding: .7rem 1rem; }
dt { color: #595959; font-size: .85rem; }
dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #E6E6E6; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: #595959; font-size: .85rem; }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap; padding: .25rem 0 .25rem 1.5rem; }
td:first-child { font-family: ui-monospace, monospace; font-size: .85rem; }
summary { cursor: pointer; margin: .8rem 0; color: #0072B2; }
"""

TILES = (
    ("rewards/accuracies", "reward accuracy"),
    ("rewards/margins", "reward margin, nats"),
    ("loss", "loss"),
    ("logps/chosen_below_ref", "displaced chosen responses"),
    ("kl_per_token", "drift, nats per token"),
    ("tokens_per_second", "tokens per second"),
    ("peak_memory_gib", "peak memory, GiB"),
)
HIDDEN = re.compile(r"(^|hub_|auth_|api_|access_)(token|key)$|password|secret", re.IGNORECASE)


def write_report(
    folder: str | PathLike[str],
    log_history: Sequence[Mapping[str, Any]],
    *,
    title: str = "DPO run",
    config: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    histograms: plots.Histograms | None = None,
    failure: str | None = None,
) -> Path | None:
    """Write `report.html` and its PNGs into `folder`, which is made where missing.

    It never raises, so that no finished training is lost over a picture: what can't be drawn or written is logged and
    left out. Whatever is missing or was not logged, by an older version or in a run that broke off, is left out too.

    Args:
        folder: where to write; files of an earlier report are replaced.
        log_history: `trainer.state.log_history`.
        title: heading of the page.
        config: all settings of the run. Values of names like `hub_token` are not shown, at any depth.
        defaults: what they would be if not set; settings that differ from these come first.
        facts: tables to show as they are, by heading: versions, the machine, statistics of the dataset.
        histograms: the first and the last of each name, `{name: [(step, fastdpo.metrics.Histogram), ...]}`.
        failure: what the run broke off with, if it did.

    Returns:
        The page's path; None if it could not be written.
    """
    try:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _draw_all(folder, log_history, histograms or {})
        body = [f"<h1>{_text(title)}</h1>"]
        if failure is not None:
            body.append(f'<p class="stopped">Broke off: {_text(failure)}</p>')
        body += [_tiles(log_history), *pictures, _numbers(log_history), _settings(config or {}, defaults or {})]
        for heading, table in (facts or {}).items():
            body.append(f"<h2>{_text(heading)}</h2>" + _table(table.items()))
        page = folder / "report.html"
        page.write_text(_page(title, body), encoding="utf-8")
    except Exception:
        logger.exception("the report could not be written to %s", folder)
        return None
    return page


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run's numbers depend on, for `facts`."""
    found = {"Python": platform.python_version()}
    for name in ("fastdpo", "torch", "triton", "transformers", "accelerate", "datasets", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _page(title: str, body: Iterable[str]) -> str:
    style = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        )
    )


def _draw_all(folder: Path, log_history: plots.LogHistory, histograms: plots.Histograms) -> list[str]:
    """Draw each picture and embed it under its heading."""
    draw: dict[str, tuple[str, str, Callable[[], Figure]]] = {
        "training": (
            "Training",
            "Dotted lines are held out. The loss starts at ln 2 where the policy is its own reference.",
            lambda: plots.training(log_history),
        ),
        "rewards": (
            "Rewards, first and last",
            "The two sides should part. Where both move left, all responses lose probability to unseen ones.",
            lambda: plots.rewards(histograms),
        ),
        "reference": (
            "Against the reference",
            "A widening margin can hide that chosen responses become less likely too: displacement.",
            lambda: plots.reference(log_history),
        ),
        "lengths": (
            "Length bias",
            "A margin that grows with the difference of lengths may be a preference for long responses.",
            lambda: plots.lengths(log_history, histograms),
        ),
        "running": (
            "Throughput and memory",
            "Tokens are those of full sequences, prompts counted for each response.",
            lambda: plots.running(log_history),
        ),
    }
    parts = []
    for name, (heading, caption, function) in draw.items():
        picture = folder / f"{name}.png"
        try:
            function().savefig(picture, format="png")
            source = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
            shown = f'<img src="{source}" alt="{_text(heading)}">'
        except Exception as error:
            logger.exception("%s could not be drawn", picture)
            shown = f'<p class="stopped">Could not be drawn: {_text(error)}</p>'
        parts.append(f"<h2>{_text(heading)}</h2>\n<p>{_text(caption)}</p>\n{shown}")
    return parts


def _tiles(log_history: plots.LogHistory) -> str:
    """The last number of each kind, held out where it was, from the first where that is another."""
    tiles = []
    for key, label in TILES:
        held_out = plots.values(log_history, f"eval_{key}")
        values = held_out or plots.values(log_history, key)
        if not values:
            continue
        first, last = _number(values[0]), _number(values[-1])
        shown = f"{first} → {last}" if held_out and first != last else last
        where = "held-out " if held_out else ""
        tiles.append(f"<div><dt>{where}{label}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(tiles)}</dl>" if tiles else ""


def _numbers(log_history: plots.LogHistory) -> str:
    """First and last of everything that was logged over the steps."""
    keys = dict.fromkeys(key for entry in log_history for key in entry if key not in ("step", "epoch"))
    rows = [
        (key, _number(values[0]), _number(values[-1])) for key in keys if (values := plots.values(log_history, key))
    ]
    return "<h2>Numbers</h2>\n" + _table(rows, ("metric", "first", "last")) if rows else ""


def _settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    if not config:
        return ""
    shown = {name: _without_secrets(name, value) for name, value in config.items()}
    changed = [(name, shown[name]) for name in config if name not in defaults or config[name] != defaults[name]]
    return (
        "<h2>Settings that differ from the defaults</h2>\n"
        + (_table(changed) if changed else "<p>None.</p>")
        + f"\n<details><summary>All {len(config)} settings</summary>{_table(sorted(shown.items()))}</details>"
    )


def _without_secrets(name: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(key, each) for key, each in value.items()}
    return "(hidden)" if value and HIDDEN.search(str(name)) else value


def _table(rows: Iterable[tuple[Any, ...]], headers: tuple[str, ...] = ()) -> str:
    def line(cells: tuple[Any, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = ' class="numbers"' if headers else ""
    body = "\n".join([line(headers, "th")] * bool(headers) + [line(row, "td") for row in rows])
    return f'<div class="scroll"><table{kind}>\n{body}\n</table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float) -> str:
    """Four digits, or all of a large number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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

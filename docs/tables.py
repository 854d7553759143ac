"""Write the tables of the pages that say what the code says: python -m docs.tables.

The settings and their defaults come from the source of fastdpo's configs, what TRL has from TRL itself, and figures
from the measurements in benchmarks/results/.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
MARK = "<!-- python -m docs.tables writes {} -->\n"


def write() -> None:
    """Replace the tables of all pages."""
    from fastdpo.benchmarks.report import replace

    for name, tables in PAGES.items():
        for title, table in tables().items():
            replace(DOCS / name, MARK.format(title), MARK.format(f"{title}, up to here"), table)


def settings() -> dict[str, str]:
    """Return the tables of settings.md: fastdpo's own settings, by their headings in the help."""
    from fastdpo.settings.fields import TRANSFORMERS, settings

    parts = []
    for group, found in groupby(settings().values(), lambda setting: setting.group):
        if group != TRANSFORMERS:
            rows = [(f"`{each.name}`", f"`{each.default}`", each.help) for each in found]
            parts.append(f"\n## {group}\n\n" + _table(("setting", "default", "what it does"), rows))
    return {"the settings": "".join(parts) + "\n"}


def migrating() -> dict[str, str]:
    """Return the tables of migrating.md, by their names there.

    Raises:
        KeyError: fastdpo lacks an argument or a field of TRL's.
    """
    import trl
    from transformers import TrainingArguments

    import fastdpo
    from fastdpo.settings.names import OLD_NAMES

    documented = _arguments_of(inspect.getdoc(fastdpo.DPOTrainer) or "")
    names = [name for name in inspect.signature(trl.DPOTrainer.__init__).parameters if name != "self"]
    arguments = [(f"`{name}`", documented[name]) for name in names]

    ours, plain = ({f.name: f for f in fields(cls)} for cls in (fastdpo.DPOConfig, TrainingArguments))
    settings = []
    for field in fields(trl.DPOConfig):
        name, default, here = field.name, _default(field), _default(ours[field.name])
        if name not in plain or default != _default(plain[name]) or here != default:
            changed = "" if here == default else f"`{here!r}`"
            settings.append((f"`{name}`", f"`{default!r}`", changed, ours[name].metadata["help"].replace("%%", "%")))
    old = [(f"`{name}`", f"{advice[0].upper()}{advice[1:]}.") for name, advice in OLD_NAMES.items()]
    return {
        "the arguments": _table(("argument", "in fastdpo"), arguments),
        "the settings": _table(("setting", "default in TRL", "in fastdpo, if another", "what it does"), settings),
        "the old names": _table(("old name", "what to do"), old),
    }


def _arguments_of(docstring: str) -> dict[str, str]:
    """Return the text of each argument in a docstring of Google's form."""
    part = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", part, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)  # an enum's value, as users write it


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def steps() -> dict[str, str]:
    """Return the table of whole training steps, for README."""
    from fastdpo.benchmarks import report

    return {"the steps": report.steps()}


def measured() -> dict[str, str]:
    """Return the tables of benchmarks.md, from the measurements that are committed."""
    from docs import step_tables, study_tables
    from fastdpo.benchmarks import report

    return {
        "the summary": step_tables.summary(),
        "the steps": report.steps(),
        "the levers": report.levers(),
        "the ratios": step_tables.ratios(),
        "the split": step_tables.splits(),
        "the parts": study_tables.step_parts(),
        "what was removed": study_tables.step_removed(),
        "the real model": step_tables.real_model(),
        "the head": report.head(),
        "the peers": report.peers(),
    }


def grouping() -> dict[str, str]:
    """Return the tables of grouping.md."""
    from docs import step_tables, study_tables

    return {"the grouped steps": step_tables.grouped(), "the trainings": study_tables.grouped_trainings()}


def studied(**tables: str) -> Callable[[], dict[str, str]]:
    """Return a function that returns tables of studies, by the names of the functions that make them."""

    def made() -> dict[str, str]:
        from docs import study_tables

        return {title: getattr(study_tables, name)() for name, title in tables.items()}

    return made


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "../README.md": steps,
    "../examples/frontier/README.md": studied(frontier="the frontier"),
    "benchmarks.md": measured,
    "drop-in.md": studied(patched="the steps of patch_trl"),
    "grouping.md": grouping,
    "how_it_works.md": studied(compiled="the graphs", liger="Liger's kernels"),
    "migrating.md": migrating,
    "settings.md": settings,
    "sparse_backward.md": studied(cells="where cells are", head_times="the computed times"),
    "vision.md": studied(vision_steps="the steps on images", vision_families="the families"),
}
"""The function that returns the tables of a page, by their titles."""

if __name__ == "__main__":
    write()

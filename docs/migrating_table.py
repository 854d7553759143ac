"""Write the tables of docs/migrating.md: python docs/migrating_table.py.

The names and defaults come from TRL, and what each does from the docstring of `fastdpo.DPOTrainer` and the help of
`fastdpo.DPOConfig`, so the tables say what the code says.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("migrating.md")
MARK = "<!-- python docs/migrating_table.py writes {} -->\n"


def write() -> None:
    """Replace the tables of the page."""
    page = PAGE.read_text()
    for name, table in tables().items():
        start, end = MARK.format(name), MARK.format(f"{name}, up to here")
        page = page[: page.index(start) + len(start)] + table + page[page.index(end) :]
    PAGE.write_text(page)


def tables() -> dict[str, str]:
    """Return each table of the page, by its name there.

    Raises:
        KeyError: fastdpo lacks an argument or a field of TRL's.
    """
    import trl
    from transformers import TrainingArguments

    import fastdpo
    from fastdpo.settings.old_names import OLD_NAMES

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


if __name__ == "__main__":
    write()

"""The settings of a run, read from the source of their dataclasses.

Importing transformers and torch takes many seconds. This module imports only the standard library, so `--help` and
errors about mistyped names appear in a fraction of a second.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TRANSFORMERS = "transformers.TrainingArguments"
HEADING = re.compile(r"    # ([^;\n]+)")


class Setting(NamedTuple):
    """One field of a config."""

    name: str
    types: frozenset[str]
    """Names of the types that its values may have, including `None`."""
    default: str | None
    """Source text of its default; None for a field without one."""
    help: str
    group: str
    """Its heading in the help: the comment above its part of the class, or the name of transformers' class."""

    @property
    def is_text(self) -> bool:
        """Whether every value is text, so that 2024 in a file is text too."""
        return self.types - {"None"} == {"str"}


@functools.cache
def settings() -> dict[str, Setting]:
    """Return all fields of `RunConfig` and `DPOConfig` by name; those of `transformers.TrainingArguments` come last."""
    here = Path(__file__).parent.parent
    found: dict[str, Setting] = {}
    for path, name in (
        (here / "run.py", "RunConfig"),
        (here / "config" / "dpo_config.py", "DPOConfig"),
        _training_arguments(),
    ):
        for setting in _fields(path, name):
            found.setdefault(setting.name, setting)
    return found


def _training_arguments() -> tuple[Path, str]:
    spec = importlib.util.find_spec("transformers")  # finding a submodule would import transformers
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed; run pip install fastdpo", name="transformers")
    return Path(spec.origin).parent / "training_args.py", "TrainingArguments"


_CHOICES = {
    "f_divergence_type": ("loss/objectives.py", "DIVERGENCES"),
    "head_backward": ("head/linear_logprobs.py", "BACKWARDS"),
    "head_impl": ("head/linear_logprobs.py", "IMPLS"),
    "loss_type": ("loss/objectives.py", "OBJECTIVES"),
    "on_bad_row": ("config/checks.py", "ON_BAD_ROW"),
    "self_check": ("config/checks.py", "SELF_CHECK"),
    "truncation_mode": ("config/checks.py", "TRUNCATION_MODES"),
}
"""Where the names stand that a setting takes, as a tuple or as the keys of a dict."""


def choices(setting: Setting) -> list[str]:
    """Return the names that a setting takes, such as those of optimizers; [] if it takes other values too."""
    if setting.name in _CHOICES:
        ours, constant = _CHOICES[setting.name]
        return _strings(Path(__file__).parent.parent / ours, constant)
    theirs, _ = _training_arguments()
    enums = [name for name in setting.types - {"None"} if name[0].isupper()]  # a file takes 20 ms to be parsed
    for name in enums if setting.group == TRANSFORMERS else ():
        for file in (theirs, theirs.with_name("trainer_utils.py")):
            if names := _strings(file, name):
                return names
    return []


def _strings(path: Path, name: str) -> list[str]:
    """Return the strings of a tuple, the keys of a dict or the values of an enum that a file defines by this name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=found, body=body) if found == name:
                parts: list[Any] = [each.value for each in body if isinstance(each, ast.Assign)]
            case (
                ast.Assign(targets=[ast.Name(id=found)], value=value)
                | ast.AnnAssign(target=ast.Name(id=found), value=value)
            ) if found == name:
                parts = list(value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", ()))
            case _:
                continue
        return [text for part in parts if isinstance(text := _literal(part), str)]
    return []


def _fields(path: Path, class_name: str) -> Iterator[Setting]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    group, seen = TRANSFORMERS, body[0].lineno
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if class_name != "TrainingArguments":
            headings = [match[1] for line in lines[seen : node.lineno - 1] if (match := HEADING.match(line))]
            group, seen = (headings or [group])[-1], node.lineno
        options = _options(node.value)
        if _literal(options.get("init")) is not False:
            types = frozenset(_types(node.annotation))
            yield Setting(node.target.id, types, _default(node.value, options), _help(options), group)


def _options(value: ast.expr | None) -> dict[str, ast.expr]:
    """Return the keyword arguments of a call of `dataclasses.field`."""
    if not isinstance(value, ast.Call):
        return {}
    return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}


def _help(options: dict[str, ast.expr]) -> str:
    metadata = options.get("metadata")
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = {_literal(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    return str(_literal(texts.get("help")) or "").replace("%%", "%")


def _default(value: ast.expr | None, options: dict[str, ast.expr]) -> str | None:
    if value is None or isinstance(value, ast.Call):
        if (factory := options.get("default_factory")) is not None:
            return ast.unparse(factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], []))
        value = options.get("default")
    return None if value is None else ast.unparse(value)


def _literal(value: ast.expr | None) -> object:
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _types(annotation: ast.expr) -> Iterator[str]:
    """Yield the names of the types in an annotation: `list[str] | None` has `list` and `None`."""
    if isinstance(annotation, ast.BinOp):
        yield from _types(annotation.left)
        yield from _types(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        yield from _types(annotation.value)
    else:
        yield ast.unparse(annotation)

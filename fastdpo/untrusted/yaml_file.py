"""Read a small YAML file or value: plain data only, bounded in size and depth, and no key twice.

Numbers are read as in YAML 1.2: 010 is ten, and 2024_01 and 2024-01-01 are text. (YAML 1.1, which PyYAML follows,
makes them eight, a number and a date.)
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Most values of a file, where an alias counts as all values that it repeats."""

_TAG = "tag:yaml.org,2002:"
_NUMBERS = {
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses what is too deep, what grows too much by aliases, and a repeated key."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, text_keys: Collection[str] = ()) -> None:
        super().__init__(text)
        self._depth = 0
        self._text_keys = text_keys

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth == MAX_DEPTH:
            problem = f"it is nested more than {MAX_DEPTH} levels deep"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                is_plain = isinstance(value, yaml.ScalarNode) and value.style is None
                if is_plain and key.value in self._text_keys and value.tag != f"{_TAG}null":
                    value.tag = f"{_TAG}str"
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"{key.value} is set twice, in line {lines[key.value]} and in line {line}; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node))
        try:
            return int(text, 0 if text[:2] in ("0x", "0o") else 10)
        except ValueError as error:  # Python bounds the number of digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


def _measure(node: Any, seen: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the depth of a node and the number of values in it, with aliases written out."""
    if id(node) in seen:
        if (known := seen[id(node)]) is None:
            raise yaml.composer.ComposerError(None, None, "an alias repeats what it is part of", node.start_mark)
        return known
    seen[id(node)] = None
    items = [] if isinstance(node, yaml.ScalarNode) else node.value
    depth, count = 0, 1
    for item in items:
        for part in item if isinstance(item, tuple) else (item,):
            below, inside = _measure(part, seen)
            depth, count = max(depth, below), count + inside
    depth += 1
    if depth > MAX_DEPTH or count > MAX_VALUES:
        what = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES:,} values"
        raise yaml.composer.ComposerError(None, None, f"with its aliases it has more than {what}", node.start_mark)
    seen[id(node)] = depth, count
    return depth, count


def read_yaml(path: Path, text_keys: Collection[str] = ()) -> Any:
    """Return the content of a YAML file; values of `text_keys` that look like numbers stay text.

    Raises:
        ValueError: the file is too large, not UTF-8, or not valid YAML; the message names it and the place.
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes, so it can't be a file of settings")
    try:
        return parse(data.decode("utf-8"), text_keys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        begun = f", {error.context} of line {error.context_mark.line + 1}" if error.context_mark else ""
        raise ValueError(f"{path}{where} is not valid YAML: {error.problem or error.context}{begun}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


def parse(text: str, text_keys: Collection[str] = ()) -> Any:
    """Return the value that a YAML text spells out.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or breaks a bound.
    """
    loader = _Loader(text, text_keys)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()

"""Parsing of settings on the command line, and the help text that lists them all."""

import shlex
import textwrap
from itertools import zip_longest
from typing import Any

import yaml

from fastdpo.settings.config_file import UsageError, advice, typed
from fastdpo.settings.fields import Setting, settings
from fastdpo.untrusted.yaml_file import parse

INDENT: dict[str, Any] = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
TRANSFORMERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
"""Values of transformers' setting `debug`, which tell its flag `--debug` from fastdpo's own."""


def without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Return the words without fastdpo's own `--debug`, which shows tracebacks, and whether it was there."""
    kept, debug = [], False
    for word, following in zip_longest(words, words[1:]):
        if word == "--debug" and following not in TRANSFORMERS_DEBUG:
            debug = True
        else:
            kept.append(word)
    return kept, debug


def overrides_of(rest: list[str], own: dict[str, Setting], shared: dict[str, Setting] | None = None) -> dict[str, Any]:
    """Return the settings behind the config file as a dict; values are read as YAML, as in the file.

    The settings are a command's `own` and those of a run, in place of which a command may have other `shared` ones.

    A setting is written as `--key value` or `--key=value`, a list as `--key a b c`, a boolean as `--key` or `--no_key`.
    If a key is given twice, the last value is used, so that a script can append to a command.
    """
    known = (settings() if shared is None else shared) | own
    values: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"expected --setting value, got {word!r}")
        key, has_value, value = word[2:].partition("=")
        key = key.replace("-", "_")
        given = [value] if has_value else []
        while not has_value and words and not words[0].startswith("--"):
            given.append(words.pop(0))
        positive = key.removeprefix("no_")
        if key not in known and not given and positive in known and "bool" in known[positive].types:
            key, given = positive, ["false"]
        if key not in known:
            raise UsageError(f"unknown setting --{key}{advice(key, known)}")
        if not given and "bool" in known[key].types:
            given = ["true"]
        if given in ([], [""]):
            raise UsageError(f"--{key} needs a value")
        if len(given) > 1 and "list" not in known[key].types:
            raise UsageError(f"--{key} takes one value, got {shlex.join(given)}")
        parsed = [_value(each, (own | known)[key]) for each in given]
        values[key] = parsed[0] if len(parsed) == 1 else parsed
        if key in own:
            values[key] = typed(own[key], values[key])
    return values


def _value(word: str, setting: Setting) -> Any:
    try:
        value = parse(word)
    except yaml.YAMLError:
        return word  # text such as `[`
    return word if setting.is_text and value is not None and not isinstance(value, str) else value


def without_flag(words: list[str], name: str) -> list[str]:
    """Return the words of a command line without one setting and its value."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word[2:].partition("=")[0].replace("-", "_") == name
        if not skip:
            kept.append(word)
    return kept


def settings_help(
    command: str,
    summary: str,
    own: dict[str, Setting],
    end: str,
    *,
    takes: str = "[CONFIG.yaml] [--any_setting value ...]",
    shared: dict[str, Setting] | None = None,
) -> str:
    """Return the help of a command: all settings by group, with types, descriptions and defaults."""
    lines = [f"usage: fastdpo {command} {takes} [--debug]", "", summary]
    group = None
    for setting in (*own.values(), *(settings() if shared is None else shared).values()):
        if setting.group != group:
            group = setting.group
            lines += ["", f"{group}:"]
        default = "must be set" if setting.default is None else f"default: {setting.default}"
        about = f"{' '.join(setting.help.split())} ({default})"
        lines += [f"  --{setting.name} {_shown(setting)}".rstrip(), *textwrap.wrap(about, 112, **INDENT)]
    return "\n".join([*lines, "", end])


def _shown(setting: Setting) -> str:
    names = ("bool", "int", "float", "str", "list", "dict")
    return "|".join(name for name in names if name in setting.types)

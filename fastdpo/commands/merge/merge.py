"""`fastdpo merge`: read the command line and check its paths, before `merged_model` loads anything."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.settings.config_file import install, local_path, newest_checkpoint
from fastdpo.settings.fields import Setting

_TEXT = frozenset({"str", "None"})
OPTIONS = {
    "output_dir": Setting(
        "output_dir", frozenset({"str"}), None, "Folder for the merged model; new, or empty.", "The merge"
    ),
    "model_name_or_path": Setting(
        "model_name_or_path",
        _TEXT,
        "the one that the adapter names",
        "The base model, as a folder or a name on the Hub, if it is no longer where the adapter was trained on it.",
        "The merge",
    ),
    "trust_remote_code": Setting(
        "trust_remote_code", frozenset({"bool"}), "False", "Run the code in the base model's repository.", "The merge"
    ),
}


def merge(adapter: str, options: Mapping[str, Any]) -> None:
    """Merge an adapter into its base model, compare the log-probs before and after, and save a model without PEFT.

    Args:
        adapter: folder or Hub repository of the adapter.
        options: values of `OPTIONS`.

    Raises:
        ValueError: a path is not what it should be, PEFT can't merge the adapter, or the merged model differs.
        OSError: a model can't be loaded, or the merged one can't be written.
        ModuleNotFoundError: PEFT is not installed.
    """
    adapter, base = _checked_adapter(adapter), options.get("model_name_or_path")
    if base is not None:
        base = _checked_base("model_name_or_path", base)
    elif (Path(adapter) / "adapter_config.json").is_file():
        base = _named_base(Path(adapter))
    output = _checked_output(options["output_dir"])
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(f"merge needs the package peft: {install('peft')}", name="peft")

    from fastdpo.commands.merge.merged_model import save_merged
    from fastdpo.report.page import summary_table

    merged = save_merged(adapter, base, output, trust_remote_code=options.get("trust_remote_code", False))
    rows = [
        ("the adapter changes the log-probs by", f"{merged.effect:.1e} nats"),
        ("merging changes them by at most", f"{merged.merge_error:.1e} nats"),
        ("the saved model differs by at most", f"{merged.saved_error:.1e} nats"),
        ("allowed by rounding", f"{merged.bound:.1e} nats"),
    ]
    print(summary_table(rows, (f"merged in {merged.dtype}", "")))  # noqa: T201
    print(f"model: {output}")  # noqa: T201


def _checked_adapter(name: str) -> str:
    """Return the adapter's folder or name; refuse a folder that holds no adapter."""
    name, path = local_path("adapter", name)
    if path is None or (path / "adapter_config.json").is_file():
        return name
    if path.is_file():
        raise ValueError(f"adapter: {name!r} is a file; give the folder that holds adapter_config.json")
    if (path / "config.json").is_file():
        raise ValueError(f"adapter: {name!r} holds a whole model, which needs no merging, and no adapter_config.json")
    newest = newest_checkpoint(path)
    found = [str(each.parent) for each in sorted(path.glob("*/adapter_config.json"))]
    if newest is not None and str(newest) in found:
        found = [str(newest)]
    hint = f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
    raise ValueError(f"adapter: the folder {name!r} holds no adapter_config.json, so no adapter{hint}")


def _named_base(adapter: Path) -> str:
    """Return the base model that an adapter's config names."""
    file = adapter / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"adapter: {str(file)!r} is broken: {error}") from error
    if not name:
        raise ValueError(f"adapter: {str(file)!r} names no base model; give it as --model_name_or_path")
    try:
        return _checked_base("the adapter's base model", name)
    except ValueError as error:
        raise ValueError(f"{error}; if it is elsewhere, give it as --model_name_or_path") from error


def _checked_base(setting: str, name: str) -> str:
    name, path = local_path(setting, name)
    if path is None:
        return name
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{setting}: {name!r} is an adapter itself; merge that one first, and give the result here")
    if not (path / "config.json").is_file():
        raise ValueError(f"{setting}: {name!r} holds no config.json, so no model")
    if not any(each.suffix in (".safetensors", ".bin") for each in path.iterdir()):
        raise ValueError(
            f"{setting}: {name!r} holds no weights; a training that began from random weights (config_name) has not "
            "saved them, and its adapter can't be used without them"
        )
    return name


def _checked_output(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir: {name!r} is a file; give a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output_dir: the folder {name!r} has files in it; give a new folder, or empty this one")
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir: {name!r} can't be made: {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir: {name!r} can't be written: no permission in {str(there)!r}")
    return path

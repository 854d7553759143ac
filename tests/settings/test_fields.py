"""fastdpo.settings.fields: what is read from the source of the configs is what the configs have."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from fastdpo.config import DPOConfig
from fastdpo.config.auto import read_switch
from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.run import RunConfig
from fastdpo.settings.fields import TRANSFORMERS, Setting, _fields, settings

CONFIGS = (RunConfig, DPOConfig)


def names_of(hint: Any) -> set[str]:
    """The names of the types of a union."""
    parts = typing.get_args(hint) if is_union(hint) else (hint,)
    names = {getattr(typing.get_origin(part) or part, "__name__", str(part)) for part in parts}
    return {"None" if name == "NoneType" else name for name in names}


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def test_names_are_those_of_the_dataclasses() -> None:
    assert set(settings()) == {f.name for config in CONFIGS for f in dataclasses.fields(config) if f.init}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_types_defaults_and_help_are_those_of_the_dataclasses(config: type) -> None:
    hints = typing.get_type_hints(config)
    if hints.get("gradient_checkpointing") is read_switch:  # it stands in the place of a type, for HfArgumentParser
        hints["gradient_checkpointing"] = bool | str | None
    literals = {"None": None, "True": True, "False": False}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        setting = settings()[field.name]
        assert setting.types - {"Literal"} == {n for n in names_of(hints[field.name]) if n != "False"} - {"Literal"}
        assert setting.help == field.metadata["help"].replace("%%", "%"), field.name
        if isinstance(field.default, (int, float, str, type(None))) and not hasattr(field.default, "value"):
            assert setting.default is not None
            assert literals.get(setting.default, field.default) == field.default, field.name


def test_groups_are_the_comments_of_the_config() -> None:
    found = settings()
    assert found["dataset_name"].group == "The run"
    assert found["beta"].group == "The objective"
    assert found["ref_adapter_name"].group == "The reference"
    assert found["head_impl"].group == "Packing, attention and the head"
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(found[name].group == TRANSFORMERS for name in ("seed", "optim", "save_steps"))
    assert all(setting.name in theirs for setting in found.values() if setting.group == TRANSFORMERS)


def test_the_help_of_loss_type_names_every_objective() -> None:
    assert OBJECTIVES.keys() <= set(re.findall(r"\w+", settings()["loss_type"].help))


def test_source_is_read_as_python_means_it(tmp_path: Path) -> None:
    source = '''
class Config:
    """Doc."""

    # First part; more about it
    a: int | None = field(default=None, metadata={"help": "Half of it " "and the rest, 5%%.", "choices": some.call()})
    b: Optional = 3
    # The next part
    c: list[str] = field(default_factory=lambda: ["x"], metadata=dict(help="not seen"))
    hidden: int = field(init=False, default=1)
    d: dict[str, int]
    _not_a_field = 1
'''
    (tmp_path / "config.py").write_text(source)
    assert list(_fields(tmp_path / "config.py", "Config")) == [
        Setting("a", frozenset({"int", "None"}), "None", "Half of it and the rest, 5%.", "First part"),
        Setting("b", frozenset({"Optional"}), "3", "", "First part"),
        Setting("c", frozenset({"list"}), "['x']", "", "The next part"),
        Setting("d", frozenset({"dict"}), None, "", "The next part"),
    ]

"""fastdpo.settings.config_file: what is wrong with a config file is said in one line, with its place."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.settings import config_file
from fastdpo.settings.config_file import ADVICE, DTYPES, MANIFEST, REPORTS, UsageError, newest_checkpoint, read_settings
from fastdpo.settings.names import MEANT


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose paths exist; the working folder holds them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name: rows.jsonl\nmodel_name_or_path: ./weights\noutput_dir: out\n")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml is empty"),
        ("# nothing but a comment\n", "run.yaml is empty"),
        ("just words\n", "must hold `key: value` lines, got str"),
        (
            "seed: 1\nbeta: {a: 1\n",
            "run.yaml, line 3, column 1 is not valid YAML: .*while parsing a flow mapping of line 2",
        ),
        ("seed: 1\n\tbeta: 2\n", "run.yaml, line 2, column 1 is not valid YAML"),
        (
            "seed: 3\nbeta: 0.1\nseed: 4\n",
            "line 3, column 1 is not valid YAML: seed is set twice, in line 1 and in line 3",
        ),
        ("optim_args: {a: 1,\n  a: 2}\n", "a is set twice, in line 1 and in line 2"),
        ("seed: !!python/name:os.system\n", "not valid YAML: could not determine a constructor"),
        ("beta: 0.1\n", "dataset_name is not set; set it in"),
        ("optim_args: {a: 1, a: 2}\n", "a is set twice, in line 1 and in line 1"),
    ],
    ids=range(10),
)
def test_a_broken_file_is_named_with_the_place(good: Path, text: str, message: str) -> None:
    good.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(good, {})


def test_trust_in_code_is_typed_and_not_read_from_a_file(good: Path) -> None:
    good.write_text(good.read_text() + "trust_remote_code: true\n")
    with pytest.raises(ValueError, match=r"run.yaml sets trust_remote_code, .* type --trust_remote_code"):
        read_settings(good, {})
    assert read_settings(good, {"trust_remote_code": True})["trust_remote_code"] is True


def test_without_trust_no_argument_and_no_model_config_brings_code(good: Path) -> None:
    kernel = "attn_implementation"
    with pytest.raises(ValueError, match="attn_implementation 'org/fast' of model_init_kwargs runs a kernel"):
        read_settings(good, {"model_init_kwargs": {kernel: "org/fast"}})
    (good.parent / "weights" / "config.json").write_text(f'{{"_{kernel}": "org/fast"}}')
    with pytest.raises(ValueError, match="names the kernel 'org/fast'"):
        read_settings(good, {})
    assert read_settings(good, {"trust_remote_code": True})


def test_bytes_that_are_no_text_are_named(good: Path) -> None:
    good.write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 13 is 0xe9"):
        read_settings(good, {})


def test_merged_mappings_are_no_duplicates(good: Path) -> None:
    good.write_text(good.read_text() + "lr_scheduler_kwargs: &a {x: 1}\nmodel_init_kwargs: {<<: *a, x: 2}\n")
    assert read_settings(good, {})["model_init_kwargs"] == {"x": 2}


def test_a_missing_file_names_the_one_beside_it(good: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config file 'runs.yaml'; did you mean 'run.yaml'\?"):
        read_settings("runs.yaml", {})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("torch_dtyp", "did you mean 'torch_dtype'?"),
        ("model", "did you mean 'model_name_or_path'?"),
        ("mdel", "did you mean 'model_name_or_path'?"),
        ("ref_model", "did you mean 'ref_model_name_or_path'?"),
        ("dataset", "did you mean 'dataset_name'?"),
        ("max_target_length", "use max_completion_length"),
        ("lora_task_type", "leave it out"),
        ("bnb_4bit_use_double_quant", "did you mean 'use_bnb_nested_quant'?"),
        ("gradient_accumulation_step", "did you mean 'gradient_accumulation_steps'?"),
        ("zzzz", ""),
    ],
)
def test_an_unknown_setting_is_a_usage_error_with_advice(good: Path, name: str, advice: str) -> None:
    with pytest.raises(UsageError) as error:
        read_settings(good, {name: 1})
    assert str(error.value).startswith(f"unknown setting {name!r}" + (f"; {advice}" if advice else ""))


def test_advice_names_settings_that_exist_and_none_that_is_one() -> None:
    from fastdpo.settings.fields import settings

    assert not settings().keys() & (ADVICE.keys() | MEANT.keys())
    assert set(MEANT.values()) <= settings().keys() | OBJECTIVES.keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim", "adamw_toch", "optim 'adamw_toch' is unknown; did you mean 'adamw_torch'?"),
        ("optim", "nothing like it", "optim must be one of adamw_torch, adamw_torch_fused, .*, got 'nothing like it'$"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type 'cosin' is unknown; did you mean 'cosine'?"),
        ("eval_strategy", "step", "eval_strategy must be one of no, steps, epoch, got 'step'; did you mean 'steps'?"),
        ("loss_type", ["ipo", "sigmod"], "loss_type 'sigmod' is unknown; did you mean 'sigmoid'?"),
        ("loss_type", "kto_pair", "loss_type 'kto_pair' is unknown; did you mean 'kto'?"),
        ("on_bad_row", "dropp", "on_bad_row must be one of error, drop, got 'dropp'; did you mean 'drop'?"),
    ],
)
def test_a_mistyped_name_is_answered_here(good: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?")):
        read_settings(good, {name: value})


MISSING = {"dataset_name", "model_name_or_path", "ref_model_name_or_path", "resume_from_checkpoint"}


@pytest.mark.parametrize("name", sorted(MISSING))
@pytest.mark.parametrize("path", ["./nowhere", "a/b/c", "/nowhere/at/all", "~/nowhere-at-all", "nowhere/", "no where"])
def test_a_path_that_does_not_exist_is_answered_here(good: Path, name: str, path: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: there is no {path!r}"):
        read_settings(good, {name: path})


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "gpt2", "mistralai/Mistral-7B-v0.1", "a/b.c-1"])
def test_names_of_the_hub_are_left_to_the_hub(good: Path, name: str) -> None:
    names = {"model_name_or_path": name, "ref_model_name_or_path": name, "dataset_name": name}
    assert read_settings(good, names).items() >= names.items()


def test_the_nearest_path_is_named(good: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'weights'"):
        read_settings(good, {"model_name_or_path": "./weight"})


def test_a_home_folder_is_found(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(good.parent))
    found = read_settings(good, {"model_name_or_path": "~/weights", "dataset_name": "~/rows.jsonl"})
    assert found["model_name_or_path"] == str(good.parent / "weights")
    assert found["dataset_name"] == str(good.parent / "rows.jsonl")


def make(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (
            {"m/notes.txt": ""},
            {"model_name_or_path": "m"},
            "holds no config.json or adapter_config.json, so no model",
        ),
        (
            {"m/checkpoint-5/trainer_state.json": "{}"},
            {"model_name_or_path": "m"},
            "so no model; did you mean 'm/checkpoint-5'",
        ),
        ({"m.bin": "x"}, {"model_name_or_path": "m.bin"}, "must be a folder or a repository on the Hub"),
        ({"d.jsonl": ""}, {"dataset_name": "d.jsonl"}, "the file 'd.jsonl' is empty"),
        ({"d.xml": "x"}, {"dataset_name": "d.xml"}, "'d.xml' has none of the suffixes that can be read: .jsonl, .json"),
        ({"d/sub/x": ""}, {"dataset_name": "d/sub/y.jsonl"}, "there is no 'd/sub/y.jsonl'"),
        ({"c/x": ""}, {"resume_from_checkpoint": "c"}, "'c' holds no trainer_state.json, so no checkpoint"),
        (
            {"c/checkpoint-20/trainer_state.json": "{}"},
            {"resume_from_checkpoint": "c"},
            "did you mean 'c/checkpoint-20'",
        ),
        ({"out/checkpoint-3/x": ""}, {"resume_from_checkpoint": True}, "no complete checkpoint in output_dir 'out'"),
        ({"out": "a file"}, {}, "output_dir 'out' can't be made: .*out' is a file"),
    ],
    ids=range(10),
)
def test_what_is_not_in_a_path_is_named(good: Path, files: dict[str, str], given: dict[str, Any], message: str) -> None:
    make(good.parent, files)
    with pytest.raises(ValueError, match=message):
        read_settings(good, given)


def test_an_empty_folder_holds_no_dataset(good: Path) -> None:
    (good.parent / "nothing").mkdir()
    with pytest.raises(ValueError, match="the folder 'nothing' is empty"):
        read_settings(good, {"dataset_name": "nothing"})


def test_an_output_folder_without_permission_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_file.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="output_dir 'out' can't be written: no permission"):
        read_settings(good, {})


def test_the_newest_whole_checkpoint_goes_on(good: Path) -> None:
    make(good.parent, {f"out/checkpoint-{n}/{MANIFEST}": "{}" for n in (9, 10)} | {"out/checkpoint-11/x": ""})
    assert newest_checkpoint(Path("out")) == Path("out/checkpoint-10")
    for wanted in (True, "auto"):  # the trainer looks for the newest undamaged one
        assert read_settings(good, {"resume_from_checkpoint": wanted})["resume_from_checkpoint"] == wanted
    for typed, meant in (("true", True), ("false", False)):  # behind a command all values are text
        assert read_settings(good, {"resume_from_checkpoint": typed})["resume_from_checkpoint"] is meant


@pytest.mark.parametrize("given", [{"dtype": "float31"}, {"model_init_kwargs": {"torch_dtype": "float31"}}], ids=str)
def test_a_dtype_that_does_not_exist_is_refused(good: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .* got 'float31'; did you mean 'float32'\?"):
        read_settings(good, given)


def test_dtypes_are_those_of_torch() -> None:
    import torch

    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES if name != "auto")


PACKAGES = [
    ({"use_peft": True}, "peft", "use_peft needs the package peft: pip install 'fastdpo[peft]'"),
    ({"dataset_name": "rows.jsonl.zst"}, "zstandard", "needs the package zstandard: pip install zstandard"),
    ({"use_liger_kernel": True}, "liger_kernel", r"pip install 'fastdpo\[liger\]'"),
    ({"attention_backend": "flash"}, "flash_attn", r"pip install 'fastdpo\[flash\]'"),
    ({"optim": "paged_lion_8bit"}, "bitsandbytes", "optim='paged_lion_8bit' needs the package bitsandbytes"),
    ({"report_to": ["tensorboard", "wandb"]}, "wandb", "report_to='wandb' needs the package wandb: pip install wandb"),
    ({"report_to": "tensorboard"}, "tensorboard", "pip install tensorboard"),
    (
        {"model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}},
        "bitsandbytes",
        "quantization_config of model_init_kwargs needs the package bitsandbytes: pip install bitsandbytes",
    ),
]


@pytest.mark.parametrize(("given", "package", "message"), PACKAGES, ids=lambda value: str(value)[:30])
def test_a_missing_package_comes_with_its_command(
    good: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], package: str, message: str
) -> None:
    real, missing = importlib.util.find_spec, {package, "tensorboardX"}

    def pretend(name: str) -> Any:
        return None if name in missing else (real("json") if name in ("wandb", "tensorboard") else real(name))

    (good.parent / "rows.jsonl.zst").write_text("x")
    monkeypatch.setattr(config_file.importlib.util, "find_spec", pretend)
    with pytest.raises(ModuleNotFoundError, match=message.replace("[peft]", r"\[peft\]")):
        read_settings(good, given)


def test_a_place_to_report_to_that_does_not_exist_is_no_package_to_install(good: Path) -> None:
    expected = r"report_to 'wandbb' is unknown; did you mean 'wandb'\?"
    with pytest.raises(ValueError, match=expected):
        read_settings(good, {"report_to": "wandbb"})


def test_places_to_report_to_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) == set(REPORTS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha has no effect without use_peft: true"),
    ],
)
def test_a_setting_that_would_do_nothing_is_named(good: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(good, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "deepspeed: there is no '.*zero.json'; did you mean '.*zero2.json'"),
        ("{", "zero.json' is not a config of DeepSpeed: Expecting"),
        ('{"bf16": {"enabled": true}}', "zero.json' is not a config of DeepSpeed, because it has no zero_optimization"),
    ],
)
def test_a_config_of_deepspeed_that_is_none_is_named(
    good: Path, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "_need", lambda *_: None)
    (tmp_path / "zero2.json").write_text("{}")
    if text is not None:
        (tmp_path / "zero.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(good, {"deepspeed": str(tmp_path / "zero.json")})


def test_a_config_of_deepspeed_is_read(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_file, "_need", lambda *_: None)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    for given in (str(tmp_path / "zero.json"), {"zero_optimization": {"stage": 2}}):
        assert read_settings(good, {"deepspeed": given})["deepspeed"] == {"zero_optimization": {"stage": 2}}

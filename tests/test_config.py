"""Settings are typed, checked before anything loads, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from fastdpo.checks import check_loading
from fastdpo.config import DPOConfig
from fastdpo.config.checks import in_bytes
from fastdpo.run import RunConfig, load_datasets, make_configs
from fastdpo.settings.config_file import read_settings

MINIMAL = "dataset_name: data\nconfig_name: model\nreport_to: none\n"


def read_config(path: Path, overrides: dict[str, Any]) -> tuple[RunConfig, DPOConfig]:
    return make_configs(read_settings(path, overrides))


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + f"output_dir: {tmp_path}\nbf16: false\nlearning_rate: 1e-5\n")
    return path


def test_reads_numbers_as_people_write_them(yaml_file: Path) -> None:
    run, args = read_config(yaml_file, {"beta": 1, "max_length": None, "num_train_epochs": 2})
    assert run == RunConfig(dataset_name="data", config_name="model")
    assert args.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as text
    assert (args.beta, args.max_length, args.num_train_epochs) == (1.0, None, 2.0)


def test_no_is_a_strategy_although_yaml_reads_it_as_false(yaml_file: Path) -> None:
    args = read_config(yaml_file, {"save_strategy": False, "eval_strategy": False})[1]
    assert (args.save_strategy, args.eval_strategy) == ("no", "no")


def test_overrides_win(yaml_file: Path) -> None:
    assert read_config(yaml_file, {"learning_rate": 0.5})[1].learning_rate == 0.5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lerning_rate": 1e-4}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'"),
        ({"qqqq": 1}, "unknown setting 'qqqq'$"),
        ({"beta": "high"}, "beta must be float, got 'high'"),
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"label_smoothing": 0.7}, "label_smoothing must be in"),
        ({"prefix_sharing": "maybe"}, "prefix_sharing must be bool, got 'maybe'"),
        ({"max_length": 12.5}, "max_length must be int, got 12.5"),
        ({"max_length": 0}, "max_length must be at least 2"),
        ({"per_device_train_batch_size": True}, "per_device_train_batch_size must be int, got True"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type must not mix kinds of examples"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights must hold one number per loss_type"),
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            "sync_ref_model changes the reference during training",
        ),
        ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0, 1\]"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode must be one of keep_start, keep_end, got 'keep_middle'"),
        (
            {"truncation_mode": "keep_end", "loss_type": "kto"},
            "truncation_mode='keep_end' is not possible with loss_type",
        ),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be at least 1, got 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"self_check": "off"}, "self_check must be one of fallback, error"),
        ({"loss_type": "ipso"}, "loss_type 'ipso' is unknown"),
        ({"head_impl": "cuda"}, "head_impl must be one of auto, eager, torch, triton, blas, got 'cuda'"),
        ({"head_backward": "dense"}, "head_backward must be one of auto, exact, sparse, got 'dense'"),
        ({"head_workspace": "much"}, "head_workspace must be a number of bytes, or a number with a unit .* got 'much'"),
        ({"head_workspace": "-3GiB"}, "head_workspace must be a number of bytes"),
        ({"head_workspace": "0.5MiB"}, r"head_workspace must be at least 1048576 bytes \(1MiB\), got '0.5MiB'"),
        ({"head_workspace": 256}, "head_workspace must be at least 1048576 bytes"),
        ({"num_train_epochs": -2}, "num_train_epochs must be a number of at least 0, got -2"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs must be a number of at least 0, got nan"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of error, drop, got 'ignore'"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cuts the tensors of a batch"),
        ({"model_name_or_path": "x"}, "give either model_name_or_path .* or config_name"),
        ({"model_init_kwargs": [1]}, "model_init_kwargs must be dict or str, got"),
        ({"model_init_kwargs": "{'a"}, "model_init_kwargs is neither YAML nor JSON: Expecting property name"),
        ({"model_init_kwargs": "fast"}, "model_init_kwargs must be a dict or a JSON object, got 'fast'"),
        (
            {"model_init_kwargs": {"quantization_config": 4}},
            "quantization_config of model_init_kwargs must be a mapping",
        ),
        ({"config_name": None}, "give either model_name_or_path .* or config_name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_setting_is_named(yaml_file: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(yaml_file, bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_train_epochs": "2"}, "num_train_epochs must be a number of at least 0, got '2'"),
        ({"loss_type": None}, "loss_type must be one of sigmoid, .*, got None"),
        ({"loss_type": [["ipo"]]}, r"loss_type must be one of sigmoid, .*, got \['ipo'\]"),
    ],
)
def test_a_value_that_only_a_script_can_pass_is_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), **bad)


@pytest.mark.parametrize(
    ("given", "expected"), [(2**21, 2**21), ("4194304", 2**22), ("3GiB", 3 * 2**30), ("1.5 gb", 1_500_000_000)]
)
def test_a_workspace_is_bytes_or_text(given: Any, expected: int, yaml_file: Path) -> None:
    assert in_bytes("head_workspace", read_config(yaml_file, {"head_workspace": given})[1].head_workspace) == expected


def test_a_config_without_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("config_name: model\n")
    with pytest.raises(ValueError, match="dataset_name is not set; set it in"):
        read_config(path, {})


def test_a_config_that_is_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- beta\n")
    with pytest.raises(ValueError, match="must hold `key: value` lines, got list"):
        read_config(path, {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "model_init_kwargs": '{"revision": "main"}'}, {"revision": "main", "dtype": "float16"}),
        ({"dtype": "auto", "model_init_kwargs": {"torch_dtype": "auto"}}, {"dtype": "auto"}),
    ],
    ids=str,
)
def test_dtype_is_short_for_that_of_model_init_kwargs(
    yaml_file: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read_config(yaml_file, given)[1].model_init_kwargs == expected


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_two_dtypes_that_differ_are_refused(yaml_file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"dtype='float16' and {name}='auto' in model_init_kwargs differ"):
        read_config(yaml_file, {"dtype": "float16", "model_init_kwargs": {name: "auto"}})


newer = pytest.mark.skipif(
    not hasattr(TrainingArguments, "activation_checkpointing"), reason="transformers 5.17 has only the old name"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "auto"),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),
        pytest.param({"activation_checkpointing": True}, True, marks=newer),
        pytest.param({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, True, marks=newer),
        ({"activation_offloading": True}, True),
        ({"activation_offloading": True, "gradient_checkpointing": "auto"}, "auto"),
    ],
    ids=str,
)
def test_checkpointing_is_chosen_by_memory_unless_something_else_is_asked_for(
    tmp_path: Path, given: dict[str, Any], expected: bool | str
) -> None:
    args = DPOConfig(output_dir=str(tmp_path), **given)
    assert args.gradient_checkpointing == expected
    assert getattr(args, "activation_checkpointing", bool(expected)) == bool(expected)
    again = DPOConfig(**{f: getattr(args, f) for f in ("output_dir", "gradient_checkpointing")} | given)
    assert again.gradient_checkpointing == expected


def test_a_config_survives_its_own_dict(tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, gradient_checkpointing=False)
    again = DPOConfig(**{f: getattr(args, f) for f in ("output_dir", "beta", "loss_type", "gradient_checkpointing")})
    assert (again.beta, again.loss_type, again.gradient_checkpointing) == (0.3, ["sigmoid"], False)


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        (None, {}, True),
        ({"even_batches": False}, {}, True),
        ({"non_blocking": False}, {}, False),
        (None, {"dataloader_pin_memory": False}, False),
        (None, {"use_cpu": True}, False),
    ],
    ids=str,
)
def test_copies_from_pinned_memory_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, changes: dict[str, bool], expected: bool
) -> None:
    args = DPOConfig(output_dir=str(tmp_path), accelerator_config=given)
    for name, value in ({"dataloader_pin_memory": True, "use_cpu": False} | changes).items():
        setattr(args, name, value)
    args.accelerator_config.non_blocking = False  # on a GPU it has been set by now
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_loading(args, given)
    assert args.accelerator_config.non_blocking is expected


def test_a_split_that_is_set_must_exist(tmp_path: Path) -> None:
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(row)
    run = RunConfig(dataset_name=str(tmp_path), config_name="x", dataset_test_split="tets")
    with pytest.raises(ValueError, match=r"dataset_test_split: .* has no split 'tets'; .* did you mean 'test'"):
        load_datasets(run)


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        ("bf16", {}, "bf16"),
        ("fp16", {}, "fp16"),
        ("no", {}, "no"),
        ("bf16", {"bf16": False}, "no"),
        ("fp16", {"bf16": True}, "bf16"),
        ("bf16", {"fp16": True}, "fp16"),
    ],
)
def test_the_precision_of_accelerates_yaml_holds_for_what_is_not_set(
    launched: str, given: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that precomputing and the checks, which read `bf16` and `fp16`, agree with the training."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)
    assert (args.mixed_precision, args.bf16, args.fp16) == (expected, expected == "bf16", expected == "fp16")

"""fastdpo.settings.flags: a flag means what the same line in the file would."""

import re
from typing import Any

import pytest
import yaml

from fastdpo.settings.config_file import UsageError, typed
from fastdpo.settings.fields import Setting, settings
from fastdpo.settings.flags import overrides_of, settings_help, without_debug, without_flag

SAME = [
    ("--learning_rate 3e-5", "learning_rate: 3e-5"),
    ("--learning-rate=3e-5", "learning_rate: 3e-5"),
    ("--bf16", "bf16: true"),
    ("--bf16 false", "bf16: false"),
    ("--no_bf16", "bf16: false"),
    ("--precompute_ref_log_probs", "precompute_ref_log_probs: true"),
    ("--no_precompute_ref_log_probs", "precompute_ref_log_probs: false"),
    ("--no_prefix_sharing --beta 0.3", "{prefix_sharing: false, beta: 0.3}"),
    ("--seed 1 --beta 1 --seed 2", "{seed: 2, beta: 1}"),
    ("--max_length null", "max_length: null"),
    ("--loss_type sigmoid sft --loss_weights 1 0.2", "{loss_type: [sigmoid, sft], loss_weights: [1, 0.2]}"),
    ("--loss_type ipo", "loss_type: ipo"),
    ("--report_to wandb tensorboard", "report_to: [wandb, tensorboard]"),
    ("--model_init_kwargs {dtype:\xa0float16}", "model_init_kwargs: {dtype: float16}"),
    ("--max_steps -1", "max_steps: -1"),
    ("--save_strategy no", "save_strategy: no"),
    ("--run_name [", "run_name: '['"),
    ("--run_name 2026-13-40", "run_name: '2026-13-40'"),
    ("--debug underflow_overflow", "debug: underflow_overflow"),
    ("--output_dir 2024_01", "output_dir: '2024_01'"),
    ("--output_dir 010", "output_dir: '010'"),
    ("--run_name yes", "run_name: 'yes'"),
    ("--seed 010", "seed: 10"),
    ("--max_steps 10_000", "max_steps: 10000"),
]


@pytest.mark.parametrize(("flags", "line"), SAME, ids=[flags for flags, _ in SAME])
def test_a_flag_means_what_the_file_would(flags: str, line: str) -> None:
    def of(values: dict[str, Any]) -> dict[str, Any]:
        return {name: typed(settings()[name], value) for name, value in values.items()}

    words = [word.replace("\xa0", " ") for word in flags.split(" ")]
    assert of(overrides_of(words, {})) == of(yaml.safe_load(line))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta", "--beta needs a value"),
        ("--beta=", "--beta needs a value"),
        ("--beta --seed 1", "--beta needs a value"),
        ("--beta 1 2", "--beta takes one value, got 1 2"),
        ("seed 1", "expected --setting value, got 'seed'"),
        ("--sede 1", "unknown setting --sede; did you mean 'seed'?"),
        ("--no_beta", "unknown setting --no_beta"),
        ("--env A=1", "unknown setting --env; set environment variables in the shell"),
    ],
)
def test_a_misspelt_command_line_is_a_usage_error(flags: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        overrides_of(flags.split(), {})
    assert str(error.value).startswith(message)


def test_options_of_a_command_are_typed() -> None:
    own = {"gpu_memory": Setting("gpu_memory", frozenset({"float"}), None, "", "")}
    assert overrides_of(["--gpu_memory", "40"], own) == {"gpu_memory": 40.0}
    with pytest.raises(ValueError, match="gpu_memory must be float, got 'big'"):
        overrides_of(["--gpu_memory", "big"], own)


@pytest.mark.parametrize(
    ("words", "kept", "debug"),
    [
        ("train a.yaml --debug", "train a.yaml", True),
        ("--debug train a.yaml --bf16", "train a.yaml --bf16", True),
        ("train a.yaml --debug --bf16", "train a.yaml --bf16", True),
        ("train a.yaml --debug underflow_overflow", "train a.yaml --debug underflow_overflow", False),
        ("", "", False),
    ],
)
def test_debug_is_ours_unless_it_has_a_value_of_transformers(words: str, kept: str, debug: bool) -> None:
    assert without_debug(words.split()) == (kept.split(), debug)


@pytest.mark.parametrize("given", ["--resume_from_checkpoint a/b", "--resume-from-checkpoint=a/b", ""])
def test_a_flag_is_taken_out_with_its_value(given: str) -> None:
    words = f"train a.yaml --bf16 {given} --beta 1".split()
    assert without_flag(words, "resume_from_checkpoint") == ["train", "a.yaml", "--bf16", "--beta", "1"]


def test_help_shows_every_setting_with_type_default_and_group() -> None:
    text = settings_help("train", "Summary.", {}, "the end")
    assert re.findall(r"^  --(\w+)", text, re.MULTILINE) == list(settings())
    assert "\nThe reference:\n" in text
    shown = "  --ref_model_mixup_alpha float\n      TR-DPO: weight of the policy in each new reference, in (0, 1]."
    assert shown in text
    assert "(default: 0.6)" in text
    assert text.index("\nThe objective:") < text.index("\ntransformers.TrainingArguments:")
    assert text.endswith("\n\nthe end")
    assert max(map(len, text.splitlines())) <= 120

"""A script written for TRL's `DPOTrainer`, of which only the import has changed."""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import ProcessorMixin, TrainingArguments

import fastdpo
from fastdpo import DPOConfig
from fastdpo.compat import trl as trl_module
from fastdpo.compat.trl import resolve
from tests.helpers.trainers import NoTokenizer, losses, rows, tiny_llama

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # TRL's own, of its default

SETTINGS: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def read(args: Any) -> DPOConfig:
    return resolve(args, None, {})[0]


# Whole configs


def test_every_field_of_trl_keeps_its_value(tmp_path: Path) -> None:
    """Defaults too: whoever passes TRL's config asks for what it says."""
    args = trl.DPOConfig(
        str(tmp_path), beta=0.3, loss_type=["ipo"], max_length=None, seed=7, warmup_steps=3, **SETTINGS
    )
    with warnings.catch_warnings(action="error"):
        config = read(args)
    assert type(config) is DPOConfig
    ours = {f.name for f in fields(DPOConfig)}
    shared = {f.name for f in fields(args)} & ours - {"logging_nan_inf_filter", "accelerator_config"}
    assert {name: getattr(config, name) for name in shared} == {name: getattr(args, name) for name in shared}
    assert config.precompute_ref_log_probs is False  # TRL's default, ours is to look whether it is done already
    assert config.max_length is None
    assert not config.logging_nan_inf_filter
    assert config.accelerator_config.dispatch_batches is False


def test_the_object_that_was_passed_stays_as_it_was(tmp_path: Path) -> None:
    args = trl.DPOConfig(str(tmp_path), accelerator_config={"even_batches": False}, **SETTINGS)
    config = read(args)
    assert config.accelerator_config.even_batches is False
    assert config.accelerator_config.dispatch_batches is False
    assert args.accelerator_config.dispatch_batches is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_derived_fields_are_not_derived_again(tmp_path: Path, checkpointing: bool) -> None:
    given = {"gradient_checkpointing": checkpointing} if checkpointing else {"activation_checkpointing": False}
    args = trl.DPOConfig(str(tmp_path), eval_strategy="steps", logging_steps=7, **given, **SETTINGS)
    config = read(args)
    assert config.gradient_checkpointing is config.activation_checkpointing is checkpointing
    assert config.eval_steps == args.eval_steps == 7
    assert config.report_to == []


def test_transformers_own_arguments_keep_their_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which are not those of DPO, so a line says so."""
    with caplog.at_level("INFO", "fastdpo"):
        config = read(TrainingArguments(str(tmp_path), **SETTINGS))
    assert (config.learning_rate, config.logging_steps, config.gradient_checkpointing) == (5e-5, 500, False)
    assert config.beta == DPOConfig.beta
    assert "args is a transformers.TrainingArguments and is read as a fastdpo.DPOConfig" in caplog.text
    assert "learning_rate=5e-05, logging_steps=500" in caplog.text


def test_a_field_of_the_user_s_own_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Mine(TrainingArguments):
        sweep_id: str = ""

    with caplog.at_level("INFO", "fastdpo"):
        read(Mine(str(tmp_path), sweep_id="x", **SETTINGS))
    assert "; not read: sweep_id" in caplog.text


def test_a_config_of_ours_is_not_copied() -> None:
    config = DPOConfig(use_cpu=True)
    assert read(config) is config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_offloading": True}, "activation_offloading=True of trl.DPOConfig is not supported: use gradient"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' of trl.DPOConfig is not supported: max_prompt"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cuts the tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation")
def test_what_means_something_else_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(trl.DPOConfig(str(tmp_path), **settings, **SETTINGS))


@pytest.mark.filterwarnings("ignore:.pad_token. is deprecated")
def test_what_only_padding_reads_is_ignored(tmp_path: Path) -> None:
    read(trl.DPOConfig(str(tmp_path), padding_free=True, pad_to_multiple_of=8, pad_token="<pad>", **SETTINGS))


def test_another_trainer_s_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args is TRL's SFTConfig, which is for another kind of training"):
        read(trl.SFTConfig(str(tmp_path), **SETTINGS))
    with pytest.raises(ValueError, match=r"args must be a fastdpo.DPOConfig, got dict"):
        read({"beta": 0.1})


def test_label_smoothing_that_trl_would_ignore_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(trl.DPOConfig(str(tmp_path), label_smoothing=0.1, **SETTINGS))
    assert "label_smoothing=0.1 makes the loss 'sigmoid' conservative DPO here" in caplog.text


# Arguments


def test_the_arguments_come_in_trl_s_order() -> None:
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (fastdpo.DPOTrainer, trl.DPOTrainer))
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == ["others"]


def test_tokenizer_is_processing_class(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = NoTokenizer()
    assert resolve(None, None, {"tokenizer": tokenizer, "compute_metrics": None})[1] is tokenizer
    assert "tokenizer is the old name of processing_class" in caplog.text
    with pytest.raises(ValueError, match="tokenizer and processing_class are given"):
        resolve(None, tokenizer, {"tokenizer": tokenizer})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beta", r"^beta is a setting, not an argument of DPOTrainer: pass args=DPOConfig\(beta=...\)$"),
        ("max_length", "^max_length is a setting"),
        ("learning_rate", "^learning_rate is a setting"),
        ("compute_metrics", "^compute_metrics is not supported: packed batches keep no logits; read the metrics"),
        ("quantization_config", "^quantization_config is not supported: pass it in args.model_init_kwargs"),
        ("is_encoder_decoder", "^is_encoder_decoder is not supported: only decoders"),
        ("model_init", "^model_init is not supported: pass model$"),
        ("label_pad_token_id", "^label_pad_token_id has no effect on packed batches; leave it out$"),
        ("padding_value", "^padding_value has no effect"),
    ],
)
def test_an_old_argument_is_named(name: str, message: str) -> None:
    resolve(None, None, {name: None})
    with pytest.raises(ValueError, match=message):
        resolve(None, None, {name: 1})


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^DPOTrainer has no argument 'train_data'; did you mean 'train_dataset'"):
        fastdpo.DPOTrainer(tiny_llama(), train_data=rows(2))
    with pytest.raises(TypeError, match=r"^DPOTrainer has no argument 'xyzzy'$"):
        resolve(None, None, {"xyzzy": 1})


def test_a_processor_and_a_name_are_no_tokenizer() -> None:
    class Processor(ProcessorMixin):
        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match=r"a Processor, but .*processing_class=processor.tokenizer"):
        resolve(None, Processor(), {})
    with pytest.raises(ValueError, match=r"got 'some/model'; pass AutoTokenizer.from_pretrained\('some/model'\)"):
        resolve(None, "some/model", {})


def test_nothing_of_trl_is_imported() -> None:
    source = Path(trl_module.__file__).read_text()
    assert "import trl" not in source
    assert "from trl" not in source


# A run


@pytest.mark.parametrize("cls", [trl.DPOConfig, TrainingArguments], ids=["trl", "transformers"])
def test_such_a_script_trains_as_ours_does(cls: Callable[..., Any], tmp_path: Path) -> None:
    settings = SETTINGS | {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    settings |= {"learning_rate": 1e-3, "seed": 1, "lr_scheduler_type": "constant"}
    trained = []
    for args in (cls(str(tmp_path), **settings), DPOConfig(str(tmp_path), **settings)):
        trainer = fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows(8), tokenizer=NoTokenizer())
        trainer.train()
        trained.append(losses(trainer))
    assert trained[0] == pytest.approx(trained[1], abs=1e-7)
    assert trained[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert trained[0][1] != trained[0][0]
    assert isinstance(trainer, transformers.Trainer)

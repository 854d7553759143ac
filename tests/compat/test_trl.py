"""A script written for TRL's `DPOTrainer`, of which only the import has changed."""

import dataclasses
import inspect
import json
import math
import pickle
import re
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
from fastdpo.compat.trl import resolve, set_pad_token
from fastdpo.loss.options import from_config
from fastdpo.model.policy import load_policy
from fastdpo.settings.names import OLD_NAMES
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import NoTokenizer, lora, losses, rows, tiny_llama

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # TRL's own, of its default

SETTINGS: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def read(args: Any) -> DPOConfig:
    return resolve("model", args, None)[0]


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
    assert {f.name for f in fields(args)} <= ours
    shared = {f.name for f in fields(args)} - {"logging_nan_inf_filter", "accelerator_config"}
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
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cuts the tensors"),
    ],
)
def test_what_means_something_else_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(trl.DPOConfig(str(tmp_path), **settings, **SETTINGS))


@pytest.mark.filterwarnings("ignore:.pad_token. is deprecated", "ignore:The `'keep_end'` truncation")
def test_what_only_padding_reads_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"pad_token": "<eos>", "truncation_mode": "keep_end", "padding_free": True, "pad_to_multiple_of": 8}
    config = read(trl.DPOConfig(str(tmp_path), **given, **SETTINGS))
    assert {name: getattr(config, name) for name in given} == given
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["padding_free=True, pad_to_multiple_of=8 have no effect on packed batches"]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "precompute_ref_log_probs", "bf16", "padding_free"])
def test_the_flags_of_trl_s_script_are_parsed(name: str, value: bool, tmp_path: Path) -> None:
    """`--no_` is known where the default is on; every flag also takes true and false."""
    parser = trl.TrlParser((trl.ScriptArguments, DPOConfig, trl.ModelConfig))
    flag = [f"--{name}"] if value else [f"--{name}", "false"]
    if name == "gradient_checkpointing" and not value:
        flag = ["--no_gradient_checkpointing"]
    words = ["--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *flag]
    config = parser.parse_args_and_config(words)[1]
    assert getattr(config, name) is value
    if name == "gradient_checkpointing":
        assert config.activation_checkpointing is value


def test_another_trainer_s_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args is TRL's SFTConfig, which is for another kind of training"):
        read(trl.SFTConfig(str(tmp_path), **SETTINGS))
    with pytest.raises(ValueError, match=r"args must be a fastdpo.DPOConfig, got dict"):
        read({"beta": 0.1})


def test_label_smoothing_that_trl_would_ignore_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(trl.DPOConfig(str(tmp_path), label_smoothing=0.1, **SETTINGS))
    assert "label_smoothing=0.1 makes the loss 'sigmoid' conservative DPO here" in caplog.text


# What TRL accepts and has no effect


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on loss_type ['hinge']"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect on loss_type ['sigmoid']"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3 has no effect on loss_type ['sigmoid']"),
        (
            {"loss_type": "sft", "ld_alpha": 0.5, "f_divergence_type": "forward_kl"},
            "f_divergence_type='forward_kl', ld_alpha=0.5 have no effect on loss_type ['sft']",
        ),
        ({"ref_model_sync_steps": 64}, "ref_model_sync_steps=64 has no effect without sync_ref_model"),
        (
            {"tokens_per_batch": 512, "per_device_train_batch_size": 3},
            "per_device_train_batch_size=3 has no effect beside tokens_per_batch=512, which fills the batches",
        ),
        (
            {"loss_type": "sft", "sync_ref_model": True},
            "sync_ref_model is switched off, because loss_type",
        ),
        ({"activation_offloading": True}, "activation_offloading has no effect, because the model is on the CPU"),
        ({"beta": 0}, "beta is 0, so no loss that it scales depends on the policy"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0]}, "loss_weights [1, 0]: a loss with the weight 0"),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_named_in_one_line(
    settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = DPOConfig(use_cpu=True, **settings)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(message)
    caplog.clear()
    from_config(config)  # as the trainer does
    assert not caplog.messages


def test_what_only_fastdpo_has_is_still_refused() -> None:
    with pytest.raises(ValueError, match=r"simpo_gamma 1.0 has no effect on loss_type 'sigmoid'"):
        DPOConfig(use_cpu=True, simpo_gamma=1.0)


# Arguments


def test_the_arguments_come_in_trl_s_order() -> None:
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (fastdpo.DPOTrainer, trl.DPOTrainer))
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == ["others"]


def test_tokenizer_is_processing_class(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = NoTokenizer()
    assert resolve("model", None, None, tokenizer=tokenizer, compute_metrics=None)[1] is tokenizer
    assert "tokenizer is the old name of processing_class" in caplog.text
    with pytest.raises(ValueError, match="tokenizer and processing_class are given"):
        resolve("model", None, tokenizer, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beta", r"^beta is a setting, not an argument of DPOTrainer: pass args=DPOConfig\(beta=...\)$"),
        ("max_length", "^max_length is a setting"),
        ("learning_rate", "^learning_rate is a setting"),
        ("compute_metrics", "^compute_metrics is not supported, because packed batches have no logits to give to it"),
        ("is_encoder_decoder", "^DPOTrainer does not take is_encoder_decoder=1: leave it out, because only decoders"),
        ("model_init", "^DPOTrainer does not take model_init=1: pass the model itself as model$"),
        ("label_pad_token_id", "^DPOTrainer does not take label_pad_token_id=1: .* packed batches have no padding$"),
    ],
)
def test_an_old_argument_is_named(name: str, message: str) -> None:
    resolve("model", None, None, **{name: None})
    with pytest.raises(ValueError, match=message):
        resolve("model", None, None, **{name: 1})


def test_a_function_or_an_object_is_not_printed_whole() -> None:
    values = [lambda: None, print, tiny_llama(), {"a": 1}]
    for value, said in zip(values, ("a lambda", "print", "a LlamaForCausalLM", "{'a': 1}"), strict=True):
        with pytest.raises(ValueError, match="^DPOTrainer does not take model_init=" + re.escape(f"{said}: pass the ")):
            resolve("model", None, None, model_init=value)


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_setting_is_named(name: str) -> None:
    assert DPOConfig(use_cpu=True, **{name: None}) is not None
    with pytest.raises(ValueError, match="^" + re.escape(f"DPOConfig does not take {name}=0: {OLD_NAMES[name]}") + "$"):
        DPOConfig(use_cpu=True, **{name: 0})


def test_a_config_stays_a_dataclass() -> None:
    with pytest.raises(TypeError, match=r"^DPOConfig has no argument 'lerning_rate'; did you mean 'learning_rate'\?$"):
        DPOConfig(use_cpu=True, lerning_rate=1)
    config = dataclasses.replace(DPOConfig(use_cpu=True, beta=0.3), learning_rate=0.5)
    assert (config.beta, config.learning_rate) == (0.3, 0.5)
    assert "learning_rate" in inspect.signature(DPOConfig).parameters
    assert pickle.loads(pickle.dumps(config)).beta == 0.3


def test_a_quantization_config_reaches_from_pretrained() -> None:
    quantized, given = object(), DPOConfig(use_cpu=True, model_init_kwargs={"revision": "x"})
    config, _ = resolve("model", given, None, quantization_config=quantized)
    assert config.model_init_kwargs == {"revision": "x", "quantization_config": quantized}
    assert given.model_init_kwargs == {"revision": "x"}
    with pytest.raises(ValueError, match="quantization_config is given twice, as an argument and in"):
        resolve("model", config, None, quantization_config=quantized)
    with pytest.raises(ValueError, match="only applies to a model given by name, and this one is already loaded"):
        resolve(tiny_llama(), given, NoTokenizer(), quantization_config=quantized)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_given_by_name_is_trained_quantized(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    trainer = fastdpo.DPOTrainer(
        str(tmp_path / "model"),
        args=DPOConfig(str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", learning_rate=1e-2, **SETTINGS),
        train_dataset=rows(8),
        processing_class=NoTokenizer(),
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32"),
        peft_config=lora(),
    )
    assert trainer.model.is_loaded_in_4bit
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(trainer)[1] != losses(trainer)[0]
    assert json.loads(trainer.args.to_json_string())["model_init_kwargs"]["quantization_config"]["load_in_4bit"]


def test_model_init_kwargs_of_a_loaded_model_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    assert load_policy(model, DPOConfig(use_cpu=True, model_init_kwargs={"dtype": "float32"})) is model
    assert caplog.messages == ["model_init_kwargs has no effect on a model that is already loaded"]


def test_no_config_means_a_folder_named_after_the_model() -> None:
    assert resolve("some/tiny-model", None, None)[0].output_dir == "tiny-model-DPO"
    assert resolve(tiny_llama(), None, NoTokenizer())[0].output_dir == DPOConfig(use_cpu=True).output_dir


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^DPOTrainer has no argument 'train_dataet'; did you mean 'train_dataset'"):
        fastdpo.DPOTrainer(tiny_llama(), train_dataet=rows(2))
    with pytest.raises(TypeError, match=r"^DPOTrainer has no argument 'xyzzy'$"):
        resolve("model", None, None, xyzzy=1)


def test_a_processor_and_a_name_are_no_tokenizer() -> None:
    class Processor(ProcessorMixin):
        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match=r"a Processor, but .*processing_class=processor.tokenizer"):
        resolve("model", None, Processor())
    with pytest.raises(ValueError, match=r"got 'some/model'; pass AutoTokenizer.from_pretrained\('some/model'\)"):
        resolve("model", None, "some/model")
    with pytest.raises(TypeError, match=r"processing_class must be a tokenizer, got dict; pass AutoTokenizer"):
        resolve("model", None, {"input_ids": []})
    with pytest.raises(ValueError, match="processing_class is None, and the model was not loaded from a folder"):
        resolve(tiny_llama(), None, None)


def test_a_model_is_a_module_or_its_name() -> None:
    with pytest.raises(TypeError, match=r"^model must be a language model, or its name .* got PosixPath$"):
        resolve(Path("runs/model"), None, None)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = DPOConfig(str(tmp_path / "out"), **SETTINGS)
    with pytest.raises(OSError, match=f"^processing_class: '{tmp_path}' holds no tokenizer that can be loaded"):
        fastdpo.DPOTrainer(str(tmp_path), args=config, train_dataset=rows(2))


def test_a_pad_token_must_be_known() -> None:
    tokenizer = byte_tokenizer()
    set_pad_token(tokenizer, None)
    assert tokenizer.pad_token == "<pad>"
    set_pad_token(tokenizer, "<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="pad_token='<nope>' is not in the tokenizer's vocabulary"):
        set_pad_token(tokenizer, "<nope>")


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

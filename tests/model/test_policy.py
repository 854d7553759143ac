"""fastdpo.model.policy and fastdpo.run: what a config says of the weights is what they are."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.studies.tiny_vision import llava_processor
from fastdpo.config import DPOConfig
from fastdpo.model.policy import _keep_differentiable, load_policy, load_tokenizer, smallest_vocab
from fastdpo.run import RunConfig, load_model, lora
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import tiny_llama


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A bfloat16 model with a tokenizer."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config(tmp_path: Path, given: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, model_init_kwargs=given)


DTYPES = [
    (None, torch.float32),
    ({"torch_dtype": "bfloat16"}, torch.bfloat16),
    ('{"torch_dtype": "bfloat16"}', torch.bfloat16),
    ({"dtype": "float16"}, torch.float16),
    ({"dtype": "auto"}, torch.bfloat16),
    ({"torch_dtype": "float16", "dtype": "float16"}, torch.float16),
]


@pytest.mark.parametrize(("given", "expected"), DTYPES, ids=str)
@pytest.mark.parametrize("start", ["model_name_or_path", "config_name"])
def test_weights_have_the_dtype_asked_for(
    saved: str, tmp_path: Path, start: str, given: Any, expected: torch.dtype
) -> None:
    args = config(tmp_path, given)
    model, _ = load_model(RunConfig(dataset_name="none", **{start: saved}), args)
    assert {p.dtype for p in load_policy(model, args).parameters()} == {expected}


def test_random_weights_take_fields_of_the_config(saved: str, tmp_path: Path) -> None:
    args = config(tmp_path, {"num_hidden_layers": 1})
    model, _ = load_model(RunConfig(dataset_name="none", config_name=saved), args)
    assert len(load_policy(model, args).model.layers) == 1
    assert len(load_policy(copy.deepcopy(model), args).model.layers) == 1


def test_what_random_weights_cannot_have_is_named(saved: str, tmp_path: Path) -> None:
    run = RunConfig(dataset_name="none", config_name=saved)
    with pytest.raises(ValueError, match="model_init_kwargs 'device_map' has no effect on random weights"):
        load_model(run, config(tmp_path, {"device_map": "cpu"}))


def test_two_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_init_kwargs has torch_dtype='float16' and another dtype"):
        config(tmp_path, {"torch_dtype": "float16", "dtype": "float32"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"colour": "red"}, "model_init_kwargs 'colour' is unknown to this model; leave it out"),
        (
            {"load_in_8bit": True},
            "model_init_kwargs 'load_in_8bit' is unknown to this model; write .*quantization_config",
        ),
        (
            {"attn_implementation": "spda"},
            "attn_implementation 'spda' is unknown; did you mean 'sdpa'",
        ),
        ({"dtype": "float61"}, "dtype of model_init_kwargs must be one of auto, float32, .* did you mean 'float64'"),
    ],
    ids=str,
)
def test_what_a_model_does_not_know_is_named(saved: str, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(saved, config(tmp_path, given))


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "holds weights that can't be read, perhaps because they were copied incompletely"),
        (break_config, "holds a broken config.json: Expecting property name"),
        (remove_weights, r"holds no weights \(model.safetensors\); give it as config_name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_named(saved: str, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(Path(saved))
    with pytest.raises(OSError, match=f"model: {saved!r} {message}"):
        load_policy(saved, config(tmp_path, None))


def test_a_folder_without_a_tokenizer_is_named(saved: str, tmp_path: Path) -> None:
    for path in Path(saved).glob("*token*"):
        path.unlink()
    run = RunConfig(dataset_name="none", model_name_or_path=saved)
    with pytest.raises(OSError, match=f"model_name_or_path: {saved!r} holds no tokenizer that can be loaded"):
        load_model(run, config(tmp_path, None))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (False, "holds no processor of images that transformers can load, only a "),
        (True, "holds no processor of images; save the model's own there"),
    ],
)
def test_a_folder_without_a_processor_of_images_is_named(tmp_path: Path, removed: bool, message: str) -> None:
    """For the user of the command line, who passes no processor."""
    llava_processor().save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / name).read_text()) | {"processor_class": "ProcessorOfNobody"}
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava" if removed else "llama"}))
    if removed:
        (tmp_path / "processor_config.json").unlink()
        (tmp_path / "tokenizer_config.json").write_text("{}")
    setting = "model_name_or_path"
    with pytest.raises((OSError, ValueError), match=re.escape(f"{setting}: {str(tmp_path)!r} {message}")):
        load_tokenizer(str(tmp_path), DPOConfig(output_dir=str(tmp_path)), setting=setting, images=True)


def test_all_linear_is_the_word_of_peft() -> None:
    run = RunConfig(dataset_name="none", use_peft=True, lora_target_modules=["all-linear"])
    adapter: Any = lora(run)
    assert adapter.target_modules == "all-linear"


@pytest.mark.parametrize("rewritten", [False, True])
def test_4_bit_weights_stay_differentiable(rewritten: bool) -> None:
    """bitsandbytes rewrites them for inference at the first evaluation, by this flag of its layers."""
    layer: Any = nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=rewritten)
    model = nn.Sequential(nn.Linear(2, 2), layer)
    if rewritten:
        with pytest.raises(ValueError, match="4-bit weights of 1 were rewritten for inference"):
            _keep_differentiable(model)
    else:
        _keep_differentiable(model)
        assert layer.support_avx512bf16_for_cpu is False


def test_the_vocabulary_of_partitioned_weights_is_known() -> None:
    """DeepSpeed's ZeRO-3 leaves an empty tensor, and keeps the shape beside it."""
    model = tiny_llama()
    vocab, width = model.get_input_embeddings().weight.shape
    model.set_input_embeddings(nn.Embedding(0, width))
    model.get_input_embeddings().weight.ds_shape = torch.Size([vocab, width])
    assert smallest_vocab(model, None, tiny_llama(vocab_size=vocab + 5)) == vocab

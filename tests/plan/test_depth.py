"""fastdpo.plan.tracing.depth: a step that is continued to all layers is the step of all layers."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from fastdpo.plan.memory import memory_model, meta_model
from fastdpo.plan.resident import Job
from fastdpo.plan.tracing import depth
from fastdpo.plan.tracing.trace import Precision, Ratios
from tests.helpers.trainers import lora

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=9)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    # the first layer has no gradient to hand on
    "lora-not-checkpointed": (LLAMA, {"peft_config": lora(), "has_reference": False, "checkpointing": False}),
    "two-kinds-of-layers": (
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=12, num_hidden_layers=16),
        {"checkpointing": False, "job": Job("zero3", 8), "precision": Precision(torch.float32, torch.bfloat16)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES)
def test_equals_the_trace_of_all_layers(config: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    own = depth.trace

    def trace(model: Any, *rest: Any, **options: Any) -> Any:
        ran.append(len(depth.find_head(model).decoder.layers))
        return own(model, *rest, **options)

    monkeypatch.setattr(depth, "trace", trace)
    found = memory_model(config, Ratios(1.4, 0.5, 1.6), **options)
    assert max(ran) < config.num_hidden_layers
    monkeypatch.setattr(depth, "stacks_of", lambda *models: [])
    assert found == memory_model(config, Ratios(1.4, 0.5, 1.6), **options)
    assert max(ran) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "period"),
    [
        (LLAMA, 1),
        (LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=5), None),  # tracing it whole is as fast
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=12, num_hidden_layers=16), 2),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=12, num_hidden_layers=17), None),
        (GPT2Config(vocab_size=300, n_embd=48, n_head=4, n_layer=8, bos_token_id=1, eos_token_id=1), 1),
    ],
    ids=["llama", "few", "gemma", "gemma-odd", "gpt2"],
)
def test_layers_that_repeat_are_found(config: Any, period: int | None) -> None:
    stacks = depth.stacks_of(meta_model(config), None)
    assert [stack.period for stack in stacks] == ([] if period is None else [period])


def test_layers_that_differ_are_all_traced() -> None:
    model = meta_model(LLAMA)
    model.model.layers[3].mlp.limit = 7.0
    assert not depth.stacks_of(model)
    other = meta_model(LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=8))
    assert not depth.stacks_of(meta_model(LLAMA), other)

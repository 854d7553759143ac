"""`torch_compile`: layers of policy and reference are compiled and counted, and the run is the same."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fastdpo import DPOConfig
from fastdpo.compat import compiling
from tests.helpers.tiny import make_model
from tests.helpers.trainers import VOCAB, losses, make_trainer, rows, tiny_llama, weights

LAYERS = {"num_hidden_layers": 1}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    return lambda name, **args: make_trainer(tmp_path / name, tiny_llama(**LAYERS), **args)


@pytest.fixture(autouse=True)
def _reset() -> Any:
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, to trace one
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # so does it
def test_a_compiled_run_is_the_same_run(
    make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Policy, reference, checkpointing and evaluation; what is saved loads as ever."""
    caplog.set_level("INFO", "fastdpo")
    args = {"gradient_checkpointing": True, "eval_dataset": rows(6, seed=3), "max_steps": 4}
    plain = make("plain", **args)
    compiled = make("compiled", torch_compile=True, torch_compile_backend="aot_eager", **args)
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-6)
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
    line = r"torch_compile: [2-4] graphs compiled for 1 layers of LlamaForCausalLM \(backend aot_eager\); the"
    assert re.search(line, caplog.text)
    compiled.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in saved if "_orig_mod" in name]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(again), weights(compiled.model))
    torch.testing.assert_close(weights(again), weights(plain.model), rtol=0, atol=1e-6)


def test_accelerate_compiles_nothing_itself(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are those of `accelerate launch`, which are in the environment."""
    for name, value in {"BACKEND": "eager", "USE_DYNAMIC": "false", "USE_FULLGRAPH": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    trainer = make("run", max_steps=1)
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO"
    assert trainer.accelerator.prepare_model(trainer.model) is trainer.model
    assert [layer._compiled_call_impl is not None for layer in trainer.model.model.layers] == [True]
    assert trainer.ref_model.model.layers[0]._compiled_call_impl is not None
    assert trainer.data_collator.keywords["few_lengths"]  # each length is compiled


@pytest.mark.parametrize(
    ("options", "few"),
    [
        (None, False),
        ({"backend": "inductor"}, False),
        ({"backend": "inductor", "mode": "max-autotune-no-cudagraphs"}, False),
        ({"backend": "inductor", "mode": "reduce-overhead"}, True),
        ({"backend": "inductor", "dynamic": False}, True),
    ],
    ids=str,
)
def test_lengths_are_few_where_each_costs(options: dict[str, Any] | None, few: bool) -> None:
    assert compiling.wants_few_lengths(options) is few


def test_it_warns_once_if_compilations_go_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    graphs = iter([0, 0, 2, 4, 4, 4, 9, 12, 13, 40])
    monkeypatch.setattr(compiling, "compiled_graphs", lambda: next(graphs))
    caplog.set_level("INFO", "fastdpo")
    count, state = compiling._Count("2 layers of X"), SimpleNamespace(max_steps=9)
    count.on_train_begin()
    for _ in range(6):
        count.on_step_end(None, state, None)
    assert "torch_compile: 4 graphs compiled for 2 layers of X; the first 3 steps took" in caplog.text
    assert "more graphs" not in caplog.text
    for _ in range(2):
        count.on_step_end(None, state, None)
    assert caplog.text.count("9 more graphs were compiled in steps 4 to 7; if this goes on") == 1


def test_a_model_without_such_layers_is_told(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastdpo.model.scoring_forward.GradientCheckpointingLayer", torch.nn.Bilinear)
    make("run", torch_compile=True, torch_compile_backend="eager", max_steps=1)
    assert "torch_compile has no effect: no layers were found in the decoder of LlamaForCausalLM" in caplog.text


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch_compile is not possible with BambaForCausalLM, whose recurrent layers"):
        make_trainer(tmp_path, make_model("bamba", vocab_size=VOCAB), torch_compile=True, torch_compile_backend="eager")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [("torch_compile_mode", "reduce_overhead", "reduce-overhead"), ("torch_compile_backend", "inducter", "inductor")],
)
def test_an_unknown_value_is_refused_before_a_model_is_loaded(name: str, value: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be one of .*\b{named}\b.*, got '{value}'"):
        DPOConfig(use_cpu=True, **{name: value})

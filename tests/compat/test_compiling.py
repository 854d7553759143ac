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
from fastdpo.model.attention import opaque
from fastdpo.trainer import memory_choice
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
    graphs = compiling.compiled_graphs()
    generated = [trainer.model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3) for trainer in (plain, compiled)]
    assert torch.equal(*generated)
    assert compiling.compiled_graphs() == graphs
    compiled.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in saved if "_orig_mod" in name]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(again), weights(compiled.model))
    torch.testing.assert_close(weights(again), weights(plain.model), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_lack_of_memory_in_compiled_code_is_met_by_recomputing_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the second step, first in its forward and then in its backward, until all layers are recomputed."""
    caplog.set_level("INFO", "fastdpo")
    monkeypatch.setattr(memory_choice, "usable_memory", lambda _: 2**40)
    settings = {"max_steps": 4, "precompute_ref_log_probs": True}
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": "auto"}
    ours = make_trainer(tmp_path / "ours", **settings, **compiled)
    attend, backward, failed, place = opaque._plainly, ours.accelerator.backward, [], ["forward"]

    def attend_or_fail(*args: Any) -> Any:
        saves_all = all(layer.gradient_checkpointing for layer in ours.model.model.layers)
        if ours.state.global_step == 1 and not saves_all and place[0] not in failed:
            failed.append(place[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return attend(*args)

    def run_backward(loss: Any, **kwargs: Any) -> None:
        place[0] = "backward"
        try:
            backward(loss, **kwargs)
        finally:
            place[0] = "forward"

    monkeypatch.setattr(opaque, "_plainly", attend_or_fail)
    ours.accelerator.backward = run_backward
    ours.train()
    assert failed == ["forward", "backward"]
    assert caplog.text.count("step 2 ran out of memory and is computed again") == 2
    assert re.search(r"torch_compile: [1-4] graphs compiled for 2 layers", caplog.text)
    assert losses(ours) == losses(plain)
    assert torch.equal(weights(ours.model), weights(plain.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_balancing_loss_of_a_router_breaks_graphs_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastdpo")
    args = {"router_aux_loss_coef": 0.1, "gradient_checkpointing": True, "precompute_ref_log_probs": True}
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 3}
    plain = make_trainer(tmp_path / "plain", make_model("mixtral", **sizes), **args)
    args |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = make_trainer(tmp_path / "compiled", make_model("mixtral", **sizes), **args)
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-6)
    assert re.search(r"torch_compile: \d graphs compiled for 3 layers of MixtralForCausalLM", caplog.text)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    with pytest.raises(ValueError, match="torch_compile with fullgraph is not possible with the balancing loss"):
        make_trainer(tmp_path / "refused", make_model("mixtral", **sizes), **args)


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
    with pytest.raises(ValueError, match=rf"{name} .*'{value}'.*; did you mean '{named}'"):
        DPOConfig(use_cpu=True, **{name: value})

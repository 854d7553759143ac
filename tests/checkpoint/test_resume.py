"""A resumed trainer equals one that never stopped, in all it computes and logs; and signals save before they stop."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo.checkpoint import lock
from fastdpo.checkpoint.manifest import checkpoints
from fastdpo.checkpoint.preempt import Preempted
from fastdpo.model.policy import load_weights
from fastdpo.settings.config_file import MANIFEST
from fastdpo.trainer import saving
from tests.helpers.resumable import records
from tests.helpers.tiny import make_model
from tests.helpers.trainers import VOCAB, lora, rows, tiny_llama, weights

Make = Callable[..., Any]
BASE: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "logging_steps": 3, "data": rows(20)}


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)


def assert_same(ours: Any, theirs: Any) -> None:
    assert records(ours.state.log_history) == records(theirs.state.log_history)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert repr(ours.histograms) == repr(theirs.histograms)  # an empty bin has no mean, but NaN


def test_records_histograms_and_mean_loss_go_on_where_they_were(make: Make, tmp_path: Path) -> None:
    """The checkpoint lies between two logs; the start is evaluated once; a third run finds that all is done."""
    settings = BASE | {"eval_dataset": rows(5, 9), "eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}
    through = make(**settings)
    mean_loss = through.train().training_loss
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    resumed = make(**settings)
    assert resumed.train(resume_from_checkpoint="auto").training_loss == mean_loss
    assert_same(resumed, through)
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [0, 5, 6]
    again = make(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_same(again, through)


@pytest.mark.parametrize("kept", [4, 8, 10], ids=["the end of a pass", "the second pass", "the third pass"])
def test_a_shuffled_stream_resumes_in_the_pass_where_it_was(make: Make, tmp_path: Path, kept: int) -> None:
    """A pass has 4 steps of 2 micro-batches, and each pass has an order of its own."""
    settings = BASE | {"data": rows(31).to_iterable_dataset().shuffle(seed=3, buffer_size=7), "max_steps": 11}
    settings |= {"gradient_accumulation_steps": 2, "save_steps": 2}
    through = make(**settings)
    through.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{kept}"))
    assert_same(resumed, through)


@pytest.mark.parametrize("kind", ["base", "ref-adapter", "in-place"])
def test_an_adapter_resumes(make: Make, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")

    def trainer() -> Any:
        if kind == "in-place":  # by transformers' own integration, without PEFT's wrapper
            model = tiny_llama()
            model.add_adapter(lora(), adapter_name="mine")
            return make(model, **BASE)
        if kind == "base":
            return make(peft_config=lora(lora_dropout=0.1), disable_dropout=False, **BASE)
        torch.manual_seed(3)
        return make(peft.get_peft_model(tiny_llama(), lora(init_lora_weights=False)), **BASE)

    through = trainer()
    through.train()
    saved = {path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "fastdpo_manifest.json"} <= saved
    assert ("ref" in saved) is (kind == "ref-adapter")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert_same(resumed, through)


def test_what_would_get_lost_beside_an_adapter_in_place_is_refused(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tiny_llama()
    model.add_adapter(lora())
    with pytest.raises(ValueError, match="pass peft_config or a model with an adapter, not both"):
        make(model, peft_config=lora())
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold the adapter \['default'\].* its 0 tensors are not"):
        load_weights(model, tmp_path)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"outside the model's adapter are trained \(lm_head.weight, 1 in all\)"):
        make(model)


def test_frozen_weights_of_8_bits_are_read(tmp_path: Path) -> None:
    """A model with such a weight resumes, though torch can't say which dtype holds both kinds of weights."""
    models = [tiny_llama(), tiny_llama()]
    for i, model in enumerate(models):
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter((layer.weight.detach() + i).to(torch.float8_e4m3fn), requires_grad=False)
        model.lm_head.weight.data += i
    models[1].save_pretrained(tmp_path)
    load_weights(models[0], tmp_path)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert models[0].model.layers[1].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


def test_checkpoints_stay_together_if_the_process_goes_elsewhere(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make(output_dir="runs/one", **BASE | {"max_steps": 4, "save_steps": 2})
    monkeypatch.chdir("elsewhere")
    trainer.train()
    trainer.save_model()
    assert sorted(checkpoints(tmp_path / "runs" / "one")) == [2, 4]
    assert (tmp_path / "runs" / "one" / "model.safetensors").exists()
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_a_model_that_is_saved_under_other_names_resumes(make: Make, tmp_path: Path) -> None:
    """A mixture of experts is saved expert by expert; the best checkpoint, which is not the last, is loaded, too."""
    settings = BASE | {"eval_dataset": rows(4, 9), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-2}

    def trainer() -> Any:
        return make(make_model("qwen2-moe", vocab_size=VOCAB), **settings)

    through, start = trainer(), weights(trainer().model)
    through.train()
    assert through.state.best_global_step < 6
    assert not torch.equal(weights(through.model), start)
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert not set(saved) <= set(through.model.state_dict())
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert_same(resumed, through)


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold the weights of this LlamaModel: unexpected_keys \['lm_head"):
        load_weights(tiny_llama().model, tmp_path)


def test_a_model_that_was_changed_after_it_was_made_resumes(make: Make, tmp_path: Path) -> None:
    """A layer is taken out, and a weight is added, and the config says neither; tied weights are saved once."""

    def trainer() -> Any:
        model = tiny_llama(num_hidden_layers=3, tie_word_embeddings=True)
        del model.model.layers[1]
        model.model.layers[1].self_attn.layer_idx = 1
        model.register_buffer("origin", torch.arange(3.0))
        return make(model, **BASE)

    through = trainer()
    through.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert_same(resumed, through)


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"vocab_size": 97}, r"mismatched_keys \['lm_head.weight', 'model.embed_tokens.weight'\]"),
        ({"num_hidden_layers": 3}, r"mismatched_keys \['model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, r"mismatched_keys \['model.layers.1.input_layernorm.weight'"),
    ],
)
def test_weights_of_other_sizes_are_refused_in_a_line(tmp_path: Path, saved: dict[str, int], problem: str) -> None:
    tiny_llama(**saved).save_pretrained(tmp_path)
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=rf"does not hold the weights of this LlamaForCausalLM: {problem}") as error:
        load_weights(model, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (3, {"save_strategy": "no"}),
        (5, {"save_strategy": "epoch", "logging_strategy": "epoch", "eval_strategy": "epoch"}),
        (3, {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}),
    ],
    ids=["no", "epoch", "best"],
)
def test_a_signal_saves_and_the_next_run_goes_on(
    make: Make, tmp_path: Path, settings: dict[str, Any], step: int
) -> None:
    """Whatever the strategy of saving is; an epoch has 5 steps, and what is due at its end is done before."""
    settings = BASE | {"eval_dataset": rows(4, 9), "max_steps": 7} | settings
    through, stopped, resumed = (make(**settings, output_dir=str(tmp_path / name)) for name in ("a", "b", "b"))
    through.train()
    stopped.add_callback(SignalAt(step))
    with pytest.raises(Preempted) as stop:
        stopped.train()
    assert stop.value.code == 143
    assert next(iter(checkpoints(tmp_path / "b"))) == step
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert not any("train_loss" in entry for entry in stopped.state.log_history)
    resumed.train(resume_from_checkpoint="auto")
    assert_same(resumed, through)


def test_the_best_and_the_newest_checkpoint_are_kept_and_the_best_is_loaded(make: Make, tmp_path: Path) -> None:
    settings = BASE | {"save_steps": 1, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"save_total_limit": 2, "eval_dataset": rows(4, 9)}
    trainer = make(**settings)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = 1 + evaluated.index(min(evaluated))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"checkpoint-{n}" for n in (best, 4)}
    again = make(**settings)
    model = tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=rf"the best checkpoint .*checkpoint-{best} is damaged: model.safetensors is not"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_a_checkpoint_of_transformers_itself_needs_a_word(make: Make, tmp_path: Path) -> None:
    trainer = make(**BASE)
    trainer.train()
    place = tmp_path / "out" / "checkpoint-4"
    (place / "fastdpo_manifest.json").unlink()
    trainer = make(**BASE, output_dir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"has no fastdpo_manifest.json.*resume_changed=True uses it unchecked"):
        trainer.train(resume_from_checkpoint=str(place))
    trainer.args.resume_changed = True
    trainer.train(resume_from_checkpoint=str(place))
    assert trainer.state.global_step == 6


def test_a_save_that_fails_at_its_manifest_leaves_no_checkpoint(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space is left")

    monkeypatch.setattr("fastdpo.trainer.saving.write_manifest", fail)
    with pytest.raises(OSError, match="no space is left"):
        make(**BASE).train()
    assert not list((tmp_path / "out").iterdir())


def test_a_plain_trainer_finds_all_its_files_in_a_checkpoint(make: Make, tmp_path: Path) -> None:
    """And nothing in it needs code to be run: every pickle loads with weights_only, and there is no training_args."""
    make(**BASE).train()
    names = {path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert "training_args.bin" not in names
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(tmp_path / "out" / "checkpoint-4" / name, weights_only=True)


def test_a_finished_run_is_not_trained_over(make: Make, tmp_path: Path) -> None:
    settings = BASE | {"max_steps": 1, "save_strategy": "no"}
    trainer = make(**settings)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match=r"has the results of an earlier run \(model.safetensors\)"):
        make(**settings).train()
    make(**settings, overwrite_output_dir=True).train()


def test_the_same_trainer_may_train_again(make: Make, tmp_path: Path) -> None:
    """As in a notebook: what it replaces is its own. Another trainer's results are still refused."""
    trainer = make(**BASE)
    trainer.train()
    trainer.save_model()
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        make(**BASE).train()
    other = make(**BASE)
    other.save_model(str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        other.train()


@pytest.mark.parametrize("resumes", [True, False])
def test_a_folder_that_machines_do_not_share_is_refused(
    resumes: bool, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a disk of its own, a machine would go on from other weights, or could not go on from the next checkpoint."""
    if resumes:
        make(**BASE).train()
    trainer = make(**BASE, resume_changed=True)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer, "_agree", lambda decide: decide())
    monkeypatch.setattr(saving, "gather_object", lambda mine: [*mine, False])
    place = f"checkpoint-6/{MANIFEST}" if resumes else lock.LOCK
    with pytest.raises(ValueError, match=rf"process 1 does not see {tmp_path}/out/{place} as process 0 does"):
        trainer.train(resume_from_checkpoint="auto")


def test_a_file_that_another_machine_sees_late_is_waited_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer, texts, slept = make(**BASE), ["first's", "False", "False", "first's"], []
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer, "_agree", lambda decide: decide())
    monkeypatch.setattr(saving, "gather_object", lambda mine: [*mine, True])
    monkeypatch.setattr(saving, "_text", lambda path: texts.pop(0))
    monkeypatch.setattr("time.sleep", slept.append)
    trainer._check_shared()
    assert len(slept) == 2

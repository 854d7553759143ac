"""Where the reference comes from, as the trainer has it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdpo
from tests.helpers.trainers import lora, losses, rows, tiny_llama, weights


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_precomputed_equals_online_bit_for_bit(make: Callable[..., Any], tmp_path: Path, peft: bool) -> None:
    """And no reference model is kept; the second time everything is in the cache."""
    held_out, config = rows(6, seed=5), lora() if peft else None
    online = make(eval_dataset=held_out, peft_config=config)
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    first, second = (make(eval_dataset=held_out, peft_config=config, **cached) for _ in range(2))
    assert first.ref_model is second.ref_model is None
    for trainer in (online, first, second):
        trainer.train()
    assert losses(online) == losses(first) == losses(second)
    assert torch.equal(weights(online.model), weights(first.model))
    assert online.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]
    assert len(list((tmp_path / "cache").rglob("shard-*.safetensors"))) == 2  # train and eval, once


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_what_was_precomputed_is_found_unasked(
    make: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    peft: bool,
) -> None:
    """Where all of it is there: not for more data, or where it is off."""
    config = {"init_lora_weights": False} if peft else None
    folder = {"reference_cache_dir": str(tmp_path / "cache"), "max_steps": 2}

    def run(n: int = 32, **settings: Any) -> Any:
        caplog.clear()
        with caplog.at_level("INFO", "fastdpo"):
            return make(peft_config=config and lora(**config), data=rows(n), **folder | settings)

    assert not (tmp_path / "cache").exists()
    online = run()
    assert not (tmp_path / "cache").exists()
    run(precompute_ref_log_probs=True)
    files = sorted((tmp_path / "cache").rglob("*"))
    found = run()
    assert "reference: log-probs of all rows are in" in caplog.text
    assert found.ref_model is None
    assert "ref_token_logps" in found.train_dataset.column_names
    others: list[dict[str, Any]] = [{"n": 40}, {"precompute_ref_log_probs": False}, {"eval_dataset": rows(6, seed=5)}]
    for settings in others[: 1 if peft else 3]:
        other = run(**settings)
        assert "ref_token_logps" not in other.train_dataset.column_names
        assert (other.ref_model is None) == peft
    assert sorted((tmp_path / "cache").rglob("*")) == files
    for trainer in (online, found):
        trainer.train()
    assert losses(online) == losses(found)


def test_without_a_reference_new_data_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"), max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"has been trained since .* set precompute_ref_log_probs=False"):
        trainer.evaluate(rows(4, seed=8))


def test_given_log_probs_need_no_reference(make: Callable[..., Any]) -> None:
    online = make(max_steps=2, per_device_train_batch_size=32, train_sampling_strategy="sequential")
    batch = next(iter(online.get_train_dataloader()))
    with torch.no_grad():
        logps = torch.segment_reduce(online.ref_model(**batch).logps, "sum", offsets=batch["cu_target"])
    data = rows(32)
    for name, side in zip(("chosen", "rejected"), logps.chunk(2), strict=True):
        values = side[batch["pair_index"].argsort()].tolist()
        data = data.add_column(f"ref_{name}_logps", values)
    given = make(max_steps=2, per_device_train_batch_size=32, train_sampling_strategy="sequential", data=data)
    assert given.ref_model is None
    for trainer in (online, given):
        trainer.train()
    assert losses(online) == pytest.approx(losses(given), abs=1e-6)


def test_reference_free_objectives_load_none(make: Callable[..., Any]) -> None:
    for settings in ({"loss_type": "simpo", "beta": 2.0}, {"reference_free": True}):
        trainer = make(max_steps=2, **settings)
        assert trainer.ref_model is None
        trainer.train()
        assert "logps/chosen_below_ref" not in trainer.state.log_history[0]
    peft = pytest.importorskip("peft")
    trainer = make(peft.get_peft_model(tiny_llama(), lora(init_lora_weights=False)), loss_type="simpo", beta=2.0)
    assert list(trainer.model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"ref_model is given, but the objective .* uses no reference"):
        make(loss_type="orpo", ref_model=tiny_llama())


class TestSync:
    """TR-DPO."""

    SETTINGS = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 4}  # noqa: RUF012

    def test_the_reference_is_mixed_every_so_many_steps(self, make: Callable[..., Any]) -> None:
        states: list[tuple[Tensor, Tensor]] = []
        trainer = make(**self.SETTINGS)
        from transformers import TrainerCallback

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                states.append((weights(trainer.model), weights(trainer.ref_model)))

        trainer.add_callback(Watch())
        start = weights(trainer.ref_model)
        trainer.train()
        (_, first), (policy, second), (_, third), (last, fourth) = states
        assert torch.equal(first, start)
        torch.testing.assert_close(second, 0.25 * policy + 0.75 * start, rtol=0, atol=1e-7)
        assert torch.equal(third, second)
        torch.testing.assert_close(fourth, 0.25 * last + 0.75 * second, rtol=0, atol=1e-7)
        assert not torch.equal(second, start)

    def test_a_resumed_run_goes_on_with_its_reference(self, make: Callable[..., Any], tmp_path: Path) -> None:
        settings = self.SETTINGS | {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        through, resumed = make(**settings), make(**settings)
        through.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert losses(resumed) == losses(through)
        assert torch.equal(weights(resumed.ref_model), weights(through.ref_model))

    def test_data_that_holds_the_reference_is_refused(self, make: Callable[..., Any]) -> None:
        """Also where a held-out split without it makes a reference: training would never ask it."""
        data = rows(8).add_column("ref_chosen_logps", [-1.0] * 8).add_column("ref_rejected_logps", [-1.0] * 8)
        for held_out in (None, rows(4)):
            with pytest.raises(ValueError, match="the training dataset holds its log-probs; remove the columns ref_"):
                make(data=data, eval_dataset=held_out, **self.SETTINGS)

    def test_adapters_are_refused(self, make: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="sync_ref_model=True needs a reference with weights of its own"):
            make(peft_config=lora(), **self.SETTINGS)


def test_a_reference_that_is_not_what_it_seems_stops_the_first_step(make: Callable[..., Any]) -> None:
    """The copy was changed after it was made."""
    trainer = make()
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.mul_(1.01)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"the first loss is 0\.\d+, but policy and reference are the same model"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize(
    "settings", [{"loss_weights": [2.0]}, {"neftune_noise_alpha": 5.0}], ids=lambda s: next(iter(s))
)
def test_what_else_moves_the_first_loss_is_no_fault_of_the_reference(
    make: Callable[..., Any],
    settings: dict[str, Any],
) -> None:
    trainer = make(max_steps=1, **settings)
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-4


def test_dropout_left_on_is_no_fault_of_the_reference(make: Callable[..., Any]) -> None:
    trainer = make(tiny_llama(attention_dropout=0.0), peft_config=lora(lora_dropout=0.3), disable_dropout=False)
    assert any(m.p > 0 for m in trainer.model.modules() if isinstance(m, nn.Dropout))
    trainer.train()
    assert len(losses(trainer)) == 4
    assert isinstance(trainer, fastdpo.DPOTrainer)


@pytest.mark.parametrize("init", ["gaussian", "pissa", False])
def test_a_new_adapter_that_is_not_the_identity_is_its_own_reference(
    make: Callable[..., Any],
    init: bool | str,
) -> None:
    """PiSSA and OLoRA move a part of the base weights into the adapter: without it the policy is another model."""
    trainer = make(peft_config=lora(init_lora_weights=init), max_steps=2)
    assert ("ref" in trainer.model.peft_config) == (init not in (True, "gaussian"))
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    assert losses(trainer)[1] != losses(trainer)[0]


@pytest.mark.parametrize("init", [True, False], ids=["off", "ref"])
def test_nothing_drops_out_of_the_reference(make: Callable[..., Any], init: bool) -> None:
    """Of the policy without its adapter, or with the reference's; the policy's own mode stays."""
    config = lora(lora_dropout=0.3, init_lora_weights=init)
    trainer = make(tiny_llama(attention_dropout=0.3), peft_config=config, disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    first, second = (trainer._reference_logps(batch) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in trainer.model.modules())
    assert not torch.equal(trainer.model(**batch).logps, trainer.model(**batch).logps)


def test_a_token_that_the_reference_does_not_know_is_named(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"train dataset.*holds token id \d+"):
        make(ref_model=tiny_llama(vocab_size=200))


def test_a_reference_by_name_is_loaded(make: Callable[..., Any], tmp_path: Path) -> None:
    reference = tiny_llama()
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    reference.save_pretrained(tmp_path / "reference")
    trainer = make(ref_model=str(tmp_path / "reference"))
    assert torch.equal(weights(trainer.ref_model), weights(reference))
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_a_saved_adapter_comes_back_with_its_reference(make: Callable[..., Any], tmp_path: Path) -> None:
    """So that scoring it, and training it further, compare with what training compared with."""
    tiny_llama().save_pretrained(tmp_path / "base")
    config = lora(init_lora_weights=False)
    trainer = make(str(tmp_path / "base"), peft_config=config, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    batch = next(iter(trainer.get_train_dataloader()))
    continued = make(str(tmp_path / "out"))
    assert sorted(continued.model.peft_config) == ["default", "ref"]
    torch.testing.assert_close(continued._reference_logps(batch), trainer._reference_logps(batch))
    assert not torch.allclose(continued.model(**batch).logps, trainer._reference_logps(batch), atol=1e-2)
    trained = [name for name, p in continued.model.named_parameters() if p.requires_grad]
    assert trained
    assert not any(".ref." in name for name in trained)

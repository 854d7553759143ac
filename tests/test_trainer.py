"""fastdpo.DPOTrainer on models small enough to train in seconds."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)

import fastdpo
from fastdpo.data import prepare as data_module
from tests.helpers.no_logits import NoLogits
from tests.helpers.trainers import (
    TOKEN_METRICS,
    VOCAB,
    lora,
    losses,
    rows,
    tiny_llama,
    weights,
)


def test_first_loss_is_ln_2_and_training_learns(make: Callable[..., Any]) -> None:
    trainer = make(max_steps=30)
    trainer.train()
    first, last = losses(trainer)[0], losses(trainer)[-1]
    assert abs(first - math.log(2)) < 1e-6  # policy == reference
    assert last < 0.3
    assert trainer.state.log_history[0]["rewards/accuracies"] == 0.5  # all ties
    assert trainer.state.log_history[-2]["rewards/accuracies"] > 0.9


def test_no_allocation_of_a_training_step_reaches_the_logits(make: Callable[..., Any]) -> None:
    """N completion tokens times V entries never exist, in either model, forward or backward, beyond the workspace."""
    options = {"head_workspace": "1MiB", "per_device_train_batch_size": 16, "max_steps": 2}
    trainer = make(tiny_llama(vocab_size=4096), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    N = batch["target_ids"].numel()
    assert N * 4096 > 2 * 4096 * 48, "the batch is too small to tell logits from weights"
    trainer.create_optimizer_and_scheduler(2)
    totals = trainer._get_num_items_in_batch([batch], batch["target_ids"].device)
    with NoLogits(N * 4096):
        trainer.training_step(trainer.model, batch, totals)
    with pytest.raises(AssertionError), NoLogits(N * 4096):  # the mode bites
        trainer.model(batch["input_ids"].expand(4, -1)).logits.sum().backward()


def test_micro_batches_equal_one_batch(make: Callable[..., Any]) -> None:
    """Also where their sizes differ: the last one holds half as many pairs."""
    whole = make(per_device_train_batch_size=12, max_steps=1, data=rows(12))
    split = make(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1, data=rows(12))
    for trainer in (whole, split):
        trainer.train()
    assert losses(whole)[0] == pytest.approx(losses(split)[0], abs=1e-7)
    grad_norms = [trainer.state.log_history[0]["grad_norm"] for trainer in (whole, split)]
    assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-5)


def test_prefix_sharing_changes_no_number(make: Callable[..., Any]) -> None:
    shared, packed = make(), make(prefix_sharing=False)
    for trainer in (shared, packed):
        trainer.train()
    torch.testing.assert_close(losses(shared), losses(packed), rtol=1e-5, atol=1e-6)
    assert shared.state.log_history[0]["prompt_shared"] > 0.2
    assert packed.state.log_history[0]["prompt_shared"] < shared.state.log_history[0]["prompt_shared"]


def test_gradient_checkpointing_changes_no_number(make: Callable[..., Any]) -> None:
    plain, checkpointed = make(), make(gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert losses(plain) == losses(checkpointed)


class ForbidWaiting(TrainerCallback):
    """From the end of step `first` to that of step `last`, whatever waits for the device raises."""

    def __init__(self, first: int, last: int) -> None:
        self.modes = {first: "error", last: "default"}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.modes:
            torch.cuda.set_sync_debug_mode(self.modes[state.global_step])


@pytest.mark.gpu
def test_steps_between_logs_do_not_wait_for_the_device(make: Callable[..., Any]) -> None:
    """Batches come over, forward, loss, backward, clipping and optimizer are queued; the first step may wait."""
    torch.use_deterministic_algorithms(False)
    data = Dataset.from_list(rows(1).to_list() * 32)  # one shape, so that nothing is compiled or measured later
    options = {"use_cpu": False, "head_impl": "triton", "max_steps": 8, "logging_steps": 8}
    trainer = make(tiny_llama(hidden_size=64), data=data, gradient_accumulation_steps=2, **options)
    trainer.add_callback(ForbidWaiting(2, 7))
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 8


def test_a_given_reference_is_used_as_it_is(make: Callable[..., Any]) -> None:
    reference = tiny_llama()
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    before = weights(reference)
    trainer = make(ref_model=reference, max_steps=2)
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-3
    assert torch.equal(weights(reference), before)


def test_the_reference_copy_is_of_the_policy_as_passed(make: Callable[..., Any]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn_like(model.lm_head.weight))  # edited after loading
    before = weights(model)
    trainer = make(model, max_steps=3)
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    assert torch.equal(weights(trainer.ref_model), before)
    assert not torch.equal(weights(model), before)


def test_lora_trains_the_adapter_alone(make: Callable[..., Any]) -> None:
    trainer = make(peft_config=lora(), max_steps=20, learning_rate=1e-2)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.ref_model is None
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    assert losses(trainer)[-1] < 0.4
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_lora_with_a_trained_head_keeps_its_reference(make: Callable[..., Any]) -> None:
    trainer = make(peft_config=lora(modules_to_save=["lm_head"]), max_steps=20, learning_rate=5e-3)
    batch = next(iter(trainer.get_train_dataloader()))
    before = trainer._reference_logps(batch)
    trainer.train()
    after = trainer._reference_logps(batch)
    assert losses(trainer)[-1] < 0.6
    assert torch.equal(before, after)


def test_an_adapter_that_was_trained_before_starts_at_its_own_reference(make: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), lora(init_lora_weights=False))  # not the identity
    trainer = make(model, max_steps=20, learning_rate=1e-2)
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." in n}
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    assert losses(trainer)[-1] < 0.6
    assert kept
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name])
    assert model.active_adapter == "default"


def test_trained_weights_outside_the_adapter_need_a_reference(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"weights outside the adapters are trained .*; pass ref_model"):
        make(peft_config=lora(bias="all"), model=tiny_llama(attention_bias=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"logging_steps": 2}, [2, 4, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4, 6]),
        ({"logging_steps": 100}, [6]),
        ({"logging_strategy": "no"}, [6]),
        ({"logging_strategy": "no", "logging_first_step": True}, [1, 6]),
        ({"logging_strategy": "epoch"}, [4, 6]),
        ({"logging_strategy": "epoch", "tokens_per_batch": 10_000}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_token_metrics_are_computed_before_a_record_alone(
    make: Callable[..., Any], settings: dict[str, Any], expected: list[int], stream: bool
) -> None:
    if stream and "tokens_per_batch" in settings:
        pytest.skip("a stream has no lengths to plan with")
    data = rows(14).to_iterable_dataset() if stream else rows(14)  # seven batches, four steps; of a stream three
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6} | settings
    trainer = make(data=data, **options)
    seen, forward = set(), trainer.model.forward

    def note(*args: Any, with_stats: bool = False, **batch: Any) -> Any:
        if with_stats:
            seen.add(trainer.state.global_step + 1)
        return forward(*args, with_stats=with_stats, **batch)

    trainer.model.forward = note
    trainer.train()
    by_epoch = stream and settings.get("logging_strategy") == "epoch"
    assert sorted(seen) == ([1, 2, 3, 4, 5, 6] if by_epoch else expected)
    logged = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert [entry["step"] for entry in logged] == ([3, 6] if by_epoch else expected)
    assert all(entry.keys() >= TOKEN_METRICS for entry in logged)
    last = trainer.state.log_history[-1]
    assert ("train_loss" in last, "loss" in last) == (True, False)
    assert ("entropy" in last) == (6 not in [entry["step"] for entry in logged if "loss" in entry])


def test_the_first_process_tokenises_first(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, names = [], []
    prepare = data_module.prepare_dataset

    @contextlib.contextmanager
    def first(self: Any, **_: Any) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def note(*args: Any, name: str = "train", **options: Any) -> Any:
        names.append((name, bool(inside)))
        return prepare(*args, name=name, **options)

    monkeypatch.setattr(fastdpo.DPOConfig, "main_process_first", first)
    monkeypatch.setattr(data_module, "prepare_dataset", note)
    make(eval_dataset={"one": rows(2), "two": rows(3)})
    assert names == [("train", True), ("one", True), ("two", True)]


def test_evaluation_averages_over_pairs(make: Callable[..., Any]) -> None:
    """Ten pairs in batches of four: the last one holds two."""
    held_out = rows(10, seed=9)
    metrics = {}
    for size in (4, 10):
        trainer = make(max_steps=5, eval_dataset=held_out, per_device_eval_batch_size=size, seed=1)
        trainer.train()
        metrics[size] = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_entropy", "eval_logps/chosen"):
        assert metrics[4][name] == pytest.approx(metrics[10][name], rel=1e-4, abs=1e-6), name
    assert metrics[10]["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_stream_trains_and_evaluates_as_a_dataset(make: Callable[..., Any], size: int) -> None:
    """Whatever divides whatever: 9 rows to evaluate on leave a smaller last batch."""

    def run(kind: Callable[[Dataset], Any]) -> tuple[list[float], float]:
        settings = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
        settings |= {"max_steps": 3, "train_sampling_strategy": "sequential"}
        trainer = make(data=kind(rows(12)), eval_dataset=kind(rows(9, seed=3)), **settings)
        trainer.train()
        return losses(trainer), trainer.evaluate()["eval_loss"]

    streamed, whole = run(Dataset.to_iterable_dataset), run(lambda data: data)
    assert streamed[0] == pytest.approx(whole[0], abs=1e-6)
    assert streamed[1] == pytest.approx(whole[1], abs=1e-6)


def test_evaluating_before_training_compares_like_with_like(make: Callable[..., Any]) -> None:
    """In mixed precision too: policy and reference are rounded the same way."""
    metrics = make(bf16=True, eval_dataset=rows(16)).evaluate()
    assert abs(metrics["eval_loss"] - math.log(2)) < 1e-6
    assert metrics["eval_rewards/margins"] == 0.0


def test_evaluation_amid_training_does_not_count_as_time_of_training(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1.0
    monkeypatch.setattr("fastdpo.trainer.packed_trainer.time.perf_counter", lambda: now)
    settings = {"max_steps": 6, "logging_steps": 3}
    rates = []
    for evaluates in ({}, {"eval_dataset": rows(4, 5), "eval_strategy": "steps", "eval_steps": 2}):
        trainer = make(**settings, **evaluates)
        compute_loss = trainer.compute_loss

        def slow(model: Any, *args: Any, _own: Any = compute_loss, **kwargs: Any) -> Any:
            nonlocal now
            loss = _own(model, *args, **kwargs)
            now += 1.0 if model.training else 50.0
            return loss

        trainer.compute_loss = slow
        trainer.train()
        rates.append([entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(rates[0]) == 2
    assert rates[0] == rates[1]


def test_evaluation_amid_training_leaves_its_metrics_alone(make: Callable[..., Any]) -> None:
    settings = {"max_steps": 6, "logging_steps": 3}
    plain = make(**settings)
    evaluated = make(**settings, eval_dataset={"a": rows(4, 5), "b": rows(4, 6)}, eval_strategy="steps", eval_steps=2)
    for trainer in (plain, evaluated):
        trainer.train()
    ours, theirs = ([e for e in t.state.log_history if "loss" in e] for t in (plain, evaluated))
    timing = {"tokens_per_second", "reference/share"}
    assert [{k: v for k, v in e.items() if k not in timing} for e in ours] == [
        {k: v for k, v in e.items() if k not in timing} for e in theirs
    ]
    keys = {key for entry in evaluated.state.log_history for key in entry}
    assert {"eval_a_rewards/accuracies", "eval_b_loss"} <= keys


def test_resuming_equals_never_having_stopped(make: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2}
    through = make(**settings)
    through.train()
    resumed = make(**settings, learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(resumed) == losses(through)
    assert torch.equal(weights(resumed.model), weights(through.model))
    tokens = [[e["num_tokens"] for e in t.state.log_history if "loss" in e] for t in (through, resumed)]
    assert tokens[0] == tokens[1]


def test_a_budget_of_tokens_fills_batches_and_resumes_within_an_epoch(make: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"tokens_per_batch": 64, "max_steps": -1, "num_train_epochs": 2, "longest_first": True}
    settings |= {"save_strategy": "steps", "save_steps": 7}
    through = make(**settings)
    loader = through.get_train_dataloader()
    batches = list(loader)
    assert all(batch["num_packed_tokens"] <= 64 for batch in batches)
    assert sorted(i for batch in batches for i in batch["pair_index"].tolist()) == list(range(32))
    assert len({len(batch["pair_index"]) for batch in batches}) > 1
    assert batches[0]["num_packed_tokens"] == max(batch["num_packed_tokens"] for batch in batches)
    through.train()
    assert through.state.global_step == 2 * len(loader)
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))
    assert losses(resumed) == losses(through)
    assert torch.equal(weights(resumed.model), weights(through.model))


def test_the_saved_model_is_an_ordinary_one(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(max_steps=2)
    trainer.train()
    trainer.save_model()
    assert "fastdpo" not in (tmp_path / "out" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, VOCAB, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


class TestNotFinite:
    """NaN stops training before it reaches the weights, and names the rows."""

    def test_a_model_that_was_never_finite_is_refused(self, make: Callable[..., Any]) -> None:
        model = tiny_llama()
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        with pytest.raises(FloatingPointError, match="the model's own log-probs are not finite on the first examples"):
            make(model)

    def test_a_nan_weight_stops_the_first_step(self, make: Callable[..., Any], tmp_path: Path) -> None:
        trainer = make(save_strategy="steps", save_steps=1)
        trainer._first_loss_is_known = False
        with torch.no_grad():
            trainer.model.model.norm.weight[0] = math.nan
        with pytest.raises(FloatingPointError, match=r"the loss of dataset rows \[\d+, \d+, \d+, \d+\] is not finite"):
            trainer.train()
        assert not list(tmp_path.glob("out/checkpoint-*"))

    def test_a_nan_gradient_never_reaches_the_weights(self, make: Callable[..., Any]) -> None:
        model = tiny_llama()
        model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
        before = weights(model)
        trainer = make(model)
        with pytest.raises(FloatingPointError, match="the gradient norm of step 1 is not finite"):
            trainer.train()
        assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_dataset": rows(1).add_column("ref_chosen_logps", [-1.0]).add_column("ref_rejected_logps", [-1.0])}
            | {"ld_alpha": 0.5},
            "ld_alpha=0.5 needs the reference's log-probs per token",
        ),
        ({"attention_backend": "flash"}, "attention_backend='flash' cannot be used: "),
        ({"data": Dataset.from_list([{"chosen": "a"}])}, "train dataset has no column 'rejected'"),
        (
            {"data": Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]}])},
            "row 0: `chosen` has no tokens",
        ),
        (
            {"data": Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [VOCAB], "rejected_ids": [3]}])},
            f"row 0: `chosen` holds token id {VOCAB}",
        ),
    ],
    ids=["reference-sums", "backend", "column", "empty-completion", "vocabulary"],
)
def test_bad_input_is_named(make: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_the_policy_as_its_own_reference_is_refused(make: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        make(model, ref_model=model)


def test_dropout_is_off(make: Callable[..., Any]) -> None:
    """Also in attention, which keeps its own as a number; the config that will be saved says what it said."""
    trainer = make(tiny_llama(attention_dropout=0.3), peft_config=lora(lora_dropout=0.5), max_steps=1)
    dropouts = [m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert not any(dropouts)
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    assert trainer.model.config.attention_dropout == 0.3


def test_dropout_of_attention_weights_by_a_module_trains_padded(make: Callable[..., Any]) -> None:
    """As stock GPT-2 has it, 0.1; a packed batch would raise in the first forward, after the check in eval mode."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1)
    trainer = make(GPT2LMHeadModel(config), disable_dropout=False, max_steps=1)
    assert trainer._layout == "padded"
    trainer.train()
    assert make(GPT2LMHeadModel(config))._layout == "shared"


def test_metrics_reach_tensorboard_under_trl_names(make: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make(max_steps=1, report_to="tensorboard", eval_dataset=rows(4), eval_strategy="steps", eval_steps=1).train()
    logged = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    for name in (b"train/rewards/accuracies", b"train/logps/chosen", b"eval/rewards/margins", b"train/grad_norm"):
        assert name in logged


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.float32, {"bf16": True}),
        (torch.float32, {"head_backward": "sparse"}),
        (torch.bfloat16, {"loss_type": "kto"}),
    ],
    ids=["bfloat16", "float16", "mixed", "sparse", "kto"],
)
def test_a_sparse_backward_of_the_head_is_logged(
    make: Callable[..., Any], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """One of a head that is almost sure of its tokens, so that skipping pays."""
    model = tiny_llama(vocab_size=2048, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    data = rows(8)
    if settings.get("loss_type") == "kto":
        data = data.rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")
        data = data.add_column("label", [bool(i % 3) for i in range(8)])
    trainer = make(model.to(dtype), data=data, max_steps=2, learning_rate=1e-5, eval_dataset=data, **settings)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["head/density"] < 0.4 for entry in logged)
    assert all("head/density" not in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_the_state_on_disk_is_json(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    trainer.save_state()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]

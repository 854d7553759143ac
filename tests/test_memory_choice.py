"""`gradient_checkpointing: auto` and `tokens_per_batch: auto`: a run that lacks memory computes what it would have."""

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Glm4MoeConfig,
    HfArgumentParser,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

import fastdpo
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.sampler import BudgetSampler, planned_sizes
from fastdpo.model.scoring_forward import decoder_layers
from fastdpo.plan import fit, free_memory
from fastdpo.plan.memory import memory_model
from fastdpo.plan.tracing.trace import Precision, Ratios
from fastdpo.trainer import memory_choice
from tests.helpers.trainers import VOCAB, data_for, losses, make_trainer, rows, tiny_llama, weights

LAYERS = 4
AUTO: dict[str, Any] = {"gradient_checkpointing": "auto"}
TOKENS: dict[str, Any] = {"tokens_per_batch": "auto"}
PAIRS = rows(40, seed=7)
NEW_NAME = hasattr(TrainingArguments, "activation_checkpointing")
"""Whether transformers has its new name of `gradient_checkpointing`, which 5.17 lacks."""
PREFIX = "activation" if NEW_NAME else "gradient"
newer = pytest.mark.skipif(not NEW_NAME, reason="this transformers has no activation_checkpointing")


@functools.cache
def _computed(checkpointing: bool, runs_reference: bool) -> Any:
    return memory_model(
        tiny_llama(num_hidden_layers=LAYERS).config,
        Ratios(1.3, 0.7, 2.0),
        checkpointing=checkpointing,
        runs_reference=runs_reference,
    )


def remembered(*_: Any, checkpointing: bool, runs_reference: bool, **__: Any) -> Any:
    """The memory model of all runs here, which takes a second or more to compute."""
    return _computed(checkpointing, runs_reference)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a trainer of four layers that takes two micro-batches in a step; `usable` bytes are free."""
    monkeypatch.setattr(fit, "memory_model", remembered)
    monkeypatch.setattr(memory_choice, "gc", SimpleNamespace(collect=lambda: None))  # a second each among many tests

    def make(usable: int | None = 2**40, data: Any = PAIRS, **args: Any) -> Any:
        monkeypatch.setattr(memory_choice, "usable_memory", lambda trainer: usable)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        options = {"gradient_accumulation_steps": 2, "max_steps": 3} | args
        return make_trainer(folder, tiny_llama(num_hidden_layers=LAYERS), data=data, **options)

    return make


def fails(trainer: Any, where: str, at: tuple[int, int], enough: Callable[[Any, Any], bool]) -> list[int]:
    """Let a micro-batch run out of memory, before its forward or after its backward, unless `enough` is saved.

    Returns:
        A list that grows with each failure.
    """
    compute, backward, failed, part = trainer.compute_loss, trainer.accelerator.backward, [], []

    def fail(place: str) -> None:
        here = (trainer.state.global_step, trainer._memory._at if trainer._memory else 0)
        if place == where and here >= at and not enough(trainer, part[-1]):
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        part.append(inputs)
        fail("forward")
        return compute(model, inputs, *args, **kwargs)

    def run_backward(loss: Any, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        fail("backward")

    trainer.compute_loss, trainer.accelerator.backward = compute_loss, run_backward
    return failed


def count_forwards(module: nn.Module) -> list[None]:
    """Return a list that grows with each forward of a module in training."""
    runs: list[None] = []
    module.register_forward_pre_hook(lambda *_: runs.extend([None] * module.training))
    return runs


def numbers(trainer: Any) -> list[dict[str, float]]:
    """All that was logged, but for times and for what depends on how a step is divided into batches."""
    timed = ("runtime", "per_second", "flos", "padding_saved", "reference/share")
    return [
        {name: value for name, value in entry.items() if not any(each in name for each in timed)}
        for entry in trainer.state.log_history
    ]


def assert_same_run(ours: Any, fixed: Any) -> None:
    assert len(losses(ours)) == len(losses(fixed)) == 3
    for mine, other in zip(numbers(ours), numbers(fixed), strict=True):
        for name in [name for name in mine if name.endswith("length_correlation")]:  # of margins near 0: only rounding
            assert mine.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert (weights(ours.model) - weights(fixed.model)).abs().max() < 1e-6


def test_as_few_layers_are_recomputed_as_fit_and_no_number_changes(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    fixed = make()
    fixed.train()
    probe = make(**AUTO)
    probe.get_train_dataloader()
    found, rows_ = probe._memory._fit, probe._memory._largest_batch
    assert probe._memory.checkpointed == 0
    caplog.set_level(logging.INFO, "fastdpo")
    for k in (1, LAYERS):
        usable = int(found.peak(k, rows_)) + 1 if k < LAYERS else 1
        trainer = make(usable, **AUTO)
        runs = [count_forwards(layer.mlp) for layer in trainer.model.model.layers]
        trainer.train()
        assert [len(each) for each in runs] == [2 * 6] * k + [6] * (LAYERS - k)
        said = f"gradient_checkpointing=auto recomputes {k} of 4 layers; a step with the largest possible batch, "
        assert f"{said}the 4 largest examples with together {rows_} tokens" in caplog.text
        assert re.search(r", takes [1-9]\S* [KM]iB \(computed\) of the [1-9]", caplog.text)
        assert torch.equal(weights(trainer.model), weights(fixed.model))
        assert losses(trainer) == losses(fixed)


DENSE_FIRST = Glm4MoeConfig(
    **{"hidden_size": 48, "num_hidden_layers": 4, "first_k_dense_replace": 2, "intermediate_size": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCAB},
    **{"n_routed_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 200, "n_shared_experts": 1},
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alike", "dense layers below experts"])
def test_a_step_takes_no_more_than_the_chord(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory model run with k layers is below the straight line between none and all."""
    config: Any = DENSE_FIRST
    if kind == "alike":
        config = tiny_llama(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=256).config
    depth, name = config.num_hidden_layers, f"{PREFIX}_checkpointing_enable"
    enable, ratios = getattr(PreTrainedModel, name), Ratios(1.3, 0.7, 2.0)

    def step_of(first: int) -> Any:
        def enable_first(model: Any, *args: Any) -> None:
            enable(model, *args)
            for i, layer in enumerate(decoder_layers(model)):
                layer.gradient_checkpointing = i < first

        monkeypatch.setattr(PreTrainedModel, name, enable_first)
        return memory_model(config, ratios, precision=Precision(torch.bfloat16))

    none, full = step_of(0), step_of(depth)
    whole = fit.Fit(none, full, depth, np.ones(1), 0)
    for k in (depth // 2, depth - 1):
        some = step_of(k)
        for n in (200, 3000, 50_000):
            assert none.peak(n) > some.peak(n) >= full.peak(n)
            assert some.peak(n) > full.peak(n) or k > depth // 2, "the last layer may be no moment of the peak"
            assert some.peak(n) <= whole.peak(k, n) + 1 < 1.5 * some.peak(n)


def test_batches_of_groups_hold_more_for_each_row() -> None:
    """Where `tokens_per_batch` counts a prompt once for its pairs, attention still gathers it for each response."""
    prompts, responses = data_for("ranked", 12)["prompt_ids"], rows(60, seed=2)["rejected_ids"]
    data = Dataset.from_list(
        [
            {"prompt_ids": prompt * 9, "chosen_ids": own[i], "rejected_ids": own[j], "pair_index": 9 * p + 3 * i + j}
            for p, prompt in enumerate(prompts)
            for own in [[[*ids, 3 + k] for k, ids in enumerate(responses[5 * p : 5 * p + 4])]]
            for i, j in ((0, 1), (2, 1), (3, 0), (2, 3))
        ]
    )
    sizes, groups = planned_sizes(data, "shared", 4, 400)
    found = fit._ratios(data, "shared", 4)
    for batch in BudgetSampler(sizes, tokens_per_batch=400, groups=groups).plan(0):
        made = shared_prefix_batch(data.select(batch).to_list(), across_examples=True)
        assert len(made["target_ids"]) <= 1.1 * found.targets * 400
        assert len(made["tree_kv_index"]) - made["tree_seqlens_k"][-1] <= found.paths * 400
    alone = fit._ratios(data, "shared")
    assert found.paths > 1.5 * alone.paths


@pytest.mark.parametrize(
    ("where", "at"), [("forward", (0, 0)), ("backward", (0, 1)), ("forward", (2, 1)), ("backward", (2, 0))], ids=str
)
def test_a_lack_of_memory_is_met_by_recomputing_layers(
    where: str, at: tuple[int, int], make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    fixed, ours = make(), make(**AUTO)
    fixed.train()
    failed = fails(ours, where, at, lambda trainer, _: trainer._memory.checkpointed == LAYERS)
    ours.train()
    assert len(failed) == 2  # with none recomputed, and with half of them
    assert f"step {at[0] + 1} ran out of memory and is computed again" in caplog.text
    assert_same_run(ours, fixed)


def test_a_step_that_is_computed_again_has_the_same_random_numbers(make: Callable[..., Any]) -> None:
    noise = {"neftune_noise_alpha": 5.0}
    fixed = make(**noise)
    fixed.train()
    ours = make(**AUTO, **noise)  # made here, because a trainer sets the seed
    fails(ours, "backward", (0, 1), lambda trainer, _: trainer._memory.checkpointed == LAYERS)
    ours.train()
    assert_same_run(ours, fixed)


CUT = {
    "sigmoid": ({}, "pairs"),
    "of the whole step": ({"loss_type": "aot"}, "pairs"),
    "unpaired": ({"loss_type": "kto"}, "unpaired"),
    "one micro-batch": ({"loss_type": "aot", "gradient_accumulation_steps": 1}, "pairs"),
}


@pytest.mark.parametrize("case", CUT)
def test_a_lack_of_memory_is_met_by_cutting_batches(case: str, make: Callable[..., Any]) -> None:
    settings, kind = CUT[case]
    data = data_for(kind, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "MOST_TOKENS", 192)
        ours = make(data=data, **settings, **TOKENS)
        failed = fails(ours, "backward", (1, 0), lambda _, part: part["num_packed_tokens"] <= 70)
        ours.train()
    assert ours._memory.tokens == 192
    assert 2 <= len(failed) <= 4
    fixed = make(data=data, tokens_per_batch=192, **settings)
    fixed.train()
    assert_same_run(ours, fixed)


def test_micro_batches_before_the_one_that_lacks_memory_are_cut_too(make: Callable[..., Any]) -> None:
    """They are computed again as well. A column that is kept beside the tokens may be called label and hold text."""
    data, kept = PAIRS.add_column("label", ["good"] * len(PAIRS)), {"remove_unused_columns": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "MOST_TOKENS", 192)
        ours = make(data=data, **kept, **TOKENS)
        failed = fails(ours, "forward", (1, 1), lambda _, part: part["num_packed_tokens"] <= 70)
        ours.train()
    assert len(failed) >= 2
    fixed = make(data=data, tokens_per_batch=192, **kept)
    fixed.train()
    assert_same_run(ours, fixed)


def test_a_callback_that_asks_for_a_loader_does_not_make_a_step_forget_its_beginning(make: Callable[..., Any]) -> None:
    class AsksForLoader(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            trainer.get_train_dataloader()

    fixed = make()
    fixed.train()
    trainer = make(**AUTO)
    trainer.add_callback(AsksForLoader())
    failed = fails(trainer, "backward", (1, 1), lambda *_: trainer._memory.checkpointed == LAYERS)
    trainer.train()
    assert len(failed) == 2
    assert_same_run(trainer, fixed)


def test_a_step_that_was_not_begun_is_not_computed_again(make: Callable[..., Any]) -> None:
    """Code that calls `training_step` by itself says nothing of where an optimizer step begins."""
    ours = make(**AUTO)
    loader = ours.get_train_dataloader()
    fails(ours, "backward", (0, 0), lambda *_: False)
    with pytest.raises(torch.OutOfMemoryError):
        ours.training_step(ours.model, next(iter(loader)))


@pytest.mark.parametrize("kind", ["lomo", "layerwise"])
def test_no_step_is_computed_again_whose_backward_changes_weights(kind: str) -> None:
    names = [each for each in OptimizerNames if kind in each.value]
    for name in names:
        args = SimpleNamespace(world_size=1, n_gpu=1, optim=name)  # transformers makes it an enum's member
        trainer = SimpleNamespace(args=args, is_deepspeed_enabled=False, is_fsdp_enabled=False)
        assert f"optim={name.value} changes the weights in the backward pass" in str(memory_choice._why_once(trainer))
    assert len(names) > 1


def test_auto_trains_a_model_that_cannot_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asked for `auto`, so it must not end a run that would train without it."""
    caplog.set_level(logging.INFO, "fastdpo")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
    trained = []
    for given in (False, None):
        set_seed(3)
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, **sizes))
        trainer = make_trainer(tmp_path / str(given), model, gradient_checkpointing=given, max_steps=2)
        trainer.train()
        trained.append(weights(trainer.model))
    assert torch.equal(*trained)
    assert "auto recomputes no layers, because the model can't (ValueError: OpenAIGPTLMHeadModel" in caplog.text


def test_what_cannot_be_lowered_ends_the_run_with_advice(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(**AUTO)
    fails(ours, "forward", (1, 0), lambda *_: False)
    with pytest.raises(torch.OutOfMemoryError):
        ours.train()
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert "step 2 ran out of memory, and gradient_checkpointing and tokens_per_batch can't be lowered" in said[0]


def test_another_error_is_not_taken_for_a_lack_of_memory(make: Callable[..., Any]) -> None:
    ours = make(**AUTO)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes differ")

    ours.compute_loss = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        ours.train()


def test_both_are_chosen_together(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "ENOUGH_TOKENS", 256)
    probe = make(**AUTO, **TOKENS)
    probe.get_train_dataloader()
    assert (probe._memory.tokens, probe._memory.checkpointed) == (fit.MOST_TOKENS, 0)
    found = probe._memory._fit
    tight = make(int(found.peak(2, 256)) + 1, **AUTO, **TOKENS)
    tight.get_train_dataloader()
    assert (tight._memory.tokens, tight._memory.checkpointed) == (256, 2)
    fixed = make(int(found.full.peak(640)) + 1, gradient_checkpointing=True, **TOKENS)
    fixed.get_train_dataloader()
    assert (fixed._memory.tokens, fixed._memory.checkpointed) == (640, None)


def test_a_resumed_run_keeps_its_batches_on_a_device_with_other_memory(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "MOST_TOKENS", 128)
    for given in (TOKENS, {"tokens_per_batch": 128}):
        whole = make(**given, save_strategy="steps", save_steps=1)
        whole.train()
        with monkeypatch.context() as patch:
            patch.setattr(fit, "MOST_TOKENS", 320)
            resumed = make(**TOKENS, resume_changed=given != TOKENS)
            resumed.train(f"{whole.args.output_dir}/checkpoint-1")
        assert resumed._memory.tokens == 128
        assert torch.equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(("share", "expected"), [(3.0, LAYERS), (0.6, 0)])
def test_the_choice_is_corrected_by_what_was_measured(
    share: float, expected: int, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = make(**AUTO)
    probe.get_train_dataloader()
    found, largest = probe._memory._fit, probe._memory._largest_batch
    ours = make(int(found.peak(2, largest)) + 1, **AUTO, max_steps=5)
    fixed = found.full.persistent
    monkeypatch.setattr(
        memory_choice,
        "measured_peak",
        lambda _: fixed + int(share * (found.peak(2, ours._memory._largest_seen) - fixed)),
    )
    ours.train()
    assert ours._memory.checkpointed == expected
    same = make(max_steps=5)
    same.train()
    assert losses(ours) == losses(same)


@pytest.mark.parametrize(("share", "expected"), [(1.2, 2), (0.5, 2), (1.3, LAYERS), (None, LAYERS)])
def test_where_no_step_can_be_computed_again_fewer_layers_wait_for_a_measurement(
    share: float | None,
    expected: int,
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fastdpo")
    probe = make(**AUTO)
    probe.get_train_dataloader()
    found, largest = probe._memory._fit, probe._memory._largest_batch
    monkeypatch.setattr(memory_choice, "_why_once", lambda _: "several processes can't compute a step again")
    fixed = found.full.persistent
    scale = max(share or 0, 1)
    ours = make(int(fixed + scale * (found.peak(2, largest) - fixed)) + 1, **AUTO, max_steps=5)

    def measured(_: Any) -> int | None:
        seen = ours._memory._largest_seen if ours._memory else largest  # it is asked before the choice is stored, too
        return share and int(fixed + share * (found.peak(LAYERS, seen) - fixed))

    monkeypatch.setattr(memory_choice, "measured_peak", measured)
    runs = count_forwards(ours.model.model.layers[-1].mlp)
    ours.train()
    first, *later = [record.message for record in caplog.records if "gradient_checkpointing=auto" in record.message][1:]
    if share is None:
        assert "recomputes all layers, because" in first
        assert not later
    else:
        assert "recomputes 4 of 4 layers in the first 3 steps" in first
        assert [f"recomputes {expected} of 4 layers from now on" in each for each in later] == [True]
    assert len(runs) == 3 * 2 * 2 + 2 * 2 * (1 + (expected == LAYERS)), "the first three steps recompute all"
    same = make(max_steps=5)
    same.train()
    assert losses(ours) == losses(same)


def test_what_the_memory_model_does_not_know_is_trained_as_before(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    unknown = make(None, **AUTO, **TOKENS)
    unknown.train()
    said = (
        "gradient_checkpointing=auto recomputes all layers and tokens_per_batch=auto takes "
        "per_device_train_batch_size=4 examples, because the memory of a step is not known: the free memory of cpu "
        "can't be read"
    )
    assert said in caplog.text
    assert all(layer.gradient_checkpointing for layer in unknown.model.model.layers)
    caplog.set_level(logging.INFO, "fastdpo")
    stream = IterableDataset.from_generator(lambda: iter(PAIRS.to_list()))
    streamed = make(data=stream, **AUTO)
    streamed.train()
    assert "the lengths of a stream are not known before" in caplog.text
    fixed = make()
    fixed.train()
    assert losses(unknown) == losses(fixed)
    with pytest.raises(ValueError, match=r"tokens_per_batch=auto needs a datasets.Dataset, .* this is a stream"):
        make(data=stream, **TOKENS).train()


def test_a_memory_model_that_breaks_ends_no_run(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody asked for `auto`, which is the default, so an error in a strange model's code must not be fatal."""

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("rope_theta")

    monkeypatch.setattr(fit, "memory_model", broken)
    caplog.set_level(logging.INFO, "fastdpo")
    ours = make(gradient_checkpointing=None, max_steps=1)
    ours.train()
    assert "recomputes all layers, because the memory of a step is not known: the memory model can't be" in caplog.text
    assert "KeyError: 'rope_theta'" in caplog.text
    assert all(layer.gradient_checkpointing for layer in ours.model.model.layers)


def test_layers_of_a_tower_that_sees_images_are_not_counted() -> None:
    """They come first in the model and do not run on text, so that recomputing them would save nothing."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 60}
    images = sizes | {"num_hidden_layers": 5, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
        )
    assert decoder_layers(model) == list(model.model.language_model.layers)
    text_only = tiny_llama()
    text_only.get_decoder = lambda: None  # as code of others may do
    assert decoder_layers(text_only) == list(text_only.model.layers)


def test_the_free_memory_of_a_container_is_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "meminfo": "MemTotal:  9000 kB\nMemAvailable:    5000 kB\n",
        "memory.max": "4000000\n",
        "memory.current": "1500000\n",
        "memory.stat": "anon 3\ninactive_file 400000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    assert free_memory.available_on_cpu() == 4_000_000 - 1_100_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.available_on_cpu() == 5000 * 1024
    (tmp_path / "meminfo").unlink()
    assert free_memory.available_on_cpu() is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("auto", True, None)),
        (["--gradient_checkpointing"], (True, True, None)),
        (["--gradient_checkpointing", "auto", "--tokens_per_batch", "auto"], ("auto", True, "auto")),
        (["--gradient-checkpointing=false", "--tokens_per_batch", "96"], (False, False, 96)),
        (["--no_gradient_checkpointing"], (False, False, None)),
        pytest.param(
            ["--gradient_checkpointing", "auto", "--activation_checkpointing", "false"],
            (False, False, None),
            marks=newer,
        ),
    ],
    ids=str,
)
def test_the_flags_of_transformers_parser(flags: list[str], expected: tuple[Any, ...], tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--head_workspace", "268435456", *flags]
    (config,) = HfArgumentParser((fastdpo.DPOConfig,)).parse_args_into_dataclasses(words)
    recomputes = getattr(config, "activation_checkpointing", bool(config.gradient_checkpointing))
    assert (config.gradient_checkpointing, recomputes, config.tokens_per_batch) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing must be true, false or auto, got 'some'"),
        ({"tokens_per_batch": "many"}, "tokens_per_batch must be a number of tokens or auto, got 'many'"),
        ({"tokens_per_batch": "0"}, "tokens_per_batch must be at least 1, got 0"),
        (AUTO | {f"{PREFIX}_checkpointing_kwargs": {"every_n_layers": 2}}, "auto chooses the layers"),
    ],
    ids=str,
)
def test_other_values_are_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        fastdpo.DPOConfig(str(tmp_path), use_cpu=True, **given)

"""A plan says beforehand what a run then does: its tokens, its batches, its memory."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from fastdpo import DPOConfig, shared_prefix_batch
from fastdpo.benchmarks import lengths
from fastdpo.data.prepare import prepare_dataset
from fastdpo.data.sampler import BudgetSampler, example_sizes
from fastdpo.model.attention import backends
from fastdpo.model.attention.backends import Usable
from fastdpo.model.attention.key_paths import key_paths
from fastdpo.model.attention.registered import METADATA
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.plan import memory as memory_module
from fastdpo.plan import plan, tables
from fastdpo.plan.memory import Memory
from fastdpo.plan.resident import Job
from fastdpo.plan.token_stats import epoch, token_stats
from fastdpo.plan.tracing import trace as trace_module
from fastdpo.plan.tracing.trace import Moment, Precision, Ratios
from fastdpo.report.metrics import RunningSums, add_tokens
from fastdpo.run import RunConfig
from tests.helpers import tiny

VOCAB = 512
TOKENIZER: Any = lengths.tokenizer(VOCAB)
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def settings(folder: Path, **options: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], **options)


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


ROWS = [
    {"prompt": words(3, 4, 5), "chosen": " " + words(6, 7), "rejected": " " + words(8)},
    {"prompt": words(9), "chosen": " " + words(10, 11, 12), "rejected": " " + words(10, 11, 13, 14)},
    {"prompt": words(3, 4), "chosen": " " + words(*range(20, 32)), "rejected": " " + words(7)},
    {"prompt": words(*range(40, 52)), "chosen": " " + words(6), "rejected": " " + words(7)},
    {"prompt": words(3, 4), "chosen": " " + words(6), "rejected": " " + words(6)},
    {"prompt": words(3, 4), "chosen": "", "rejected": " " + words(6)},
]
"""Two plain ones (the second's responses begin alike), one to cut, one whose prompt is too long, one tie, one bad."""


def test_tokens_are_counted(tmp_path: Path) -> None:
    args = settings(tmp_path, max_length=10, on_bad_row="drop")
    stats = token_stats(Dataset.from_list(ROWS), TOKENIZER, args, VOCAB)
    assert stats.given == 6
    assert {name: values.tolist() for name, values in stats.lengths.items()} == {
        "prompt": [3, 1, 2],
        "chosen": [3, 4, 8],  # EOS included, but for the one that is cut
        "rejected": [2, 5, 2],
    }
    assert stats.cut == {"chosen": [2]}
    assert stats.dropped == {
        "its prompt of # tokens fills max_length=#": [3],
        "chosen and rejected are the same tokens": [4],
        "`chosen` is empty": [5],
    }
    # P + C + R - 1, less the two tokens with which both responses of the second begin
    assert stats.sizes.prod(1).tolist() == [7, 1 + 4 + 5 - 1 - 2, 11]
    packed = token_stats(
        Dataset.from_list(ROWS),
        TOKENIZER,
        args,
        VOCAB,
        "packed",
    )
    assert packed.sizes.prod(1).tolist() == [5 + 4, 4 + 5, 9 + 3]


def test_tokens_of_unpaired_examples_are_counted(tmp_path: Path) -> None:
    args = settings(tmp_path, max_length=10, loss_type=["kto"])
    stats = token_stats(Dataset.from_list(ROWS[:4]), TOKENIZER, args, VOCAB)
    # chosen ones first, then rejected ones; the fourth pair's prompt is too long
    assert stats.lengths["prompt"].tolist() == [3, 1, 2] * 2
    assert stats.lengths["completion"].tolist() == [3, 4, 8, 2, 5, 2]
    assert len(stats.lengths["completion for the KL term"]) == 6
    assert stats.cut == {"completion": [2]}
    assert [rows for rows in stats.dropped.values()] == [[3]]
    assert all(len(sequences) == 2 for sequences in stats.sequences)


def test_pairs_that_are_equal_when_cut_are_no_unpaired_examples(tmp_path: Path) -> None:
    equal = {"prompt": words(3, 4), "chosen": " " + words(*range(20, 32)), "rejected": " " + words(*range(20, 30))}
    rows = Dataset.from_list([*ROWS[:2], equal, *ROWS[2:4]])
    args = settings(tmp_path, max_length=10, loss_type=["kto"])
    stats = token_stats(rows, TOKENIZER, args, VOCAB)
    options: Any = {"vocab_size": VOCAB, "kind": "unpaired", "with_kl": True, "max_length": 10}
    trained: Any = prepare_dataset(rows, TOKENIZER, **options)
    assert stats.lengths["prompt"].tolist() == [len(ids) for ids in trained["prompt_ids"]]
    assert stats.lengths["completion"].tolist() == [len(ids) for ids in trained["completion_ids"]]
    assert stats.dropped["chosen and rejected are the same tokens"] == [2]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_length": 10, "max_prompt_length": 20}, "its prompt of # tokens fills max_length=#"),
        ({"max_completion_length": 1}, "chosen and rejected are the same tokens"),
    ],
    ids=str,
)
def test_a_row_is_left_out_for_the_limit_it_was_left_out_for(
    limits: dict[str, int], reason: str, tmp_path: Path
) -> None:
    row = ROWS[1] | ({"prompt": words(*range(40, 55))} if "max_length" in limits else {})
    stats = token_stats(Dataset.from_list([ROWS[0], row]), TOKENIZER, settings(tmp_path, **limits), VOCAB)
    assert stats.dropped == {reason: [1]}


def test_padded_batches_avoid_and_share_nothing(tmp_path: Path) -> None:
    args = settings(tmp_path, max_length=10, per_device_train_batch_size=3)
    batches = epoch(token_stats(Dataset.from_list(ROWS[:3]), TOKENIZER, args, VOCAB, "padded"), args)
    assert (batches.padding_avoided, batches.shared) == (0, 0)
    batches = epoch(token_stats(Dataset.from_list(ROWS[:3]), TOKENIZER, args, VOCAB, "packed"), args)
    assert batches.shared == 0
    assert batches.padding_avoided > 0.1


def test_a_bad_row_stops_the_plan_as_it_stops_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 5: `chosen` is empty"):
        token_stats(Dataset.from_list(ROWS), TOKENIZER, settings(tmp_path), VOCAB)
    with pytest.raises(ValueError, match="whose length is unknown"):
        token_stats(Dataset.from_list(ROWS).to_iterable_dataset(), TOKENIZER, settings(tmp_path), VOCAB)


def test_grouped_batches_hold_what_the_collator_makes_of_them(tmp_path: Path) -> None:
    rows = Dataset.from_list(lengths.pairs_of_prompts("toy", 24, 4, 4, VOCAB, 32))
    args = settings(tmp_path, max_length=32, per_device_train_batch_size=8, group_by_prompt=4)
    stats = token_stats(rows, TOKENIZER, args, VOCAB)
    batches = epoch(stats, args)
    examples: Any = prepare_dataset(rows, TOKENIZER, max_length=32, vocab_size=VOCAB)
    sampler = BudgetSampler(stats.sizes, batch_size=8, seed=args.seed, groups=stats.groups)
    made = [
        shared_prefix_batch([examples[i] for i in batch], pad_to_multiple_of=1, across_examples=True)
        for batch in sampler.plan(0)
    ]
    assert [len(batch["cu_target"]) - 1 for batch in made] == [8, 8, 8]
    assert batches.rows.tolist() == [batch["num_packed_tokens"] for batch in made]
    assert batches.tokens.tolist() == [batch["num_tokens"] for batch in made]
    assert batches.padded.tolist() == [batch["num_padded_tokens"] for batch in made]
    assert batches.paths.tolist() == [len(batch["tree_kv_index"]) for batch in made]
    assert batches.targets.tolist() == [len(batch["target_ids"]) for batch in made]
    assert batches.unshared.tolist() == [batch["num_tokens"] - batch["num_sequences"] for batch in made]
    assert stats.per_prompt == 4
    assert stats.grouped[4] == sum(batch["num_packed_tokens"] for batch in made) / 24
    assert stats.ungrouped > stats.grouped[2] > stats.grouped[4]
    assert list(stats.grouped) == [2, 4]
    assert ("recommended (see docs/grouping.md)", "group_by_prompt=4") in tables._grouping(stats, 32)
    assert "with steps of 8 prompts or more (now about 2)" in tables._grouping(stats, 8)[-1][1]


def test_a_start_that_all_prompts_share_is_not_saved_by_grouping(tmp_path: Path) -> None:
    """A batch shares it in any case, so that grouping saves little of what its pairs alone would take."""
    system = "w8 " * 40
    rows = [row | {"prompt": system + row["prompt"]} for row in lengths.pairs_of_prompts("toy", 24, 4, 4, VOCAB, 32)]
    args = settings(tmp_path, max_length=96, per_device_train_batch_size=8)
    stats = token_stats(Dataset.from_list(rows), TOKENIZER, args, VOCAB)
    examples: Any = prepare_dataset(Dataset.from_list(rows), TOKENIZER, max_length=96, vocab_size=VOCAB)
    batches = BudgetSampler(stats.sizes, batch_size=8, seed=0).plan(0)
    made = [
        shared_prefix_batch([examples[i] for i in batch], pad_to_multiple_of=1, across_examples=True)
        for batch in batches
    ]
    assert stats.ungrouped == sum(batch["num_packed_tokens"] for batch in made) / 24
    assert stats.ungrouped < 40, "the system prompt is computed once in a batch"


@pytest.mark.parametrize("options", [{"tokens_per_batch": 60}, {"per_device_train_batch_size": 3}], ids=str)
def test_batches_hold_what_the_collator_makes_of_them(options: dict[str, Any], tmp_path: Path) -> None:
    rows = Dataset.from_list(lengths.pairs("toy", 20, VOCAB, 32))
    args = settings(tmp_path, max_length=32, **options)
    stats = token_stats(rows, TOKENIZER, args, VOCAB)
    batches = epoch(stats, args)
    examples: Any = prepare_dataset(rows, TOKENIZER, max_length=32, vocab_size=VOCAB)
    sampler = BudgetSampler(
        example_sizes(examples, "shared"),
        tokens_per_batch=options.get("tokens_per_batch"),
        batch_size=options.get("per_device_train_batch_size"),
        seed=args.seed,
    )
    made = [shared_prefix_batch([examples[i] for i in batch], pad_to_multiple_of=1) for batch in sampler.plan(0)]
    assert batches.rows.tolist() == [batch["num_packed_tokens"] for batch in made]
    assert batches.tokens.tolist() == [batch["num_tokens"] for batch in made]
    assert batches.padded.tolist() == [batch["num_padded_tokens"] for batch in made]
    assert batches.paths.tolist() == [len(batch["tree_kv_index"]) for batch in made]
    assert batches.targets.tolist() == [len(batch["target_ids"]) for batch in made]
    grid = [(len(batch["tree_cu_seqlens_q"]) - 1) * batch["tree_max_seqlen_k"] for batch in made]
    assert batches.grid.tolist() == grid
    # the shares that training logs
    sums = RunningSums()
    for batch in made:
        add_tokens(sums, batch)
    rows_of_sums = sums.read(Accelerator(cpu=True))
    assert batches.shared == pytest.approx(np.divide(*rows_of_sums["prompt_shared"]))
    assert batches.padding_avoided == pytest.approx(np.divide(*rows_of_sums["padding_saved"]))


def real_step(config: Any, batch: dict[str, Any], checkpointing: bool) -> Any:
    """A function that runs one step on real tensors, with the models it needs."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    for each in (model, reference):
        patch_forward(each)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        scores = model(**batch).logps
        with torch.no_grad():
            expected = reference(**batch).logps
        (scores - expected).sum().backward()

    return step, [*model.parameters(), *model.buffers(), *reference.parameters(), *reference.buffers()]


def batch_of(pairs: int) -> tuple[dict[str, Any], int, Ratios]:
    """A batch, its rows, and what it holds for each."""
    rows = [(40 + 7 * i, i % 3, 30 + 5 * i, 60 - 2 * i) for i in range(pairs)]
    batch = shared_prefix_batch(tiny.make_pairs(rows))
    T = batch["input_ids"].shape[1]
    grid = len(key_paths(*(batch[name] for name in METADATA), T=T).grid)
    return batch, T, Ratios(len(batch["tree_kv_index"]) / T, len(batch["target_ids"]) / T, grid / T)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "keeping"])
def test_memory_is_what_a_step_takes(checkpointing: bool) -> None:
    """Every storage that a real step allocates outside of kernels is counted, and the prediction is within 10 %."""
    batch, T, ratios = batch_of(8)
    predicted = memory_module.memory_model(CONFIG, ratios, checkpointing=checkpointing)  # in float32: the grid
    step, known = real_step(CONFIG, batch, checkpointing)
    with trace_module.Live(iter(known), 0, trace_module.Place()) as live:
        step()
    counted = max(operation.alive for operation in live.operations)
    outside = replace(predicted, workspace_per_row=0)  # the head's workspace is inside its kernel
    assert outside.peak(T) - predicted.persistent == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
def test_memory_of_other_setups() -> None:
    ratios = Ratios(1.4, 0.5, 1.6)
    plain = memory_module.memory_model(CONFIG, ratios)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIG).parameters())
    buffers = plain.weights - 4 * parameters
    assert 0 <= buffers < 1024
    assert plain.gradients == 4 * parameters
    assert plain.optimizer == 8 * parameters
    assert plain.reference == plain.weights
    assert CONFIG._attn_implementation != memory_module.NAME, "the caller's config is left alone"

    keeping = memory_module.memory_model(CONFIG, ratios, checkpointing=False)
    deeper = memory_module.memory_model(LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 4}), ratios)
    assert deeper.kept_per_row - plain.kept_per_row == 2 * 4 * CONFIG.hidden_size  # of a layer only its input
    assert keeping.kept_per_row > 3 * plain.kept_per_row
    wide = memory_module.memory_model(CONFIG, ratios._replace(grid=3.0), checkpointing=False)
    assert (keeping.attention, wide.kept_per_row > keeping.kept_per_row) == (("grid",), True)

    half = memory_module.memory_model(CONFIG, ratios, precision=Precision(torch.bfloat16), optimizer="sgd")
    assert half.attention == ("varlen",)
    assert half.optimizer == 0
    assert half.weights < 0.51 * plain.weights
    mixed = memory_module.memory_model(
        CONFIG, ratios, precision=Precision(autocast=torch.bfloat16), checkpointing=False
    )
    assert half.kept_per_row < mixed.kept_per_row < 0.9 * keeping.kept_per_row
    adds_up = memory_module.memory_model(CONFIG, ratios, job=Job(micro_batches=2))
    assert adds_up.peak(4096) >= plain.peak(4096)
    cached = memory_module.memory_model(CONFIG, ratios, has_reference=False, runs_reference=False)
    assert cached.persistent == plain.persistent - plain.reference


BF16 = Precision(torch.bfloat16)


def test_memory_knows_which_attention_a_layer_can_have() -> None:
    def memory(config: Any, backend: str = "auto") -> Memory:
        options: Any = {"precision": BF16, "backends": Usable(backend, {}), "checkpointing": False}
        return memory_module.memory_model(config, Ratios(1.4, 0.5, 3.0), **options)

    plain, grid = memory(CONFIG), memory(CONFIG, "grid")
    assert (plain.attention, grid.attention) == (("varlen",), ("grid",))
    assert grid.kept_per_row > plain.kept_per_row
    small = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    capped, uncapped = (Gemma2Config(**small, **heads, attn_logit_softcapping=cap) for cap in (50.0, None))
    assert (memory(capped).attention, memory(uncapped).attention) == (("grid",), ("varlen",))
    # the scores that are computed at a time
    assert memory(capped).peak(1024) - memory(uncapped).peak(1024) > 4 * backends.SCORES
    with pytest.raises(ValueError, match="attention_backend='varlen' cannot be used: it does not know soft-caps"):
        memory(capped, "varlen")


@pytest.mark.slow
def test_memory_with_another_model_as_reference() -> None:
    from peft import LoraConfig

    deeper = LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 4})
    ratios, alone = Ratios(1.4, 0.5, 1.6), memory_module.memory_model(deeper, Ratios(1.4, 0.5, 1.6))
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for peft_config in (None, adapter):
        memory = memory_module.memory_model(CONFIG, ratios, peft_config=peft_config, reference_config=deeper)
        assert memory.reference == alone.weights


def test_memory_with_an_adapter() -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    memory = memory_module.memory_model(CONFIG, Ratios(1.4, 0.5, 1.6), peft_config=adapter, has_reference=False)
    assert memory.gradients < memory.weights / 5
    assert memory.optimizer == 2 * memory.gradients
    assert memory.reference == 0


def test_a_model_that_cannot_be_packed_has_no_plan() -> None:
    from transformers import MambaConfig

    small = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        memory_module.memory_model(small, Ratios(1.5, 0.5, 2.0))


def test_a_plan_reads_what_the_trainer_would_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    LlamaConfig(**CONFIG.to_dict() | {"dtype": "bfloat16"}).save_pretrained(tmp_path / "policy")
    LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 4}).save_pretrained(tmp_path / "ref")
    policy, ref, adapter = (str(tmp_path / name) for name in ("policy", "ref", "adapter"))
    LoraConfig(r=4, task_type="CAUSAL_LM", base_model_name_or_path=policy).save_pretrained(adapter)
    memory = Memory(1, 1, 1, 1, 1.0, 1.0, (Moment(1.0, 1.0, 0),))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(plan, "memory_model", lambda config, ratios, **options: asked.update(options) or memory)
    rows = Dataset.from_list(ROWS[:2])

    def planned(path: str, run: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        made = RunConfig(dataset_name="unused", model_name_or_path=path, **(run or {}))
        plan.make_plan(made, settings(tmp_path, max_length=10, **options), rows, TOKENIZER, gpu_memory=4)
        return asked

    assert planned(policy)["precision"] == Precision(torch.float32, torch.bfloat16)
    assert planned(policy, bf16=False)["precision"] == Precision(torch.float32, None)
    for kwargs in ({"dtype": "auto"}, {"torch_dtype": "bfloat16"}):
        assert planned(policy, bf16=False, model_init_kwargs=kwargs)["precision"] == Precision(torch.bfloat16, None)
    assert planned(policy, attention_backend="grid")["backends"].backend == "grid"
    referred = planned(policy, {"ref_model_name_or_path": ref, "use_peft": True})
    assert (referred["has_reference"], referred["reference_config"].num_hidden_layers) == (True, 4)
    adapted = planned(adapter)
    assert (adapted["has_reference"], adapted["peft_config"].r) == (False, 4)
    with pytest.raises(ValueError, match=r"use_peft=True would add an adapter to .*adapter, which is an adapter"):
        planned(adapter, {"use_peft": True})


def test_padded_batches_have_no_memory_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "fastdpo")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    LlamaConfig(**CONFIG.to_dict() | {"rope_parameters": rope}).save_pretrained(tmp_path)
    run = RunConfig(dataset_name="unused", config_name=str(tmp_path))
    made = plan.make_plan(run, settings(tmp_path, max_length=10), Dataset.from_list(ROWS[:2]), TOKENIZER, gpu_memory=4)
    assert (made.memory, made.fits) == ({}, {})
    text = tables.tables(made)
    assert "memory: not computed, because batches are padded" in text
    assert "peak" not in text


def test_peak_and_the_largest_batch_agree() -> None:
    moments = (Moment(0.0, 500.0, 0), Moment(10.0, 0.0, 0), Moment(7.0, 100.0, 2))
    memory = Memory(
        weights=100, reference=100, gradients=100, optimizer=200, kept_per_row=1, workspace_per_row=2, timeline=moments
    )
    assert memory.peak(1) == 400 + 500
    assert memory.peak(100) == 400 + 100 + 7 * 100 + 2 * 200
    for budget in (900, 1000, 4321, 10**9):
        rows = memory.largest(budget)
        assert memory.peak(rows) <= budget < memory.peak(rows + 1)
    assert memory.largest(899) == 0


def test_a_larger_workspace_is_advised_where_probabilities_do_not_fit() -> None:
    moments = (Moment(0.0, 500.0, 0), Moment(7.0, 100.0, 2))
    sizes = {"weights": 0, "reference": 0, "gradients": 0, "optimizer": 0, "kept_per_row": 1}
    memory = Memory(**sizes, workspace_per_row=2**18, timeline=moments, head_workspace=2**30)
    assert memory.peak(2000) == 100 + 7 * 2000 + 2000 * 2**18 + 2**28, "it works in 256 MiB"
    assert memory.peak(8000) == 100 + 7 * 8000 + 2**30 + 2**28
    (advice,) = tables._head_advice(memory, 8000)
    assert "head_workspace=1.00 GiB holds 50% of" in advice
    assert "head_workspace=2.1GiB holds all of them, for 1.01 GiB more memory and 14% fewer" in advice
    assert tables._head_advice(memory, 3000) == []
    assert tables._head_advice(replace(memory, timeline=(Moment(7.0, 100.0, 1),)), 8000) == [], (
        "a frozen head keeps none"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "about 20% of the multiplications of a step; .* pays in this run of 3 epochs"),
        ({"gradient_checkpointing": False, "max_steps": 1}, "about 25% .* pays with 5 such runs, or with a second"),
        ({"use_peft": True, "num_train_epochs": 1}, "about 25% .* pays with 2 such runs, or with a second epoch"),
        ({"precompute_ref_log_probs": True}, None),
        ({"sync_ref_model": True}, None),
        ({"loss_type": "simpo", "beta": 2.0}, None),
    ],
    ids=["full", "part-of-an-epoch", "lora", "precomputed", "TR-DPO", "simpo"],
)
def test_a_plan_says_when_precomputing_the_reference_pays(
    options: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    """Full fine-tuning takes the reference's forward, the policy's twice with checkpointing, and two for gradients."""
    # its batches are padded, so that no memory is computed, which would take seconds
    LlamaConfig(**CONFIG.to_dict() | {"attention_dropout": 0.1}).save_pretrained(tmp_path)
    options, uses_peft = dict(options), "use_peft" in options
    options.pop("use_peft", None)
    args = settings(tmp_path, per_device_train_batch_size=1, disable_dropout=False, **options)
    run = RunConfig(dataset_name="unused", config_name=str(tmp_path), use_peft=uses_peft)
    text = tables.tables(plan.make_plan(run, args, Dataset.from_list(ROWS[:4]), TOKENIZER))
    said = [line for line in text.splitlines() if line.startswith("reference:")]
    assert len(said) == (expected is not None)
    assert all(re.search(str(expected), line) for line in said), said


def test_envelope_loses_no_maximum() -> None:
    rng = np.random.default_rng(0)
    moments = {Moment(*rng.integers(0, 50, 2).astype(float).tolist(), int(rng.integers(3))) for _ in range(300)}
    kept = trace_module.upper_envelope(moments)
    assert len(kept) < 40
    for rows in (0, 1, 2, 5, 17, 1000):
        for workspaces in range(3):
            every, few = (
                max(m.fixed + m.per_row * rows for m in some if m.workspaces == workspaces) for some in (moments, kept)
            )
            assert every == few


def test_plan_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CONFIG.save_pretrained(tmp_path)
    args = settings(tmp_path, max_length=10, on_bad_row="drop", tokens_per_batch=32, gradient_accumulation_steps=2)
    run = RunConfig(dataset_name="unused", config_name=str(tmp_path))
    caplog.set_level(logging.ERROR, "fastdpo")
    made = plan.make_plan(run, args, Dataset.from_list(ROWS), TOKENIZER, gpu_memory=4)
    text = tables.tables(made)
    assert made.steps == 1
    assert made.checkpointing == "auto"
    for fact in (
        "left out: `chosen` is empty",
        "1 (first: row 5)",
        "memory (computed, not measured)",
        "largest tokens_per_batch in 4 GiB",
        "bfloat16",
        "`fastdpo precompute` computes it once",
    ):
        assert fact in text
    for on, rows in made.fits.items():
        assert rows % 64 == 0
        assert made.memory[on].peak(rows) < 3 * plan.GIB < made.memory[on].peak(2 * rows)
    tight = plan.Plan(**vars(made) | {"gpu_memory": 1.001})
    assert tight.fits == {True: 0, False: 0}
    assert "nothing fits into 1.001 GiB" in tables.tables(tight)
    assert f"on auto, which recomputes {made.layers} of {made.layers} layers for" in tables.tables(tight)
    assert f"on auto, which recomputes 0 of {made.layers} layers for the largest batch" in text
    assert "which recomputes as few layers" in tables.tables(plan.Plan(**vars(made) | {"gpu_memory": None}))
    assert tight.reference_share == pytest.approx(1 / 5)
    assert made.reference_share == pytest.approx(1 / 4), "nothing is recomputed"

    picture = tmp_path / "plan.png"
    tables.draw_lengths(made.stats, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="gpu_memory must be above 0 GiB, got -1"):
        plan.make_plan(run, args, Dataset.from_list(ROWS), TOKENIZER, gpu_memory=-1)

"""What scripts and callbacks written for TRL's trainer find in ours: rows, reference, tokens, attributes, card."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fastdpo
from fastdpo.model import policy
from fastdpo.trainer import packed_trainer
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import lora, losses, rows, tiny_llama

TEXTS = Dataset.from_list(
    [{"prompt": f"{i} and", "chosen": " one" * (i % 3 + 1), "rejected": " two", "source": f"s{i}"} for i in range(6)]
)
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "show_example": False}


@pytest.fixture
def text_trainer(tmp_path: Path) -> Callable[..., fastdpo.DPOTrainer]:
    def make(model: Any = None, data: Any = TEXTS, tokenizer: Any = None, **others: Any) -> fastdpo.DPOTrainer:
        of_trainer = {name: others.pop(name) for name in ("data_collator", "callbacks") if name in others}
        settings = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "logging_steps": 1, **QUIET, **others}
        return fastdpo.DPOTrainer(
            model=model or tiny_llama(num_hidden_layers=1),
            args=fastdpo.DPOConfig(**settings),
            train_dataset=data,
            eval_dataset=data.select(range(3)),
            processing_class=tokenizer or byte_tokenizer(),
            **of_trainer,
        )

    return make


def test_a_best_metric_that_does_not_exist_stops_the_first_evaluation(text_trainer: Callable[..., Any]) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "metric_for_best_model": "margin"}
    trainer = text_trainer(**given)
    message = "metric_for_best_model must be one of loss, .*rewards/margins.*, got 'margin'"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "test_loss" in trainer.evaluate(metric_key_prefix="test"), "a callback's own evaluation chooses no model"
    trainer.is_in_train = False
    assert "eval_rewards/margins" in trainer.evaluate(), "an evaluation of its own needs no best metric"


def test_a_second_training_counts_neither_the_pause_before_it_nor_what_a_stopped_one_left(
    text_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trainer, pause = text_trainer(max_steps=2, logging_steps=2), [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + pause[0])
    monkeypatch.setattr(packed_trainer, "time", clock)
    trainer.train()
    first = trainer.state.log_history[0]
    with monkeypatch.context() as broken:
        broken.setattr(trainer, "_get_grad_norm", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    pause[0] = 1e6
    trainer.train()
    again = trainer.state.log_history[0]
    assert again["num_tokens"] == first["num_tokens"]
    assert again["tokens_per_second"] > 0.1, "of a million seconds"


# The reference of rows that are passed to evaluate


@pytest.mark.parametrize("reference", ["own", "passed", "adapter"])
def test_new_rows_are_evaluated_as_if_nothing_were_precomputed(make: Callable[..., Any], reference: str) -> None:
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    options = {"own": {}, "passed": {"ref_model": other}, "adapter": {"peft_config": lora()}}[reference]
    found = {}
    for precompute in (False, True):
        trainer = make(precompute_ref_log_probs=precompute, max_steps=2, **options)
        found[precompute] = [trainer.evaluate(rows(6, seed=9))["eval_rewards/margins"]]
        trainer.train()
        if reference != "own":
            found[precompute].append(trainer.evaluate({"new": rows(6, seed=9)})["eval_new_rewards/margins"])
    assert found[True] == pytest.approx(found[False], abs=1e-5)
    if reference != "own":
        assert abs(found[True][1] - found[True][0]) > 1e-4


# Rows


def test_raw_columns_stay_beside_the_rows_that_are_kept(text_trainer: Callable[..., Any]) -> None:
    bad = TEXTS.add_item({"prompt": "7 and", "chosen": " same", "rejected": " same", "source": "bad"})
    data = bad.select([0, 6, 1, 2, 3])
    trainer = text_trainer(data=data, on_bad_row="drop")
    assert trainer.train_dataset["source"][:] == ["s0", "s1", "s2", "s3"]
    assert trainer.eval_dataset["prompt"][:] == ["0 and", "1 and"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert not {"prompt", "source"} & set(batch)


def test_a_dataset_that_fills_no_batch_is_refused(text_trainer: Callable[..., Any]) -> None:
    trainer = text_trainer(data=TEXTS.select(range(3)), dataloader_drop_last=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="dataset has 3 examples, which fill no batch, and dataloader_drop"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_callback_of_trls_reads_prompts_and_generates(text_trainer: Callable[..., Any]) -> None:
    trl = pytest.importorskip("trl")
    trainer = text_trainer(eval_strategy="steps", eval_steps=1)
    options = GenerationConfig(max_new_tokens=3, do_sample=False)
    callback = trl.LogCompletionsCallback(trainer, options, num_prompts=2)
    trainer.add_callback(callback)
    trainer.train()
    assert [row[1] for row in callback.table] == ["0 and", "1 and"]


def test_trls_collator_is_replaced_by_a_packed_one(text_trainer: Callable[..., Any]) -> None:
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    given = text_trainer(data_collator=module.DataCollatorForPreference(pad_token_id=2), learning_rate=1e-3)
    plain = text_trainer(learning_rate=1e-3)
    for trainer in (given, plain):
        trainer.train()
    assert losses(given) == losses(plain)
    with pytest.raises(ValueError, match="data_collator would cut rows with max_length=7, but DPOConfig says 1024"):
        text_trainer(data_collator=module.DataCollatorForPreference(pad_token_id=2, max_length=7))
    other = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    with pytest.raises(ValueError, match="data_collator is a DataCollatorForLanguageModeling"):
        text_trainer(data_collator=other(pad_token_id=2))
    with pytest.raises(
        ValueError, match="data_collator makes batches of input_ids, but training needs those of fastdpo"
    ):
        text_trainer(data_collator=lambda rows: {"input_ids": torch.tensor([row["prompt_ids"] for row in rows])})


# Tokens and models


def test_the_pad_token_is_the_same_everywhere(text_trainer: Callable[..., Any]) -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama(num_hidden_layers=1, pad_token_id=None)
    tokenizer.pad_token = None
    text_trainer(model, tokenizer=tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_the_revision_reaches_config_and_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def from_pretrained(kind: str, result: Any) -> Any:
        def record(name: str, **options: Any) -> Any:
            asked[kind] = options.get("revision")
            return result

        return staticmethod(record)

    model = tiny_llama(num_hidden_layers=1)
    model.config._name_or_path = "someone/model"
    for cls, result in ((transformers.AutoConfig, model.config), (AutoModelForCausalLM, model), (AutoTokenizer, None)):
        monkeypatch.setattr(cls, "from_pretrained", from_pretrained(cls.__name__, result))
    args = fastdpo.DPOConfig(output_dir=str(tmp_path), use_cpu=True, model_init_kwargs={"revision": "v2"})
    policy.load_tokenizer(policy.load_policy("someone/model", args), args)
    assert asked == {"AutoConfig": "v2", "AutoModelForCausalLM": "v2", "AutoTokenizer": "v2"}


@pytest.fixture
def llava(tmp_path: Path) -> str:
    """A checkpoint with a vision tower, which AutoModelForCausalLM does not know."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**size, num_hidden_layers=1, num_key_value_heads=2, vocab_size=300)
    vision = transformers.CLIPVisionConfig(**size, num_hidden_layers=2, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=270)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


def test_a_model_that_sees_is_trained_on_text_and_keeps_its_eyes(
    text_trainer: Callable[..., Any], llava: str, tmp_path: Path
) -> None:
    trainer = text_trainer(llava, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer) == pytest.approx([0.693147], abs=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    start = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    eyes = [dict(m.model.vision_tower.named_parameters()) for m in (again, start)]
    assert all(torch.equal(eyes[0][name], eyes[1][name]) for name in eyes[1])
    assert not torch.equal(again.lm_head.weight, start.lm_head.weight)


# Attributes and the card


def test_the_attributes_are_those_of_the_objective(make: Callable[..., Any]) -> None:
    trainer = make(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.2, max_steps=1)
    assert (trainer.beta, trainer.loss_types, trainer.loss_weights) == (0.2, ["sigmoid", "sft"], [1.0, 0.5])
    assert trainer.label_smoothing == 0.0
    assert trainer.f_divergence_type == "reverse_kl"
    assert [trainer.reference_free, trainer.use_weighting, trainer.precompute_ref_logps] == [False] * 3
    assert trainer.padding_free
    with pytest.raises(AttributeError, match=r"loss_type can't be changed .* DPOConfig\(loss_type=...\)"):
        trainer.loss_types = ["ipo"]
    with pytest.raises(ValueError, match="beta"):
        trainer.beta = -1.0
    before = trainer.evaluate(rows(4, seed=3))
    trainer.train()
    margin = trainer.evaluate(rows(4, seed=3))["eval_rewards/margins"]
    trainer.beta = 0.4
    assert trainer.evaluate(rows(4, seed=3))["eval_rewards/margins"] == pytest.approx(2 * margin)
    assert before["eval_rewards/margins"] != margin


def test_the_card_says_what_was_trained_and_no_secret(
    text_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = text_trainer(
        hub_token="hf_" + "x" * 20, hub_model_id="someone/little", beta=0.25, ld_alpha=0.5, eval_on_start=True
    )
    trainer.train()
    trainer.evaluate()
    trainer.model.config._name_or_path = "someone/start"
    trainer.create_model_card(dataset_name="someone/pairs", tags="mine", license="mit")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "base_model: someone/start",
        "datasets: someone/pairs",
        "license: mit",
        "- dpo",
        "- mine",
        "# little",
    ):
        assert words in card, words
    for words in ("| `beta` | `0.25` |", "| `ld_alpha` | `0.5` |", "| train | 6 |", "rafailov2023direct", "+0.000"):
        assert words in card, words
    assert "hf_x" not in card
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {"fastdpo", "dpo"} <= set(trainer.model.model_tags)
    trainer.create_model_card()
    assert "someone/pairs" in (tmp_path / "out" / "README.md").read_text(), "the dataset's name is remembered"

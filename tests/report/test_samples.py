"""fastdpo.report.samples: what the model answers to held-out prompts, and what that may not change."""

import copy
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, Trainer

import fastdpo
from fastdpo import cli
from fastdpo.report import plots, samples
from fastdpo.run import RunConfig
from fastdpo.trainer import DPOTrainer

ROOT = Path(__file__).parent.parent.parent
WORDS = ("blue", "a red house", "tea", "snow on the roof", "an owl")
TEXT = [{"prompt": f"Say {word}:", "chosen": f" {word}", "rejected": " no, not that"} for word in WORDS]
CHAT = [
    {side: [{"role": "user" if side == "prompt" else "assistant", "content": text}] for side, text in row.items()}
    for row in TEXT
]
RANKED = [{"prompt": row["prompt"], "responses": [row["chosen"], " well", row["rejected"]]} for row in TEXT]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in TEXT
    for side in ("rejected", "chosen")
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/model")


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DPOTrainer]:
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 12)  # enough to be wrong

    def make(
        rows: list[dict[str, Any]] = TEXT, *, dtype: torch.dtype = torch.float32, lora: bool = False, **args: Any
    ) -> DPOTrainer:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(
            **sizes, vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=tokenizer.eos_token_id
        )
        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        settings = {"output_dir": str(tmp_path), "max_steps": 2, "learning_rate": 0.01, "save_strategy": "no"}
        settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        return fastdpo.DPOTrainer(
            model=LlamaForCausalLM(config).to(dtype),
            args=fastdpo.DPOConfig(**(settings | args)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def greedy(trainer: DPOTrainer, prompt_ids: list[int], limit: int = 12) -> str:
    """The most likely token again and again, without a cache, until EOS."""
    tokenizer, ids = trainer.processing_class, list(prompt_ids)
    model = copy.deepcopy(trainer.model).eval()
    with torch.no_grad():
        while len(ids) < len(prompt_ids) + limit and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).strip()
    return text if ids[-1] == tokenizer.eos_token_id else f"{text} …"


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param(TEXT, {}, id="text"),
        pytest.param(CHAT, {"gradient_checkpointing": False}, id="chat"),
        pytest.param(RANKED, {"loss_type": "plackett_luce"}, id="ranked"),
        pytest.param(UNPAIRED, {"loss_type": "kto", "lora": True}, id="unpaired-lora"),
    ],
)
def test_answers_are_the_most_likely_ones_before_and_after(
    rows: list[dict[str, Any]], options: dict[str, Any], make: Callable[..., DPOTrainer]
) -> None:
    trainer = make(rows, **options)
    found = samples.before_training(trainer, 2)
    assert [sample.before for sample in found] == [greedy(trainer, sample.prompt_ids) for sample in found]
    trainer.train()
    found = samples.after_training(trainer, found)
    assert [sample.after for sample in found] == [greedy(trainer, sample.prompt_ids) for sample in found]
    assert [sample.chosen for sample in found] == list(WORDS[:2])
    for sample, word in zip(found, WORDS, strict=False):
        assert f"Say {word}:" in sample.prompt


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"bf16": True}, {"bf16": True, "lora": True}],
    ids=["weights", "mixed", "lora"],
)
def test_sixteen_bits(
    options: dict[str, Any], make: Callable[..., DPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(**options)
    found = samples.before_training(trainer, 2)
    trainer.train()
    found = samples.after_training(trainer, found)
    assert len(found) == 2
    assert all(sample.before and sample.after for sample in found)
    assert "no sample" not in caplog.text


def test_training_is_the_same_bit_by_bit(make: Callable[..., DPOTrainer]) -> None:
    """With dropout, which draws random numbers in every step."""
    after = []
    for count in (0, 3):
        trainer = make(lora=True, disable_dropout=False)
        modes = [module.training for module in trainer.model.modules()]
        state, config = torch.get_rng_state(), trainer.model.get_base_model().generation_config
        found = samples.before_training(trainer, count)
        assert len(found) == count
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in trainer.model.modules()] == modes
        assert trainer.model.get_base_model().generation_config is config
        trainer.train()
        after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(after[0][name], p) for name, p in after[1].items())


def test_the_models_own_generation_config_does_not_count(make: Callable[..., DPOTrainer]) -> None:
    trainer = make()
    plain = samples.before_training(trainer, 2)
    trainer.model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.9, repetition_penalty=3.0, max_new_tokens=1, num_beams=2
    )
    assert samples.before_training(trainer, 2) == plain


@pytest.mark.parametrize("limit", ["max_length", "max_position_embeddings"])
def test_answers_are_no_longer_than_what_is_trained_on(limit: str, make: Callable[..., DPOTrainer]) -> None:
    trainer = make()
    [sample] = samples.before_training(trainer, 1)
    where = trainer.args if limit == "max_length" else trainer.model.config
    for room in (5, 0):
        setattr(where, limit, len(sample.prompt_ids) + room)
        [cut] = samples.before_training(trainer, 1)
        assert cut.before == (greedy(trainer, sample.prompt_ids, room) if room else " …")


def test_prompts_are_distinct_and_only_those_with_a_response_to_show(make: Callable[..., DPOTrainer]) -> None:
    rows = [TEXT[0], {**TEXT[0], "rejected": " x"}, TEXT[1]]
    assert [sample.chosen for sample in samples.before_training(make(rows), 4)] == ["blue", "a red house"]


def test_a_failure_is_one_line_and_ends_nothing(
    make: Callable[..., DPOTrainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    found = samples.before_training(trainer, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck\nand of memory")

    monkeypatch.setattr(trainer.model, "generate", fail)
    trainer.model.train()
    caplog.clear()
    assert samples.before_training(trainer, 2) == []
    assert samples.after_training(trainer, found) == found
    assert all("no sample generations: RuntimeError: out of luck (" in message for message in caplog.messages)
    assert len(caplog.messages) == 2
    assert trainer.model.training


def test_where_there_is_nothing_to_generate(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "fastdpo")
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2]}])
    zero, other = (lambda: True), (lambda: False)
    for count, eval_dataset, main in ((0, rows, zero), (4, None, zero), (4, rows, other)):
        trainer = SimpleNamespace(eval_dataset=eval_dataset, is_world_process_zero=main)
        assert samples.before_training(trainer, count) == []
        assert samples.after_training(trainer, []) == []
    assert not caplog.messages
    monkeypatch.setattr(samples, "is_sharded", lambda model: model == "sharded")
    trainer = SimpleNamespace(eval_dataset=rows, is_world_process_zero=zero, model="sharded")
    assert samples.before_training(trainer, 4) == []
    assert "the model's weights are sharded" in caplog.text


# From the command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Run `fastdpo train` in this process on the quickstart's model, and return the report."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which the command sets too, and would leave behind
    monkeypatch.setattr(plots, "pixels", lambda _: np.zeros((1, 1, 4), np.uint8))  # drawn elsewhere
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in TEXT))

    def run(*words: str) -> str:
        config = tmp_path / "run.yaml"
        lines = [f"config_name: {ROOT}/examples/quickstart/model", f"dataset_name: {tmp_path}/data"]
        lines += ["max_steps: 4", "logging_steps: 1", "save_strategy: 'no'", "report_to: none", "use_cpu: true"]
        lines += ["eval_strategy: steps", "eval_steps: 4", "disable_tqdm: true"]
        config.write_text("\n".join([*lines, f"output_dir: {tmp_path / 'out'}"]))
        monkeypatch.setattr(sys, "argv", ["/bin/fastdpo", "train", str(config), *words])
        cli.main()
        return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    return run


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return Trainer.training_step(self, *args, **options)

    monkeypatch.setattr(DPOTrainer, "training_step", training_step)


def test_a_run_and_others_that_break_off_after_it(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run("--report_samples=2", "--learning_rate", "1e-3")
    assert f"fastdpo train {tmp_path}/run.yaml --report_samples=2 --learning_rate 1e-3" in page
    assert page.count('class="sample"') == 2
    assert "(not generated)" not in page
    first, everything = page.split("<details>")
    settings = first[first.index("<h2>Settings") :]
    assert "report_<wbr>samples" in settings
    assert "bf16" not in settings  # resolved, not set
    assert "bf16" in everything
    assert "given" not in everything.split("</details>")[0]

    interrupt_at(0, monkeypatch)  # the first evaluation is logged, but no step
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("--overwrite_output_dir")
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == page

    interrupt_at(2, monkeypatch)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("--overwrite_output_dir")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Broke off: stopped by Ctrl-C, after step 2 of 4" in page
    assert page.count("(not generated)") == 4


def test_a_negative_number_of_samples_is_named() -> None:
    with pytest.raises(ValueError, match=r"report_samples must be at least 0 \(0: no samples\), got -1"):
        RunConfig(dataset_name="rows.jsonl", report_samples=-1)

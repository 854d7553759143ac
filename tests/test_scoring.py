"""The model as a reward model."""

import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from fastdpo.commands.score import _keep_whole, score_run
from fastdpo.reference import precompute
from fastdpo.scoring import score
from tests.helpers.tiny import PAIRS, make_model, stock, stock_logps
from tests.helpers.trainers import NoTokenizer


def models() -> tuple[Any, Any]:
    reference = make_model("llama")
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return policy, reference


def truth(policy: Any, reference: Any) -> list[tuple[float, float]]:
    """(chosen, rejected) log-ratios of each pair in float64, each sequence alone through the stock forward."""
    with torch.no_grad():
        ratios = stock_logps(policy.double(), PAIRS) - stock_logps(reference.double(), PAIRS)
    lengths = [len(pair[f"{name}_ids"]) for name in ("chosen", "rejected") for pair in PAIRS]
    sums = [float(part.sum()) for part in ratios.split(lengths)]
    return list(zip(sums[: len(PAIRS)], sums[len(PAIRS) :], strict=True))


OPTIONS: dict[str, Any] = {"tokenizer": NoTokenizer(), "disable_tqdm": True}


def test_rewards_are_beta_times_the_log_ratio() -> None:
    policy, reference = models()
    expected = truth(stock(policy), stock(reference))
    result = score(policy, reference, PAIRS, beta=0.3, **OPTIONS)
    for i, (row, ratios, pair) in enumerate(zip(result.rows, expected, PAIRS, strict=True)):
        assert row["row"] == i
        assert row["rewards"] == pytest.approx([0.3 * x for x in ratios], abs=2e-4)
        assert row["rewards"] == pytest.approx(
            [0.3 * (a - b) for a, b in zip(row["logps"], row["ref_logps"], strict=True)]
        )
        assert row["lengths"] == [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
    right = sum(a > b for a, b in expected) / len(expected)
    assert result.accuracy == right
    assert 0 < right < 1


def test_ranked_and_single_responses_have_the_same_rewards() -> None:
    policy, reference = models()
    pairs = score(policy, reference, PAIRS, **OPTIONS)
    ranked = [
        {"prompt_ids": p["prompt_ids"], "ranked_ids": [p["rejected_ids"], p["chosen_ids"], [5, 6, 2]]} for p in PAIRS
    ]
    result = score(policy, reference, ranked, **OPTIONS)
    for row, pair in zip(result.rows, pairs.rows, strict=True):
        assert row["rewards"][1::-1] == pair["rewards"]
    ordered = [row["rewards"][a] > row["rewards"][b] for row in result.rows for a, b in ((0, 1), (0, 2), (1, 2))]
    assert result.accuracy == sum(ordered) / len(ordered)
    single = [{"prompt_ids": p["prompt_ids"], "completion_ids": p["rejected_ids"], "label": False} for p in PAIRS]
    result = score(policy, reference, single, **OPTIONS)
    assert [row["rewards"] for row in result.rows] == [row["rewards"][1:] for row in pairs.rows]
    assert result.accuracy is None


def test_equal_models_tie() -> None:
    _, reference = models()
    result = score(copy.deepcopy(reference), reference, PAIRS, **OPTIONS)
    assert all(row["rewards"] == [0.0, 0.0] for row in result.rows)
    assert result.accuracy == 0.5


def test_an_adapter_switched_off_is_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    """Its dropout has no effect on scores, so that prompts are shared."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], lora_dropout=0.3)
    policy = get_peft_model(make_model("llama"), config)
    reference = make_model("llama")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    with caplog.at_level("INFO", logger="fastdpo"):
        alone = score(policy, None, PAIRS, **OPTIONS)
    assert "what an example's responses share, such as the prompt, is computed once" in caplog.text
    given = score(policy, reference, PAIRS, **OPTIONS)
    assert alone == given
    assert any(abs(row["rewards"][0]) > 1e-3 for row in alone.rows)


def test_jsonl_is_written_whole_and_keeps_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = models()
    target = tmp_path / "scores.jsonl"
    result = score(policy, reference, Dataset.from_list(PAIRS).select([2, 0]), output=target, **OPTIONS)
    assert [json.loads(line) for line in target.read_text().splitlines()] == result.rows
    assert [row["row"] for row in result.rows] == [0, 1]

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(precompute, "score_batch", stop)
    before = target.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        score(policy, reference, PAIRS, output=target, **OPTIONS)
    assert target.read_bytes() == before


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache the policy's log-probs are there when the run comes back."""
    policy, reference = models()
    expected = score(policy, reference, PAIRS, cache_dir=tmp_path, **OPTIONS)
    monkeypatch.setattr(precompute, "_fill", lambda cache, batches, *_: pytest.fail("computed") if batches else None)
    assert score(policy, reference, PAIRS, cache_dir=tmp_path, **OPTIONS) == expected


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_that_makes_no_sense_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        score(None, None, PAIRS, beta=beta, **OPTIONS)


def test_a_missing_reference_is_refused() -> None:
    policy, _ = models()
    with pytest.raises(ValueError, match="no adapter to switch off; pass the reference"):
        score(policy, None, PAIRS, **OPTIONS)
    with pytest.raises(ValueError, match="the same object as model"):
        score(policy, policy, PAIRS, **OPTIONS)


def test_a_bad_row_is_named() -> None:
    policy, reference = models()
    rows = [*PAIRS[:2], {**PAIRS[2], "chosen_ids": [9999, 2]}]
    with pytest.raises(ValueError, match=r"scored dataset.*row 2: `chosen` holds token id 9999"):
        score(policy, reference, rows, **OPTIONS)


def test_prompts_and_responses_are_cut_as_in_training() -> None:
    policy, reference = models()
    options = OPTIONS | {"max_prompt_length": 4, "max_completion_length": 5, "on_bad_row": "drop"}
    result = score(policy, reference, [{**PAIRS[0], "chosen_ids": []}, *PAIRS], **options)
    cut = [{name: ids[-4:] if name == "prompt_ids" else ids[:5] for name, ids in pair.items()} for pair in PAIRS]
    expected = score(policy, reference, cut, **OPTIONS)
    assert [row["row"] for row in result.rows] == [1, 2, 3, 4]
    assert [row["rewards"] for row in result.rows] == [row["rewards"] for row in expected.rows]


def test_a_token_that_the_reference_does_not_know_is_named() -> None:
    policy, _ = models()
    smaller = make_model("llama", vocab_size=50)
    with pytest.raises(ValueError, match=r"scored dataset.*row 0: `\w+` holds token id"):
        score(policy, smaller, PAIRS, **OPTIONS)


def test_text_and_plain_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and completion as text, and no label: what a reward model is asked about."""
    policy, reference = models()

    class Letters:
        """A token per letter."""

        bos_token, eos_token, pad_token, bos_token_id, eos_token_id = "<s>", "</s>", None, 1, 2
        all_special_tokens: tuple[str, ...] = ()
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *(ord(c) - 28 for c in text)]}

    texts = [{"prompt": "ab", "completion": "cd"}, {"prompt": "x", "completion": "yyz"}]
    ids = [
        {"prompt_ids": [1, 69, 70], "completion_ids": [71, 72, 2]},
        {"prompt_ids": [1, 92], "completion_ids": [93, 93, 94, 2]},
    ]
    options = OPTIONS | {"tokenizer": Letters()}
    assert score(policy, reference, texts, **options) == score(policy, reference, ids, **OPTIONS)


def test_the_command_keeps_whole_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With FSDP's settings only the first process would read the weights, and DeepSpeed would shard them."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    _keep_whole(SimpleNamespace(deepspeed_plugin=None))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    settings = SimpleNamespace(deepspeed_plugin=object(), output_dir=str(tmp_path))
    monkeypatch.setattr("fastdpo.commands.score.make_configs", lambda chosen: (None, settings))
    with pytest.raises(ValueError, match="can't use DeepSpeed; leave `deepspeed` out, and start it with `torchrun`"):
        score_run({})

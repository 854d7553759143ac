"""group_by_prompt in training, evaluation, streams, precomputing and scoring."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import fastdpo
from fastdpo.data.packing import edges, shared_prefix_batch
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.reference import precompute
from tests.helpers.trainers import VOCAB, NoTokenizer, losses, tiny_llama

_rng = random.Random(5)


def ids(n: int) -> list[int]:
    return [_rng.randrange(3, VOCAB) for _ in range(n)]


def pairs(prompts: int) -> list[dict[str, Any]]:
    """Four pairs of each prompt over four responses, far apart from each other."""
    rows = []
    for _ in range(prompts):
        prompt, answers = [1, *ids(_rng.randint(3, 12))], [[*ids(_rng.randint(1, 8)), 2] for _ in range(4)]
        edges = [(0, 1), (0, 2), (1, 3), (2, 3)]
        rows.append([{"prompt_ids": prompt, "chosen_ids": answers[i], "rejected_ids": answers[k]} for i, k in edges])
    return list(itertools.chain(*zip(*rows, strict=True)))


ROWS = pairs(6)
DATA = Dataset.from_list(ROWS)


def watched(trainer: Any) -> list[dict[str, Any]]:
    """The batches that the trainer's collator makes from now on."""
    seen: list[dict[str, Any]] = []
    collate = trainer.data_collator

    def collator(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(collate(examples))
        return seen[-1]

    trainer.data_collator = collator
    return seen


@pytest.mark.parametrize("options", [{}, {"tokens_per_batch": 120}], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "stream"])
def test_an_epoch_computes_each_prompt_and_response_once(
    make: Callable[..., Any], options: dict[str, int], stream: bool
) -> None:
    if stream and options:
        pytest.skip("a stream has no lengths to plan with")
    steps = 6 if stream or not options else -1
    data = DATA.to_iterable_dataset() if stream else DATA
    trainer = make(data=data, group_by_prompt=4, max_steps=steps, num_train_epochs=1, **options)
    batches = watched(trainer)
    trainer.train()
    assert sorted(i for batch in batches for i in batch["pair_index"].tolist()) == list(range(24))
    responses = [len(batch["cu_target"]) - 1 for batch in batches]
    assert sum(responses) == 6 * 4  # and not 6 * 4 * 2
    rows = {(tuple(row["prompt_ids"]), tuple(row[side])) for row in ROWS for side in ("chosen_ids", "rejected_ids")}
    prompts = {prompt for prompt, _ in rows}
    # a prompt once, each response without its last token, and copies of the prompt's last token (or of shared starts)
    least = sum(map(len, prompts)) + sum(len(response) - 1 for _, response in rows)
    computed = sum(batch["num_packed_tokens"] for batch in batches)
    assert least - 24 <= computed <= least + 24
    assert trainer.state.log_history[0]["prompt_shared"] > 0.5


def test_grouped_steps_are_those_of_the_same_pairs_alone(make: Callable[..., Any]) -> None:
    trainer = make(data=DATA, group_by_prompt=4, max_steps=3, per_device_train_batch_size=8)
    batches = watched(trainer)
    trainer.train()
    order = [i for batch in batches for i in batch["pair_index"].tolist()]
    plain = make(
        data=DATA.select(order), max_steps=3, per_device_train_batch_size=8, train_sampling_strategy="sequential"
    )
    plain.data_collator = shared_prefix_batch
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert trainer.state.log_history[1]["grad_norm"] == pytest.approx(plain.state.log_history[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_evaluation_is_the_same_grouped_or_not(make: Callable[..., Any], loss_type: str) -> None:
    results = []
    for most in (None, 4):
        trainer = make(data=DATA, eval_dataset=DATA, group_by_prompt=most, loss_type=loss_type, max_steps=1)
        trainer.train()
        trainer.model.load_state_dict(tiny_llama(initializer_range=0.25).state_dict())
        batches = watched(trainer)
        results.append(trainer.evaluate())
        merged = sum(edges(batch).numel() - (len(batch["cu_target"]) - 1) for batch in batches)
        assert merged >= (24 if most else 0)
    for name, value in results[0].items():
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second", "num_tokens", "/density", "_kl")):
            assert results[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_precomputed_references_serve_grouped_batches(make: Callable[..., Any], tmp_path: Path) -> None:
    options = {"data": DATA, "group_by_prompt": 4, "max_steps": 3}
    online = make(**options)
    online.train()
    known = make(**options, precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"))
    batches = watched(known)
    known.train()
    assert losses(known) == pytest.approx(losses(online), rel=1e-5)
    assert all(len(batch["cu_target"]) - 1 == 4 for batch in batches)


def test_precomputing_runs_each_prompt_and_response_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().eval()
    patch_forward(model)
    made: list[dict[str, Any]] = []

    def batch(examples: list[Any], **options: Any) -> dict[str, Any]:
        made.append(shared_prefix_batch(examples, **options))
        return dict(made[-1])

    monkeypatch.setattr(precompute, "shared_prefix_batch", batch)
    expected = precompute.token_logps(DATA, model, folder=None, layout="packed", disable_tqdm=True, collate=batch)
    apart = sum(each["num_packed_tokens"] for each in made)
    made.clear()
    found = precompute.token_logps(DATA, model, folder=None, disable_tqdm=True, collate=batch)
    together = sum(each["num_packed_tokens"] for each in made)
    assert sum(len(each["cu_target"]) - 1 for each in made) == 24
    assert together < 0.65 * apart
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, rel=1e-5)


def test_merged_prompts_fit_into_a_batch() -> None:
    items = list(precompute._items(DATA))
    merged = precompute._merged(items, "shared", (0, 40))
    assert 6 < len(merged) < 24
    assert all(len(item.prompt) + sum(map(len, item.responses)) <= 40 or len(item.places) == 2 for item in merged)
    held = sorted(place for item in merged for place in item.places)
    assert held == [(row, k) for row in range(24) for k in (0, 1)]
    for item in merged:
        for response, (row, k) in zip(item.responses, item.places, strict=True):
            assert item.prompt == ROWS[row]["prompt_ids"]
            assert response == ROWS[row][("chosen_ids", "rejected_ids")[k]]
    assert precompute._merged(items, "shared", (1, 4)) == items  # a number of examples is one of rows


def test_scores_do_not_depend_on_what_other_rows_share() -> None:
    model, reference = tiny_llama(initializer_range=0.25).eval(), tiny_llama().eval()
    options: dict[str, Any] = {"tokenizer": NoTokenizer(), "disable_tqdm": True}
    together = fastdpo.score(model, reference, DATA, **options)
    for i in (0, 7, 23):
        alone = fastdpo.score(model, reference, DATA.select([i]), **options)
        assert together.rows[i]["rewards"] == pytest.approx(alone.rows[0]["rewards"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by_prompt": 1}, "group_by_prompt must be at least 2 examples of a prompt, got 1"),
        (
            {"prefix_sharing": False},
            "group_by_prompt=4 computes a response once for all its pairs, which prefix_sharing",
        ),
        ({"disable_dropout": False}, "which disable_dropout=False excludes"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True has no effect together with"),
    ],
    ids=str,
)
def test_settings_that_grouping_excludes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fastdpo.DPOConfig(output_dir=str(tmp_path), **{"group_by_prompt": 4} | options)


def test_a_collator_of_ones_own_is_said_to_decide(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(data=DATA, group_by_prompt=4)
    args = trainer.args
    with caplog.at_level("WARNING", logger="fastdpo"):
        fastdpo.DPOTrainer(
            tiny_llama(),
            args=args,
            data_collator=shared_prefix_batch,
            train_dataset=DATA,
            processing_class=NoTokenizer(),  # type: ignore[arg-type]
        )
    assert "group_by_prompt brings examples of one prompt together" in caplog.text


def test_a_cpu_computes_few_rows_that_nobody_needs(make: Callable[..., Any]) -> None:
    trainer = make(tiny_llama(num_hidden_layers=1), data=DATA, per_device_train_batch_size=3)
    batches = list(trainer.get_train_dataloader())
    filled = [batch["input_ids"].shape[1] - batch["num_packed_tokens"] for batch in batches]
    assert max(filled) < 8
    assert any(filled)
    assert {batch["input_ids"].shape[1] % 8 for batch in batches} == {0}

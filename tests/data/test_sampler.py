"""fastdpo.data.sampler: every example once, within the budget, the same number of batches everywhere, and resumable."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastdpo.data import sampler
from fastdpo.data.packing import LAYOUTS, shared_prefix_batch
from fastdpo.data.sampler import BudgetSampler, example_sizes, rebatch
from tests.helpers import sampler_ranks
from tests.helpers.forks import run_ranks
from tests.helpers.sampler_ranks import PAIRS, rows, train

TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
ROOT = Path(__file__).parent.parent.parent
BUDGET = 64


def plain(lengths):
    return np.array([(n, 1) for n in lengths])


def padded(responses, lengths):
    return np.array(list(zip(responses, lengths, strict=True)))


def cost(sizes, batch):
    return sum(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch)


sizes_of = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=60).map(np.array)


@settings(TIMELESS, max_examples=60)
@given(sizes=sizes_of, budget=st.integers(1, 90), world_size=st.integers(1, 4), epochs=st.integers(1, 3))
def test_every_rank_has_its_part_of_every_epoch(sizes, budget, world_size, epochs):
    ranks = [
        BudgetSampler(sizes, tokens_per_batch=budget, epochs=epochs, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(epochs + 1):  # one more than announced
        for rank in ranks:
            rank.set_epoch(epoch)
        batches = [list(rank) for rank in ranks]
        assert {len(own) for own in batches} == {len(ranks[0])}
        everything = [batch for own in batches for batch in own]
        examples = sorted(i for batch in everything for i in batch)
        if len(everything) <= len(sizes):
            assert examples == list(range(len(sizes)))
        else:  # fewer examples than batches: some have to come twice
            assert set(examples) == set(range(len(sizes)))
            assert {len(batch) for batch in everything} == {1}
        for batch in everything:
            assert len(batch) == 1 or cost(sizes, batch) <= budget


def test_batches_are_nearly_full():
    """Log-normal lengths as those of preference sets; first fit decreasing leaves little room."""
    rng = np.random.default_rng(0)
    sizes = plain(np.exp(rng.normal(math.log(600), 0.6, 5000)).astype(int) + 1)
    for budget in (8192, 32768):
        batches = BudgetSampler(sizes, tokens_per_batch=budget).plan(0)
        assert sizes.prod(1).sum() / (len(batches) * budget) > 0.97


def test_padded_batches_hold_similar_lengths():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(math.log(300), 0.6, 3000)).astype(int) + 1
    sizes = padded([2] * 3000, lengths)
    batches = BudgetSampler(sizes, tokens_per_batch=16384).plan(0)
    filled = sum(sizes[batch].prod(1).sum() for batch in batches)
    assert filled / sum(cost(sizes, batch) for batch in batches) > 0.95


def test_the_order_depends_on_seed_and_epoch_alone():
    sizes = plain([1 + i % 7 for i in range(100)])

    def batches(seed, epoch, **options):
        own = BudgetSampler(sizes, tokens_per_batch=20, seed=seed, epochs=3, **options)
        own.set_epoch(epoch)
        return list(own)

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 1)
    assert batches(1, 2) != batches(2, 2)
    # other epochs pair other examples, and do not only reorder the batches
    assert {frozenset(batch) for batch in batches(1, 0)} != {frozenset(batch) for batch in batches(1, 1)}


def test_batches_of_one_turn_are_of_similar_size():
    """Ranks wait for each other, so that the slowest counts."""
    sizes = plain([1 + i % 50 for i in range(400)])
    plan = BudgetSampler(sizes, batch_size=4, world_size=4).plan(0)
    turns = [[cost(sizes, batch) for batch in plan[i : i + 4]] for i in range(0, len(plan), 4)]
    spread = [max(turn) - min(turn) for turn in turns]
    assert sorted(spread)[len(spread) // 2] <= 8
    assert len({max(turn) for turn in turns[:5]}) > 1  # and the turns are not sorted


def test_batches_shrink_together_where_many_would_be_halved(monkeypatch):
    """Of 24 processes with two or three batches each."""
    sizes = plain(np.exp(np.random.default_rng(0).normal(math.log(60), 0.7, 1500)).astype(int) + 1)

    def lost(own):
        rows = np.array([cost(sizes, batch) for batch in own.plan(0)]).reshape(-1, 24)
        assert rows.max() <= 2048
        assert sorted(i for batch in own.plan(1) for i in batch) == list(range(1500))
        return 1 - rows.mean(1).sum() / rows.max(1).sum(), len(own)

    options = {"tokens_per_batch": 2048, "world_size": 24, "epochs": 2}
    (even, length), again = lost(BudgetSampler(sizes, **options)), BudgetSampler(sizes, **options, rank=3)
    assert list(again) == BudgetSampler(sizes, **options).plan(0)[3::24]
    monkeypatch.setattr(sampler, "_UNEVEN", 9.0)
    halved, as_long = lost(BudgetSampler(sizes, **options))
    assert length == as_long
    assert even < 0.02
    assert halved > 3 * even


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batching", [{"tokens_per_batch": 60}, {"batch_size": 4}], ids=["budget", "count"])
def test_longest_first_begins_with_the_most_rows(batching, world_size):
    sizes = plain([1 + i * i % 29 for i in range(100)])
    options = batching | {"world_size": world_size, "epochs": 2}
    plan = BudgetSampler(sizes, longest_first=True, **options).plan(0)
    costs = sorted((cost(sizes, batch) for batch in plan), reverse=True)
    assert sorted((cost(sizes, batch) for batch in plan[:world_size]), reverse=True) == costs[:world_size]
    later = [BudgetSampler(sizes, longest_first=first, **options).plan(1) for first in (True, False)]
    assert later[0] == later[1]


def test_a_number_of_examples_keeps_its_meaning():
    batches = BudgetSampler(plain(range(1, 12)), batch_size=4).plan(0)
    assert sorted(map(len, batches)) == [3, 4, 4]


def test_batches_are_split_rather_than_repeated():
    plan = BudgetSampler(plain([1] * 9), batch_size=3, world_size=2).plan(0)
    assert sorted(map(len, plan)) == [1, 2, 3, 3]
    assert sorted(i for batch in plan for i in batch) == list(range(9))


def test_fewer_examples_than_ranks_come_more_than_once():
    plan = BudgetSampler(plain([1] * 3), batch_size=3, world_size=5).plan(0)
    assert [len(batch) for batch in plan] == [1] * 5
    assert {i for batch in plan for i in batch} == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give tokens_per_batch or batch_size, got None and None"),
        ({"tokens_per_batch": 1, "batch_size": 1}, "give tokens_per_batch or batch_size, got 1 and 1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_refuses_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        BudgetSampler(plain([1]), **options)


def test_refuses_no_examples():
    with pytest.raises(ValueError, match="at least one example, got none"):
        BudgetSampler(np.zeros((0, 2)), tokens_per_batch=1)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
DATASETS = {
    "preference": {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids},
    "ranked": {"prompt_ids": ids, "ranked_ids": st.lists(ids, min_size=2, max_size=4)},
    "unpaired": {"prompt_ids": ids, "completion_ids": ids, "label": st.booleans()},
    "unpaired-kl": {"prompt_ids": ids, "completion_ids": ids, "kl_ids": ids, "label": st.booleans()},
}


@pytest.mark.parametrize("kind", DATASETS)
@settings(TIMELESS, max_examples=10)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_sizes_are_those_of_the_batch(kind, data, layout):
    examples = data.draw(st.lists(st.fixed_dictionaries(DATASETS[kind]), min_size=1, max_size=6))
    dataset = Dataset.from_list([examples[0], *examples]).select(range(1, len(examples) + 1))  # not from row 0 on
    sizes = example_sizes(dataset, layout)
    batch = shared_prefix_batch(examples, layout=layout)
    rows = batch["input_ids"].numel() if layout == "padded" else batch["num_packed_tokens"]
    assert cost(sizes, range(len(examples))) == rows


def test_names_the_examples_that_exceed_the_budget(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        loader = DataLoader(rows())
        rebatch(loader, layout="shared", tokens_per_batch=BUDGET)
        rebatch(loader, layout="shared", tokens_per_batch=20, rank=1, world_size=2)  # the first rank says it
    assert "1 of 41 examples take more rows than tokens_per_batch=64" in caplog.text
    assert "(row 40: 79)" in caplog.text
    assert len(caplog.records) == 1


def test_refuses_a_stream():
    loader = DataLoader(IterableDataset.from_generator(lambda: iter(rows())))
    with pytest.raises(ValueError, match="to plan whole epochs; got IterableDataset: use per_device_train_batch_size"):
        rebatch(loader, layout="shared", tokens_per_batch=BUDGET)


# The Trainer


def epochs_of(results, count=2):
    """The examples of each epoch, over all ranks."""
    epochs = []
    for epoch in range(count):
        parts = [np.array_split(np.arange(len(r["seen"])), count)[epoch] for r in results]
        epochs.append(sorted(i for r, part in zip(results, parts, strict=True) for at in part for i in r["seen"][at]))
    return epochs


@pytest.mark.parametrize("options", [{"tokens_per_batch": BUDGET}, {"batch_size": 4}], ids=["budget", "count"])
def test_the_trainer_sees_every_example_once_an_epoch(tmp_path, options):
    result = train(str(tmp_path), options | {"longest_first": True})
    assert epochs_of([result]) == [list(range(PAIRS))] * 2
    assert 40 in result["seen"][0]  # the one that exceeds the budget
    assert result["steps"] == result["max_steps"] == 2 * math.ceil(len(result["seen"]) / 2 / 2)


@pytest.mark.parametrize("stop_at", [3, 9], ids=["first-epoch", "second-epoch"])
def test_a_resumed_run_sees_what_the_whole_run_would(tmp_path, stop_at):
    options = {"tokens_per_batch": BUDGET}
    whole = train(str(tmp_path / "whole"), options)
    cut = train(str(tmp_path / "cut"), options, stop_at=stop_at)
    rest = train(str(tmp_path / "cut"), options, resume=True)
    assert cut["seen"] + rest["seen"] == whole["seen"]
    assert len(cut["seen"]) % (len(whole["seen"]) // 2) != 0  # within an epoch


@pytest.mark.slow
def test_two_ranks_share_an_epoch_and_resume(tmp_path):
    log = tmp_path / "log"
    assert run_ranks(sampler_ranks.main, tmp_path, 6, log=log) == [0, 0], log.read_text()
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert len({len(whole["seen"]) for whole, _, _ in ranks}) == 1
    assert epochs_of([whole for whole, _, _ in ranks]) == [list(range(PAIRS))] * 2
    for whole, cut, rest in ranks:
        assert cut["seen"] + rest["seen"] == whole["seen"]
        assert len(cut["seen"]) % (len(whole["seen"]) // 2) != 0
        assert whole["steps"] == whole["max_steps"]


def test_more_epochs_than_plans_repeat_batches_in_another_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "_MAX_PLANS", 2)
    own = BudgetSampler(plain([1 + i % 7 for i in range(100)]), tokens_per_batch=20, epochs=9)
    first, third = own.plan(0), own.plan(2)
    assert first != third
    assert sorted(first) == sorted(third)

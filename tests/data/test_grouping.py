"""Groups of examples of one prompt, the batches made of them, and streams put in their order."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from fastdpo.data import trees
from fastdpo.data.grouping import fill, group_sizes, grouped_stream, groups_of, in_groups, make_groups
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.sampler import BudgetSampler, planned_sizes

_rng = random.Random(4)


def ids(n: int) -> list[int]:
    return [_rng.randrange(3, 500) for _ in range(n)]


def prompt_rows(counts: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows in random order: for each count a prompt with so many pairs of its responses."""
    rows = []
    for count in counts:
        prompt, answers = ids(_rng.randint(2, 30)), [ids(_rng.randint(2, 12)) for _ in range(5)]
        edges = list(itertools.combinations(range(5), 2))[:count]
        rows += [{"prompt_ids": prompt, "chosen_ids": answers[i], "rejected_ids": answers[k]} for i, k in edges]
    random.Random(seed).shuffle(rows)
    return [row | {"pair_index": i} for i, row in enumerate(rows)]


ROWS = prompt_rows([1, 3, 6, 2, 10, 4, 1, 1, 5, 7, 2, 3])
DATASET = Dataset.from_list(ROWS)


def prompt_of(row: int) -> tuple[int, ...]:
    return tuple(ROWS[row]["prompt_ids"])


def test_groups_are_of_one_prompt_and_of_about_equal_sizes() -> None:
    groups = groups_of(DATASET, 4)
    assert sorted(itertools.chain(*groups.rows)) == list(range(len(ROWS)))
    for rows in groups.rows:
        assert len({prompt_of(i) for i in rows}) == 1
    sizes: dict[tuple[int, ...], list[int]] = {}
    for rows in groups.rows:
        sizes.setdefault(prompt_of(rows[0]), []).append(len(rows))
    assert sorted(map(sorted, sizes.values())) == sorted(
        [[1], [3], [3, 3], [2], [3, 3, 4], [4], [1], [1], [2, 3], [3, 4], [2], [3]]
    )
    families = {prompt_of(rows[0]): family for rows, family in zip(groups.rows, groups.families, strict=True)}
    assert len(set(families.values())) == len(sizes)


def test_later_turns_are_of_the_family_of_their_conversation() -> None:
    turn = ids(trees.LEAST_SHARED)
    short = ids(trees.LEAST_SHARED - 1)
    prompts = [[*turn, 1, 2], turn, [*turn, 1], [*turn[:-1], 499], short, [*short, 5]]
    groups = make_groups(prompts, 8)
    assert sorted(groups.rows) == [[1, 2, 0], [3], [4], [5]]  # a short start says nothing


@pytest.mark.parametrize("count", [1, 3, 8])
def test_batches_by_number_are_full_and_hold_each_example_once(count: int) -> None:
    groups = groups_of(DATASET, 4)
    order = np.random.default_rng(0).permutation(len(groups.rows)).tolist()
    batches = fill(order, groups, count)
    assert sorted(itertools.chain(*batches)) == list(range(len(ROWS)))
    assert [len(batch) for batch in batches[:-1]] == [count] * (len(batches) - 1)
    assert len(batches) == -(-len(ROWS) // count)


def test_a_batch_takes_one_group_of_a_prompt_if_there_are_others() -> None:
    groups = make_groups([[1]] * 8 + [[2]] * 4 + [[3]] * 4, 4)
    for batch in fill([0, 1, 2, 3], groups, 8):
        assert not {0, 1} <= {i // 4 for i in batch}  # 0 and 1 are of one prompt
    assert [len(batch) for batch in fill([0, 1], groups, 8)] == [8]  # there is no other


def test_a_group_is_cut_only_where_nothing_fits() -> None:
    groups = make_groups([[1]] * 3 + [[2]] * 3 + [[3]] * 2 + [[4]] * 2, 4)
    assert fill(range(4), groups, 5) == [[0, 1, 2, 6, 7], [3, 4, 5, 8, 9]]
    assert fill(range(2), groups, 4) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("layout", ["shared", "tree", "padded", "packed"])
def test_sizes_are_those_of_the_batches(layout: str) -> None:
    groups = groups_of(DATASET, 4)
    for rows, (n, width) in zip(groups.rows, group_sizes(DATASET, groups, layout).tolist(), strict=True):
        batch = shared_prefix_batch([ROWS[i] for i in rows], layout=layout, across_examples=True, pad_to_multiple_of=1)
        expected = batch["input_ids"].numel()
        if layout == "padded":
            expected = n * -(-batch["input_ids"].shape[1] // 8) * 8
        assert n * width == expected


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("options", [{"tokens_per_batch": 150}, {"batch_size": 6}], ids=str)
def test_every_process_has_its_batches_of_each_epoch(options: dict[str, int], world_size: int) -> None:
    sizes, groups = planned_sizes(DATASET, "shared", 4, options.get("tokens_per_batch"))
    ranks = [
        BudgetSampler(sizes, groups=groups, rank=rank, world_size=world_size, epochs=3, **options)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])}
        batches = list(itertools.chain(*shares))
        assert sorted(itertools.chain(*batches)) == list(range(len(ROWS)))
        shared = 0
        for batch in batches:
            made = shared_prefix_batch([ROWS[i] for i in batch], across_examples=True)
            if "tokens_per_batch" in options:
                assert made["num_packed_tokens"] <= options["tokens_per_batch"]
                assert max([prompt_of(i) for i in batch].count(prompt_of(j)) for j in batch) <= 4
            else:
                assert len(batch) <= options["batch_size"]
            shared += made["num_sequences"] - (len(made["cu_target"]) - 1)
        assert shared > len(ROWS) // 2  # of 45 pairs; random batches share a few


def test_a_budget_is_filled_although_all_examples_are_of_few_prompts() -> None:
    rows = Dataset.from_list(prompt_rows([10] * 7) * 6)
    sizes, groups = planned_sizes(rows, "shared", 4, 500)
    assert groups is not None
    own = BudgetSampler(sizes, tokens_per_batch=500, groups=groups)
    batches = own.plan(0)
    assert sorted(itertools.chain(*batches)) == list(range(len(rows)))
    assert max(map(own.rows, batches)) <= 500
    full = groups.sizes.prod(1).sum() / 500
    assert max(map(groups.families.count, groups.families)) > 1.5 * full  # so many batches if families were kept apart
    assert len(batches) <= 1.1 * full + 3


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_longest_batch_is_first_although_groups_are_cut(count: int, layout: str) -> None:
    sizes, groups = planned_sizes(DATASET, layout, 4, None)
    own = BudgetSampler(sizes, batch_size=count, groups=groups, longest_first=True)
    made = []
    for batch in own.plan(0):
        examples = [ROWS[i] for i in batch]
        made.append(shared_prefix_batch(examples, layout=layout, across_examples=True, pad_to_multiple_of=8))
        assert made[-1]["num_packed_tokens"] <= own.rows(batch)
        apart = shared_prefix_batch(examples, layout=layout, pad_to_multiple_of=8)
        assert own.rows(batch) <= apart["input_ids"].numel()
    rows = [batch["input_ids"].numel() for batch in made]
    assert rows[0] >= 0.85 * max(rows)  # parts of groups are known by bounds


def test_a_group_above_the_budget_is_cut() -> None:
    _, groups = planned_sizes(DATASET, "shared", 8, 60)
    assert groups is not None
    assert groups.sizes.prod(1).max() <= 60
    assert sorted(itertools.chain(*groups.rows)) == list(range(len(ROWS)))


def test_a_stream_is_put_in_order_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.data.grouping.STREAM_WINDOW", 25)
    stream: IterableDataset = DATASET.to_iterable_dataset()
    ordered = grouped_stream(stream, 4, 4)
    found = [row["pair_index"] for row in ordered]
    assert ordered.features == DATASET.features
    assert sorted(found) == list(range(len(ROWS)))
    for start in (0, 24):  # 24 is the multiple of 4 below 25
        window = DATASET.select(range(start, min(start + 24, len(ROWS))))
        assert found[start : start + 24] == [start + i for i in in_groups(window, 4, 4)]
    assert found != list(range(len(ROWS)))

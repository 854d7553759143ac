"""Trees across examples: each sequence is there, each row once; equal responses are merged, and deep trees bounded."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data import trees
from fastdpo.data.grouping import size_of
from fastdpo.data.packing import edges, shared_prefix_batch

TIMELESS = settings(deadline=None, derandomize=True)
SYSTEM = list(range(100, 100 + trees.LEAST_SHARED + 1))


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
prompts = st.one_of(ids, ids.map(lambda x: SYSTEM + x), ids.map(lambda x: SYSTEM + SYSTEM + x))
pairs = st.tuples(prompts, ids, ids).filter(lambda each: each[1] != each[2]).map(lambda each: pair(*each))
ranked = st.tuples(prompts, st.lists(ids, min_size=2, max_size=4)).map(
    lambda each: {"prompt_ids": each[0], "ranked_ids": each[1]}
)
unpaired = st.tuples(prompts, ids, ids).map(
    lambda each: {"prompt_ids": each[0], "completion_ids": each[1], "kl_ids": each[2], "label": True}
)
examples = st.one_of(*(st.lists(kind, min_size=1, max_size=6) for kind in (pairs, ranked, unpaired)))


def responses_of(example: dict[str, Any]) -> list[list[int]]:
    if "ranked_ids" in example:
        return example["ranked_ids"]
    return [example[name] for name in ("chosen_ids", "rejected_ids", "completion_ids", "kl_ids") if name in example]


def paths(batch: dict[str, Any]) -> list[list[int]]:
    cu_k = batch["tree_cu_seqlens_k"].tolist()
    return [batch["tree_kv_index"][a:b].tolist() for a, b in itertools.pairwise(cu_k)]


@settings(TIMELESS, max_examples=50)
@given(examples=examples, layout=st.sampled_from(["shared", "tree", "packed", "padded"]))
def test_each_example_finds_its_responses_with_their_own_past(examples: list[Any], layout: str) -> None:
    batch = shared_prefix_batch(examples, layout=layout, across_examples=True, pad_to_multiple_of=1)
    tokens, index = batch["input_ids"].flatten().tolist(), edges(batch).T.tolist()
    bounds, targets = batch["cu_target"].tolist(), batch["target_ids"].tolist()
    rows, R = batch["logit_index"].tolist(), len(bounds) - 1
    if layout == "padded":
        L = batch["input_ids"].shape[1]
        past = {row: tokens[row // L * L : row + 1] for row in rows}
    else:
        starts = batch["tree_cu_seqlens_q"].tolist()
        past = {}
        for path, a, b in zip(paths(batch), starts, starts[1:], strict=False):
            assert path[len(path) - (b - a) :] == list(range(a, b))  # a path ends with its segment's own rows
            past |= {row: [tokens[r] for r in path[: len(path) - (b - 1 - row)]] for row in range(a, b)}
    for example, held in zip(examples, index, strict=True):
        expected = responses_of(example)
        assert held[len(expected) :] == [R] * (len(held) - len(expected))
        for response, r in zip(expected, held, strict=False):
            a, b = bounds[r : r + 2]
            assert targets[a:b] == response
            for k, row in enumerate(rows[a:b]):
                assert past[row] == example["prompt_ids"] + response[:k]


@settings(TIMELESS, max_examples=30)
@given(examples=examples, layout=st.sampled_from(["shared", "tree", "packed", "padded"]))
def test_each_response_is_computed_once(examples: list[Any], layout: str) -> None:
    batch = shared_prefix_batch(examples, layout=layout, across_examples=True, pad_to_multiple_of=1)
    unique = {(tuple(e["prompt_ids"]), tuple(r)) for e in examples for r in responses_of(e)}
    assert len(batch["cu_target"]) - 1 == len(unique)
    assert len(batch["target_ids"]) == sum(len(response) for _, response in unique)
    slots = [(e["prompt_ids"], r) for e in examples for r in responses_of(e)]
    assert batch["num_sequences"] == len(slots)
    assert batch["num_targets"] == sum(len(response) for _, response in slots)
    assert batch["num_tokens"] == sum(len(prompt) + len(response) for prompt, response in slots)
    n, width = size_of(examples, layout)
    if layout == "padded":
        assert n == len(unique)
        assert width == -(-max(len(p) + len(r) - 1 for p, r in unique) // 8) * 8
    else:
        assert batch["num_packed_tokens"] == n


@settings(TIMELESS, max_examples=30)
@given(examples=examples)
def test_key_paths_of_a_tree_are_chains_of_whole_segments(examples: list[Any]) -> None:
    batch = shared_prefix_batch(examples, layout="tree", across_examples=True, pad_to_multiple_of=1)
    bounds = batch["tree_cu_seqlens_q"].tolist()
    segments = {a: list(range(a, b)) for a, b in itertools.pairwise(bounds)}
    for path in paths(batch):
        rest = path
        while rest:
            segment = segments[rest[0]]
            assert rest[: len(segment)] == segment
            rest = rest[len(segment) :]
            assert not rest or rest[0] > segment[0]  # parents come first


def test_a_system_prompt_and_a_prompt_are_two_levels() -> None:
    first, second = [*SYSTEM, 1, 2], [*SYSTEM, 3]
    batch = shared_prefix_batch(
        [pair(first, [10, 11], [12]), pair(second, [13], [14]), pair(first, [12], [15, 16])],
        across_examples=True,
        pad_to_multiple_of=1,
    )
    S = len(SYSTEM)
    # 10; a copy of 2; a copy of the system prompt's last token and 3; a copy of 3; a copy of 2 and 15
    assert batch["num_packed_tokens"] == (S + 3) + 1 + 2 + 1 + 2
    assert batch["chosen"].tolist() == [0, 1, 2]
    assert batch["rejected"].tolist() == [2, 3, 4]


def test_the_next_turn_of_a_conversation_shares_the_answer() -> None:
    answer = [7, 8, 9, 2]
    rows = [pair([*SYSTEM, 1], answer, [5]), pair([*SYSTEM, 1, *answer, 4], [6], [3])]
    batch = shared_prefix_batch(rows, across_examples=True, pad_to_multiple_of=1)
    S = len(SYSTEM) + 1
    assert batch["num_packed_tokens"] == (S + 3) + 1 + (1 + 1 + 1) + 1


def test_short_starts_of_other_prompts_are_not_shared() -> None:
    header = SYSTEM[: trees.LEAST_SHARED]  # of which the last token is copied
    rows = [pair([*header, 1, 1], [2], [3]), pair([*header, 4, 4], [2], [3])]
    assert shared_prefix_batch(rows, across_examples=True)["num_packed_tokens"] == 2 * (len(header) + 3)


def test_deep_trees_are_bounded() -> None:
    chain = [([1] * n, [2, 3]) for n in range(20, 20 + 3 * trees.MOST_LEVELS)]
    sequences = [(np.array(prompt), np.array(response)) for prompt, response in chain]
    branches = trees.longest_starts(sequences)
    levels: list[int] = []
    for branch in branches:
        levels.append(levels[branch.parent] + 1 if branch.start else 0)
    assert max(levels) == trees.MOST_LEVELS
    assert all(branch.start for branch in branches[1:])


def test_a_response_compared_with_itself_is_refused() -> None:
    rows = [pair([1], [2], [3]), pair([1], [4, 5], [4, 5], pair_index=7)]
    with pytest.raises(ValueError, match="pair_index 7: chosen_ids and rejected_ids are the same tokens"):
        shared_prefix_batch(rows, across_examples=True)
    shared_prefix_batch(rows)  # two responses, as ever


def test_responses_with_other_references_are_not_merged() -> None:
    def row(ref: float) -> dict[str, Any]:
        return pair([1], [2], [3], ref_chosen_logps=-1.0, ref_rejected_logps=ref)

    batch = shared_prefix_batch([row(-2.0), row(-2.0), row(-2.5)], across_examples=True)
    assert batch["chosen"].tolist() == [0, 0, 0]
    assert batch["rejected"].tolist() == [1, 1, 2]
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -2.5]


def test_references_by_token_stay_beside_their_tokens() -> None:
    rows = [pair([1], [20, 21], [22]), pair([1], [22], [23, 24]), pair([1], [20, 21], [23, 24])]
    for row in rows:
        row["ref_token_logps"] = [[-float(t) for t in row[side]] for side in ("chosen_ids", "rejected_ids")]
    batch = shared_prefix_batch(rows, across_examples=True)
    assert batch["target_ids"].tolist() == [20, 21, 22, 23, 24]
    assert batch["ref_token_logps"].tolist() == [-float(t) for t in (20, 21, 22, 23, 24)]

"""Put the examples of one prompt into one batch, where the prompt and equal responses are computed once.

A family is the examples of one prompt and of the prompts that begin with it, as the later turns of a conversation do.
Families are cut into groups of few examples, and a batch takes whole groups, one of a family. Which examples form a
group is the same in all epochs; which groups form a batch is not.

Shapes: N examples, U groups.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from fastdpo.data import trees
from fastdpo.data.packing import RESPONSE_FIELDS, kind_of, responses_of

Numbers = np.ndarray[Any, np.dtype[np.int64]]

STREAM_WINDOW = 1024
"""Rows of a stream that are read before they are put in order."""
_LOOKAHEAD = 64
"""Number of groups among which one is looked for that fits into the rest of a batch."""
_SIEVE = 1 << 22
_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that no two positions of a token have the same factor."""


class Groups(NamedTuple):
    """The groups of a dataset."""

    rows: list[list[int]]
    """Positions of each group's examples, U lists."""
    families: list[int]
    """The family of each group."""
    sizes: Numbers = np.ones((0, 2), np.int64)
    """`[U, 2]`: what each group adds to the size of a batch, see `size_of`; empty where only examples are counted."""


def make_groups(prompts: Sequence[Sequence[int] | Numbers], most: int) -> Groups:
    """Group the examples of one prompt, and of prompts that begin with it.

    Args:
        prompts: token ids of each example's prompt. They are compared by 64-bit hashes of their starts; what a batch
            computes does not depend on the groups.
        most: most examples of a group.
    """
    hashes = _Hashes()
    own = np.concatenate([hashes.starts(ids)[-1:] for ids in prompts])
    known = np.unique(own)
    is_known = np.zeros(_SIEVE, bool)  # most starts are no prompt, which is seen here without a search
    is_known[own % _SIEVE] = True
    families: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # (tokens, hash, position) by hash of the root
    for i, ids in enumerate(prompts):
        starts = hashes.starts(ids)[trees.LEAST_SHARED - 1 :]  # a shorter start says nothing
        starts = starts[is_known[starts % _SIEVE]]
        found = np.flatnonzero(known[np.minimum(known.searchsorted(starts), len(known) - 1)] == starts)
        root = starts[found[0]] if len(found) else own[i]
        families[int(root)].append((len(ids), int(own[i]), i))
    groups = Groups([], [])
    for number, members in enumerate(families.values()):
        order = [i for _, _, i in sorted(members)]
        for part in np.array_split(order, -(-len(order) // most)):  # of about equal sizes
            groups.rows.append(part.tolist())
            groups.families.append(number)
    return groups


class _Hashes:
    """Hashes of all starts of a list of tokens, which differ from start to start also by their lengths."""

    def __init__(self) -> None:
        self._powers = np.ones(1, np.uint64)

    def starts(self, ids: Sequence[int] | Numbers) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return one hash for each start, from the first token alone to the whole list."""
        n = len(ids)
        if n > len(self._powers):
            self._powers = np.cumprod(np.full(2 * n, _FACTOR, np.uint64), dtype=np.uint64)
        tokens = (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)
        tokens ^= tokens >> np.uint64(29)
        hashes: np.ndarray[Any, np.dtype[np.uint64]] = np.cumsum(tokens * self._powers[:n], dtype=np.uint64)
        return hashes


def fill(order: Iterable[int], groups: Groups, count: int) -> list[list[int]]:
    """Make batches of exactly `count` examples (the last one may have fewer), with as few cut groups as can be found.

    Args:
        order: groups in the order in which batches take them, if they fit.
        groups: what `make_groups` returned.
        count: number of examples of a batch.

    Returns:
        Positions of the examples of each batch. A family is twice in a batch only if no other is left nearby.
    """
    waiting = [(groups.families[u], groups.rows[u]) for u in order]
    waiting.reverse()  # the next group is the last of the list
    batches: list[list[int]] = []
    while waiting:
        batch: list[int] = []
        held: set[int] = set()
        while waiting and len(batch) < count:
            room = count - len(batch)
            near = range(len(waiting) - 1, max(-1, len(waiting) - 1 - _LOOKAHEAD), -1)
            other = [at for at in near if waiting[at][0] not in held]
            at = next((at for at in other if len(waiting[at][1]) <= room), (other or near)[0])
            family, rows = waiting.pop(at)
            batch += rows[:room]
            held.add(family)
            if rows[room:]:
                waiting.append((family, rows[room:]))
        batches.append(batch)
    return batches


def in_groups(dataset: Dataset, most: int, count: int) -> list[int]:
    """Return the positions of all examples in an order in which batches of `count` examples hold whole groups."""
    groups = make_groups(_prompts(dataset), most)
    return [i for batch in fill(range(len(groups.rows)), groups, count) for i in batch]


def grouped_stream(dataset: IterableDataset, most: int, count: int) -> IterableDataset:
    """Return a stream whose rows are put in the order of `in_groups`, window by window.

    Args:
        dataset: tokenised rows.
        most: as in `make_groups`.
        count: number of rows of a batch.
    """
    window = max(STREAM_WINDOW // count, 1) * count
    function = functools.partial(_reorder, most=most, count=count)
    return dataset.map(function, batched=True, batch_size=window, features=dataset.features)


def _reorder(window: Mapping[str, list[Any]], most: int, count: int) -> dict[str, list[Any]]:
    groups = make_groups(window["prompt_ids"], most)
    order = [i for batch in fill(range(len(groups.rows)), groups, count) for i in batch]
    return {column: [values[i] for i in order] for column, values in window.items()}


# Sizes


def size_of(examples: Sequence[Mapping[str, Any]], layout: str) -> tuple[int, int]:
    """Return what examples of one batch add to its size if their equal responses are computed once.

    Args:
        examples: as in `fastdpo.shared_prefix_batch`, whose `across_examples` is on.
        layout: as in `fastdpo.shared_prefix_batch`.

    Returns:
        (rows, 1), or, for padded batches, (responses, row length).
    """
    held: dict[tuple[bytes, bytes], trees.Parts] = {}
    for example in examples:
        prompt = np.asarray(example["prompt_ids"], np.int64)
        key = prompt.tobytes()
        for response in responses_of(example):
            ids = np.asarray(response, np.int64)
            held.setdefault((key, ids.tobytes()), (prompt, ids))
    sequences = list(held.values())
    lengths = [len(prompt) + len(response) - 1 for prompt, response in sequences]
    if layout == "padded":
        return len(lengths), trees.padded_length(max(lengths))
    if layout == "packed":
        return sum(lengths), 1
    return trees.rows_of_tree(sequences, trees.longest_starts(sequences)), 1


def group_sizes(dataset: Dataset, groups: Groups, layout: str) -> Numbers:
    """Compute the sizes of `groups`, `[U, 2]` int64."""
    examples = list(arrays(dataset))
    return np.array([size_of([examples[i] for i in rows], layout) for rows in groups.rows], np.int64).reshape(-1, 2)


def groups_of(dataset: Dataset, most: int) -> Groups:
    """Return the groups of a tokenised dataset, see `make_groups`."""
    return make_groups(_prompts(dataset), most)


def _prompts(dataset: Dataset) -> list[Numbers]:
    return [example["prompt_ids"] for example in arrays(dataset.select_columns(["prompt_ids"]))]


def arrays(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Iterate over the examples of a tokenised dataset, with their ids as numpy arrays that nothing was copied into."""
    kind = kind_of(dict.fromkeys(dataset.column_names))
    columns = [c for c in ("prompt_ids", *RESPONSE_FIELDS[kind]) if c in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        lists = [_as_lists(table[column].combine_chunks()) for column in columns]
        for values in zip(*lists, strict=True):
            yield dict(zip(columns, values, strict=True))


def _as_lists(column: Any) -> list[Any]:
    """Return an Arrow column of (lists of) lists as arrays, without copying its numbers."""
    bounds = column.offsets.to_numpy()
    values = _as_lists(column.values) if hasattr(column.values, "offsets") else column.values.to_numpy()
    return [values[a:b] for a, b in pairwise(bounds)]

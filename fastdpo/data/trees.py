"""Find what the sequences of a batch have in common, and lay them out as one tree of segments in a row of tokens.

A sequence is a prompt and a response. It shares its first tokens with a sequence before it, its parent, and branches
off there. It may itself be the parent of later sequences, so trees have several levels: a system prompt, the prompts
that begin with it, the responses to a prompt, and the next turn of a conversation, whose prompt repeats a response.

Shapes: T rows, S segments, K key-path entries.
"""

from bisect import bisect
from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Parts: TypeAlias = tuple[Ids, Ids]
"""A sequence: its prompt and its response, whose last token is never computed, because it predicts nothing."""

LEAST_SHARED = 16
"""Fewest tokens of a prompt that are shared with another prompt; fewer are not worth a branch."""
MOST_LEVELS = 16
"""Most branches on the way from the root of a tree to one of its leaves."""
_PADDED_MULTIPLE = 8  # enough for tensor cores; a larger multiple would lengthen all R rows


class Branch(NamedTuple):
    """Where a sequence leaves the tree that its batch has made so far."""

    parent: int
    """The sequence whose rows it shares, as far as this is not the parent's own parent; -1 if it shares none."""
    start: int
    """Position of its first row of its own; the rows before it are shared."""


ROOT = Branch(-1, 0)


class Fill(NamedTuple):
    """How far the rows of a batch are filled up."""

    multiple: int
    """Up to a multiple of this."""
    few: bool = False
    """Up to one of the eight lengths, in equal steps, to the next power of two."""

    def up(self, rows: int) -> int:
        """Return the number of rows that these become."""
        step = self.multiple
        if self.few:
            step = max(step, 2 ** max((rows - 1).bit_length() - 4, 0))
        return -(-rows // step) * step


def merged(
    keys: Iterable[tuple[tuple[int, int], Hashable]],
) -> tuple[dict[tuple[int, int], int], list[tuple[int, int]]]:
    """Give equal keys one number, in the order in which they come first.

    Args:
        keys: (example, rank) of each response, and what is equal in responses that may be computed once.

    Returns:
        The number of the response at each (example, rank), and the (example, rank) that came first for each number.
    """
    number: dict[Hashable, int] = {}
    places: dict[tuple[int, int], int] = {}
    first: list[tuple[int, int]] = []
    for place, key in keys:
        places[place] = number.setdefault(key, len(first))
        if places[place] == len(first):
            first.append(place)
    return places, first


def common_length(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """Return the number of tokens with which both begin."""
    n = min(len(a), len(b))
    if not n or a[0] != b[0]:  # the usual case, without making arrays of lists
        return 0
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def trunk(prompt: Sequence[int] | Ids, completions: Sequence[Sequence[int] | Ids]) -> int:
    """Return the length of the start that all completions of a prompt share; 1 for a single completion.

    It includes the prompt, and leaves each completion a token of its own.
    """
    if len(completions) == 1:
        return 1  # nothing is shared
    n = min(map(len, completions)) - 1
    for other in completions[1:]:
        n = min(n, common_length(completions[0][:n], other[:n]))
    return len(prompt) + n


def longest_starts(sequences: Sequence[Parts]) -> list[Branch]:
    """Let each sequence branch off the earlier one with which it has the longest start in common.

    A start is shared if it reaches to the end of the prompt, or is at least `LEAST_SHARED` tokens long.

    Args:
        sequences: in the order of their rows.
    """
    branches: list[Branch] = []
    levels: list[int] = []
    rows = [np.concatenate((prompt, response[:-1])) for prompt, response in sequences]
    # in the order of these keys, the earlier sequence with the longest common start is a neighbour
    keys: list[bytes] = []
    order: list[int] = []
    for own, (prompt, _) in enumerate(sequences):
        key = rows[own].astype(">i8").tobytes()
        at = bisect(keys, key)
        near = [(common_length(rows[own], rows[other]) - 1, other) for other in order[max(at - 1, 0) : at + 1]]
        keys.insert(at, key)
        order.insert(at, own)
        start, parent = max(near, key=lambda found: (found[0], -found[1]), default=(0, -1))
        while parent >= 0 and (start <= branches[parent].start or levels[parent] >= MOST_LEVELS):
            # what is shared belongs to the parent's parent, or a deep tree is not made deeper
            start, parent = min(start, branches[parent].start), branches[parent].parent
        shares = parent >= 0 and start > 0 and start >= min(len(prompt) - 1, LEAST_SHARED)
        branches.append(Branch(parent, start) if shares else ROOT)
        levels.append(levels[parent] + 1 if shares else 0)
    return branches


def rows_of_tree(sequences: Sequence[Parts], branches: Sequence[Branch]) -> int:
    """Return the number of rows that sequences with these branches take."""
    lengths = (len(prompt) + len(response) - 1 for prompt, response in sequences)
    return sum(length - branch.start for length, branch in zip(lengths, branches, strict=True))


class _Ranges(NamedTuple):
    """Ranges of rows, one after the other."""

    starts: list[int]
    lengths: list[int]

    def cut(self, before: int, after: int | None = None) -> "_Ranges":
        """Return the rows from position `before` on, up to position `after`."""
        kept = _Ranges([], [])
        end = 0
        for start, length in zip(*self, strict=True):
            begin, end = end, end + length
            low, high = max(before, begin), end if after is None else min(after, end)
            if low < high:
                kept.add(start + low - begin, high - low)
        return kept

    def add(self, start: int, length: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)

    def extend(self, other: "_Ranges") -> None:
        self.starts.extend(other.starts)
        self.lengths.extend(other.lengths)


def lay_out(
    sequences: Sequence[Parts], branches: Sequence[Branch], order: Sequence[int], *, whole: bool, fill: Fill
) -> dict[str, Any]:
    """Build the fields of `fastdpo.shared_prefix_batch` that describe one row of tokens, and `logit_index`.

    Args:
        sequences: in the order of their rows.
        branches: where each of them leaves the tree.
        order: the numbers of the sequences in the order of the batch's responses, for `logit_index`.
        whole: cut a segment where another branches off, so that every key path is a chain of whole segments.
        fill: how far one unused segment fills T up.
    """
    cuts: list[set[int]] = [set() for _ in sequences]
    for branch in branches if whole else ():
        if branch.parent >= 0:
            cuts[branch.parent].add(branch.start)
    tokens: list[Ids] = []
    positions, targets, kv = _Ranges([], []), _Ranges([], []), _Ranges([], [])
    paths: list[_Ranges] = []  # of the sequences
    seqlens_q, seqlens_k = [], []
    T = 0
    for (prompt, response), branch, inner in zip(sequences, branches, cuts, strict=True):
        P, start, end = len(prompt), branch.start, len(prompt) + len(response) - 1
        tokens += (prompt[start:], response[max(start - P, 0) : -1])
        path = paths[branch.parent].cut(0, start) if start else _Ranges([], [])
        path.add(T, end - start)
        paths.append(path)
        bounds = [start, *sorted(inner), end]
        for a, b in pairwise(bounds):
            seqlens_q.append(b - a)
            seqlens_k.append(b)
            positions.add(a, b - a)
            kv.extend(path if b == end else path.cut(0, b))
        T += end - start
    num_packed_tokens = T
    if filling := fill.up(T) - T:
        tokens.append(np.zeros(filling, np.int64))
        seqlens_q.append(filling)
        seqlens_k.append(filling)
        positions.add(0, filling)
        kv.add(T, filling)
    for r in order:
        targets.extend(paths[r].cut(len(sequences[r][0]) - 1))
    return {
        "input_ids": torch.from_numpy(np.concatenate(tokens))[None],
        "position_ids": torch.from_numpy(_concatenated(positions))[None],
        "tree_cu_seqlens_q": offsets(seqlens_q).int(),
        "tree_cu_seqlens_k": offsets(seqlens_k).int(),
        "tree_kv_index": torch.from_numpy(_concatenated(kv)),
        "tree_max_seqlen_q": max(seqlens_q),
        "tree_max_seqlen_k": max(seqlens_k),
        "tree_seqlens_k": seqlens_k,
        "logit_index": torch.from_numpy(_concatenated(targets)),
        "num_packed_tokens": num_packed_tokens,
    }


def pad(sequences: Sequence[Parts], fill: Fill) -> dict[str, Any]:
    """Build the fields of a batch with one padded row for each sequence, and `logit_index`; nothing is shared."""
    lengths = np.array([len(prompt) + len(response) - 1 for prompt, response in sequences])
    L = fill._replace(multiple=min(fill.multiple, _PADDED_MULTIPLE)).up(int(lengths.max()))
    input_ids, place = np.zeros((len(sequences), L), np.int64), np.arange(L)
    for row, (prompt, response) in zip(input_ids, sequences, strict=True):
        P = len(prompt)
        row[:P] = prompt
        row[P : P + len(response) - 1] = response[:-1]
    mask = place < lengths[:, None]
    first = np.array([r * L + len(prompt) - 1 for r, (prompt, _) in enumerate(sequences)])
    targets = np.array([len(response) for _, response in sequences])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "position_ids": torch.from_numpy(place * mask),
        "logit_index": torch.from_numpy(number_ranges(first, targets)),
        "num_packed_tokens": int(lengths.sum()),
    }


def padded_length(longest: int) -> int:
    """Return L of a padded batch whose longest sequence has `longest` tokens without its last one."""
    return Fill(_PADDED_MULTIPLE).up(longest)


def _concatenated(ranges: _Ranges) -> Ids:
    return number_ranges(np.array(ranges.starts), np.array(ranges.lengths))


def number_ranges(starts: Ids, lengths: Ids) -> Ids:
    """Concatenate the ranges `starts[i], starts[i] + 1, ...` of `lengths[i]` numbers each."""
    before = np.cumsum(lengths) - lengths
    ranges: Ids = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return ranges


def offsets(lengths: list[int]) -> Tensor:
    """Return the bounds of consecutive parts of these lengths."""
    return torch.tensor(list(accumulate(lengths, initial=0)))

"""Pack examples into one row of tokens without padding, in which what a prompt's responses share is computed once.

Each example is a small tree. Its trunk is the longest common prefix of its full sequences: the prompt, and the start
of the responses as far as it is the same. The first response continues the trunk. Every further response is a branch,
a segment of its own that begins with a copy of the trunk's last token, because the row of that token predicts the
branch's first token. The last token of a sequence predicts nothing and is left out:

    tokens     p0 p1 p2 c0 c1 c2 | p2 r0 r1       chosen = c0 c1 c2 c3, rejected = r0 r1 r2
    row         0  1  2  3  4  5 |  6  7  8
    position    0  1  2  3  4  5 |  2  3  4
    key path    0  1  2  3  4  5 |  0  1 6 7 8    the rows that a segment's queries attend to, causally

P prompt, C chosen and R rejected tokens that share only the prompt take P + C + R - 1 rows. This layout is called
`shared`; three other layouts hold the same sequences:

- `tree`: the trunk without its last token is a segment of its own: p0 p1 | p2 c0 c1 c2 | p2 r0 r1. It has as many rows,
  and every key path is a chain of whole segments, so that layers that carry a state can follow it.
- `packed`: every response has a copy of its prompt.
- `padded`: every sequence is a row of its own, padded at its end. It is for models on which no other layout is exact.

Shapes: T rows, S segments, K key-path entries, M targets, B examples, R responses, L length of a padded row.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

LAYOUTS = ("shared", "tree", "packed", "padded")
RESPONSE_FIELDS = {
    "preference": ("chosen_ids", "rejected_ids"),
    "ranked": ("ranked_ids",),
    "unpaired": ("completion_ids", "kl_ids"),
}
"""The fields that hold the responses of each kind of example."""

_REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("finite and at least 0", lambda x: 0 <= x < math.inf),
    "margin": ("finite", math.isfinite),
    "beta": ("finite and above 0", lambda x: 0 < x < math.inf),
}
_PADDED_MULTIPLE = 8  # enough for tensor cores; a larger multiple would lengthen all R rows


def shared_prefix_batch(
    examples: Sequence[Mapping[str, Any]], *, layout: str = "shared", pad_to_multiple_of: int = 64
) -> dict[str, Any]:
    """Pack tokenised examples into one row of tokens, on the CPU.

    Prefix sharing is that of https://arxiv.org/abs/2410.20305; here it also covers a common start of the responses.

    Args:
        examples: one mapping per example, all of one kind. Lists of ids must not be empty; completions are taken as
            they are, so they should end with EOS and be truncated already.

            - preference: `prompt_ids`, `chosen_ids`, `rejected_ids`.
            - ranked: `prompt_ids`, `ranked_ids`, a list of at least two lists of ids, best first.
            - unpaired: `prompt_ids`, `completion_ids`, `label` (bool: desirable) and, in all examples or none,
              `kl_ids`, a completion that belongs to another prompt.

            Each may have `pair_index` (int; its position in `examples` if absent) and, in all examples or none,
            `weight` (at least 0), `margin`, `beta` (above 0), `ref_token_logps` (for each response, a list of one
            float per token, nats) or, for a preference, `ref_chosen_logps` and `ref_rejected_logps` (floats, nats).
        layout: `shared`, `tree`, `packed` or `padded`, as described in the module's docstring.
        pad_to_multiple_of: one unused segment fills T up to a multiple of this. L of a padded batch is filled up to a
            multiple of this or of 8, whichever is smaller.

    Returns:
        A flat dict of CPU tensors and Python ints; the ints spare later code a wait for the device. The rows of all
        layouts but `padded` are:

        - `input_ids`, `position_ids` `[1, T]` int64: tokens, and positions inside each full sequence.
        - `tree_cu_seqlens_q`, `tree_cu_seqlens_k` `[S + 1]` int32: bounds of the segments, and of their key paths.
        - `tree_kv_index` `[K]` int64: the row of each key-path entry. Each path ends with its segment's own rows.
        - `tree_max_seqlen_q`, `tree_max_seqlen_k` int: longest segment and longest key path; `tree_seqlens_k` list
          of S ints: the lengths of all key paths.

        The rows of a padded batch are `input_ids`, `position_ids`, `attention_mask` `[R, L]` int64, zero after the
        end of each sequence. Every layout also has:

        - `logit_index`, `target_ids` `[M]` int64: for each completion token, the row that predicts it (counted over
          all R L rows if padded) and the token itself. The first responses of all examples come first, then all
          second ones, and so on: chosen 0..B-1, then rejected 0..B-1. Rows repeat where responses share tokens.
        - `cu_target` `[R + 1]` int64: bounds of each response among the M targets.
        - `pair_index` `[B]` int64.
        - `label` `[B]` bool, for unpaired examples.
        - `response_index` `[B, most responses]` int64, for ranked examples: the place among the R responses of the
          response of each rank; the value R where an example has fewer responses.
        - `weight`, `margin`, `beta` `[B]`, `ref_logps` `[R]`, `ref_token_logps` `[M]` float32, if the examples have
          them.
        - `num_tokens` int: tokens of all R full sequences, where a prompt counts once per response;
          `num_padded_tokens` int: R times the longest sequence; `num_packed_tokens` int: rows without the filling.

    Raises:
        ValueError: there are no examples, the layout is unknown, a field is missing or empty, an id is negative or
            not an int, or a number is out of range or given in some examples only. The message names pair_index and
            field.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    kind = kind_of(examples[0])
    pair_index = [_pair_index(example, i) for i, example in enumerate(examples)]
    where = [f"pair_index {i}" for i in pair_index]
    pairs = list(zip(where, examples, strict=True))
    prompts = [_token_ids(_field(example, "prompt_ids", at), f"{at}: prompt_ids") for at, example in pairs]
    has_kl = examples[0].get("kl_ids") is not None
    responses = [_responses(example, kind, at, has_kl) for at, example in pairs]
    slots = _slots(responses)

    rows = _padded if layout == "padded" else _packed
    batch = rows(prompts, responses, slots, layout, pad_to_multiple_of)
    batch |= _targets(prompts, responses, slots)
    batch["pair_index"] = torch.tensor(pair_index)
    if kind == "unpaired":
        batch["label"] = torch.tensor([_label(example, at) for at, example in pairs])
    if kind == "ranked":
        index = torch.full((len(examples), max(map(len, responses))), len(slots))
        index[tuple(torch.tensor(slots).T)] = torch.arange(len(slots))
        batch["response_index"] = index
    for field in _NUMBERS:
        if (values := _numbers(pairs, field)) is not None:
            batch[field] = torch.tensor(values, dtype=torch.float32)
    if kind == "preference":
        references = {field: _numbers(pairs, field) for field in _REF_LOGPS}
        missing = [field for field, values in references.items() if values is None]
        if len(missing) == 1:
            raise ValueError(f"{where[0]}: {missing[0]} is missing; give both {' and '.join(_REF_LOGPS)}, or neither")
        if not missing:
            batch["ref_logps"] = torch.tensor(list(references.values()), dtype=torch.float32).flatten()
    if _in_all(pairs, "ref_token_logps"):
        logps = [_ref_token_logps(example, r, at) for r, (at, example) in zip(responses, pairs, strict=True)]
        batch["ref_token_logps"] = torch.from_numpy(np.concatenate([logps[i][k] for i, k in slots]))
    return batch


def kind_of(example: Mapping[str, Any]) -> str:
    """Return the kind of a tokenised example, which is `preference` unless its fields are those of another kind."""
    others = (kind for kind in ("ranked", "unpaired") if RESPONSE_FIELDS[kind][0] in example)
    return next(others, "preference")


def rows_of(example: Mapping[str, Any], layout: str = "shared") -> int:
    """Return the rows that a tokenised example takes in a batch; for `padded`, those of a batch of it alone.

    Args:
        example: as in `shared_prefix_batch`; its ids may be lists or numpy arrays, and are not checked.
        layout: as in `shared_prefix_batch`.
    """
    fields = RESPONSE_FIELDS[kind_of(example)]
    found = [example[field] for field in fields if example.get(field) is not None]
    responses = found[0] if fields == RESPONSE_FIELDS["ranked"] else found
    lengths = [len(example["prompt_ids"]) + len(response) - 1 for response in responses]
    if layout == "padded":
        return len(lengths) * _multiple_of(_PADDED_MULTIPLE, max(lengths))
    shared = 0 if layout == "packed" else _trunk(example["prompt_ids"], responses) - 1
    return sum(lengths) - (len(lengths) - 1) * shared


# Rows


def _slots(responses: list[list[Ids]]) -> list[tuple[int, int]]:
    """Return (example, rank) of each of the R responses, in the order of the batch."""
    return [(i, k) for k in range(max(map(len, responses))) for i, each in enumerate(responses) if k < len(each)]


def _packed(
    prompts: list[Ids], responses: list[list[Ids]], slots: list[tuple[int, int]], layout: str, multiple: int
) -> dict[str, Any]:
    """Build the fields of a batch in one row of tokens, and the index of the rows that predict its targets."""
    tokens: list[Ids] = []
    # per segment: length and first row of the shared start of its path, then length and first row of its own rows
    segments: tuple[list[int], ...] = ([], [], [], [])
    shared_len, shared_row, own_len, own_row = segments
    segment_of: dict[tuple[int, int], int] = {}  # by (example, rank)
    T = 0
    for i, (prompt, completions) in enumerate(zip(prompts, responses, strict=True)):
        P, first_row = len(prompt), T
        branch = 0 if layout == "packed" else _trunk(prompt, completions) - 1  # the position where branches begin
        if layout == "tree" and branch:
            tokens += (prompt[:branch], completions[0][: max(branch - P, 0)])
            for column, value in zip(segments, (0, 0, branch, T), strict=True):
                column.append(value)
            T += branch
        for k, completion in enumerate(completions):
            start = 0 if layout == "shared" and k == 0 else branch
            length = P + len(completion) - 1 - start
            tokens += (prompt[start:], completion[max(start - P, 0) : -1])
            segment_of[i, k] = len(own_row)
            for column, value in zip(segments, (start, first_row, length, T), strict=True):
                column.append(value)
            T += length
    num_packed_tokens = T
    if filling := -T % multiple:
        tokens.append(np.zeros(filling, np.int64))
        for column, value in zip(segments, (0, 0, filling, T), strict=True):
            column.append(value)

    starts, lengths = np.array([shared_row, own_row]).T, np.array([shared_len, own_len]).T
    # a response's targets are predicted from position P - 1 on, first in the shared start, then in its own rows
    at = [segment_of[slot] for slot in slots]
    skipped = np.array([len(prompts[i]) - 1 for i, _ in slots])
    skipped = np.stack((np.minimum(skipped, lengths[at, 0]), np.maximum(skipped - lengths[at, 0], 0)), 1)
    return {
        "input_ids": torch.from_numpy(np.concatenate(tokens))[None],
        "position_ids": torch.from_numpy(_ranges(lengths[:, 0], lengths[:, 1]))[None],
        "tree_cu_seqlens_q": _offsets(own_len).int(),
        "tree_cu_seqlens_k": _offsets(lengths.sum(1).tolist()).int(),
        "tree_kv_index": torch.from_numpy(_ranges(starts.ravel(), lengths.ravel())),
        "tree_max_seqlen_q": max(own_len),
        "tree_max_seqlen_k": int(lengths.sum(1).max()),
        "tree_seqlens_k": lengths.sum(1).tolist(),
        "logit_index": torch.from_numpy(_ranges((starts[at] + skipped).ravel(), (lengths[at] - skipped).ravel())),
        "num_packed_tokens": num_packed_tokens,
    }


def _padded(
    prompts: list[Ids], responses: list[list[Ids]], slots: list[tuple[int, int]], layout: str, multiple: int
) -> dict[str, Any]:
    """Build the fields of a batch with one padded row for each sequence."""
    lengths = np.array([len(prompts[i]) + len(responses[i][k]) - 1 for i, k in slots])
    L = _multiple_of(min(multiple, _PADDED_MULTIPLE), int(lengths.max()))
    input_ids, place = np.zeros((len(slots), L), np.int64), np.arange(L)
    for row, (i, k) in zip(input_ids, slots, strict=True):
        P = len(prompts[i])
        row[:P] = prompts[i]
        row[P : P + len(responses[i][k]) - 1] = responses[i][k][:-1]
    mask = place < lengths[:, None]
    first = np.array([r * L + len(prompts[i]) - 1 for r, (i, _) in enumerate(slots)])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "position_ids": torch.from_numpy(place * mask),
        "logit_index": torch.from_numpy(_ranges(first, np.array([len(responses[i][k]) for i, k in slots]))),
        "num_packed_tokens": int(lengths.sum()),
    }


def _targets(prompts: list[Ids], responses: list[list[Ids]], slots: list[tuple[int, int]]) -> dict[str, Any]:
    targets = [responses[i][k] for i, k in slots]
    lengths = [len(prompts[i]) + len(target) for (i, _), target in zip(slots, targets, strict=True)]
    return {
        "target_ids": torch.from_numpy(np.concatenate(targets)),
        "cu_target": _offsets([len(target) for target in targets]),
        "num_tokens": sum(lengths),
        "num_padded_tokens": len(lengths) * max(lengths),
    }


def _trunk(prompt: Sequence[int] | Ids, completions: Sequence[Sequence[int] | Ids]) -> int:
    """Return the length of the trunk, which leaves each completion a token of its own; 1 for a single completion."""
    if len(completions) == 1:
        return 1  # nothing is shared
    first, n = completions[0], min(map(len, completions)) - 1
    for other in completions[1:]:
        if not n or first[0] != other[0]:  # the usual case, without making arrays of lists
            return len(prompt)
        differs = np.flatnonzero(np.asarray(first[:n]) != np.asarray(other[:n]))
        n = int(differs[0]) if len(differs) else n
    return len(prompt) + n


def _ranges(starts: Ids, lengths: Ids) -> Ids:
    """Concatenate the ranges `starts[i], starts[i] + 1, ...` of `lengths[i]` numbers each."""
    before = np.cumsum(lengths) - lengths
    ranges: Ids = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return ranges


def _multiple_of(multiple: int, at_least: int) -> int:
    return -(-at_least // multiple) * multiple


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))


# Reading the fields of examples, with checks


def _field(example: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in example:
        raise ValueError(f"{where}: {field} is missing; the example has {', '.join(map(repr, example)) or 'nothing'}")
    return example[field]


def _pair_index(example: Mapping[str, Any], position: int) -> int:
    index = example.get("pair_index", position)
    if not isinstance(index, Integral):
        raise ValueError(f"example {position}: pair_index must be an int, got {index!r}")
    return int(index)


def _responses(example: Mapping[str, Any], kind: str, where: str, has_kl: bool) -> list[Ids]:
    if kind == "ranked":
        ranked = _field(example, "ranked_ids", where)
        if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) < 2:
            raise ValueError(f"{where}: ranked_ids must be a list of at least two lists of ids, got {ranked!r:.80}")
        return [_token_ids(ids, f"{where}: ranked_ids[{k}]") for k, ids in enumerate(ranked)]
    fields = RESPONSE_FIELDS[kind]
    if kind == "unpaired":
        _same_as_first("kl_ids", example.get("kl_ids") is not None, has_kl, where)
        fields = fields if has_kl else fields[:1]
    return [_token_ids(_field(example, field, where), f"{where}: {field}") for field in fields]


def _token_ids(value: Any, where: str) -> Ids:
    try:
        ids = array("q", value)  # half the time of torch.tensor
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where} must be a list of ints: {error}") from error
    if not ids:
        why = "no row could predict the first completion token" if "prompt" in where else "nothing to score"
        raise ValueError(f"{where} must not be empty: {why}")
    result = np.frombuffer(ids, np.int64)
    if (lowest := int(result.min())) < 0:
        raise ValueError(f"{where} must not be negative, got {lowest}")
    return result


def _label(example: Mapping[str, Any], where: str) -> bool:
    label = _field(example, "label", where)
    if not isinstance(label, (bool, np.bool_)):
        raise ValueError(f"{where}: label must be True (desirable) or False, got {label!r}")
    return bool(label)


def _in_all(pairs: list[tuple[str, Mapping[str, Any]]], field: str) -> bool:
    given = pairs[0][1].get(field) is not None
    for where, example in pairs:
        _same_as_first(field, example.get(field) is not None, given, where)
    return given


def _same_as_first(field: str, given: bool, first: bool, where: str) -> None:
    if given != first:
        raise ValueError(
            f"{where}: {field} is {'given' if given else 'missing'}, but the first example "
            f"{'has' if first else 'lacks'} it; give it in all examples, or none"
        )


def _numbers(pairs: list[tuple[str, Mapping[str, Any]]], field: str) -> list[float] | None:
    """Return the examples' values of an optional field, or None if no example has it."""
    if not _in_all(pairs, field):
        return None
    wanted, allowed = _NUMBERS.get(field, _NUMBERS["margin"])
    for where, example in pairs:
        value = example[field]
        if isinstance(value, bool) or not isinstance(value, Real) or not allowed(float(value)):
            raise ValueError(f"{where}: {field} must be {wanted}, got {value!r}")
    return [float(example[field]) for _, example in pairs]


def _ref_token_logps(example: Mapping[str, Any], responses: list[Ids], where: str) -> list[np.ndarray[Any, Any]]:
    """Return one float32 array for each response."""
    lists = example["ref_token_logps"]
    lengths = [len(ids) for ids in responses]
    try:
        logps = [np.frombuffer(array("f", each), np.float32) if len(each) else np.zeros(0) for each in lists]
    except TypeError as error:
        raise ValueError(f"{where}: ref_token_logps must be a list of floats for each response: {error}") from error
    if (found := [len(each) for each in logps]) != lengths:
        raise ValueError(f"{where}: ref_token_logps has lists of {found} values, but responses have {lengths} tokens")
    if not all(np.isfinite(each).all() for each in logps):
        raise ValueError(f"{where}: ref_token_logps must be finite")
    return logps

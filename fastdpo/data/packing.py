"""Pack examples into one row of tokens without padding, in which what sequences share is computed once.

Each example is a small tree. Its trunk is the longest common prefix of its full sequences: the prompt, and the start
of the responses as far as it is the same. The first response continues the trunk. Every further response is a branch,
a segment of its own that begins with a copy of the trunk's last token, because the row of that token predicts the
branch's first token. The last token of a sequence predicts nothing and is left out:

    tokens     p0 p1 p2 c0 c1 c2 | p2 r0 r1       chosen = c0 c1 c2 c3, rejected = r0 r1 r2
    row         0  1  2  3  4  5 |  6  7  8
    position    0  1  2  3  4  5 |  2  3  4
    key path    0  1  2  3  4  5 |  0  1 6 7 8    the rows that a segment's queries attend to, causally

P prompt, C chosen and R rejected tokens that share only the prompt take P + C + R - 1 rows.

A batch may also be one graph for all its examples: each response to a prompt is computed once, however many examples
hold it, and examples are edges between responses, which they index. The trees then reach across examples, see
`fastdpo.data.trees`. Without it, no response has more than one edge; everything else is the same.

This layout is called `shared`; three other layouts hold the same sequences:

- `tree`: the trunk without its last token is a segment of its own: p0 p1 | p2 c0 c1 c2 | p2 r0 r1. It has as many rows,
  and every key path is a chain of whole segments, so that layers that carry a state can follow it.
- `packed`: every response has a copy of its prompt.
- `padded`: every sequence is a row of its own, padded at its end. It is for models on which no other layout is exact.

Shapes: T rows, S segments, K key-path entries, M targets, B examples, R responses, L length of a padded row.
"""

import math
from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastdpo.data import trees
from fastdpo.data.trees import Ids, Parts
from fastdpo.settings.names import check_name

LAYOUTS = ("shared", "tree", "packed", "padded")
RESPONSE_FIELDS = {
    "preference": ("chosen_ids", "rejected_ids"),
    "ranked": ("ranked_ids",),
    "unpaired": ("completion_ids", "kl_ids"),
}
"""The fields that hold the responses of each kind of example."""
EDGES = {"preference": ("chosen", "rejected"), "unpaired": ("completion", "kl")}
"""The fields of a batch that say which of its responses an example holds; for ranked examples, `response_index`."""

_OfSlots: TypeAlias = dict[tuple[int, int], np.ndarray[Any, Any]]
"""Values of the response at each (example, rank)."""
_REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("finite and at least 0", lambda x: 0 <= x < math.inf),
    "margin": ("finite", math.isfinite),
    "beta": ("finite and above 0", lambda x: 0 < x < math.inf),
}


def shared_prefix_batch(
    examples: Sequence[Mapping[str, Any]],
    *,
    layout: str = "shared",
    pad_to_multiple_of: int = 64,
    across_examples: bool = False,
    few_lengths: bool = False,
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
        across_examples: compute a response once for all examples that hold it with the same prompt (and the same
            reference log-probs, if they are given) and, in the layouts `shared` and `tree`, also share the longest
            common starts of different examples. Then R may be smaller than the sum over the examples, so read
            responses by the indices below.
        few_lengths: fill T or L up to one of eight lengths between each power of two and the next, which adds at most
            an eighth. Code that is compiled for one length then meets few of them.

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
          second ones, and so on: chosen 0..B-1, then rejected 0..B-1, unless an earlier example has the response.
          Rows repeat where responses share tokens.
        - `cu_target` `[R + 1]` int64: bounds of each response among the M targets.
        - `pair_index` `[B]` int64.
        - `chosen`, `rejected` `[B]` int64, for preferences: which of the R responses they are.
        - `completion` and, if given, `kl` `[B]` int64, likewise, and `label` `[B]` bool, for unpaired examples.
        - `response_index` `[B, most responses]` int64, for ranked examples: the place among the R responses of the
          response of each rank; the value R where an example has fewer responses.
        - `weight`, `margin`, `beta` `[B]`, `ref_logps` `[R]`, `ref_token_logps` `[M]` float32, if the examples have
          them.
        - `num_sequences`, `num_targets` int: responses and completion tokens, counted once for each example that
          holds them; `num_tokens` int: tokens of these full sequences, prompts included; `num_padded_tokens` int:
          `num_sequences` times the longest sequence; `num_packed_tokens` int: rows without the filling.

    Raises:
        ValueError: there are no examples, the layout is unknown, a field is missing or empty, an id is negative or
            not an int, a number is out of range or given in some examples only, or (across_examples) a response is
            compared with itself. The message names pair_index and field.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    check_name("layout", layout, LAYOUTS)
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
    references = _references(pairs, kind, responses)

    places, first = dict(zip(slots, range(len(slots)), strict=True)), slots
    if across_examples:
        keys = _keys(prompts, responses, slots, references)
        places, first = trees.merged(zip(slots, keys, strict=True))
    sequences = [(prompts[i], responses[i][k]) for i, k in first]
    fill = trees.Fill(pad_to_multiple_of, few_lengths)
    if layout == "padded":
        batch = trees.pad(sequences, fill)
    else:
        batch = _packed(prompts, responses, places, first, layout, fill, across_examples)
    batch["target_ids"] = torch.from_numpy(np.concatenate([response for _, response in sequences]))
    batch["cu_target"] = trees.offsets([len(response) for _, response in sequences])
    batch |= _counts(prompts, responses, slots)
    batch["pair_index"] = torch.tensor(pair_index)
    if kind == "unpaired":
        batch["label"] = torch.tensor([_label(example, at) for at, example in pairs])
    index = torch.full((len(examples), max(map(len, responses))), len(first))
    index[tuple(torch.tensor(slots).T)] = torch.tensor([places[slot] for slot in slots])
    if kind == "ranked":
        batch["response_index"] = index
    else:
        batch |= zip(EDGES[kind], index.T.contiguous(), strict=False)
    if across_examples and kind == "preference":
        for at, same in zip(where, (index[:, 0] == index[:, 1]).tolist(), strict=True):
            if same:
                raise ValueError(f"{at}: chosen_ids and rejected_ids are the same tokens; leave the example out")
    for field in _NUMBERS:
        if (values := _numbers(pairs, field)) is not None:
            batch[field] = torch.tensor(values, dtype=torch.float32)
    for field, of_slot in references.items():
        batch[field] = torch.from_numpy(np.concatenate([of_slot[slot] for slot in first]))
    return batch


def edges(batch: Mapping[str, Any]) -> Tensor:
    """Return the responses of each example of a batch, `[most responses, B]` int64.

    Row 0 has the chosen (or best, or only) responses, among the R of the batch; the value R stands for no response. A
    batch that another collator made without these fields has all first responses first, then all second ones.
    """
    if "response_index" in batch:
        index: Tensor = batch["response_index"].T
        return index
    fields = EDGES["unpaired" if "label" in batch else "preference"]
    if fields[0] in batch:
        return torch.stack([batch[field] for field in fields if field in batch])
    R = len(batch["cu_target"]) - 1
    index = torch.arange(R, device=batch["cu_target"].device)
    return index.view(-1, len(batch["label"]) if "label" in batch else R // 2)


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
    responses = responses_of(example)
    lengths = [len(example["prompt_ids"]) + len(response) - 1 for response in responses]
    if layout == "padded":
        return len(lengths) * trees.padded_length(max(lengths))
    shared = 0 if layout == "packed" else trees.trunk(example["prompt_ids"], responses) - 1
    return sum(lengths) - (len(lengths) - 1) * shared


def responses_of(example: Mapping[str, Any]) -> Sequence[Sequence[int] | Ids]:
    """Return the ids of a tokenised example's responses, in the order of its kind."""
    fields = RESPONSE_FIELDS[kind_of(example)]
    found: list[Any] = [example[field] for field in fields if example.get(field) is not None]
    return found[0] if fields == RESPONSE_FIELDS["ranked"] else found


# Rows


def _slots(responses: list[list[Ids]]) -> list[tuple[int, int]]:
    """Return (example, rank) of each example's responses: first all first ones, then all second ones, and so on."""
    return [(i, k) for k in range(max(map(len, responses))) for i, each in enumerate(responses) if k < len(each)]


def _keys(
    prompts: list[Ids], responses: list[list[Ids]], slots: list[tuple[int, int]], references: dict[str, _OfSlots]
) -> list[Hashable]:
    """Return what must be equal in responses that are computed once: ids, and what is given for the reference."""
    of_prompt = [prompt.tobytes() for prompt in prompts]
    given = [[values[slot].tobytes() for values in references.values()] for slot in slots]
    return [(of_prompt[i], responses[i][k].tobytes(), *ref) for (i, k), ref in zip(slots, given, strict=True)]


def _packed(
    prompts: list[Ids],
    responses: list[list[Ids]],
    places: dict[tuple[int, int], int],
    first: list[tuple[int, int]],
    layout: str,
    fill: trees.Fill,
    across_examples: bool,
) -> dict[str, Any]:
    """Build the fields of a batch in one row of tokens; the rows of an example's responses are neighbours."""
    ranked = [(i, k) for i, each in enumerate(responses) for k in range(len(each))]
    in_rows = list(dict.fromkeys(places[slot] for slot in ranked))
    sequences: list[Parts] = [(prompts[i], responses[i][k]) for i, k in (first[r] for r in in_rows)]
    if layout == "packed":
        branches = [trees.ROOT] * len(sequences)
    elif across_examples:
        branches = trees.longest_starts(sequences)
    else:
        branches = []
        for prompt, completions in zip(prompts, responses, strict=True):
            trunk, others = len(branches), len(completions) - 1
            start = trees.trunk(prompt, completions) - 1
            branches += [trees.ROOT, *[trees.Branch(trunk, start) if start else trees.ROOT] * others]
    order = np.argsort(in_rows).tolist()
    return trees.lay_out(sequences, branches, order, whole=layout == "tree", fill=fill)


def _counts(prompts: list[Ids], responses: list[list[Ids]], slots: list[tuple[int, int]]) -> dict[str, int]:
    targets = [len(responses[i][k]) for i, k in slots]
    lengths = [len(prompts[i]) + length for (i, _), length in zip(slots, targets, strict=True)]
    return {
        "num_sequences": len(slots),
        "num_targets": sum(targets),
        "num_tokens": sum(lengths),
        "num_padded_tokens": len(lengths) * max(lengths),
    }


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


def _references(
    pairs: list[tuple[str, Mapping[str, Any]]], kind: str, responses: list[list[Ids]]
) -> dict[str, _OfSlots]:
    """Return the reference log-probs that the examples come with, float32, by the field of the batch."""
    found: dict[str, _OfSlots] = {}
    if kind == "preference":
        sums = [_numbers(pairs, field) for field in _REF_LOGPS]
        missing = [field for field, values in zip(_REF_LOGPS, sums, strict=True) if values is None]
        if len(missing) == 1:
            where = pairs[0][0]
            raise ValueError(f"{where}: {missing[0]} is missing; give both {' and '.join(_REF_LOGPS)}, or neither")
        if not missing:
            found["ref_logps"] = {
                (i, k): np.array([x], np.float32) for k, values in enumerate(sums) for i, x in enumerate(values or ())
            }
    if _in_all(pairs, "ref_token_logps"):
        logps = [_ref_token_logps(example, r, at) for r, (at, example) in zip(responses, pairs, strict=True)]
        found["ref_token_logps"] = {(i, k): x for i, each in enumerate(logps) for k, x in enumerate(each)}
    return found


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

"""The packed batch: one row of tokens, no padding, what the responses of a prompt share computed once.

Each example is a small tree. Its trunk is the longest common prefix of its full sequences (the prompt, and the start
of the responses where they begin alike). The first response continues the trunk; every further one is a branch that
begins with a copy of the trunk's last token, so that it too predicts its own first token from its own row. The last
token of a sequence predicts nothing and is left out:

    tokens     p0 p1 p2 c0 c1 c2 | p2 r0 r1       chosen = c0 c1 c2 c3, rejected = r0 r1 r2
    row         0  1  2  3  4  5 |  6  7  8
    position    0  1  2  3  4  5 |  2  3  4
    key path    0  1  2  3  4  5 |  0  1 6 7 8    what a segment's queries may see, causally

Prompt P, chosen C and rejected R tokens with nothing else in common take P + C + R - 1 rows.

Shapes: T rows, S segments, K key-path entries, M targets, B examples, R responses (2B for pairs).
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_RESPONSES = ("chosen_ids", "rejected_ids")
_REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


def shared_prefix_batch(
    examples: Sequence[Mapping[str, Any]], *, prefix_sharing: bool = True, pad_to_multiple_of: int = 64
) -> dict[str, Any]:
    """Pack preference pairs into one row of tokens, on the CPU.

    Prefix sharing: https://arxiv.org/abs/2410.20305, with the trunk extended over a common start of the responses.

    Args:
        examples: one mapping per pair: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints; completions end
            with EOS and are already truncated), optionally `pair_index` (int; its position in `examples` if absent)
            and, in all examples or none, `ref_chosen_logps` and `ref_rejected_logps` (floats, nats).
        prefix_sharing: False gives every response a copy of its prompt: same results, more rows.
        pad_to_multiple_of: one unused segment fills T up to a multiple of this.

    Returns:
        A flat dict of CPU tensors and Python ints, so that nothing later has to ask the device:

        - `input_ids`, `position_ids` `[1, T]` int64: tokens, and positions inside each full sequence.
        - `tree_cu_seqlens_q`, `tree_cu_seqlens_k` `[S + 1]` int32: bounds of the segments, and of their key paths.
        - `tree_kv_index` `[K]` int64: the row of each key-path entry. A segment's own rows end its path.
        - `tree_max_seqlen_q`, `tree_max_seqlen_k` int: longest segment and longest key path.
        - `logit_index`, `target_ids` `[M]` int64: the row that predicts each completion token, and that token.
          Responses in the order chosen 0..B-1, rejected 0..B-1; rows repeat where responses share tokens.
        - `cu_target` `[R + 1]` int64: bounds of each response in M.
        - `ref_logps` `[R]` float32, where the examples have them.
        - `pair_index` `[B]` int64.
        - `num_tokens` int: tokens of all R full sequences, prompts counted for each; `num_padded_tokens` int: R times
          the longest; `num_packed_tokens` int: rows before the filling.

    Raises:
        ValueError: no examples, a missing or empty field, an id that is not an int or is negative, a reference
            log-prob that is missing in some examples only or not finite. The message names pair_index and field.
    """
    if not examples:
        raise ValueError("examples must hold at least one pair, got none")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    pair_index = [_pair_index(example, i) for i, example in enumerate(examples)]
    pairs = list(zip(pair_index, examples, strict=True))
    prompts = [_token_ids(example, "prompt_ids", i) for i, example in pairs]
    responses = [[_token_ids(example, field, i) for field in _RESPONSES] for i, example in pairs]

    batch = _pack(prompts, responses, prefix_sharing, pad_to_multiple_of)
    has_ref = examples[0].get(_REF_LOGPS[0]) is not None
    ref_logps = [[_ref_logps(example, field, i, has_ref) for i, example in pairs] for field in _REF_LOGPS]
    if has_ref:
        batch["ref_logps"] = torch.tensor(ref_logps, dtype=torch.float32).flatten()
    batch["pair_index"] = torch.tensor(pair_index)
    return batch


def _pack(
    prompts: list[Tensor], responses: list[list[Tensor]], prefix_sharing: bool, pad_to_multiple_of: int
) -> dict[str, Any]:
    """Lay out B prompts with K responses each; fields as in `shared_prefix_batch`, R = B K."""
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    paths: list[Tensor] = []  # per segment: the rows its queries may see
    logit_index: list[list[Tensor]] = [[] for _ in responses[0]]  # [K][B]
    lengths: list[int] = []  # of the full sequences
    T = 0
    for prompt, completions in zip(prompts, responses, strict=True):
        P = prompt.numel()
        trunk = P + _common_start(completions) if prefix_sharing else 0
        for k, completion in enumerate(completions):
            length = P + completion.numel()
            # the first response holds the trunk; the others begin with a copy of its last token
            start = trunk - 1 if k and trunk else 0
            end = T + length - 1 - start
            path = torch.arange(T, end)
            if start:
                path = torch.cat((paths[-k][:start], path))
            tokens += (prompt[start:], completion[max(start - P, 0) : -1])
            positions.append(torch.arange(start, length - 1))
            paths.append(path)
            logit_index[k].append(path[P - 1 :])
            lengths.append(length)
            T = end
    num_packed_tokens = T
    if filling := -T % pad_to_multiple_of:
        tokens.append(torch.zeros(filling, dtype=torch.int64))
        positions.append(torch.arange(filling))
        paths.append(torch.arange(T, T + filling))

    targets = [completion for k in zip(*responses, strict=True) for completion in k]
    seqlens_q, seqlens_k = ([segment.numel() for segment in segments] for segments in (positions, paths))
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions)[None],
        "tree_cu_seqlens_q": _offsets(seqlens_q).int(),
        "tree_cu_seqlens_k": _offsets(seqlens_k).int(),
        "tree_kv_index": torch.cat(paths),
        "tree_max_seqlen_q": max(seqlens_q),
        "tree_max_seqlen_k": max(seqlens_k),
        "logit_index": torch.cat([rows for k in logit_index for rows in k]),
        "target_ids": torch.cat(targets),
        "cu_target": _offsets([completion.numel() for completion in targets]),
        "num_tokens": sum(lengths),
        "num_padded_tokens": len(lengths) * max(lengths),
        "num_packed_tokens": num_packed_tokens,
    }


def _common_start(completions: list[Tensor]) -> int:
    """Length of the common prefix, short enough to leave every completion a token of its own."""
    first, n = completions[0], min(completion.numel() for completion in completions) - 1
    for other in completions[1:]:
        differs = (first[:n] != other[:n]).nonzero()
        n = int(differs[0]) if differs.numel() else n
    return n


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))


def _pair_index(example: Mapping[str, Any], position: int) -> int:
    index = example.get("pair_index", position)
    if not isinstance(index, Integral):
        raise ValueError(f"example {position}: pair_index must be an int, got {index!r}")
    return int(index)


def _token_ids(example: Mapping[str, Any], field: str, pair_index: int) -> Tensor:
    where = f"pair_index {pair_index}: {field}"
    if field not in example:
        raise ValueError(f"{where} is missing; the example has {', '.join(map(repr, example)) or 'nothing'}")
    try:
        ids = array("q", example[field])  # half the time of torch.tensor
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where} must be a list of ints: {error}") from error
    if not ids:
        why = "no row could predict the first completion token" if field == "prompt_ids" else "nothing to score"
        raise ValueError(f"{where} must not be empty: {why}")
    tensor = torch.frombuffer(ids, dtype=torch.int64)
    if (lowest := int(tensor.min())) < 0:
        raise ValueError(f"{where} must not be negative, got {lowest}")
    return tensor


def _ref_logps(example: Mapping[str, Any], field: str, pair_index: int, has_ref: bool) -> float | None:
    logps: float | None = example.get(field)
    if (logps is not None) != has_ref:
        raise ValueError(
            f"pair_index {pair_index}: {field} is {'missing' if has_ref else 'given'}, but the first example "
            f"{'has' if has_ref else 'lacks'} {_REF_LOGPS[0]}; give both reference log-probs in all examples, or none"
        )
    if logps is not None and not math.isfinite(logps):
        raise ValueError(f"pair_index {pair_index}: {field} must be finite, got {logps}")
    return logps

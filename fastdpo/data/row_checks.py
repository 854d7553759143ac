"""Check the numbers and the token ids of a dataset row."""

import math
from typing import Any

from fastdpo.data.columns import NUMBERS
from fastdpo.data.text.messages import BadRow
from fastdpo.data.text.rows import response_names


def check_fields(row: dict[str, Any], kind: str) -> None:
    """Check the row's numbers, its label and its `pair_index`."""
    for field in NUMBERS:
        if field not in row:
            continue
        value = row[field]
        if not _is_finite(value):
            raise BadRow(f"`{field}` must be a finite number, got {value!r:.80}")
        if (field == "weight" and value < 0) or (field == "beta" and value <= 0):
            raise BadRow(f"`{field}` must be {'at least' if field == 'weight' else 'above'} 0, got {value}")
    if kind == "unpaired" and not isinstance(row["label"], bool):
        raise BadRow(f"`label` must be true (desirable) or false, got {row['label']!r:.80}")
    if type(row.get("pair_index", 0)) is not int:
        raise BadRow(f"`pair_index` must be an int, got {row['pair_index']!r:.80}; rename or remove the column")


def check_tokens(prompt: list[int], responses: list[list[int]], kind: str, vocab_size: int) -> None:
    """Check that the prompt and the responses have tokens, all of them in the model's vocabulary."""
    if not prompt:
        raise BadRow("`prompt` has no tokens, so nothing predicts the first token of the completions; add a BOS token")
    for field, ids in zip(["prompt", *response_names(kind, len(responses))], [prompt, *responses], strict=True):
        if not ids:
            raise BadRow(f"`{field}` has no tokens")
        if (worst := max(ids)) >= vocab_size or min(ids) < 0:
            bad = worst if worst >= vocab_size else min(ids)
            raise BadRow(f"`{field}` holds token id {bad}, but the model's vocabulary has {vocab_size} entries")


def check_references(row: dict[str, Any], responses: list[list[int]]) -> None:
    """Check log-probs of a reference that the row brings."""
    for field in ("ref_chosen_logps", "ref_rejected_logps"):
        if field in row and not _is_finite(row[field]):
            raise BadRow(f"`{field}` must be a finite number, got {row[field]!r:.80}")
    if "ref_token_logps" not in row:
        return
    given = row["ref_token_logps"]
    if not isinstance(given, list) or not all(isinstance(each, list) for each in given):
        raise BadRow(f"`ref_token_logps` must be a list of numbers for each response, got {given!r:.80}")
    if (found := [*map(len, given)]) != (expected := [*map(len, responses)]):
        raise BadRow(f"`ref_token_logps` has lists of {found} numbers, but the responses have {expected} tokens")
    if bad := [value for each in given for value in each if not _is_finite(value)]:
        raise BadRow(f"`ref_token_logps` must hold finite numbers, got {bad[0]!r:.80}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

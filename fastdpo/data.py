"""Preference rows to token ids: dataset formats, chat templates, truncation, and errors that name the row.

A row holds `chosen` and `rejected`, with or without `prompt`. Each is text (standard format) or a list of
`{"role", "content"}` messages (conversational format). Without `prompt`, the common start of the two is the prompt.
`tools` and `chat_template_kwargs` columns go to the chat template. The result has the columns
`prompt_ids, chosen_ids, rejected_ids` (completions end with EOS) and `pair_index`, the row it came from.
"""

import difflib
import json
import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fastdpo")

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = (*TOKEN_COLUMNS, "pair_index")
MAX_NAMED_ROWS = 5


class BadRow(ValueError):
    """What is wrong with one dataset row."""


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """Tokenise a preference dataset; rows that are already tokenised are only checked.

    Args:
        dataset: see the module's docstring.
        tokenizer: needs an EOS token for the standard format, a chat template for the conversational one.
        max_length: longest prompt + completion, in tokens; the end is cut. None: no limit.
        vocab_size: rows of the model's embedding; a token id must be below it.
        on_bad_row: "error" raises on malformed rows, "drop" leaves them out with a warning.
        num_proc: processes used by `Dataset.map`.
        name: what errors, log lines and progress bars call this dataset.

    Raises:
        TypeError: not a `datasets` dataset.
        ValueError: a column is missing, no row is left, or (on_bad_row="error") rows are malformed; names the rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}; "
            "for a list of dicts use datasets.Dataset.from_list(rows)"
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} dataset is empty")
    first = next(iter(dataset))
    _check_columns(list(first), name)

    options: dict[str, Any] = {"with_indices": True, "remove_columns": list(first)}
    if isinstance(dataset, IterableDataset):
        rows = dataset.map(
            lambda row, i: _raise_problem(tokenize_row(row, i, tokenizer, max_length, vocab_size), i, name, on_bad_row),
            **options,
        )
        return rows.filter(lambda row: not row["problem"]).remove_columns(["problem"])

    rows = dataset.map(
        tokenize_row,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size},
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
        **options,
    )
    _report_problems(rows["problem"], name, on_bad_row)
    kept = [i for i, problem in enumerate(rows["problem"]) if not problem]
    if not kept:
        raise ValueError(f"{name} dataset has no usable row left out of {len(rows)}")
    return rows.select(kept).remove_columns(["problem"])


def tokenize_row(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None, vocab_size: int
) -> dict[str, Any]:
    """Token ids of one row, with `problem` saying why it can't be used, or empty.

    A problem that begins with "dropped:" is no fault of the row's (nothing of it is left to learn from).
    """
    empty: dict[str, Any] = {
        "prompt_ids": [],
        "chosen_ids": [],
        "rejected_ids": [],
        "pair_index": row.get("pair_index", index),
    }
    try:
        if TOKEN_COLUMNS[0] in row:
            prompt, chosen, rejected = (_check_ids(row[column], column) for column in TOKEN_COLUMNS)
        else:
            prompt, chosen, rejected = _tokenize(_with_prompt(row), tokenizer)
        _check_tokens(prompt, chosen, rejected, vocab_size)
        if tokenizer.bos_token_id is not None and prompt[:2] == [tokenizer.bos_token_id] * 2:
            raise BadRow("`prompt` begins with two BOS tokens: the tokenizer adds one, so remove it from the text")
    except BadRow as error:
        return {**empty, "problem": str(error)}

    if max_length is not None:
        room = max_length - len(prompt)
        if room <= 0:
            return {**empty, "problem": f"dropped: its prompt of {len(prompt)} tokens fills max_length={max_length}"}
        chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        return {**empty, "problem": "dropped: chosen and rejected are the same tokens"}
    return {**empty, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "problem": ""}


def _check_columns(columns: list[str], name: str) -> None:
    if TOKEN_COLUMNS[0] in columns:
        needed: tuple[str, ...] = TOKEN_COLUMNS
    else:
        needed = ("chosen", "rejected")
    for column in needed:
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; rename {near[0]!r}?" if near else ""
            raise ValueError(f"{name} dataset has no column {column!r}; it has {columns}{hint}")
    if unsupported := {"image", "images"} & set(columns):
        raise ValueError(f"{name} dataset has a column {min(unsupported)!r}: images are not supported; remove it")


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Check types and emptiness, and split off an implicit prompt."""
    fields = ["chosen", "rejected"]
    if row.get("prompt") is not None:
        fields.insert(0, "prompt")
    elif "prompt" in row:
        raise BadRow("`prompt` is None; give it a value, or remove the column where prompts are implicit")
    kinds = {field: _kind(row[field], field) for field in fields}
    if kinds["chosen"] != kinds["rejected"]:
        raise BadRow(f"`chosen` is {kinds['chosen']} but `rejected` is {kinds['rejected']}; make them alike")
    if kinds.get("prompt", kinds["chosen"]) != kinds["chosen"]:
        if kinds["prompt"] != "text":
            raise BadRow(f"`prompt` is {kinds['prompt']} but `chosen` is {kinds['chosen']}; make them alike")
        fields.remove("prompt")  # a text copy of a prompt that the messages hold too, as UltraFeedback has it
    if "prompt" in fields:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    start = common_prefix_length(chosen, rejected)
    if kinds["chosen"] == "text" and 0 < start < min(len(chosen), len(rejected)) and chosen[start - 1] == " ":
        start -= 1  # the space belongs to the completions, as tokenizers see it
    prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    for field, rest in (("chosen", chosen), ("rejected", rejected)):
        if not rest:
            raise BadRow(f"`{field}` is nothing but the start of the other response: no completion is left")
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _kind(value: Any, field: str) -> str:
    if isinstance(value, str):
        if not value and field != "prompt":
            raise BadRow(f"`{field}` is empty")
        return "text"
    if isinstance(value, list) and value:
        for message in value:
            if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
                raise BadRow(f"`{field}` must hold messages with `role` and `content`, found {message!r:.80}")
        if not value[-1]["content"] and not value[-1].get("tool_calls"):
            raise BadRow(f"`{field}` ends with an empty message")
        return "messages"
    raise BadRow(f"`{field}` must be text or a non-empty list of messages, got {value!r:.80}")


def _tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, chosen, rejected. A completion starts where it and the prompt alone part company."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        prompt_ids = _encode(prompt, tokenizer, "prompt")
        full_ids = [
            _end_with_eos(_encode(prompt + completion, tokenizer, field), tokenizer)
            for field, completion in (("chosen", chosen), ("rejected", rejected))
        ]
    else:
        tools = row.get("tools")
        options = {
            "tokenize": True,
            "return_dict": True,
            "tools": (json.loads(tools) if isinstance(tools, str) else tools) or None,
            **(row.get("chat_template_kwargs") or {}),
        }
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        full_ids = [
            tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"]
            for completion in (chosen, rejected)
        ]
    start = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    if start < len(prompt_ids):
        _warn_merged_boundary(tokenizer.decode(prompt_ids[start:]))
    return prompt_ids[:start], full_ids[0][start:], full_ids[1][start:]


_warned_merged_boundary = False


def _warn_merged_boundary(end: str) -> None:
    global _warned_merged_boundary
    if not _warned_merged_boundary:
        _warned_merged_boundary = True
        logger.warning(
            "the prompt alone and prompt + completion are tokenised differently from %r on, so this end of the prompt "
            "counts as completion. End prompts on a token boundary, or use a chat template that renders both alike. "
            "Said once; other rows are likely the same.",
            end,
        )


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, field: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{field}` is not valid Unicode: {error.reason} at character {error.start}") from None
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _end_with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so completions would have no end; set tokenizer.eos_token")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _check_ids(ids: Any, column: str) -> list[int]:
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise BadRow(f"`{column}` must be a list of token ids, got {ids!r:.80}")
    return ids


def _check_tokens(prompt: list[int], chosen: list[int], rejected: list[int], vocab_size: int) -> None:
    if not prompt:
        raise BadRow("`prompt` has no tokens, so nothing predicts the first token of the completions; add a BOS token")
    for field, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids:
            raise BadRow(f"`{field}` has no tokens")
        if (worst := max(ids)) >= vocab_size or min(ids) < 0:
            bad = worst if worst >= vocab_size else min(ids)
            raise BadRow(f"`{field}` holds token id {bad}, but the model's vocabulary has {vocab_size} entries")


def _report_problems(problems: Sequence[str], name: str, on_bad_row: str) -> None:
    bad = [(i, p) for i, p in enumerate(problems) if p and not p.startswith("dropped: ")]
    dropped = [(i, p.removeprefix("dropped: ")) for i, p in enumerate(problems) if p.startswith("dropped: ")]
    if bad and on_bad_row == "error":
        raise ValueError(
            f"{name} dataset: {len(bad)} of {len(problems)} rows are malformed. {_name_rows(bad)}. "
            "Mend them, or set on_bad_row='drop' to leave them out."
        )
    for what, rows in (("malformed", bad), ("useless", dropped)):
        if rows:
            logger.warning(
                "%s dataset: dropped %d %s rows of %d. %s.", name, len(rows), what, len(problems), _name_rows(rows)
            )


def _name_rows(rows: list[tuple[int, str]]) -> str:
    named = "; ".join(f"row {i}: {problem}" for i, problem in rows[:MAX_NAMED_ROWS])
    return named + (f"; and {len(rows) - MAX_NAMED_ROWS} more" if len(rows) > MAX_NAMED_ROWS else "")


def _raise_problem(row: dict[str, Any], index: int, name: str, on_bad_row: str) -> dict[str, Any]:
    """For streamed datasets: `_report_problems` of one row, when it comes by."""
    problem: str = row["problem"]
    if problem and not problem.startswith("dropped: ") and on_bad_row == "error":
        raise ValueError(f"{name} dataset: row {index}: {problem}. Mend it, or set on_bad_row='drop'.")
    if problem:
        logger.warning("%s dataset: dropped row %d: %s", name, index, problem.removeprefix("dropped: "))
    return row


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading elements that `a` and `b` have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

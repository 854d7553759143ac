"""Tell what each column of a dataset is used for, which kind of rows the columns make, and which text is never read."""

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import Dataset, List, Value, concatenate_datasets

logger = logging.getLogger("fastdpo")

RAW_COLUMNS = {
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
    "unpaired": ("prompt", "completion", "label"),
}
TOKEN_COLUMNS = {
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ranked": ("prompt_ids", "ranked_ids"),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
}
NUMBERS = ("weight", "margin", "beta")
REFERENCES = {
    "ref_chosen_logps": Value("float64"),
    "ref_rejected_logps": Value("float64"),
    "ref_token_logps": List(List(Value("float32"))),
}
COLUMNS = (
    *dict.fromkeys(column for columns in TOKEN_COLUMNS.values() for column in columns),
    *("kl_ids", "pair_index", *NUMBERS, *REFERENCES, "images", "image", "prompt_text", "images_key"),
)
"""All columns that `fastdpo.data.prepare.prepare_dataset` may return, for rows of any kind."""

_USES = {
    "weight": "factor of the row's loss",
    "margin": "what the row's reward margin must exceed",
    "beta": "the row's own beta",
    "tools": "for the chat template",
    "chat_template_kwargs": "for the chat template",
    "pair_index": "the row's number",
    "kl_ids": "completion for the KL term",
    **dict.fromkeys(("images", "image"), "seen by the model in the prompt"),
    **dict.fromkeys(("prompt_text", "images_key"), "the prompt and its images, as they were tokenised"),
    **dict.fromkeys(REFERENCES, "the reference's log-probs, used instead of computing them"),
}
_SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "problem", "request", "user", "context"),
    "completion": ("response", "answer", "output"),
}
_SYSTEM = ("system", "system_prompt")


def describe_columns(columns: Collection[str], kind: str, *, is_chat: bool = True) -> str:
    """Return one line that says which columns of a dataset are used, for what, and which are not used.

    Args:
        columns: names of the dataset's columns.
        kind: kind of its rows.
        is_chat: whether the rows hold messages, which a chat template renders.
    """
    is_tokenised = "prompt_ids" in columns
    read = TOKEN_COLUMNS[kind] if is_tokenised else ("prompt", *RAW_COLUMNS[kind])
    unread = set() if is_tokenised else {"kl_ids"}
    if is_tokenised or not is_chat:
        unread |= {column for column, use in _USES.items() if use == "for the chat template"}
    uses = {column: use for column, use in _USES.items() if column not in unread}
    used = [column for column in dict.fromkeys(read) if column in columns]
    extra = [f"{column} ({uses[column]})" for column in columns if column in uses and column not in used]
    unused = [column for column in columns if column not in used and column not in uses]
    return f"{', '.join([*used, *extra])}; not used: {', '.join(unused) or 'none'}"


def find_kind(columns: list[str], wanted: str, name: str) -> str:
    """Return the kind of rows to read: `wanted`, or `preference`, from which `wanted` can be made.

    Raises:
        ValueError: a column is missing, or the rows are of another kind. The message calls the dataset `name`.
    """
    table = TOKEN_COLUMNS if "prompt_ids" in columns else RAW_COLUMNS
    fitting = [kind for kind, needed in table.items() if set(needed) <= set(columns)]
    for kind in (wanted, "preference"):
        if kind in fitting:
            return kind
    if fitting:
        needed = " and ".join(map(repr, table[wanted]))
        raise ValueError(
            f"{name} dataset holds {fitting[0]} rows (it has the columns {columns}), but the objective needs {wanted} "
            f"rows (columns {needed}); change the dataset or loss_type"
        )
    for column in table[wanted]:
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1) or _alike(column, columns)
            hint = f"; rename {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name} dataset has no column {column!r}, which {wanted} rows need; it has {columns}{hint}"
            )
    raise AssertionError("unreachable: with all of its columns, `wanted` would fit")


def _alike(column: str, columns: Collection[str]) -> list[str]:
    """Return the columns whose names suggest that they hold what belongs in `column`."""
    plain = {name.lower(): name for name in columns if name != column}
    near = difflib.get_close_matches(column, plain, n=1, cutoff=0.85)
    return [plain[name] for name in dict.fromkeys([*near, *_SYNONYMS.get(column, ())]) if name in plain]


def unread_prompt(rows: Sequence[Mapping[str, Any]], kind: str) -> str | None:
    """Find columns that, by their names, hold text of the prompt, but whose text is in no column that is read.

    Args:
        rows: the first rows of the dataset, not tokenised.
        kind: kind of the rows.

    Returns:
        A message that says which columns these are and how to mend it, or None.
    """
    columns = list(rows[0])
    suspects = [*_alike("prompt", columns), *(name for name in columns if name.lower() in _SYSTEM)]
    read = [name for name in ("prompt", *RAW_COLUMNS[kind]) if name in columns]
    found = [
        column
        for column in suspects
        if any(
            (text := _strings(row.get(column)).strip()) and text not in _strings([row.get(name) for name in read])
            for row in rows
        )
    ]
    if not found:
        return None
    named = " and ".join(map(repr, found))
    system = [name for name in found if name.lower() in _SYSTEM]
    if "prompt" in columns:
        message = ", a system prompt as its first message" if system else ""
        return f"the text of {named} is not read, only {', '.join(read)} are; write it into 'prompt'{message}"
    mend = f"rename {named} to 'prompt'" if len(found) == 1 and not system else f"make a column 'prompt' of {named}"
    return f"there is no column 'prompt', and {', '.join(read)} do not repeat the text of {named}; {mend}"


def _strings(value: Any) -> str:
    """Return all text found in a value, one piece per line."""
    if isinstance(value, dict):
        value = list(value.values())
    return "\n".join(map(_strings, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def with_raw_columns(rows: Any, raw: Any, *, wanted: bool = False) -> Any:
    """Return tokenised rows with those columns of the raw rows that they lack, for callbacks that read the text.

    The collator sees them only with `remove_unused_columns=False`. A stream, rows that came tokenised and rows that a
    transform of the user's makes are returned as they are.

    Args:
        rows: what `fastdpo.data.prepare.prepare_dataset` made of the raw rows.
        raw: the dataset as the user passed it.
        wanted: the user has set `remove_unused_columns=False`; the log says if that has no effect.
    """
    if "pair_index" in (raw.column_names or ()):
        return rows
    if not isinstance(raw, Dataset) or raw.format["type"] == "custom":
        if wanted:
            logger.warning(
                "remove_unused_columns=False has no effect on rows that are streamed or that a transform makes: only "
                "their tokens and numbers are kept; load the dataset whole to keep its other columns"
            )
        return rows
    extra = [name for name in raw.column_names if name not in rows.column_names]
    kept = raw.with_format(None).select_columns(extra).select(rows["pair_index"])  # without the rows that were dropped
    return concatenate_datasets([rows, kept], axis=1) if extra else rows


def check_reference_columns(columns: Collection[str], kind: str, ld_alpha: float | None) -> None:
    """Check that reference log-probs among the columns of a prepared dataset can serve the objective.

    Args:
        columns: names of the dataset's columns.
        kind: the kind of rows that the objective needs.
        ld_alpha: the objective's setting of this name.

    Raises:
        ValueError: there is only one of `ref_chosen_logps` and `ref_rejected_logps`, or the objective cannot use
            these sums.
    """
    sums = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in columns]
    if not sums:
        return
    drop = f"drop {' and '.join(sums)}"
    if len(sums) == 1:
        raise ValueError(f"a dataset has {sums[0]!r} without its counterpart; add or drop the column")
    if kind != "preference":
        raise ValueError(f"{sums[0]!r} is for preferences, but the objective takes {kind} rows; {drop}")
    if ld_alpha is not None:
        raise ValueError(
            f"ld_alpha={ld_alpha} needs the reference's log-probs per token, not their sums; {drop}, or give "
            "ref_token_logps instead"
        )

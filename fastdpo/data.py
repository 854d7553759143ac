"""Datasets to token ids: kinds of rows, truncation, numbers that go with a row, and errors that name the row.

`fastdpo.formats` says what rows may look like. The result has the token columns of its kind,

| kind | columns |
|---|---|
| preference | `prompt_ids`, `chosen_ids`, `rejected_ids` |
| ranked | `prompt_ids`, `ranked_ids` |
| unpaired | `prompt_ids`, `completion_ids`, `label` and, where asked for, `kl_ids` |

and `pair_index`, the row it came from. Completions end with EOS unless they were cut. The columns `weight`, `margin`,
`beta` and reference log-probs are carried along; all others are left behind.
"""

import difflib
import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fastdpo.formats import RAW_COLUMNS, TOKEN_COLUMNS, BadRow, read_ids, response_names, tokenize

logger = logging.getLogger("fastdpo")

NUMBERS = ("weight", "margin", "beta")
REFERENCES = {
    "ref_chosen_logps": Value("float64"),
    "ref_rejected_logps": Value("float64"),
    "ref_token_logps": List(List(Value("float32"))),
}
COLUMNS = (
    *dict.fromkeys(column for columns in TOKEN_COLUMNS.values() for column in columns),
    *("kl_ids", "pair_index", *NUMBERS, *REFERENCES),
)
"""All that `prepare_dataset` may return, of any kind."""

RULES = 2
"""Raised when rows come out otherwise: `datasets` keeps results on disk and knows a function by its name alone."""

MAX_NAMED_ROWS = 5
_NOTES = {
    "prompt": "have a prompt that is too long and cut at its start",
    "completion": "have a completion that is too long and cut at its end",
    "special": "spell out a special token, which becomes the real one; fine if a chat template made the text",
}


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    kind: str = "preference",
    with_kl: bool = False,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """Tokenise a dataset; rows that are already tokenised are only checked and cut.

    Args:
        dataset: see the module's docstring.
        tokenizer: needs an EOS token for the standard format, a chat template for the conversational one.
        max_length: longest prompt + completion, in tokens; the end is cut. None: no limit.
        vocab_size: rows of the model's embedding; a token id must be below it.
        max_prompt_length: longest prompt; the start of longer ones is cut, but for a BOS token. None: no limit.
        max_completion_length: longest completion; the end of longer ones is cut. None: no limit.
        kind: of rows that the objective needs: `preference`, `ranked` or `unpaired`. A preference is also a ranking
            of two, and two unpaired rows.
        with_kl: give every unpaired row `kl_ids`, a completion that belongs to another prompt: that of the next row
            with a different one, the last rows going on from the first.
        on_bad_row: "error" raises on malformed rows, "drop" leaves them out with a warning.
        num_proc: processes used by `Dataset.map`.
        name: what errors, log lines and progress bars call this dataset.

    Raises:
        TypeError: not a `datasets` dataset.
        ValueError: a column is missing, the rows are of another kind, no row is left, no prompt differs from another
            (with_kl), or (on_bad_row="error") rows are malformed; names the rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}; "
            "for a list of dicts use datasets.Dataset.from_list(rows)"
        )
    if kind not in TOKEN_COLUMNS:
        raise ValueError(f"kind must be one of {', '.join(TOKEN_COLUMNS)}, got {kind!r}")
    if with_kl and isinstance(dataset, IterableDataset):
        raise ValueError(f"{name} dataset is a stream; the KL term needs completions of other rows: load it whole")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} dataset is empty")
    found = find_kind(list(first), kind, name)
    ranked = kind == "ranked"
    limits = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
    }
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "kind": found,
        "as_ranked": ranked,
        "rules": RULES,
    }
    options: dict[str, Any] = {
        "with_indices": True,
        "remove_columns": list(first),
        "fn_kwargs": arguments | limits,
        "features": _features("ranked" if ranked else found, first),
    }
    if isinstance(dataset, IterableDataset):
        said: set[str] = set()
        rows = dataset.map(tokenize_row, **options)
        rows = rows.filter(_report_streamed, fn_kwargs={"name": name, "on_bad_row": on_bad_row, "said": said})
        rows = rows.remove_columns(["problem", "notes"])
    else:
        rows = dataset.map(tokenize_row, num_proc=num_proc, desc=f"Tokenizing {name} dataset", **options)
        _report_problems(rows["problem"], name, on_bad_row)
        kept = [i for i, problem in enumerate(rows["problem"]) if not problem]
        if not kept:
            raise ValueError(f"{name} dataset has no usable row left out of {len(rows)}")
        _report_notes(rows["notes"], name, limits)
        rows = rows.select(kept).remove_columns(["problem", "notes"])
    if kind == "unpaired" and found == "preference":
        rows = rows.map(_unpair, batched=True, remove_columns=rows.column_names)
    if with_kl and kind == "unpaired" and "kl_ids" not in rows.column_names:
        rows = _add_kl(rows, name, max_length)
    return rows


def tokenize_row(
    row: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    vocab_size: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    kind: str = "preference",
    as_ranked: bool = False,
    rules: int = RULES,
) -> dict[str, Any]:
    """Token ids of one row of a kind, with `problem` saying why it can't be used, or empty.

    A problem that begins with "dropped:" is no fault of the row's (nothing of it is left to learn from). `notes` names
    what was done to it, by the keys of `_NOTES`. `as_ranked` returns a preference as a ranking of two.
    """
    result = _empty("ranked" if as_ranked else kind, row, index)
    notes: list[str] = result["notes"]
    try:
        _check_fields(row, kind)
        if TOKEN_COLUMNS[kind][0] in row:
            prompt, responses = read_ids(row, kind)
        else:
            prompt, responses, special = tokenize(row, kind, tokenizer)
            notes += ["special"] if special else []
        _check_tokens(prompt, responses, kind, vocab_size)
        _check_references(row, responses)
        bos = tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos] * 2:
            raise BadRow("`prompt` begins with two BOS tokens: the tokenizer adds one, so remove it from the text")

        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            keep = [bos] if prompt[0] == bos and max_prompt_length > 1 else []  # some models are lost without it
            prompt = keep + prompt[len(prompt) + len(keep) - max_prompt_length :]
            notes.append("prompt")
        room = math.inf if max_length is None else max_length - len(prompt)
        if room <= 0:
            why = f"its prompt of {len(prompt)} tokens fills max_length={max_length}"
            return result | {"problem": f"dropped: {why}"}
        room = min(room, max_completion_length or math.inf)
        if max(map(len, responses)) > room:
            responses = [ids[: int(room)] for ids in responses]
            notes.append("completion")
        if {"prompt", "completion"} & set(notes) and (given := REFERENCES.keys() & row.keys()):
            raise BadRow(f"`{min(given)}` is of the whole row, but the row is too long and gets cut; raise the limits")
    except BadRow as error:
        return result | dict.fromkeys(REFERENCES.keys() & row.keys()) | {"problem": str(error)}
    if len(responses) > 1 and all(ids == responses[0] for ids in responses):
        what = "all responses" if kind == "ranked" else "chosen and rejected"
        return result | {"problem": f"dropped: {what} are the same tokens"}
    columns = TOKEN_COLUMNS["ranked" if as_ranked else kind][1:]
    ids = {columns[0]: responses} if as_ranked or kind == "ranked" else dict(zip(columns, responses, strict=False))
    return result | {"prompt_ids": prompt, **ids}


def find_kind(columns: list[str], wanted: str, name: str) -> str:
    """The kind of rows to read, which `wanted` can be made of.

    Raises:
        ValueError: a column is missing, or the rows are of another kind; `name` is the dataset's.
    """
    if unsupported := {"image", "images"} & set(columns):
        raise ValueError(f"{name} dataset has a column {min(unsupported)!r}: images are not supported; remove it")
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
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; rename {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name} dataset has no column {column!r}, which {wanted} rows need; it has {columns}{hint}"
            )
    raise AssertionError("unreachable: a kind that lacks no column fits")


def _features(kind: str, first: dict[str, Any]) -> Features:
    """Types of what `tokenize_row` returns, so that they do not hang on the first rows."""
    ids = List(Value("int64"))
    features = {column: ids for column in TOKEN_COLUMNS[kind]}
    if kind == "ranked":
        features["ranked_ids"] = List(ids)
    if kind == "unpaired":
        features["label"] = Value("bool")
    features |= {column: Value("float64") for column in NUMBERS if column in first}
    features |= {column: feature for column, feature in REFERENCES.items() if column in first}
    if "kl_ids" in first:
        features["kl_ids"] = ids
    return Features(
        features | {"pair_index": Value("int64"), "problem": Value("string"), "notes": List(Value("string"))}
    )


def _empty(kind: str, row: dict[str, Any], index: int) -> dict[str, Any]:
    """What is returned of a row with a problem."""
    kept: dict[str, Any] = dict.fromkeys(NUMBERS, (int, float)) | {"pair_index": (int,)}
    if kind == "unpaired":
        kept |= {"label": (bool,), "kl_ids": (list,)}
    # None instead of a type that Arrow would refuse; the row has a problem then
    carried = {c: row[c] if type(row[c]) in types else None for c, types in kept.items() if c in row}
    carried |= {column: row[column] for column in REFERENCES if column in row}
    ids: dict[str, Any] = {column: [] for column in TOKEN_COLUMNS[kind] if column != "label"}
    return {"pair_index": index, **ids, **carried, "problem": "", "notes": []}


def _check_fields(row: dict[str, Any], kind: str) -> None:
    """Check what goes with the tokens."""
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


def _check_tokens(prompt: list[int], responses: list[list[int]], kind: str, vocab_size: int) -> None:
    if not prompt:
        raise BadRow("`prompt` has no tokens, so nothing predicts the first token of the completions; add a BOS token")
    for field, ids in zip(["prompt", *response_names(kind, len(responses))], [prompt, *responses], strict=True):
        if not ids:
            raise BadRow(f"`{field}` has no tokens")
        if (worst := max(ids)) >= vocab_size or min(ids) < 0:
            bad = worst if worst >= vocab_size else min(ids)
            raise BadRow(f"`{field}` holds token id {bad}, but the model's vocabulary has {vocab_size} entries")


def _check_references(row: dict[str, Any], responses: list[list[int]]) -> None:
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


def check_reference_columns(columns: Collection[str], kind: str, ld_alpha: float | None) -> None:
    """Check that reference log-probs among the columns of a prepared dataset can serve the objective.

    Args:
        columns: of the dataset.
        kind: of rows that the objective needs.
        ld_alpha: of the objective.

    Raises:
        ValueError: there is only one of `ref_chosen_logps` and `ref_rejected_logps`, or these sums are of no use to
            the objective.
    """
    sums = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in columns]
    if not sums:
        return
    drop = f"drop {' and '.join(sums)}"
    if len(sums) == 1:
        raise ValueError(f"a dataset has {sums[0]!r} without its counterpart; add or drop the column")
    if kind != "preference":
        raise ValueError(f"{sums[0]!r} is of preferences, and the objective takes {kind} rows; {drop}")
    if ld_alpha is not None:
        raise ValueError(
            f"ld_alpha={ld_alpha} needs the reference's log-probs per token, not their sums; {drop}, or give "
            "ref_token_logps instead"
        )


# Rows of another kind


def _unpair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Every preference as two rows with a label: the batch's chosen ones, then its rejected ones."""
    chosen, rejected = batch.pop("chosen_ids"), batch.pop("rejected_ids")
    doubled = {column: values * 2 for column, values in batch.items() if column not in REFERENCES}
    label = [True] * len(chosen) + [False] * len(rejected)
    return doubled | {"completion_ids": chosen + rejected, "label": label}


def _add_kl(rows: Dataset, name: str, max_length: int | None) -> Dataset:
    prompts = [hash(tuple(ids)) for ids in rows["prompt_ids"]]
    if len(set(prompts)) == 1:
        raise ValueError(f"{name} dataset has one prompt only; the KL term needs completions of other prompts")
    following, other = [0] * len(prompts), 0
    for i in reversed(range(2 * len(prompts) - 1)):  # twice around, so that the last rows know the first ones
        i, after = i % len(prompts), (i + 1) % len(prompts)
        other = after if prompts[after] != prompts[i] else other
        following[i] = other
    kl = rows.select(following).select_columns(["completion_ids"]).rename_column("completion_ids", "kl_ids")
    result: Dataset = concatenate_datasets([rows, kl], axis=1)
    return result if max_length is None else result.map(_cut_kl, fn_kwargs={"max_length": max_length})


def _cut_kl(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    return {"kl_ids": row["kl_ids"][: max_length - len(row["prompt_ids"])]}


# Reports


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


def _report_notes(notes: Sequence[list[str]], name: str, limits: dict[str, int | None]) -> None:
    """One line for each thing that was done to rows."""
    for key, what in _NOTES.items():
        rows = [i for i, done in enumerate(notes) if key in done]
        if rows:
            named = ", ".join(map(str, rows[:MAX_NAMED_ROWS])) + (", ..." if len(rows) > MAX_NAMED_ROWS else "")
            given = "" if key == "special" else f"; {', '.join(f'{k}={v}' for k, v in limits.items() if v is not None)}"
            logger.warning("%s dataset: %d rows of %d %s (rows %s%s)", name, len(rows), len(notes), what, named, given)


def _report_streamed(row: dict[str, Any], name: str, on_bad_row: str, said: set[str]) -> bool:
    """For streamed datasets: the reports of one row, when it comes by, and whether to keep it."""
    problem, index = row["problem"], row["pair_index"]
    if problem and not problem.startswith("dropped: ") and on_bad_row == "error":
        raise ValueError(f"{name} dataset: row {index}: {problem}. Mend it, or set on_bad_row='drop'.")
    if problem:
        logger.warning("%s dataset: dropped row %d: %s", name, index, problem.removeprefix("dropped: "))
    for key in set(row["notes"]) - said:
        said.add(key)
        logger.warning("%s dataset: rows %s; row %d is the first, others are not named", name, _NOTES[key], index)
    return not problem


def each(datasets: Any, function: Callable[[Any, str], Any]) -> Any:
    """`function(rows, name)` of one dataset, called "eval", or of each in a dict of them; None of None."""
    if isinstance(datasets, dict):
        return {name: function(rows, name) for name, rows in datasets.items()}
    return None if datasets is None else function(datasets, "eval")

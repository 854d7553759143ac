"""Turn datasets into token ids: check, tokenise and truncate rows, and name the rows that are malformed.

`fastdpo.data.text.rows` says what rows may look like. The result has the token columns of its kind,

| kind | columns |
|---|---|
| preference | `prompt_ids`, `chosen_ids`, `rejected_ids` |
| ranked | `prompt_ids`, `ranked_ids` |
| unpaired | `prompt_ids`, `completion_ids`, `label` and, where asked for, `kl_ids` |

and `pair_index`, the number of the row it came from. Completions end with EOS, or as their chat template ends a turn,
unless they were cut. The columns `weight`, `margin`, `beta` and reference log-probs are kept, and so is a column of
images, from which the collator reads them again; all others are dropped.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fastdpo.data.columns import COLUMNS as COLUMNS
from fastdpo.data.columns import NUMBERS, RAW_COLUMNS, TOKEN_COLUMNS, unread_prompt
from fastdpo.data.columns import REFERENCES as REFERENCES
from fastdpo.data.columns import check_reference_columns as check_reference_columns
from fastdpo.data.columns import find_kind as find_kind
from fastdpo.data.row_checks import check_fields, check_references, check_tokens
from fastdpo.data.summary import CUTS, Reporter, report_streamed
from fastdpo.data.text.messages import BadRow, read_value
from fastdpo.data.text.rows import read_ids, tokenize
from fastdpo.data.vision import images
from fastdpo.settings.names import check_name

logger = logging.getLogger("fastdpo")

RULES = 7
"""Increase it when `tokenize_row` changes: `datasets` keeps results on disk and knows a function by name alone."""

LIMITS = ("max_length", "max_prompt_length", "max_completion_length", "truncation_mode")
_IN_ALL_ROWS = ("prompt", "kl_ids", *NUMBERS, *REFERENCES)
"""Columns that either all rows of a stream must have, or none of them."""
_LOOKED_AT = 20
"""Number of rows that are searched for columns of unread prompt text, before all rows are tokenised."""


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str | None = None,
    kind: str = "preference",
    with_kl: bool = False,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    name: str = "train",
    show_example: bool | None = None,
) -> Dataset | IterableDataset:
    """Tokenise a dataset; rows that are already tokenised are only checked and cut.

    Args:
        dataset: rows as `fastdpo.data.text.rows` describes them, or rows with the token columns above.
        tokenizer: needs an EOS token for the standard format, a chat template for the conversational one; for rows with
            images, the model's processor.
        max_length: most tokens of prompt + completion; see truncation_mode for longer ones. None: no limit.
        vocab_size: rows of the model's embedding; a token id must be below it.
        max_prompt_length: most tokens of a prompt; longer ones are cut at the start, after a BOS token. None: no limit.
        max_completion_length: most tokens of a completion; longer ones are cut at the end. None: no limit.
        truncation_mode: "keep_end" cuts prompts at the start; "keep_start" and None cut completions at the end.
        kind: the kind of rows that the objective needs: `preference`, `ranked` or `unpaired`. Preferences serve all
            three: each is also a ranking of two responses, and two unpaired rows.
        with_kl: give every unpaired row `kl_ids`, the completion of the next row with another prompt; after the last
            row, the search goes on from the first.
        on_bad_row: "error" raises on malformed rows, "drop" leaves them out with a warning.
        num_proc: number of processes for `Dataset.map`.
        name: what errors, log lines and progress bars call this dataset.
        show_example: log a summary of the dataset, with an example row (True) or without (False). None: no summary.

    Raises:
        TypeError: `dataset` is not a `datasets` dataset.
        ValueError: a column is missing or misnamed, the rows are of another kind, no row is left, all prompts are
            the same (with_kl), or (on_bad_row="error") rows are malformed; the message names the rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}; "
            "for a list of dicts use datasets.Dataset.from_list(rows)"
        )
    check_name("kind", kind, TOKEN_COLUMNS)
    if with_kl and isinstance(dataset, IterableDataset):
        raise ValueError(f"{name} dataset is a stream; the KL term needs completions of other rows: load it whole")
    is_stream = isinstance(dataset, IterableDataset)
    dataset = unformatted(dataset)
    is_transformed = not is_stream and dataset.format["type"] == "custom"
    dataset = dataset if is_transformed else images.undecoded(dataset)
    head = list(itertools.islice(dataset, 1 if is_stream else _LOOKED_AT))
    if not head:
        raise ValueError(f"{name} dataset is empty")
    first = head[0]
    image_column = images.check_column(list(first), tokenizer, name)
    found = find_kind(list(first), kind, name)
    if "prompt_ids" not in first and (wrong := unread_prompt(head, found)):
        if "prompt" not in first:
            raise ValueError(f"{name} dataset: {wrong}")
        if not _is_silent():
            logger.warning("%s dataset: %s", name, wrong)
    ranked = kind == "ranked"
    limits = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "truncation_mode": truncation_mode,
    }
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "kind": found,
        "as_ranked": ranked,
        "columns": tuple(first),
        "rules": RULES,
        **limits,
    }
    options: dict[str, Any] = {
        "with_indices": True,
        "remove_columns": list(first) if is_stream else dataset.column_names,  # those of a transform are others
        "fn_kwargs": arguments,
        "features": _features("ranked" if ranked else found, first),
    }
    reporter = Reporter(
        name=name,
        columns=list(first),
        kind=found,
        is_chat=_is_chat(first, found),
        limits=limits,
        tokenizer=images.text_tokenizer(tokenizer),
        on_bad_row=on_bad_row,
        show_example=show_example,
        is_silent=_is_silent(),
    )
    # the images of a plain dataset are put beside its rows; those that exist only while a row is read go through `map`
    is_beside = not (is_stream or is_transformed)
    if image_column and not is_beside:
        options["features"][image_column] = images.feature(image_column)
        options["fn_kwargs"] = arguments | {"carries": image_column}
    trial = tokenize_row(first, 0, **arguments)  # a tokenizer that lacks something fails here, not in a worker of map
    if is_stream:
        reporter.report_stream(trial)
        said: set[str] = set()
        rows = dataset.map(tokenize_row, **options)
        rows = rows.filter(report_streamed, fn_kwargs={"name": name, "on_bad_row": on_bad_row, "said": said})
        rows = rows.remove_columns(["problem", "notes"])
    else:
        rows = dataset.map(tokenize_row, num_proc=num_proc, desc=f"Tokenizing {name} dataset", **options)
        rows = rows.with_format(None)  # a transform stays on what `map` returns
        kept = reporter.report(rows)
        if image_column and is_beside:
            rows = concatenate_datasets([rows, dataset.select_columns([image_column])], axis=1)
        rows = rows if len(kept) == len(rows) else rows.select(kept)
        rows = rows.remove_columns(["problem", "notes"])
    if kind == "unpaired" and found == "preference":
        if image_column and not is_stream:
            labelled = rows.remove_columns(image_column)
            labelled = labelled.map(_unpair, batched=True, batch_size=_UNPAIRED, remove_columns=labelled.column_names)
            twice = rows.select_columns([image_column]).select(_unpaired_order(len(rows)))
            rows = concatenate_datasets([labelled, twice], axis=1)
        else:
            rows = rows.map(_unpair, batched=True, batch_size=_UNPAIRED, remove_columns=rows.column_names)
    if with_kl and kind == "unpaired" and "kl_ids" not in rows.column_names:
        rows = _add_kl(rows, name, max_length)
    return rows


def _is_chat(row: Mapping[str, Any], kind: str) -> bool:
    """Return whether the responses of a row are messages, also where these are written as text."""
    response = row.get({"preference": "chosen", "ranked": "responses", "unpaired": "completion"}[kind])
    try:
        return isinstance(read_value(response[0] if kind == "ranked" and response else response, "chosen"), list)
    except BadRow:
        return True  # the row is named in any case


def _is_silent() -> bool:
    """Whether another process of this run writes the log."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0


def unformatted(dataset: Any) -> Any:
    """Undo `with_format`, so that the dataset gives plain Python values; columns that it hid stay hidden."""
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    kind, shown = dataset.format["type"], dataset.format["columns"]
    if kind == "custom":  # the user's own transform makes the rows
        return dataset
    if shown != dataset.column_names:
        dataset = dataset.select_columns(shown)
    return dataset.with_format(None) if kind else dataset


def tokenize_row(
    row: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    vocab_size: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str | None = None,
    kind: str = "preference",
    as_ranked: bool = False,
    columns: tuple[str, ...] | None = None,
    rules: int = RULES,
    carries: str | None = None,
) -> dict[str, Any]:
    """Tokenise one row of a kind; `problem` in the result says why the row can't be used, or is empty.

    A problem that begins with "dropped:" means that the row is well formed but has nothing to learn from. `notes` in
    the result says what was done to the row, by keys of `fastdpo.data.summary.NOTES`. `as_ranked` returns a preference
    as a ranking of two. `columns` are those of the first row. The result carries the row's column `carries`, if any.
    """
    result = _empty("ranked" if as_ranked else kind, row, index)
    result |= {carries: row[carries]} if carries else {}
    notes: list[str] = result["notes"]
    try:
        is_tokenised = "prompt_ids" in row
        for column in (TOKEN_COLUMNS if is_tokenised else RAW_COLUMNS)[kind]:
            if column not in row:
                raise BadRow(f"it has no `{column}`")
        for column in _IN_ALL_ROWS:
            if columns is not None and (column in row) != (column in columns):
                raise BadRow(f"it has {'a' if column in row else 'no'} `{column}`, unlike the first row")
        check_fields(row, kind)
        if is_tokenised:
            prompt, responses = read_ids(row, kind)
        else:
            prompt, responses, found, seen = tokenize(row, kind, tokenizer)
            notes += found
            result |= seen
        check_tokens(prompt, responses, kind, vocab_size)
        check_references(row, responses)
        bos = images.text_tokenizer(tokenizer).bos_token_id
        if bos is not None and prompt[:2] == [bos] * 2:
            raise BadRow("`prompt` begins with two BOS tokens: the tokenizer adds one, so remove it from the text")

        if max_length is not None and truncation_mode == "keep_end":
            longest = min(max(map(len, responses)), max_completion_length or math.inf)
            if longest >= max_length:
                raise BadRow(f"its completion of {longest} tokens fills max_length, so 'keep_end' would cut it")
            max_prompt_length = min(max_prompt_length or max_length, int(max_length - longest))
        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            if result.get("images_key"):
                limit = f"max_prompt_length={max_prompt_length}"
                why = f"its prompt of {len(prompt)} tokens has images, which are not cut to {limit}"
                return result | {"problem": f"dropped: {why}"}
            keep = [bos] if prompt[0] == bos and max_prompt_length > 1 else []  # some models need it
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
        if set(CUTS) & set(notes) and (given := REFERENCES.keys() & row.keys()):
            raise BadRow(f"`{min(given)}` belongs to the whole row, which is too long and gets cut; raise the limits")
    except BadRow as error:
        return result | dict.fromkeys(REFERENCES.keys() & row.keys()) | {"problem": str(error)}
    if len(responses) > 1 and all(ids == responses[0] for ids in responses):
        what = "all responses" if kind == "ranked" else "chosen and rejected"
        return result | {"problem": f"dropped: {what} are the same tokens"}
    columns = TOKEN_COLUMNS["ranked" if as_ranked else kind][1:]
    ids = {columns[0]: responses} if as_ranked or kind == "ranked" else dict(zip(columns, responses, strict=False))
    return result | {"prompt_ids": prompt, **ids}


def _features(kind: str, first: dict[str, Any]) -> Features:
    """Return the types of what `tokenize_row` returns, which `datasets` would otherwise infer from the first rows."""
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
    if any(column in first for column in images.COLUMNS):
        features |= dict.fromkeys(images.ADDED, Value("string"))
    return Features(
        features | {"pair_index": Value("int64"), "problem": Value("string"), "notes": List(Value("string"))}
    )


def _empty(kind: str, row: dict[str, Any], index: int) -> dict[str, Any]:
    """Return what `tokenize_row` returns for a row with a problem: the row's numbers, and no token ids."""
    kept: dict[str, Any] = dict.fromkeys(NUMBERS, (int, float)) | {"pair_index": (int,)}
    if kind == "unpaired":
        kept |= {"label": (bool,), "kl_ids": (list,)}
    # a value whose type Arrow would refuse becomes None; its row has a problem anyway
    carried = {c: row[c] if type(row[c]) in types else None for c, types in kept.items() if c in row}
    carried |= {column: row[column] for column in REFERENCES if column in row}
    if any(column in row for column in images.COLUMNS):
        carried |= {column: row.get(column, "") for column in images.ADDED}
    ids: dict[str, Any] = {column: [] for column in TOKEN_COLUMNS[kind] if column != "label"}
    return {"pair_index": index, **ids, **carried, "problem": "", "notes": []}


# Rows of another kind


_UNPAIRED = 1000
"""Number of preferences that become unpaired rows together."""


def _unpaired_order(rows: int) -> list[int]:
    """Return of which preference each unpaired row is."""
    starts = range(0, rows, _UNPAIRED)
    return [i for start in starts for _ in range(2) for i in range(start, min(start + _UNPAIRED, rows))]


def _unpair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Turn preferences into rows with a label: first the batch's chosen responses, then its rejected ones."""
    chosen, rejected = batch.pop("chosen_ids"), batch.pop("rejected_ids")
    doubled = {column: values * 2 for column, values in batch.items() if column not in REFERENCES}
    label = [True] * len(chosen) + [False] * len(rejected)
    return doubled | {"completion_ids": chosen + rejected, "label": label}


def _add_kl(rows: Dataset, name: str, max_length: int | None) -> Dataset:
    prompts = [hash(tuple(ids)) for ids in rows["prompt_ids"]]
    if len(set(prompts)) == 1:
        raise ValueError(f"{name} dataset has one prompt only; the KL term needs completions of other prompts")
    following, other = [0] * len(prompts), 0
    for i in reversed(range(2 * len(prompts) - 1)):  # twice around, so that the last rows find the first ones
        i, after = i % len(prompts), (i + 1) % len(prompts)
        other = after if prompts[after] != prompts[i] else other
        following[i] = other
    kl = rows.select(following).select_columns(["completion_ids"]).rename_column("completion_ids", "kl_ids")
    result: Dataset = concatenate_datasets([rows, kl], axis=1)
    return result if max_length is None else result.map(_cut_kl, fn_kwargs={"max_length": max_length})


def _cut_kl(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    return {"kl_ids": row["kl_ids"][: max_length - len(row["prompt_ids"])]}


def columns_of(train_dataset: Any, eval_dataset: Any) -> list[set[str]]:
    """Return the columns of the training dataset, then those of each evaluation dataset."""
    columns = [set(train_dataset.column_names or ())]
    each(eval_dataset, lambda rows, _: columns.append(set(rows.column_names or ())))
    return columns


def preparer(args: Any, settings: Any, tokenizer: Any, vocab_size: int) -> Callable[..., Any]:
    """Return `prepare_dataset` with the settings of a run, to be called with only a dataset and its `name`.

    Args:
        args: a `fastdpo.DPOConfig`.
        settings: the objective's `fastdpo.loss.options.ObjectiveSettings`.
        tokenizer: as in `prepare_dataset`.
        vocab_size: as in `prepare_dataset`.
    """
    return functools.partial(
        prepare_dataset,
        tokenizer=tokenizer,
        kind=settings.kind,
        with_kl=settings.needs_kl,
        vocab_size=vocab_size,
        on_bad_row=args.on_bad_row,
        num_proc=args.dataset_num_proc,
        show_example=args.show_example,
        **limits_of(args),
    )


def limits_of(args: Any) -> dict[str, Any]:
    """Return the settings of a run that limit the tokens of a row, by the names of `prepare_dataset`'s arguments."""
    return {name: getattr(args, name) for name in LIMITS}


def each(datasets: Any, function: Callable[[Any, str], Any]) -> Any:
    """Apply `function(rows, name)` to one dataset, named "eval", or to each in a dict of them; None stays None."""
    if isinstance(datasets, dict):
        return {name: function(rows, name) for name, rows in datasets.items()}
    return None if datasets is None else function(datasets, "eval")

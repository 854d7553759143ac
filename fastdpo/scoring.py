"""The model as a reward model: `beta * log(pi(y|x) / pi_ref(y|x))`, https://arxiv.org/abs/2305.18290, section 5.1."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data import prepare
from fastdpo.data.packing import kind_of
from fastdpo.data.vision.batch import collator_of
from fastdpo.model import adapters
from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.layout import check_images, choose_layout
from fastdpo.model.policy import smallest_vocab
from fastdpo.model.scoring_forward import is_patched, patch_forward
from fastdpo.model.self_check import checked_layout
from fastdpo.reference.cache import Logps
from fastdpo.reference.exchange import exchange
from fastdpo.reference.precompute import token_logps
from fastdpo.settings.files import write_file

logger = logging.getLogger("fastdpo")


class Scores(NamedTuple):
    """What `score` returns."""

    rows: list[dict[str, Any]]
    """One dict per scored row: `row` (its position in the input) and four lists with one entry per response, in the
    row's order: `rewards`, `logps`, `ref_logps` (nats, summed over the response) and `lengths` (tokens)."""
    accuracy: float | None
    """Share of response pairs that the rewards put in the dataset's order; a tie counts one half. None if rows hold
    single responses."""


def score(
    model: Any,
    ref_model: Any | None,
    rows: Dataset | Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    beta: float = 0.1,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_bad_row: str = "error",
    output: Path | str | None = None,
    ref_adapter_name: str | None = None,
    cache_dir: Path | str | None = None,
    processes: PartialState | None = None,
    **options: Any,
) -> Scores:
    """Compute the reward of responses: how much likelier a trained model makes them than its reference.

    Args:
        model: the trained causal LM, or a PEFT model. Its forward is patched in place, as `DPOTrainer` does.
        ref_model: its reference. None: `model`, which must be a PEFT model, with its adapters off or with the adapter
            `ref_adapter_name` on.
        rows: rows of one format: `prompt` with `chosen` and `rejected`, with `responses` (best first), or with
            `completion`; text, messages or token ids, see `fastdpo.data.prepare`.
        tokenizer: the tokenizer of training; for rows with images, the processor.
        beta: scale of the rewards, > 0. Accuracy does not depend on it.
        max_length: cut prompt + response to this many tokens; None: nothing is cut.
        max_prompt_length: cut prompts to this many tokens; None: nothing is cut.
        max_completion_length: cut responses to this many tokens; None: nothing is cut.
        truncation_mode: what max_length cuts: "keep_start" the end of responses, "keep_end" the start of prompts.
        on_bad_row: what to do with a malformed row: "error" or "drop".
        output: a JSONL file for `Scores.rows`; it is written completely or not at all.
        ref_adapter_name: see `ref_model`.
        cache_dir: keep log-probs in this folder, as the reference cache does, so that a stopped run can continue.
        processes: accelerate's state of the processes that share the work. All must call this with the same arguments;
            each scores a share of the rows, all return the scores of all rows, and the first one writes `output`.
            None: this process scores all rows.
        **options: `tokens_per_batch`, `autocast`, `disable_tqdm`, see
            `fastdpo.reference.precompute.token_logps`.

    Raises:
        ValueError: beta, a row or a column makes no sense, or there is no reference; the message names the row.
        FloatingPointError: a log-prob is not finite; the message names the row.
    """
    if not beta > 0 or beta == float("inf"):
        raise ValueError(f"beta must be a finite number above 0, got {beta}")
    if ref_model is model:
        raise ValueError("ref_model is the same object as model, so every reward would be 0; pass the untrained model")
    if ref_model is None and not adapters.is_peft_model(model):
        raise ValueError("ref_model is None and model has no adapter to switch off; pass the reference")
    with nullcontext() if processes is None else processes.local_main_process_first():  # the others read its cache
        dataset = _tokenised(
            rows,
            tokenizer=tokenizer,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            truncation_mode=truncation_mode,
            on_bad_row=on_bad_row,
            vocab_size=smallest_vocab(model, ref_model),
        )

    models = [model] if ref_model is None else [model, ref_model]
    collate = collator_of([dataset.column_names], tokenizer, unwrap(model))
    for each in models:
        if "images_key" in dataset.column_names:
            check_images(each)
        if not is_patched(each):
            patch_forward(each)
    layout = choose_layout(models, prefix_sharing=True, trains=False)
    layout = checked_layout(models, [dataset[0]], layout, collate=collate)
    options = {"layout": layout, "collate": collate, "folder": cache_dir, **options}
    if processes is not None:
        options |= {
            "process_index": processes.process_index,
            "num_processes": processes.num_processes,
            "wait_for_everyone": processes.wait_for_everyone,
            "exchange": exchange,
        }

    scored = token_logps(dataset, model, name="scored", by="model", **options)
    if ref_model is not None:
        reference = token_logps(dataset, ref_model, name="scored", **options)
    else:
        with adapters.as_reference(model, ref_adapter_name):
            reference = token_logps(dataset, model, name="scored", **options)

    index = dataset["pair_index"]
    results = [_row(i, ours, theirs, beta) for i, ours, theirs in zip(index, scored, reference, strict=True)]
    ranked = kind_of(dataset[0]) != "unpaired"
    result = Scores(results, _accuracy(results) if ranked else None)
    if output is not None and (processes is None or processes.is_main_process):
        lines = "".join(json.dumps(row) + "\n" for row in results)
        write_file(Path(output), lines.encode())
    return result


def _tokenised(rows: Any, **options: Any) -> Dataset:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    columns = dataset.column_names
    alone = {"completion", "completion_ids"} & set(columns)
    if alone and "label" not in columns:
        dataset = dataset.add_column("label", [True] * len(dataset))  # required, but not read here
    kind = "unpaired" if alone else "ranked" if {"responses", "ranked_ids"} & set(columns) else "preference"
    prepared = prepare.prepare_dataset(dataset, kind=kind, name="scored", **options)
    assert isinstance(prepared, Dataset)
    return prepared


def _row(index: int, ours: Sequence[Logps], theirs: Sequence[Logps], beta: float) -> dict[str, Any]:
    logps, ref_logps = ([float(np.sum(x, dtype=np.float64)) for x in side] for side in (ours, theirs))
    return {
        "row": index,
        "rewards": [beta * (a - b) for a, b in zip(logps, ref_logps, strict=True)],
        "logps": logps,
        "ref_logps": ref_logps,
        "lengths": [len(x) for x in ours],
    }


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of pairs whose first response has the greater reward, for responses are best first."""
    pairs = [(a, b) for row in rows for a, b in combinations(row["rewards"], 2)]
    return float(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))

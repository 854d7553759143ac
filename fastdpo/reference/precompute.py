"""Compute the reference's log-probs of every response of a dataset once, in large batches, and keep them on disk.

Each response is looked up in a `TokenCache` by its token ids. Missing responses are scored by the packed forward that
training uses, the longest first, and written in shards as they come. On the CPU of one machine, the values are bit for
bit those that training would have computed in batches of at least `MIN_TARGETS` completion tokens, however either was
batched; `tests/reference/test_precompute.py` checks this, and bounds the error of smaller batches.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from fastdpo.data.packing import RESPONSE_FIELDS, edges, responses_of, rows_of, shared_prefix_batch
from fastdpo.data.vision.batch import KEPT, Collate
from fastdpo.data.vision.images import key_ids
from fastdpo.model.scoring_forward import evaluating, is_patched, patch_forward
from fastdpo.reference.cache import Logps, TokenCache, entry_key
from fastdpo.reference.fingerprint import fingerprint
from fastdpo.settings.files import cache_home, write_file
from fastdpo.sharding import dtype_of_deepspeed

logger = logging.getLogger("fastdpo")

COLUMN = "ref_token_logps"
TOKENS_PER_BATCH = 16384
TOKENS_PER_SHARD = 1 << 19  # 2 MiB: minutes of work of a large model; a thousand shards hold half a billion tokens
MIN_TARGETS = 16
"""For a head of fewer rows, the CPU's BLAS uses another algorithm, which rounds differently."""
_CHECKED_ENTRIES = 4


class Item(NamedTuple):
    """A prompt and those of its responses that are to be scored."""

    row: int
    """Position in the dataset."""
    prompt: Sequence[int]
    responses: list[Sequence[int]]
    keys: list[bytes]
    """One `entry_key` for each response."""
    places: list[tuple[int, int]]
    """For each response, its dataset row and its number there."""

    def example(self) -> dict[str, Any]:
        """Return the responses as one tokenised example, so that what they have in common is computed once."""
        example: dict[str, Any] = {"prompt_ids": self.prompt, "pair_index": self.row}
        if len(self.responses) == 1:
            return example | {"completion_ids": self.responses[0], "label": True}
        return example | {"ranked_ids": self.responses}


def reference_folder(folder: str | None) -> Path:
    """Return the folder of the cache: `folder`, else "reference" in $FASTDPO_CACHE or ~/.cache/fastdpo."""
    return Path(folder) if folder else cache_home() / "reference"


def with_reference(dataset: Dataset, model: Any, *, folder: Path | str | None, **options: Any) -> Dataset:
    """Return `dataset` with a column `ref_token_logps`: for each response of a row, one float32 number per token.

    Args:
        dataset: tokenised rows of any kind, see `fastdpo.shared_prefix_batch`.
        model: the model that answers as the reference, unwrapped and on its device; a PEFT policy inside
            `as_reference`.
        folder: the cache; one folder may hold values of many models and datasets. None: keep nothing.
        **options: as in `token_logps`.

    Raises:
        ValueError, FloatingPointError: as in `token_logps`.
    """
    values = token_logps(dataset, model, folder=folder, **options)
    flat = [logps for row in values for logps in row]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    tokens = np.cumsum([0, *map(len, flat)], dtype=np.int64)
    lists = pa.LargeListArray.from_arrays(tokens, pa.array(np.concatenate(flat) if flat else np.zeros(0, np.float32)))
    column = pa.LargeListArray.from_arrays(offsets, lists)
    if COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(COLUMN)
    return concatenate_datasets([dataset, Dataset(pa.table({COLUMN: column}))], axis=1)


def token_logps(
    dataset: Dataset,
    model: Any,
    *,
    folder: Path | str | None,
    layout: str = "shared",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    examples_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    name: str = "train",
    by: str = "reference",
    process_index: int = 0,
    num_processes: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
    largest: Callable[[int], int] = lambda number: number,
    exchange: Callable[..., dict[bytes, Logps]] = lambda entries, lacks_some: {},
    disable_tqdm: bool = False,
    collate: Collate = shared_prefix_batch,
) -> list[list[Logps]]:
    """Return the log-probs that `model` gives each token of each response, in nats, from the cache if it has them.

    Args:
        dataset: tokenised rows of any kind, see `fastdpo.shared_prefix_batch`.
        model: a causal LM, or a PEFT model with the right adapters switched on; patched if it is not yet.
        folder: the cache; None: keep nothing.
        layout: the layout of the batches, see `fastdpo.shared_prefix_batch`; it must be exact on the model.
        tokens_per_batch: most rows of a batch; an example that has more is a batch of its own.
        examples_per_batch: number of examples in a batch, instead of `tokens_per_batch`.
        autocast: the dtype of autocast in training; None if it is off.
        name: what errors and the progress bar call the dataset.
        by: what they call the model.
        process_index: number of this process among those that share the work.
        num_processes: number of processes that share the work. Each computes its share, and reads the others from
            `folder`, or gets them by `exchange` if they are not there.
        wait_for_everyone: a function that returns when all of these processes have called it.
        largest: a function that returns the largest number that any of these processes gives it, if the model is
            sharded: then each process must call the model as often as the one with most to score.
        exchange: see `fastdpo.reference.exchange`. Without it, a process computes itself what it does not find.
        disable_tqdm: show no progress bar.
        collate: what makes a batch of rows; a `VisionCollator` for rows with images.

    Returns:
        One list per dataset row, with one `[tokens]` float32 array per response.

    Raises:
        ValueError: the dataset is streamed, or cached values differ from what the model says now.
        FloatingPointError: a log-prob is not finite; names the dataset row.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} dataset is {type(dataset).__name__}: {by} log-probs can be precomputed for a "
            "datasets.Dataset only; set precompute_ref_log_probs=False, or load it without streaming"
        )
    for what, number in (("tokens_per_batch", tokens_per_batch), ("precompute_ref_batch_size", examples_per_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    budget = (1, examples_per_batch) if examples_per_batch else (0, tokens_per_batch)
    if not is_patched(model):
        patch_forward(model)
    items = list(_items(dataset))
    options: dict[str, Any] = {"layout": layout, "autocast": autocast, "collate": collate, "by": by}
    if "images_key" in dataset.column_names:
        options["images"] = dataset.select_columns([c for c in KEPT if c in dataset.column_names])
    with evaluating(model):
        cache = _open(folder, model, autocast)
        known = [item for item in items if all(key in cache for key in item.keys)]
        others_check = largest(len(known)) > 0
        cached = f"{len(known):,} of {len(items):,} rows are cached" + (f" in {folder}" if folder else "")
        told = (name, by, cached, f"{len(items) - len(known):,}")
        logger.info("log-probs of the %s dataset under the %s: %s, and %s are computed now", *told)
        if known:
            _check(cache, known, model, name, options)
        elif others_check:
            score_batch(model, items[:1], name, **options)
        spare = (largest, items[:1])
        share = "" if num_processes == 1 else f"-{process_index}-of-{num_processes}"
        with cache.filling(share):
            # shares are dealt out by length from all items, which no other process can change: they do not overlap,
            # and have about the same number of tokens
            groups = items if "images" in options else _merged(items, layout, budget)
            by_length = sorted(groups, key=lambda item: len(item.prompt) + sum(map(len, item.responses)))
            own = _missing(by_length, TokenCache(None))[process_index::num_processes]
            batches = _batches(_missing(own, cache), layout, budget)
            _fill(cache, batches, model, name, disable_tqdm or process_index > 0, options, *spare)
        wait_for_everyone()
        cache.refresh()
        found = {key: cache[key] for item in own for key in item.keys}
        cache.hold(exchange(found, lacks_some=bool(_missing(items, cache))))
        # this computes nothing, unless another process failed
        batches = _batches(_missing(groups, cache), layout, budget)
        _fill(cache, batches, model, name, disable_tqdm or process_index > 0, options, *spare)
    return [[cache[key] for key in item.keys] for item in items]


def holds(
    datasets: Iterable[Any], model: Any, *, folder: Path | str, autocast: torch.dtype | None, key: str | None = None
) -> bool:
    """Whether the cache has every value that `token_logps` would return for each of `datasets`.

    Nothing is computed or written; weights are hashed only where the folder holds some model's values.

    Args:
        datasets: tokenised datasets; if one of them is streamed, the answer is False.
        model: as in `token_logps`.
        folder: the cache.
        autocast: as in `token_logps`.
        key: the model's `fingerprint`, if it is known.
    """
    folder, datasets = Path(folder), list(datasets)
    if (
        not all(isinstance(dataset, Dataset) for dataset in datasets)
        or not folder.is_dir()
        or not any(folder.iterdir())
    ):
        return False
    home = folder / (key or fingerprint(model, autocast=autocast)[0])[:32]
    if not home.is_dir():
        return False
    cache = TokenCache(home)
    return all(key in cache for dataset in datasets for item in _items(dataset) for key in item.keys)


def _open(folder: Path | str | None, model: Any, autocast: torch.dtype | None) -> TokenCache:
    if folder is None:
        return TokenCache(None)
    key, description = fingerprint(model, autocast=autocast)
    home = Path(folder) / key[:32]
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "reference.json").exists():  # for people; nothing reads it
        write_file(home / "reference.json", json.dumps(description, indent=1, sort_keys=True, default=str).encode())
    return TokenCache(home)


def _items(dataset: Dataset) -> Iterator[Item]:
    columns = {"prompt_ids", "images_key", *(field for fields in RESPONSE_FIELDS.values() for field in fields)}
    for i, row in enumerate(dataset.select_columns([c for c in dataset.column_names if c in columns])):
        responses: Any = responses_of(row)
        prompt = [*key_ids(row.get("images_key")), *row["prompt_ids"]]
        keys = [entry_key(prompt, ids) for ids in responses]
        yield Item(i, row["prompt_ids"], responses, keys, [(i, k) for k in range(len(responses))])


def _merged(items: Sequence[Item], layout: str, budget: tuple[int, int]) -> list[Item]:
    """Merge the items of one prompt, so that the prompt is computed once, as far as a batch of rows holds them."""
    counts_examples, most = budget
    if counts_examples or layout not in ("shared", "tree"):
        return list(items)
    merged: list[Item] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # by prompt: the item that grows, and its rows at most
    for item in items:
        prompt = tuple(item.prompt)
        at, rows = last.get(prompt, (len(merged), len(prompt)))
        rows += sum(map(len, item.responses))
        if at == len(merged) or rows > most:
            last[prompt] = len(merged), len(prompt) + sum(map(len, item.responses))
            merged.append(Item(item.row, item.prompt, [*item.responses], [*item.keys], [*item.places]))
            continue
        last[prompt] = at, rows
        merged[at].responses.extend(item.responses)
        merged[at].keys.extend(item.keys)
        merged[at].places.extend(item.places)
    return merged


def _missing(items: Sequence[Item], cache: TokenCache) -> list[Item]:
    """Return the responses that are not in the cache, each of them once."""
    seen: set[bytes] = set()
    rest = []
    for item in items:
        kept = []
        for response, key, place in zip(item.responses, item.keys, item.places, strict=True):
            if key not in cache and key not in seen:
                seen.add(key)
                kept.append((response, key, place))
        if kept:
            responses, keys, places = map(list, zip(*kept, strict=True))
            rest.append(Item(item.row, item.prompt, responses, keys, places))
    return rest


def _batches(items: Sequence[Item], layout: str, budget: tuple[int, int]) -> list[list[Item]]:
    """Put items of similar length together, the longest first, so that a batch too large for memory fails at once.

    `budget` is (1, most examples of a batch) or (0, most rows of a batch).
    """
    counts_examples, most = budget
    sized = sorted(((rows_of(item.example(), layout), item) for item in items), key=lambda pair: -pair[0])
    batches: list[list[Item]] = []
    for single in (False, True):  # a batch holds examples of one kind
        used = most
        for rows, item in sized:
            if (len(item.responses) == 1) != single:
                continue
            size = 1 if counts_examples else rows
            if used + size > most:
                batches.append([])
                used = 0
            batches[-1].append(item)
            used += size
    return batches


def _fill(
    cache: TokenCache,
    batches: Sequence[Sequence[Item]],
    model: Any,
    name: str,
    disable_tqdm: bool,
    options: dict[str, Any],
    largest: Callable[[int], int],
    spare: Sequence[Item],
) -> None:
    """Score batches and add them to the cache; score `spare` beside other processes that have more batches."""
    more = largest(len(batches)) - len(batches)
    if not batches and not more:
        return
    total = sum(len(response) for batch in batches for item in batch for response in item.responses)
    unsaved: dict[bytes, Logps] = {}
    waiting = 0
    description = f"Log-probs of the {name} dataset under the {options['by']}"
    with tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=disable_tqdm or None) as bar:
        for batch in batches:
            scored = score_batch(model, batch, name, **options)
            unsaved |= scored
            tokens = sum(map(len, scored.values()))
            waiting += tokens
            if waiting >= TOKENS_PER_SHARD:
                cache.add(unsaved)
                unsaved, waiting = {}, 0
            bar.update(tokens)
        cache.add(unsaved)
    for _ in range(more):
        score_batch(model, spare, name, **options)


def score_batch(
    model: Any,
    items: Sequence[Item],
    name: str,
    *,
    layout: str,
    autocast: torch.dtype | None,
    by: str = "reference",
    collate: Collate = shared_prefix_batch,
    images: Dataset | None = None,
) -> dict[bytes, Logps]:
    """Score the items in one batch of this layout; `images` has the images of all rows of the dataset, if there are."""
    device = next(model.parameters()).device
    examples = [item.example() | ({} if images is None else images[item.row]) for item in items]
    # few tokens are repeated up to MIN_TARGETS, so that the head uses its usual algorithm
    tokens = sum(len(response) for item in items for response in item.responses)
    repeats = -(-MIN_TARGETS // tokens)
    across = collate is shared_prefix_batch and repeats == 1 and layout != "packed"
    batch = collate(examples * repeats, layout=layout, **({"across_examples": True} if across else {}))
    bounds, index = batch["cu_target"].tolist(), edges(batch).T.tolist()
    batch.pop("label", None)
    batch = send_to_device(batch, device, non_blocking=True)
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        logps = model(**batch).logps.float().cpu().numpy()
    scored = {}
    for item, responses in zip(items, index, strict=False):
        for k, (key, (row, number)) in enumerate(zip(item.keys, item.places, strict=True)):
            values = logps[bounds[responses[k]] : bounds[responses[k] + 1]]
            if not np.isfinite(values).all():
                raise FloatingPointError(
                    f"{name} dataset: row {row}: the {by} gives response {number} a log-prob that is not finite; "
                    "its weights may not be finite, or it overflows in fp16 (use bf16)"
                )
            scored[key] = values
    return scored


def _check(cache: TokenCache, known: Sequence[Item], model: Any, name: str, options: dict[str, Any]) -> None:
    """Compute a few cached values again, to find changes that the key can't see (libraries, a model's own code).

    Rounding may differ, above all between machines; the bound allows this, but not a change of the model.
    """
    singles = [item for item in known if len(item.responses) == 1]
    sample = sorted(singles or known, key=lambda item: sum(map(len, item.responses)))[:_CHECKED_ENTRIES]
    low = options["autocast"] is not None or next(model.parameters()).dtype != torch.float32
    bound = 5e-2 if low else 1e-3
    for key, values in score_batch(model, sample, name, **options).items():
        error = float(np.abs(values - cache[key]).mean())
        if error > bound:
            raise ValueError(
                f"reference cache {cache.folder}: cached log-probs are {error:.2g} nats per token from what the model "
                "says now, with the same weights and config; another version of transformers or of the model's code "
                "may have computed them. Remove that folder to compute them anew, or set "
                "precompute_ref_log_probs=False."
            )


def options_of(args: Any) -> dict[str, Any]:
    """Return the options of `token_logps` that a `DPOConfig` sets."""
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype_of_deepspeed(args) is not None:
        autocast = None  # the weights are cast instead
    options: dict[str, Any] = {
        "autocast": autocast,
        "examples_per_batch": args.precompute_ref_batch_size,
        "disable_tqdm": bool(args.disable_tqdm),
    }
    if isinstance(tokens := args.tokens_per_batch, int):
        options["tokens_per_batch"] = max(tokens, TOKENS_PER_BATCH)  # without a backward, larger batches fit
    return options

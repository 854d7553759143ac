"""Count a dataset's tokens: lengths, rows that are dropped or cut and why, and the batches of an epoch.

Shapes: N examples, T rows of a batch, K key-path entries, M targets (see `fastdpo.data.packing`).
"""

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.config import DPOConfig
from fastdpo.config.auto import given_tokens
from fastdpo.data.grouping import Groups, arrays, groups_of
from fastdpo.data.packing import kind_of, responses_of, shared_prefix_batch
from fastdpo.data.prepare import LIMITS, find_kind, limits_of, prepare_dataset, tokenize_row, unformatted
from fastdpo.data.sampler import BudgetSampler, planned_sizes
from fastdpo.loss.options import from_config

Numbers = np.ndarray[Any, np.dtype[np.int64]]

GROUP_SIZES = (2, 4, 8, 16)
"""Values of `group_by_prompt` that are tried."""
SAMPLED = 32
"""Most batches that are packed for each of them."""
_RESPONSES = {
    "chosen_ids": "chosen",
    "rejected_ids": "rejected",
    "ranked_ids": "response",
    "completion_ids": "completion",
    "kl_ids": "completion for the KL term",
}


class Grouped(NamedTuple):
    """What batches with one value of `group_by_prompt` hold, per example."""

    rows: float
    families: float
    """Prompts; all turns of a conversation count as one."""


@dataclass(frozen=True)
class TokenStats:
    """The examples of a dataset that are trained on, and the rows that are dropped or cut."""

    given: int
    """Rows of the dataset."""
    lengths: dict[str, Numbers]
    """By name ("prompt", "chosen", ...): tokens of each prompt or response that is trained on."""
    sequences: list[list[int]]
    """For each example, the tokens of its full sequences, prompt included."""
    prompts: Numbers
    """`[N]`: tokens of each example's prompt."""
    sizes: Numbers
    """`[N, 2]`: see `fastdpo.data.sampler.example_sizes`."""
    groups: Groups | None
    """With `group_by_prompt`, the groups of examples that batches take."""
    grouped: dict[int, Grouped]
    """What batches hold with several values of `group_by_prompt`; empty if all prompts differ."""
    ungrouped: float
    """The rows per example of batches that are not grouped; 0 if all prompts differ."""
    per_prompt: int
    """The most examples of one prompt and of those that begin with it, as later turns of a conversation do."""
    responses: list[list[int]]
    """For each example, numbers of its responses, which are equal where prompt and response are."""
    layout: str
    dropped: dict[str, list[int]]
    """Dataset rows that are dropped, by reason; each number in a reason is replaced by a #."""
    cut: dict[str, list[int]]
    """By name as in `lengths`: dataset rows whose prompt or response is cut."""


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch on all processes; each array has one number per batch."""

    rows: Numbers
    """T: rows, which are tokens that are computed."""
    tokens: Numbers
    """Tokens of all full sequences, in which a prompt counts once for each response."""
    padded: Numbers
    """Size of the padded batch: number of responses times the longest sequence."""
    paths: Numbers
    """K: key-path entries."""
    targets: Numbers
    """M: completion tokens."""
    unshared: Numbers
    """Tokens that would be computed if nothing were shared."""
    grid: Numbers
    """Places of the attention grid at most: number of responses times the longest key path."""
    processes: int
    is_padded: bool
    """Whether each sequence is a padded row of its own, so that no padding is avoided and no token shared."""

    @property
    def padding_avoided(self) -> float:
        """Share of the padded batches that is padding and is avoided."""
        return 0.0 if self.is_padded else 1 - float(self.tokens.sum() / self.padded.sum())

    @property
    def shared(self) -> float:
        """Share of the tokens that need not be computed, because another response shares them."""
        return 0.0 if self.is_padded else 1 - float(self.rows.sum() / self.unshared.sum())


def token_stats(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, vocab_size: int, layout: str = "shared"
) -> TokenStats:
    """Tokenise a dataset as the trainer does, and count its tokens.

    Args:
        dataset: rows as `fastdpo.data.prepare` describes them.
        tokenizer: the model's tokenizer.
        args: settings of the run.
        vocab_size: number of rows of the model's embedding.
        layout: layout of the batches, see `fastdpo.shared_prefix_batch`.

    Raises:
        ValueError: `fastdpo.data.prepare.prepare_dataset` raises it, or the dataset is a stream, whose length is
            unknown.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"a plan needs a datasets.Dataset, got {type(dataset).__name__}, whose length is unknown")
    dataset = unformatted(dataset)
    limits = limits_of(args)
    unlimited: dict[str, Any] = dict.fromkeys(LIMITS)
    settings = from_config(args)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "kind": settings.kind,
        "on_bad_row": args.on_bad_row,
        "num_proc": args.dataset_num_proc,
    }
    if "pair_index" in dataset.column_names:
        dataset = dataset.remove_columns("pair_index")  # from here on, a row is known by its position
    found = find_kind(dataset.column_names, settings.kind, "train")
    # pairs are cut before they become unpaired examples, and pairs whose responses are equal by then are dropped
    is_unpaired = settings.kind == "unpaired" and found == "preference"
    whole: Any = prepare_dataset(dataset, **options | {"kind": found} if is_unpaired else options, **unlimited)
    kept: Any = prepare_dataset(whole, **options, **limits, with_kl=settings.needs_kl)

    place = {row: at for at, row in enumerate(whole["pair_index"])}
    used = kept["pair_index"]
    dropped: dict[str, list[int]] = defaultdict(list)
    for row in sorted(set(range(len(dataset))) - set(used)):
        here, kind = (whole[place[row]], kind_of(whole[0])) if row in place else (dataset[row], found)
        problem = tokenize_row(here, row, tokenizer, vocab_size=vocab_size, kind=kind, **limits)["problem"]
        dropped[re.sub(r"\d+", "#", problem.removeprefix("dropped: "))].append(row)

    if is_unpaired:
        whole = prepare_dataset(whole, **options, **unlimited)
    uncut = {row: at for at, row in enumerate(_counted(whole["pair_index"]))}
    before, lengths = _lengths(whole.select([uncut[row] for row in _counted(used)])), _lengths(kept)
    cut = {}
    for name, values in lengths.items():
        if name in before and (rows := [row for row, a, b in zip(used, before[name], values, strict=True) if a != b]):
            cut[name] = rows
    prompts = np.array([sum(n) for n in lengths["prompt"]])
    responses = [lengths[name] for name in lengths if name != "prompt"]
    sequences = [
        [int(prompt) + n for each in several for n in each]
        for prompt, several in zip(prompts, zip(*responses, strict=True), strict=True)
    ]
    sizes, groups = planned_sizes(kept, layout, args.group_by_prompt, given_tokens(args))
    per_prompt, ungrouped, grouped = _grouped(kept, layout, args)
    return TokenStats(
        given=len(dataset),
        lengths={name: np.array([n for each in values for n in each]) for name, values in lengths.items()},
        sequences=sequences,
        prompts=prompts,
        sizes=sizes,
        groups=groups,
        grouped=grouped,
        ungrouped=ungrouped,
        per_prompt=per_prompt,
        responses=_numbered(kept),
        layout=layout,
        dropped=dict(dropped),
        cut=cut,
    )


def _grouped(kept: Dataset, layout: str, args: DPOConfig) -> tuple[int, float, dict[int, Grouped]]:
    """Return `per_prompt`, `ungrouped` and `grouped` of `TokenStats`.

    Some batches of an epoch are packed, because prompts that differ may begin alike, with a system prompt for example.
    """
    families = groups_of(kept, len(kept)).rows
    family_of = {i: number for number, rows in enumerate(families) for i in rows}
    most = max(map(len, families))
    if most == 1 or layout == "packed" or "images_key" in kept.column_names:  # equal tokens may be other images
        return most, 0.0, {}
    sizes = [n for n in GROUP_SIZES if n // 2 < most]
    return (
        most,
        _packed(kept, layout, args, None, family_of).rows,
        {n: _packed(kept, layout, args, n, family_of) for n in sizes},
    )


def _packed(
    kept: Dataset, layout: str, args: DPOConfig, group_by_prompt: int | None, family_of: dict[int, int]
) -> Grouped:
    budget = given_tokens(args)
    sizes, groups = planned_sizes(kept, layout, group_by_prompt, budget)
    count = None if budget else args.train_batch_size
    batches = BudgetSampler(sizes, tokens_per_batch=budget, batch_size=count, seed=0, groups=groups).plan(0)
    batches = batches[:: -(-len(batches) // SAMPLED)]
    rows = families = 0
    for batch in batches:
        families += len({family_of[i] for i in batch})
        examples = kept.select(batch).to_list()
        packed = shared_prefix_batch(examples, layout=layout, pad_to_multiple_of=1, across_examples=True)
        rows += packed["input_ids"].numel()
    taken = sum(map(len, batches))
    return Grouped(rows / taken, families / taken)


def _numbered(kept: Dataset) -> list[list[int]]:
    """Number the responses of all examples, equal ones alike."""
    numbers: dict[tuple[int, int], int] = {}
    result = []
    images = kept["images_key"] if "images_key" in kept.column_names else itertools.repeat(None)
    for example, seen in zip(arrays(kept), images, strict=False):
        prompt = hash((example["prompt_ids"].tobytes(), seen))
        keys = [(prompt, hash(np.asarray(response).tobytes())) for response in responses_of(example)]
        result.append([numbers.setdefault(key, len(numbers)) for key in keys])
    return result


def _counted(rows: list[int]) -> list[tuple[int, int]]:
    """Number the occurrences of each dataset row, because a pair may have become two unpaired examples."""
    seen: dict[int, int] = defaultdict(int)
    counted = []
    for row in rows:
        counted.append((row, seen[row]))
        seen[row] += 1
    return counted


def _lengths(dataset: Dataset) -> dict[str, list[list[int]]]:
    """Return, by name, the tokens of each example's prompt and responses; a ranking's responses have one name."""
    names = {"prompt_ids": "prompt"} | {c: name for c, name in _RESPONSES.items() if c in dataset.column_names}
    return {
        name: [[len(ids)] if column != "ranked_ids" else [len(each) for each in ids] for ids in dataset[column]]
        for column, name in names.items()
    }


def epoch(stats: TokenStats, args: DPOConfig, processes: int = 1, tokens_per_batch: int | None = None) -> Batches:
    """Plan the batches of the first epoch, by `tokens_per_batch` or, if that is unset, by a number of examples.

    `tokens_per_batch=None` reads the setting of `args`, in which "auto", which is chosen in training, counts as unset.
    Batches by tokens are those that the trainer will use; batches by a number of examples differ from the trainer's,
    whose random order is another.
    """
    budget = tokens_per_batch or given_tokens(args)
    sampler = BudgetSampler(
        stats.sizes,
        tokens_per_batch=budget,
        batch_size=None if budget else args.train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=processes,
        groups=stats.groups,
    )
    fields: dict[str, list[int]] = defaultdict(list)
    for batch in sampler.plan(0):
        lengths = [n for i in batch for n in stats.sequences[i]]
        # (tokens, tokens of the response) of what is computed: with groups, equal responses once
        of_all = [(n, n - int(stats.prompts[i])) for i in batch for n in stats.sequences[i]]
        keys = [number for i in batch for number in stats.responses[i]]
        held = of_all if stats.groups is None else list(dict(zip(keys, of_all, strict=True)).values())
        fields["rows"].append(sampler.rows(batch))
        fields["tokens"].append(sum(lengths))
        fields["padded"].append(len(lengths) * max(lengths))
        fields["unshared"].append(sum(lengths) - len(lengths))  # the last token of a sequence predicts nothing
        fields["paths"].append(sum(n - 1 for n, _ in held))
        fields["targets"].append(sum(targets for _, targets in held))
        fields["grid"].append(len(held) * (max(lengths) - 1))
    numbers = {name: np.array(values) for name, values in fields.items()}
    return Batches(**numbers, processes=processes, is_padded=stats.layout == "padded")

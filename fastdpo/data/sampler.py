"""Plan batches by a budget of rows instead of a number of examples.

Each epoch is planned as a whole, the same on every process: the examples are shuffled, cut into windows, and packed
first-fit-decreasing within each window. Then batches are split until every epoch has the same number of them, a
multiple of the number of processes; if that would split many, they are packed again with a lower budget. So every
example comes once per epoch, every process has the same number of batches, and the Trainer can rely on the length.
Processes wait for each other in each step, so the batches of a step have about the same number of rows. The plan
depends only on the sizes, the settings, the seed and the epoch; so a run resumes in the middle of an epoch by skipping
its first batches.

With groups (`fastdpo.data.grouping`), groups of examples are shuffled and packed instead of single ones.

Shapes: N examples, U groups.
"""

import heapq
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from fastdpo.data.grouping import Groups, arrays, fill, group_sizes, groups_of
from fastdpo.data.packing import responses_of, rows_of

logger = logging.getLogger("fastdpo")

MAX_NAMED_ROWS = 5
_WINDOW = 1024  # a window has at least this many examples, few enough for the order to stay random
_WINDOW_BATCHES = 64  # and examples for about this many batches: its one half-empty batch is under a hundredth of them
_UNEVEN = 1.02  # if more batches are needed, to have equally many on all processes, the budget is lowered
_SPARE = (1.003, 1.01, 1.03)  # shares of the even budget that are tried, because batches are never quite full
_APART = 1.1  # groups of a family are kept apart in up to so many times the batches that all rows fill, and two more
_MAX_PLANS = 8  # different ways to make batches; later epochs repeat them, with the batches in another order


class BudgetSampler(Sampler[list[int]]):
    """Sampler of one process' batches, which are lists of positions in the dataset.

    Args:
        sizes: `[N, 2]` int, see `example_sizes`.
        tokens_per_batch: most rows of a batch; an example that has more is a batch of its own.
        batch_size: number of examples in a batch, instead of `tokens_per_batch`.
        seed: seeds the shuffling, together with the epoch.
        epochs: number of epochs to plan; all get as many batches as the one that needs most.
        rank: number of this process.
        world_size: number of processes.
        longest_first: begin the first epoch with the largest batches, so that a run too large for memory fails at once.
        groups: examples to be kept together, with the sizes that they have then.

    Raises:
        ValueError: `tokens_per_batch` and `batch_size` are both given or both missing, or one is not positive, or
            there are no examples.
    """

    def __init__(
        self,
        sizes: np.ndarray[Any, Any],
        *,
        tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        longest_first: bool = False,
        groups: Groups | None = None,
    ) -> None:
        if (tokens_per_batch is None) == (batch_size is None):
            raise ValueError(f"give tokens_per_batch or batch_size, got {tokens_per_batch} and {batch_size}")
        for name, value in (("tokens_per_batch", tokens_per_batch), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not len(sizes):
            raise ValueError("sizes must hold at least one example, got none")
        self.batch_size = None  # accelerate reads this; None says that the size varies
        self._sizes, self._budget, self._count, self._groups = sizes, tokens_per_batch, batch_size, groups
        self._units = sizes if groups is None else groups.sizes
        self._group_of = np.zeros(len(sizes), np.int64)  # by example
        for u, rows in enumerate(groups.rows if groups else ()):
            self._group_of[rows] = u
        self._seed, self._plans = seed % 2**63, max(1, min(epochs, _MAX_PLANS))
        self._rank, self._world_size, self._longest_first = rank, world_size, longest_first
        self._epoch = 0
        most = max(len(self._fill(plan)) for plan in range(self._plans))
        self._length = -(-most // world_size)
        self._even_out(most)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches that each process has in each epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the batches of this process in this epoch."""
        return iter(self.plan(self._epoch)[self._rank :: self._world_size])

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the batches of all processes, in the order in which they are dealt out."""
        batches = _split(self._fill(epoch % self._plans), self._length * self._world_size, self._groups is not None)
        rng = np.random.default_rng((self._seed, epoch, 1))
        # each step has a group of batches of similar size; the groups, and the batches in each, are in random order
        order = np.argsort([-self.rows(batch) for batch in batches], kind="stable")
        groups = rng.permuted(order.reshape(self._length, self._world_size), axis=1)
        turns = rng.permutation(self._length)
        if self._longest_first and epoch == 0:
            turns = np.concatenate(([0], turns[turns != 0]))
        return [batches[i] for i in groups[turns].ravel()]

    def rows(self, batch: list[int]) -> int:
        """Return the rows that a batch takes; of a group that was cut, at most those of its examples apart."""
        own = self._sizes[batch]
        counts = own[:, 0]
        if self._groups is not None:
            groups, place = np.unique(self._group_of[batch], return_inverse=True)
            counts = np.minimum(np.bincount(place, counts).astype(np.int64), self._units[groups, 0])
        return int(counts.sum() * own[:, 1].max())

    def _even_out(self, most: int) -> None:
        """Lower the budget where many batches would be halved, so that all become a little smaller instead."""
        count, given = self._length * self._world_size, self._budget
        if given is None or count < _UNEVEN * most:
            return
        for spare in _SPARE:
            self._budget = min(given, math.ceil(given * most / count * spare))
            if max(len(self._fill(plan)) for plan in range(self._plans)) <= count:
                return
        self._budget = given

    def _fill(self, plan: int) -> list[list[int]]:
        order = np.random.default_rng((self._seed, plan, 0)).permutation(len(self._units))
        if self._count is not None and self._groups is not None:
            return fill(order.tolist(), self._groups, self._count)
        if self._count is not None:
            return [chunk.tolist() for chunk in np.split(order, range(self._count, len(order), self._count))]
        assert self._budget is not None
        window = max(_WINDOW, int(_WINDOW_BATCHES * self._budget / self._units.prod(1).mean()))
        batches = []
        for start in range(0, len(order), window):
            batches += _first_fit(order[start : start + window], self._units, self._budget, self._groups)
        if self._groups is None:
            return batches
        return [[i for group in batch for i in self._groups.rows[group]] for batch in batches]


def _first_fit(
    order: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], budget: int, groups: Groups | None = None
) -> list[list[int]]:
    """Pack examples or groups into batches, the largest first, each into the first batch that has room.

    A batch takes one group of a family, unless that would need many more batches than the rows can fill.
    """
    most = math.ceil(_APART * sizes[order].prod(1).sum() / budget) + 2
    taken: dict[int, list[int]] = defaultdict(list)  # the batches of each family
    order = order[np.lexsort((-sizes[order, 0], -sizes[order, 1]))]
    batches: list[list[int]] = []
    count, width = np.zeros((2, len(order)), np.int64)  # of each batch, whose first example is the widest
    for i, (n, w) in zip(order.tolist(), sizes[order].tolist(), strict=True):
        room = (count[: len(batches)] + n) * width[: len(batches)] <= budget
        if groups is not None:
            others = room.copy()
            others[taken[groups.families[i]]] = False
            if others.any() or len(batches) < most:
                room = others
        at = int(room.argmax()) if len(batches) else 0
        if not batches or not room[at]:
            at = len(batches)
            batches.append([])
            width[at] = w
        batches[at].append(i)
        count[at] += n
        if groups is not None:
            taken[groups.families[i]].append(at)
    return batches


def _split(batches: list[list[int]], count: int, in_order: bool = False) -> list[list[int]]:
    """Halve the batches with most examples until there are `count`; if all have one example, repeat some.

    `in_order` keeps neighbours together, because they are a group.
    """
    heap = [(-len(batch), i, batch) for i, batch in enumerate(batches)]
    heapq.heapify(heap)
    for i in range(len(batches), count):
        _, at, batch = heap[0]
        half = len(batch) // 2
        keep, rest = (batch[:half], batch[half:]) if in_order else (batch[::2], batch[1::2])
        if len(batch) == 1:
            keep, rest = batch, heap[i % len(heap)][2]
        heapq.heapreplace(heap, (-len(keep), at, keep))
        heapq.heappush(heap, (-len(rest), i, rest))
    return [batch for _, _, batch in sorted(heap, key=lambda entry: entry[1])]


def example_sizes(dataset: Dataset, layout: str) -> np.ndarray[Any, Any]:
    """Return what each example of a tokenised dataset adds to the size of a batch.

    Args:
        dataset: its columns are those of `fastdpo.shared_prefix_batch`.
        layout: as in `fastdpo.shared_prefix_batch`.

    Returns:
        `[N, 2]` int64: (rows, 1), or, for padded batches, (responses, row length). The rows of a batch are the sum of
        its examples' first numbers times the greatest of their second numbers.
    """
    sizes = np.ones((len(dataset), 2), np.int64)
    for row, example in enumerate(arrays(dataset)):
        rows = rows_of(example, layout)
        if layout == "padded":
            responses = len(responses_of(example))
            sizes[row] = responses, rows // responses
        else:
            sizes[row, 0] = rows
    return sizes


def planned(loader: DataLoader[Any], args: Any, layout: str, tokens_per_batch: int | None) -> DataLoader[Any]:
    """Return the loader, rebuilt by `rebatch` if a run's settings ask for other batches than the Trainer's.

    These settings are `tokens_per_batch`, which may have been "auto", `longest_first` and `group_by_prompt`, which
    orders a stream elsewhere.
    """
    is_stream = not isinstance(loader.dataset, Dataset)
    if tokens_per_batch is None and not args.longest_first and (args.group_by_prompt is None or is_stream):
        return loader
    return rebatch(
        loader,
        layout=layout,
        tokens_per_batch=tokens_per_batch,
        batch_size=args.train_batch_size if tokens_per_batch is None else None,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epochs=math.ceil(args.num_train_epochs),
        rank=args.process_index,
        world_size=args.world_size,
        longest_first=args.longest_first,
        group_by_prompt=args.group_by_prompt,
    )


def rebatch(
    loader: DataLoader[Any],
    *,
    layout: str,
    tokens_per_batch: int | None = None,
    rank: int = 0,
    group_by_prompt: int | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """Return a copy of a `transformers.Trainer`'s loader that takes its batches from a `BudgetSampler`.

    Args:
        loader: what `Trainer.get_train_dataloader` returned.
        layout: as in `fastdpo.shared_prefix_batch`.
        tokens_per_batch: this and all arguments below are those of `BudgetSampler`.
        rank: number of this process.
        group_by_prompt: most examples of a group, see `fastdpo.data.grouping`; None: no groups.
        options: the others.

    Raises:
        ValueError: the dataset is a stream, or `BudgetSampler` refuses its arguments.
    """
    dataset: Any = loader.dataset
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "tokens_per_batch and longest_first need a datasets.Dataset, to plan whole epochs; "
            f"got {type(dataset).__name__}: use per_device_train_batch_size"
        )
    sizes, groups = planned_sizes(dataset, layout, group_by_prompt, tokens_per_batch)
    if tokens_per_batch is not None and rank == 0:
        _warn_of_large_examples(dataset, sizes.prod(1), tokens_per_batch)
    sampler = BudgetSampler(sizes, tokens_per_batch=tokens_per_batch, rank=rank, groups=groups, **options)
    kept = set(inspect.signature(DataLoader).parameters)
    kept -= {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"}
    plain = DataLoader(dataset, batch_sampler=sampler, **{name: getattr(loader, name) for name in kept})
    # accelerate must not deal batches out to processes, as the sampler has done so; it is told of one process
    device = getattr(loader, "device", None)
    result: DataLoader[Any] = prepare_data_loader(
        plain, device, num_processes=1, process_index=0, put_on_device=device is not None
    )
    return result


def planned_sizes(
    dataset: Dataset, layout: str, group_by_prompt: int | None, tokens_per_batch: int | None
) -> tuple[np.ndarray[Any, Any], Groups | None]:
    """Return the sizes and the groups of a `BudgetSampler`; a group above the budget is halved until it fits."""
    sizes = example_sizes(dataset, layout)
    if group_by_prompt is None:
        return sizes, None
    groups = groups_of(dataset, group_by_prompt)
    units = group_sizes(dataset, groups, layout)
    while tokens_per_batch is not None:
        large = [u for u, size in enumerate(units.prod(1)) if size > tokens_per_batch and len(groups.rows[u]) > 1]
        if not large:
            break
        halves = [half for u in large for half in np.array_split(groups.rows[u], 2)]
        new = Groups([half.tolist() for half in halves], [groups.families[u] for u in large for _ in range(2)])
        kept = sorted(set(range(len(groups.rows))) - set(large))
        units = np.concatenate((units[kept], group_sizes(dataset, new, layout)))
        rows = [groups.rows[u] for u in kept] + new.rows
        groups = Groups(rows, [groups.families[u] for u in kept] + new.families)
    return sizes, groups._replace(sizes=units)


def _warn_of_large_examples(dataset: Dataset, rows: np.ndarray[Any, Any], tokens_per_batch: int) -> None:
    large = np.flatnonzero(rows > tokens_per_batch)
    if not len(large):
        return
    large = large[np.argsort(-rows[large], kind="stable")]
    index = dataset.select(large[:MAX_NAMED_ROWS])["pair_index"] if "pair_index" in dataset.column_names else large
    named = ", ".join(f"row {i}: {n}" for i, n in zip(index, rows[large[:MAX_NAMED_ROWS]], strict=False))
    logger.warning(
        "%d of %d examples take more rows than tokens_per_batch=%d, and become batches of their own (%s%s). "
        "Raise tokens_per_batch, or lower max_length.",
        *(len(large), len(rows), tokens_per_batch, named, ", ..." if len(large) > MAX_NAMED_ROWS else ""),
    )

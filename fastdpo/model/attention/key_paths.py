"""Turn the key paths of a packed batch into the form that attention backends need, and gather rows along them.

A segment's key path is the list of rows that its queries attend to (see `fastdpo.data.packing`). `key_paths` runs once
per forward, on the batch's device and without waiting for it. The grid is the padded form of the paths: segments of
similar length are the rows of one bucket, and the buckets follow one another.

Shapes: T rows, S segments, K key-path entries, N places of the grid, H heads, D head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_BUCKETS = 4
LEVELS = 32
"""Number of different lengths that the search for the buckets tells apart."""
ROUNDING = 32
"""On the CPU the segments of a bucket have paths of one length, and own rows of one length, rounded up to a multiple of
this."""
TOLERANCE = 1.1
"""The search adds no more buckets once the scores of the grid are at most this many times those of its paths."""


class Paths(NamedTuple):
    """The key paths of a packed batch as the backends want them; made by `key_paths`, once per forward.

    All fields are tensors, so that the lengths of a batch are no constants of code that is compiled.
    """

    kv_index: Tensor
    """`[K]`: the row of each entry. Each path ends with its segment's own rows."""
    cu_seqlens_q: Tensor
    """`[S + 1]` int32: bounds of the segments in T."""
    cu_seqlens_k: Tensor
    """`[S + 1]` int32: bounds of their paths in K."""
    order: Tensor
    """`[K]`: the entries sorted by row."""
    bounds: Tensor
    """`[T + 1]`: bounds of each row's entries in `order`."""
    sizes: Tensor
    """`[2 + 3 buckets]` int64, on the CPU: the longest segment and path, and the lengths of `shapes` and `queries`."""
    grid: Tensor
    """`[N]`: the row at each place of the grid, buckets one after the other; row 0 at the padding."""
    grid_order: Tensor
    """`[K]`: the place in the grid of each entry of `order`."""
    grid_back: Tensor
    """`[T]`: the place in the grid of each row on the path of its own segment."""
    query_grid: Tensor
    """The row of each query, buckets one after the other; row 0 at the padding."""
    query_back: Tensor
    """`[T]`: the place in `query_grid` of each row."""
    before: Tensor
    """`[S]`, in the order of the grid: the entries of a path before its segment's own rows."""

    @property
    def longest(self) -> tuple[int, int]:
        """The length of the longest segment, and of the longest path."""
        q, k = self.sizes[:2].tolist()
        return q, k

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(segments, longest path) of each bucket of the grid."""
        return tuple((s, length) for s, length, _ in self._buckets())

    @property
    def queries(self) -> tuple[int, ...]:
        """The queries of a segment of each bucket: on the CPU its own rows, else as many as the longest path has."""
        return tuple(count for _, _, count in self._buckets())

    def _buckets(self) -> list[list[int]]:
        buckets: list[list[int]] = self.sizes[2:].view(-1, 3).tolist()
        return buckets


@torch.compiler.disable  # type: ignore[untyped-decorator]
def key_paths(
    kv_index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    T: int,
    seqlens_k: Sequence[int] | None = None,
) -> Paths:
    """Describe a packed batch to the backends, on the batch's device and without waiting for it.

    Args:
        kv_index: `[K]`; this and the next two are as in `Paths`.
        cu_seqlens_q: `[S + 1]` int32.
        cu_seqlens_k: `[S + 1]` int32.
        max_seqlen_q: longest segment.
        max_seqlen_k: longest path.
        T: rows of the batch.
        seqlens_k: lengths of the S paths. Without them, the grid is one bucket, except on the CPU.
    """
    device, S = kv_index.device, len(cu_seqlens_q) - 1
    if seqlens_k is None and device.type == "cpu":
        seqlens_k = cu_seqlens_k.diff().tolist()

    if seqlens_k is None:
        shapes: tuple[tuple[int, int], ...] = ((S, max_seqlen_k),)
        start = torch.arange(S, device=device) * max_seqlen_k
    elif device.type == "cpu":
        shapes, places, queries, firsts = _own_buckets(seqlens_k, cu_seqlens_q.diff().tolist())
        start = torch.tensor(places)
    else:
        shapes, places = _buckets(seqlens_k)
        start = torch.tensor(places).to(device, non_blocking=True)
    entry = torch.arange(kv_index.shape[0], device=device)
    segment = torch.searchsorted(cu_seqlens_k[1:], entry.int(), right=True)
    place = (start - cu_seqlens_k[:-1])[segment] + entry
    grid = kv_index.new_zeros(sum(s * length for s, length in shapes)).index_copy(0, place, kv_index)

    rows = torch.arange(T + 1, device=device)
    by_row, order = torch.sort(kv_index, stable=True)
    segment = torch.searchsorted(cu_seqlens_q[1:], rows[:-1].int(), right=True)
    # each path ends with its segment's own rows
    back = (start + cu_seqlens_k.diff() - cu_seqlens_q[1:])[segment] + rows[:-1]
    bounds = torch.searchsorted(by_row, rows)
    found = (
        kv_index,
        cu_seqlens_q,
        cu_seqlens_k,
        order,
        bounds,
    )
    longest = (max_seqlen_q, max_seqlen_k)
    before = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    if device.type != "cpu":
        sizes = _sizes(longest, shapes, [length for _, length in shapes])
        return Paths(*found, sizes, grid, place[order], back, grid, back, before)
    first = torch.tensor(firsts)
    query_back = (first - cu_seqlens_q[:-1])[segment] + rows[:-1]
    places_of_queries = sum(s * q for (s, _), q in zip(shapes, queries, strict=True))
    query_grid = kv_index.new_zeros(places_of_queries).index_copy(0, query_back, rows[:-1])
    sizes = _sizes(longest, shapes, queries)
    return Paths(*found, sizes, grid, place[order], back, query_grid, query_back, before[first.argsort()])


def _sizes(longest: tuple[int, int], shapes: Sequence[tuple[int, int]], queries: Sequence[int]) -> Tensor:
    buckets = [x for shape, count in zip(shapes, queries, strict=True) for x in (*shape, count)]
    return torch.tensor([*longest, *buckets])


def _own_buckets(
    lengths: Sequence[int], own: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], list[int], tuple[int, ...], list[int]]:
    """Return buckets like `_buckets`, but choose the bucket of each segment by its own lengths alone.

    The queries of a segment are its own rows, for those before them on its path have queries in segments of their own.

    SDPA on the CPU sums a path in blocks that depend on its padded length. Where that depends only on the path's own
    length, the path's result is the same, bit for bit, whatever else is in the batch. This makes precomputed reference
    log-probs exact.

    Returns:
        What `_buckets` returns; then the queries of a segment of each bucket, and the place of each segment's first own
        row among all queries.
    """
    rounded = [(_round(n), _round(q)) for n, q in zip(lengths, own, strict=True)]
    shapes, queries = [], []
    places, firsts, place, first = [0] * len(rounded), [0] * len(rounded), 0, 0
    for bucket in sorted(set(rounded), reverse=True):
        length, count = bucket
        members = [i for i, each in enumerate(rounded) if each == bucket]
        for i in members:
            places[i], place = place, place + length
            # a segment that is a whole path has its queries where their keys are
            firsts[i] = first + (lengths[i] - own[i] if count == length else 0)
            first += count
        shapes.append((len(members), length))
        queries.append(count)
    return tuple(shapes), places, tuple(queries), firsts


def _round(length: int) -> int:
    return -(-length // ROUNDING) * ROUNDING


def _buckets(lengths: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Split segments into a few buckets of similar length, so that few of the grid's scores are padding.

    Returns:
        (number of segments, longest path) of each bucket, the longest first, and the first place of each segment in
        the grid.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = [lengths[i] for i in by_length]
    S, step = len(sizes), -(-sizes[0] // LEVELS)
    # a bucket may begin where the length falls below a multiple of the step
    cuts = [i for i in range(S) if i == 0 or -(-sizes[i] // step) < -(-sizes[i - 1] // step)]
    # per cut: the fewest scores from there on, and the buckets' ends
    best: list[tuple[int, tuple[int, ...]]] = [((S - i) * sizes[i] ** 2, (S,)) for i in cuts]
    enough = TOLERANCE * sum(size**2 for size in sizes)
    for _ in range(MOST_BUCKETS - 1):
        if best[0][0] <= enough:
            break
        after = list(zip(cuts[1:], best[1:], strict=True))
        best = [
            min(
                [best[a], *((scores + (b - cut) * sizes[cut] ** 2, (b, *ends)) for b, (scores, ends) in after[a:])],
                key=lambda option: (option[0], len(option[1])),
            )
            for a, cut in enumerate(cuts)
        ]
    shapes, places, first, place = [], [0] * S, 0, 0
    for end in best[0][1]:
        shapes.append((end - first, sizes[first]))
        for i in by_length[first:end]:
            places[i] = place
            place += sizes[first]
        first = end
    return tuple(shapes), places


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor, bounds: Tensor | None) -> Tensor:
        ctx.save_for_backward(order, bounds)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, bounds = ctx.saved_tensors
        (grad,) = grads
        if bounds is None:
            return grad.index_select(0, order), None, None, None
        rows = F.embedding_bag(order, grad.flatten(1), bounds, mode="sum", include_last_offset=True)
        return rows.unflatten(1, grad.shape[1:]), None, None, None


def gather(x: Tensor, index: Tensor, order: Tensor, bounds: Tensor | None) -> Tensor:
    """Return `x.index_select(0, index)`, with a backward that adds in a fixed order and without atomics.

    Args:
        x: `[T, H, D]`.
        index: `[K]` rows.
        order: the gradient of row t is the sum of the output's gradients at `order[bounds[t] : bounds[t + 1]]`. Entries
            of the output that are not in `order`, such as the grid's padding, must have no gradient.
        bounds: `[T + 1]`. None: `order` is `[T]`, one entry for each row.

    Returns:
        `[K, H, D]`.
    """
    out: Tensor = _Gather.apply(x, index, order, bounds)
    return out

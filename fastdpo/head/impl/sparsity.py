"""Choose the cells of the softmax that a backward computes, and bound the error of skipping the others.

A cell is one row by one tile of T neighbouring vocabulary entries. Its mass is the probability that the token lies in
the tile without being the target. A skipped cell acts as if its mass were spread evenly over the tile, so that the
gradient of the logits still sums to 0 over the vocabulary. The error comes from how the mass is really spread:

    |error of dhidden[n]| <= |dlogps[n]| * sum over the skipped cells j of mass[n, j] * radius[j]

where radius[j] is the largest distance between a row of weight in tile j and the mean of these rows: the error of a
cell is its mass times the difference of two points in the convex hull of the tile's embeddings. In a trained model p
grows along hidden, so the errors of many small cells point the same way and add up as in this bound; the errors of a
few large cells do not cancel either. A row therefore skips only cells of little mass, and only as many as have little
mass together. Both limits are in units of the root mean square of the rows' |dlogps| * (1 - p), which is the size of
their gradients. For all rows together it follows that

    |error of dhidden| <= MAX_ROW_MASS * max radius * |dlogps * (1 - p)|                 (Frobenius norms)

Shapes: N rows, V vocabulary, T columns of a tile, J = ceil(V / T) tiles.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head.impl.interface import LinearHead, is_captured, result_dtype
from fastdpo.head.impl.tiles import Rows, addmm, cell_means, side_by_side, slices

MAX_ROW_MASS, MAX_CELL_MASS = 0.005, 2.0**-12
"""Largest mass that a row may skip, in total and in one cell, in units of the root mean square of the rows' gradients.
docs/sparse_backward.md has the errors and densities."""
STEPS = 5
"""Thresholds are MAX_CELL_MASS / sqrt(2)^k for k < 2^STEPS, found by bisection."""
DENSE = 0.4
"""Density from which computing all cells with large matmuls is cheaper on a CPU."""


class Chip(NamedTuple):
    """Times of the kernels on a chip, each relative to the vendor's matmul of the same cells."""

    forward: float
    dlogits: float
    blocks: float  # dhidden of dense blocks
    memory: float  # dhidden of other cells, by the bytes from memory
    cache: float  # the same, by the bytes from L2
    weight: float  # the bytes of weight from L2, relative to all cells: they do not depend on how many are active
    step: float  # a step of each program in each tile, which takes no less, relative to all cells
    dweight: float


CHIPS = {
    (8, 0): Chip(1.0, dlogits=1.04, blocks=1.06, memory=4.33, cache=1.8, weight=0.014, step=0.045, dweight=1.06),
    (9, 0): Chip(1.08, dlogits=1.28, blocks=1.24, memory=5.63, cache=4.33, weight=0.045, step=0.111, dweight=1.33),
    (10, 0): Chip(2.89, dlogits=3.14, blocks=3.46, memory=7.77, cache=8.66, weight=0.09, step=0.248, dweight=2.65),
}
"""Computed, not measured, by `python -m benchmarks.studies.head_time_model --chips` from the kernels that the
compiler makes for each chip, and from the chips' published rates, with 1 / 0.88 of the peak for the vendor's matmul.
A multiprocessor of sm_80, sm_90 and sm_100 does 2048, 4096 and 8192 operations on bfloat16 in a cycle, and gets about
47, 39 and 39 bytes from L2 and 13, 20 and 29 from memory: on sm_100 these kernels, with tiles of 128 x 128, wait for
L2, and a frozen head takes the vendor's matmuls whatever the density. `chip` of that module has the formula of each
number."""
GLUE = 0.05
"""Time of choosing cells, of their lists and of what the others add, relative to one matmul of all cells: at N=8192,
D=4096, V=128256 half a millisecond, for 50 operations of 3 microseconds (tests/head/test_device_operations.py counts
them), one pass over weight and one over the shares, and a product with a row of weight for each tile."""


def chip_of(device: torch.device) -> Chip:
    """Return the times for a GPU; those of the nearest older chip if it has no entry, or of the oldest."""
    capability = torch.cuda.get_device_capability(device)
    return CHIPS[max((c for c in CHIPS if c <= capability), default=min(CHIPS))]


def dense_block(chip: Chip) -> float:
    """Return the share of active rows from which a block is dense in a tile: its matmul takes as long as lists then."""
    return chip.blocks / max(chip.memory, chip.cache)


def relative_time(chip: Chip, density: float, blocks: float, others: float, trained: bool, exact_weight: bool) -> float:
    """Return the time of a sparse backward divided by that of the dense one it replaces.

    Args:
        chip: times of the kernels.
        density: share of the cells that are active.
        blocks: share of the cells in dense blocks.
        others: share of the cells that are active and in no dense block.
        trained: whether the head is; the dense backward of a frozen one is a matmul in the forward.
        exact_weight: whether the weight's gradient is dense anyway, so that only dhidden's matmul differs.
    """
    lists = max(chip.memory * others, chip.cache * others + chip.weight, chip.step)
    dhidden = chip.blocks * blocks + lists + GLUE
    if trained and exact_weight:
        return dhidden
    if not trained:
        return dhidden + chip.dlogits * density + chip.forward - 1  # the dense one's forward is the vendor's
    return (dhidden + (chip.dlogits + chip.dweight) * density) / 2  # the dense one may have kept its probabilities


class Selection(NamedTuple):
    """The cells to compute: those with a share above their row's threshold, and the target's. All `[N]`."""

    threshold: Tensor
    bound: Tensor  # mass that is skipped
    active: Tensor  # share of the row's cells above the threshold
    found: Tensor | None = None
    """`[3]` float32, on a GPU: the backward's lists add the shares of cells in dense blocks, and of other active ones,
    to the last two; `remember` stores the mean of `active` in the first."""


def select(
    shares: Tensor,
    weight: Tensor,
    row: float = MAX_ROW_MASS,
    cell: float = MAX_CELL_MASS,
) -> Selection:
    """Choose for each row the largest threshold that skips at most `row` of mass in total and `cell` in one cell.

    On a GPU, kernels do it.

    Args:
        shares: `[N, J]`: a cell's mass is its share times `weight`.
        weight: `[N]`: mass of all tokens but the target, times the size of the upstream gradient.
        row: largest mass that a row skips, in units of the root mean square of `weight`.
        cell: largest mass of a skipped cell, in the same units.
    """
    if shares.is_cuda and not torch.compiler.is_compiling():
        from fastdpo.kernels.select_cells import select_cells  # imported late: Triton may be missing

        found = torch.zeros(3, dtype=torch.float32, device=shares.device)
        return Selection(*select_cells(shares, weight, row, cell), found)
    weight = weight.abs().float()
    finite = weight.nan_to_num(0.0, 0.0).double()
    scale = (finite.square().sum() / finite.count_nonzero().clamp(min=1)).sqrt().float()
    blocks = zip(shares.split(1024), weight.split(1024), strict=True)
    rows = [_select(*block, row * scale, cell * scale) for block in blocks]
    return Selection(*(torch.cat(values) for values in zip(*rows, strict=True)))


def _select(shares: Tensor, weight: Tensor, row: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mass = shares.float() * weight.unsqueeze(1)

    def limit(k: Tensor) -> Tensor:
        return cell * (torch.exp2(-k.div(2, rounding_mode="floor")) * torch.where(k % 2 == 1, math.sqrt(0.5), 1.0))

    def skipped(k: Tensor) -> Tensor:
        return torch.where(mass <= limit(k).unsqueeze(1), mass, 0.0).sum(1)

    k = torch.full_like(weight, 2**STEPS - 1)  # the lowest threshold, which skips next to nothing
    for step in reversed(range(STEPS)):
        k = torch.where(skipped(k - 2**step) <= row, k - 2**step, k)
    threshold = limit(k) / weight
    active = (shares > threshold.unsqueeze(1)).float().mean(1)
    return threshold, skipped(k), active


def active_cells(shares: Tensor, threshold: Tensor, target_tiles: Tensor, upstream: Tensor) -> Tensor:
    """Return the mask `[N, J]` of the cells to compute in a chunk of tiles.

    Args:
        shares: `[N, J]`, those of the chunk.
        threshold: `[N]`.
        target_tiles: `[N]` int64: tile of the target, counted from the chunk's first tile; may lie outside [0, J).
        upstream: `[N]` bool: rows with a gradient to propagate.
    """
    tiles = torch.arange(shares.shape[1], device=shares.device)
    active = (shares > threshold.unsqueeze(1)) | (tiles == target_tiles.unsqueeze(1))
    return active & upstream.unsqueeze(1)


def spread_skipped(
    dhidden: Tensor | None,
    hidden: Tensor,
    hidden2: Tensor | None,
    head: LinearHead,
    all_rows: Rows,
    shares: Tensor | None,
    selection: Selection,
    trained: slice,
    T: int,
    operand: torch.dtype,
) -> Tensor:
    """Add the gradients of the skipped cells, each of which acts as its share spread evenly over its columns.

    The function adds to `dhidden` in place. It returns `[J, trained + 1]`, which every row of (weight, weight2) in a
    tile gets: columns `trained` of its gradient, then the gradient of its bias. Matmuls take the dtype `operand`.
    """
    assert shares is not None
    V = head.weight.shape[0]
    dtype = result_dtype(hidden)
    spread = hidden.new_zeros(shares.shape[1], trained.stop - trained.start + 1, dtype=dtype)
    for vs in slices(V, 256 * T):
        means = cell_means(head.weight[vs], T, dtype)
        if head.weight2 is not None:
            means = torch.cat([means, cell_means(head.weight2[vs], T, dtype)], 1)
        means = means.to(operand)
        cells = slice(vs.start // T, -(-vs.stop // T))
        for rs in slices(hidden.shape[0], 1024):
            some, threshold = all_rows.at(rs), selection.threshold[rs]
            active = active_cells(shares[rs, cells], threshold, some.targets // T - cells.start, some.has_upstream)
            skipped = (shares[rs, cells] * some.dothers[:, None]).masked_fill(active, 0)
            if dhidden is not None:
                addmm(dhidden[rs], skipped.to(operand), means)
            if trained.stop > trained.start:
                h = side_by_side(hidden, hidden2, rs, operand)
                addmm(spread[cells, :-1], skipped.to(operand).t(), h[:, trained])
            spread[cells, -1] += skipped.sum(0)
    sizes = torch.full_like(spread[:, :1], T)
    sizes[-1] = V - (shares.shape[1] - 1) * T
    return spread.div_(sizes)


Key = tuple[torch.device, torch.dtype, tuple[int, ...]]
RETRY = 64
"""Calls after which a head that was too dense is tried again."""


class Noted(NamedTuple):
    """What is known of a backward."""

    found: Tensor  # `[3]`: of all cells, the share of active ones, of those in dense blocks, and of other active ones
    ready: Any  # event after which it can be read; None if it can


_densities: dict[Key, list[Noted]] = {}
_calls: dict[Key, int] = {}


def too_dense(selection: Selection) -> bool:
    """Whether computing all cells is cheaper. False on a GPU, because the answer would wait for it."""
    return selection.active.device.type == "cpu" and bool(selection.active.mean() > DENSE)


def remember(key: Key, selection: Selection) -> None:
    """Note the density of a head, for `expect_dense`; not while a CUDA graph is captured, which would repeat it."""
    if is_captured(selection.active):
        return
    if selection.found is None:
        density = selection.active.mean()
        _densities[key] = [Noted(torch.stack([density, torch.zeros_like(density), density]), None)] * 2
        return
    from fastdpo.kernels.select_cells import mean_density  # imported late: Triton may be missing

    mean_density(selection.active, selection.found)
    host = torch.empty(3, pin_memory=True)
    host.copy_(selection.found, non_blocking=True)
    with torch.cuda.device_of(selection.found):  # an event is recorded on a stream of the current device
        ready = torch.cuda.Event()
        ready.record()
    _note(key, Noted(host, ready))


def _note(key: Key, noted: Noted) -> None:
    """Keep only the last two densities, because compiled code notes them without ever reading them."""
    _densities[key] = [*_densities.get(key, [])[-1:], noted]


def expect_dense(key: Key, trained: bool = False, exact_weight: bool = True) -> bool:
    """Whether this head is expected to be too dense; every RETRY calls the answer is False, to try it again.

    The last but one backward decides. A device has long finished it, so its density is there without waiting, and is
    the same in every run. On a GPU, `relative_time` decides by the model of its chip.
    """
    history = _densities.get(key, [])
    if len(history) < 2:
        return False
    found, ready = history[-2]
    if ready is not None:
        ready.synchronize()
        density, blocks, others = found.tolist()
        others = others if blocks + others > 0 else density  # an implementation without blocks counts neither
        sparse = relative_time(chip_of(key[0]), density, blocks, others, trained, exact_weight) <= 1
    else:
        sparse = float(found[0]) <= DENSE
    if sparse:
        return False
    _calls[key] = _calls.get(key, 0) + 1
    return _calls[key] % RETRY != 0

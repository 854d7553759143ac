"""The active cells of `fastdpo.head.impl.triton`: their lists, the gradient of the others, and a sparse backward.

Everything that depends on which cells are active happens in a handful of kernels for the whole vocabulary: the lists,
one launch for as many tiles as a quarter of the workspace holds lists of, and the gradient of the skipped cells, the
product of two small matrices. What is left are three kernels for each chunk of the vocabulary, or four with dweight.
Where the rows are one block, dweight is finished in the kernel that computes it, and no float32 sum of it exists.

Names and shapes are those of `fastdpo.head.impl.interface`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.head.impl.interface import Forward, Grads, LinearHead, Needs, result_dtype
from fastdpo.head.impl.sparsity import CHIPS, Selection, chip_of, dense_block
from fastdpo.head.impl.tiles import addmm, slices
from fastdpo.kernels import row_lists as row_lists_module
from fastdpo.kernels.row_lists import TILE, Lists, cell_means, row_lists, skipped_mass
from fastdpo.kernels.sparse_dhidden import sparse_dhidden
from fastdpo.kernels.sparse_dlogits import sparse_dlogits
from fastdpo.kernels.sparse_dweight import Sum, sparse_dweight

CHUNK = 4096
"""Columns of a chunk that keep the matmuls efficient."""
LIST_BYTES = 5
"""Bytes of a cell in the lists."""
ALIGNED = 4
"""Tiles that a chunk is a multiple of, so that all chunks of an int32 tensor begin at a multiple of 16 bytes."""


class Cells:
    """The active cells of a backward."""

    def __init__(self, targets: Tensor, grads: Grads, result: Forward, selection: Selection, workspace: int) -> None:
        assert result.kept.shares is not None
        self.shares = result.kept.shares
        self.rows = selection.threshold, targets, grads.target, grads.others
        self.selection = selection
        N, self.tiles = self.shares.shape
        self.list_bytes = min(workspace // 4, LIST_BYTES * N * self.tiles)
        tiles = self.list_bytes // (LIST_BYTES * max(N, 1))
        self._at_once = self.tiles if tiles == self.tiles else tiles // ALIGNED * ALIGNED
        self._made: dict[int, tuple[int, Lists]] = {}

    def lists(self, rs: slice, vs: slice) -> Lists:
        """Return the lists of a block of rows and a chunk of the vocabulary; chunks come in order."""
        first, last = vs.start // TILE, -(-vs.stop // TILE)
        start, lists = self._made.get(rs.start, (0, None))
        if lists is None or last > start + len(lists.counts):
            start, stop = first, min(first + max(self._at_once, last - first), self.tiles)
            if lists is None:
                order = self.selection.active[rs].argsort(descending=True, stable=True).int()
            else:
                order = lists.order
            found = self.selection.found
            lists = row_lists(
                self.shares[rs, start:stop], *self._rows_of(rs), start, order=order, least=least_of(self.shares.device),
                found=None if found is None else (found, self.shares.numel()),
            )  # fmt: skip
            self._made[rs.start] = start, lists
        return lists.of(first - start, last - start)

    def skipped(self, rs: slice, slope: float, dtype: torch.dtype) -> Tensor:
        """Return the gradient that the skipped cells leave out, `[rows, J]`, 0 where a cell is active."""
        return skipped_mass(self.shares[rs], *self._rows_of(rs), slope, dtype)

    def _rows_of(self, rs: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        threshold, targets, dtarget, dothers = self.rows
        return threshold[rs], targets[rs], dtarget[rs], dothers[rs]


def least_of(device: torch.device) -> int:
    """Return how many rows of a block must be active in a tile for a matmul of all to take less time than lists."""
    chip = chip_of(device) if device.type == "cuda" else next(iter(CHIPS.values()))
    return max(1, round(dense_block(chip) * row_lists_module.BLOCK_N))


class Skipped(NamedTuple):
    """The gradients of the skipped cells, each of which acts as its mass spread evenly over its columns."""

    dhidden: list[Tensor | None]
    """`[N, K]` in the accumulators' dtype, for each pair of hidden and weight."""
    spread: list[Tensor]
    """`[J, K]` in that dtype, for each pair: what all columns of a tile get together; empty if not asked for."""
    bias: Tensor | None
    """`[J]`: the same for the bias."""


def pairs_of(hidden: Tensor, hidden2: Tensor | None, head: LinearHead) -> list[tuple[Tensor, Tensor]]:
    """Return the one or two products, hidden and weight, that make the logits."""
    pairs = [(hidden, head.weight)]
    return pairs if hidden2 is None or head.weight2 is None else [*pairs, (hidden2, head.weight2)]


def skipped_gradients(
    cells: Cells,
    pairs: list[tuple[Tensor, Tensor]],
    needs: list[bool],
    slope: float,
    workspace: int,
    *,
    spread: bool = False,
    bias: bool = False,
) -> Skipped:
    """Compute the gradients of the skipped cells.

    `needs` says of which pairs' hidden, `spread` whether of the weights or the bias, `bias` whether of the bias.
    """
    hidden = pairs[0][0]
    acc = result_dtype(hidden)
    (N, J), operand = cells.shares.shape, hidden.dtype
    dhidden = [hidden.new_empty(h.shape, dtype=acc) if n else None for (h, _), n in zip(pairs, needs, strict=True)]
    sums = [hidden.new_empty(J, h.shape[1], dtype=acc) for h, _ in pairs] if spread else []
    bias_sum = hidden.new_zeros(J, dtype=acc) if bias else None
    means = [cell_means(weight) if needed else None for (_, weight), needed in zip(pairs, needs, strict=True)]
    rows = max(256, workspace // 4 // (operand.itemsize * J) // 256 * 256)
    for rs in slices(N, rows):
        skipped = cells.skipped(rs, slope, operand)
        for out, mean in zip(dhidden, means, strict=True):
            if out is not None and mean is not None:
                addmm(out[rs], skipped, mean, beta=0.0)
        for total, (h, _) in zip(sums, pairs if spread else [], strict=True):
            addmm(total, skipped.t(), h[rs], beta=float(rs.start > 0))
        if bias_sum is not None:
            bias_sum += skipped.sum(0, dtype=acc)
    return Skipped(dhidden, sums, bias_sum)


def sparse_backward(
    grads: Grads,
    hidden: Tensor,
    hidden2: Tensor | None,
    targets: Tensor,
    head: LinearHead,
    others: Tensor,
    result: Forward,
    needs: Needs,
    selection: Selection,
    boost: Tensor | None,
    workspace: int,
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Compute all gradients from the active cells, and those of the skipped cells.

    The arguments are those of `fastdpo.head.impl.triton.backward`, with gradients that `boost` has multiplied.

    Returns:
        dhidden of each pair, in the accumulators' dtype and not yet divided by `boost`; dweight of each pair and dbias,
        both finished. None where not needed.
    """
    N, V = hidden.shape[0], head.weight.shape[0]
    cells = Cells(targets, grads, result, selection, workspace)
    pairs = pairs_of(hidden, hidden2, head)
    trained = [needs.weight, needs.weight2][: len(pairs)]
    any_weight = any(trained) or needs.bias
    of_hidden = [needs.hidden, needs.hidden2][: len(pairs)]
    skipped = skipped_gradients(
        cells, pairs, of_hidden, head.transform.slope, workspace, spread=any_weight, bias=needs.bias
    )
    acc = result_dtype(hidden)
    width = sum(h.shape[1] for h, _ in pairs)
    rows, columns = _block_shape(
        N, V, width * acc.itemsize if any_weight else 0, hidden.element_size(), workspace - cells.list_bytes
    )
    buffer = hidden.new_empty(rows, columns)
    chunks = list(slices(V, columns))
    starts = torch.arange(0, V, columns, device=targets.device)[:, None]
    local_targets = targets.new_empty(len(chunks), N + N % 2)[:, :N]  # rows begin at a multiple of 16 bytes
    torch.sub(targets, starts, out=local_targets)
    dweight = [torch.empty_like(weight) if t else None for (_, weight), t in zip(pairs, trained, strict=True)]
    dbias = head.weight.new_empty(V, dtype=acc) if needs.bias else None  # 16 bits would be stored one by one
    sums = [hidden.new_empty(columns, h.shape[1], dtype=acc) if any_weight and rows < N else None for h, _ in pairs]
    scratch = None if trained[0] or not needs.bias else head.weight.new_empty(columns, hidden.shape[1])

    for vs, of_chunk in zip(chunks, local_targets, strict=True):
        for rs in slices(N, rows):
            lists = cells.lists(rs, vs)
            dlogits = buffer[: rs.stop - rs.start, : vs.stop - vs.start]
            low_rank = None if len(pairs) == 1 else (pairs[1][0][rs], pairs[1][1][vs])
            sparse_dlogits(
                dlogits, lists.rows, lists.counts, hidden[rs], head.weight[vs], of_chunk[rs],
                None if head.bias is None else head.bias[vs], others[rs], grads.target[rs], grads.others[rs],
                *head.transform, low_rank=low_rank,
            )  # fmt: skip
            for (_, weight), out in zip(pairs, skipped.dhidden, strict=True):
                if out is not None:
                    sparse_dhidden(out[rs], dlogits, lists, weight[vs])
            for i, (h, _) in enumerate(pairs):
                bias = needs.bias and i == 0
                if not trained[i] and not bias:
                    continue
                final = dweight[i]
                weights = _sum(
                    None if final is None else final[vs], sums[i], skipped.spread[i], scratch, rs, vs, rs.stop == N
                )
                biases = None
                if bias and dbias is not None and skipped.bias is not None:
                    biases = _sum(dbias[vs], dbias[vs], skipped.bias, None, rs, vs, rs.stop == N)
                sparse_dweight(
                    weights, dlogits, lists.rows, lists.counts, h[rs], dbias=biases,
                    boost=boost if rs.stop == N else None,
                )  # fmt: skip
    return skipped.dhidden, dweight, None if dbias is None else dbias.to(head.weight.dtype)


def _sum(
    final: Tensor | None, total: Tensor | None, spread: Tensor, scratch: Tensor | None, rs: slice, vs: slice, last: bool
) -> Sum:
    """Say where the gradient of a block of rows goes, and what it is added to."""
    size = vs.stop - vs.start
    before = None if rs.start == 0 or total is None else total[:size]
    out = final if last else total
    if out is None:
        out = scratch
    assert out is not None
    return Sum(out[:size], before, spread[vs.start // TILE : -(-vs.stop // TILE)] if last else None)


def _block_shape(N: int, V: int, sum_bytes: int, itemsize: int, workspace: int) -> tuple[int, int]:
    """Choose the rows and columns of a block of dlogits: all rows, if a chunk then has CHUNK columns or more.

    Otherwise half of the workspace is for the block. The other half is for sums of dweight, `sum_bytes` a row.
    """
    padded = -(-V // TILE) * TILE
    columns = whole_tiles(workspace // (itemsize * max(N, 1)))
    if columns >= min(CHUNK, padded):
        return N, min(columns, padded)
    half = workspace // 2
    columns = whole_tiles(min(CHUNK, padded, half // sum_bytes if sum_bytes else V))
    rows = half // (itemsize * columns)
    return min(max(rows // 256 * 256 if rows >= 256 else rows, 1), max(N, 1)), columns


def whole_tiles(columns: int) -> int:
    """Round down to whole tiles, to a multiple of ALIGNED where there are so many; return at least one tile."""
    tiles = columns // TILE
    return TILE * max(tiles // ALIGNED * ALIGNED if tiles >= ALIGNED else tiles, 1)

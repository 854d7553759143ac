"""The head as vendor matmuls into a bounded workspace, with Triton kernels for the steps between them.

The algorithm, its matmuls and what it keeps are those of `fastdpo.head.impl.torch`. Only the two steps that walk over a
tile of logits differ: each is a dozen operations there and one kernel here. The matmuls run at the vendor's speed,
logits stay float32 where the device multiplies into float32, and a kernel costs one read and one write of a tile.

Names and shapes are those of `fastdpo.head.impl.interface`.
"""

from typing import Any

import torch
from torch import Tensor

from fastdpo.head.impl import torch as tiled
from fastdpo.head.impl.interface import Forward, Transform
from fastdpo.head.impl.tiles import Folded, Rows, Running
from fastdpo.kernels.dlogits_rows import dlogits_rows
from fastdpo.kernels.fold_logits import fold_logits

kept_like = tiled.kept_like


def cell_columns(device: torch.device) -> None:
    """Return None: a vendor matmul computes all cells."""


def forward(hidden: Tensor, *args: Any) -> Forward:
    """Compute as `fastdpo.head.impl.torch.forward`."""
    operand = tiled.operand_dtype(hidden)

    def fold(state: Running, z: Tensor, targets: Tensor, transform: Transform, T: int, spare: Tensor) -> Folded:
        e = z.new_empty(z.shape, dtype=operand)
        masses, decay = fold_logits(e, z, targets, state, transform.cap, T)
        return Folded(e, e, masses, decay)

    return tiled.forward(hidden, *args, fold=fold)


def backward(grads: Any, hidden: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Compute as `fastdpo.head.impl.torch.backward`."""
    operand = tiled.operand_dtype(hidden)

    def make_dlogits(z: Tensor, rows: Rows, vs: slice, transform: Transform) -> Tensor:
        dlogits = z.new_empty(z.shape, dtype=operand)
        dlogits_rows(dlogits, z, rows.targets - vs.start, *rows[1:], transform.cap)
        return dlogits

    return tiled.backward(grads, hidden, *args, make_dlogits=make_dlogits)

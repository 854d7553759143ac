"""Types of the head's implementations: each module has `forward` and `backward`, which take and return them.

A forward returns the target's logit and the log-sum-exp of the other tokens' logits, two numbers for a row:

    target[n] = x[n, targets[n]]          others[n] = log sum_{v != targets[n]} exp(x[n, v])

where x are the transformed logits. Then logps = log sigmoid(target - others), which is never above 0 and loses no digit
where p approaches 1. If the vocabulary is cut into shards, one of them has the `target`, and their `others` are merged.

Let q[n, v] = exp(x[n, v] - others[n]), the distribution given that the token is not the target. Then the gradients are

    dx[n, v] = dothers[n] * q[n, v]  for v != targets[n],     dx[n, targets[n]] = dtarget[n]

Shapes: N rows, D hidden size, V vocabulary, R rank of the low-rank part, T columns of a tile, J = ceil(V / T) tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 256 * 2**20
"""Upper bound of what a call allocates besides its results and float32 `[N, D]`, and of what it keeps for the
backward, in bytes. `impl.triton` uses a larger one only for what it keeps."""


class Transform(NamedTuple):
    """The step from raw logits z to logits x: x = scale * z, or cap * tanh(scale * z) with a soft-cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0) -> "Transform":
        """Fold, in this order, the steps z * logit_scale, softcap * tanh(z / softcap), z / temperature."""
        if softcap is None:
            return cls(logit_scale / temperature)
        return cls(logit_scale / softcap, softcap / temperature)

    @property
    def slope(self) -> float:
        """dx / dz at z = 0. With a soft-cap it is the largest dx / dz; without one dx / dz is constant."""
        return self.scale if self.cap is None else self.scale * self.cap


class LinearHead(NamedTuple):
    """The head z = hidden @ weight.T + bias + hidden2 @ weight2.T, and its transform."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    weight2: Tensor | None = None  # [V, R]
    transform: Transform = Transform()


class Keep(NamedTuple):
    """Which fields of `Kept` a forward leaves for its backward."""

    expected: bool = False
    shares: bool = False
    probs: bool = False


NOTHING = Keep()


class Kept(NamedTuple):
    """The tensors that a forward left for its backward; None if not asked for."""

    expected: Tensor | None = None
    """`[N, D + R]`: sum_v q * slope * (weight, weight2). With a frozen head it replaces the backward's matmul."""
    shares: Tensor | None = None
    """`[N, J]`: sum over a tile of q * slope; slope is 1, or 1 - tanh^2 with a soft-cap."""
    probs: Tensor | None = None
    """`[N, columns]`: q of the last columns, each divided by its factor. `impl.triton` encodes those of 16-bit inputs
    in int16, and may keep columns past V, of no meaning."""
    factors: Tensor | None = None
    """`[N, ceil(columns / block)]`: q = factor * probs, with one factor for a row and a block of columns."""


class OtherStats(NamedTuple):
    """Statistics of q, all `[N]`, which `fastdpo.head.linear_logprobs` combines with the target's."""

    entropy: Tensor
    """-sum_v q log q"""
    log_sum_sq: Tensor
    """log sum_v q^2"""
    sum_logits: Tensor
    """Sum of all x, the target's included."""
    top_before: Tensor
    """x of some token before the target, or -inf. The target is the first maximum if its x is above this one and not
    below `top`."""
    top: Tensor
    """Largest x of the other tokens; -inf if there is none."""


class Forward(NamedTuple):
    """What a forward computes, in float32 (float64 for float64 inputs)."""

    target: Tensor
    """`[N]`: -inf for a target outside [0, V)."""
    others: Tensor
    """`[N]`: -inf if there is no other token."""
    stats: OtherStats | None
    kept: Kept


def without_others(others: Tensor) -> Tensor:
    """Replace -inf, of rows without other tokens of any probability, by inf, so that exp(x - others) is 0, not NaN."""
    return others.masked_fill(others == -torch.inf, torch.inf)


class Grads(NamedTuple):
    """Upstream gradients of a backward, `[N]` in the dtype of `Forward`."""

    target: Tensor
    others: Tensor
    entropy: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    hidden2: bool = False
    weight2: bool = False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast multiplies `x`, or None where it leaves `x` alone: if off, or for float64."""
    device = x.device.type
    compiling = torch.compiler.is_compiling()  # then the device has autocast, and torch 2.11 can't trace the question
    if x.dtype == torch.float64 or not (compiling or torch.amp.is_autocast_available(device)):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def result_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of results and of sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def is_captured(x: Tensor) -> bool:
    """Whether work on `x` is being captured in a CUDA graph, where nothing may be timed, asked or waited for."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()

"""The head in obvious PyTorch, with `[N, V]` logits: every implementation is checked against it.

    logits = transform(hidden @ weight.T + bias)
    logps = log_softmax(logits)[targets]

`transform` applies, in this order: z * logit_scale, softcap * tanh(z / softcap), z / temperature.

Shapes: N rows, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stats(NamedTuple):
    """Statistics of the next-token distribution p of each row, all `[N]`."""

    entropy: Tensor
    """-sum_v p_v log p_v, in nats."""
    log_sum_sq_probs: Tensor
    """log sum_v p_v^2 (the log of WPO's weight, https://arxiv.org/abs/2406.11827)."""
    mean_logits: Tensor
    """Mean over the vocabulary of the transformed logits."""
    is_top1: Tensor
    """bool: whether the target is the argmax of the logits, the first one among equals."""
    density: Tensor | None = None
    """Share of a row's cells that a sparse backward computes if the upstream gradients of all rows have one size; a
    cell is the row by one tile of the vocabulary. None if the backward is dense."""
    bound: Tensor | None = None
    """Probability in the cells that such a backward skips and spreads evenly over their tokens, see
    `fastdpo.head.impl.sparsity`. None if the backward is dense."""


def transform_logits(logits: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor:
    """Scale, soft-cap (if not None) and divide by the temperature, in this order."""
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits / temperature


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute log p(targets) of every row, differentiable by autograd.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`, the dtype of `hidden`.
        targets: `[N]` int64 in [0, V).
        bias: `[V]`, the dtype of `hidden`.
        logit_scale: factor of the raw logits.
        softcap: bound of the soft-capped logits, or None.
        temperature: divisor of the logits.
        stats: whether to compute `Stats` too.

    Returns:
        `logps [N]`, the log-sum-exp of the transformed logits `lse [N]`, and `Stats` or None. Floating-point results
        have the dtype of `hidden`.

    Raises:
        RuntimeError: a target is outside [0, V).
    """
    logits = transform_logits(F.linear(hidden, weight, bias), logit_scale, softcap, temperature)
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    lse = logits.logsumexp(-1)
    if not stats:
        return logps, lse, None
    return (
        logps,
        lse,
        Stats(
            entropy=-(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1),  # not 0 * -inf
            log_sum_sq_probs=(2 * log_probs).logsumexp(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == targets,
        ),
    )

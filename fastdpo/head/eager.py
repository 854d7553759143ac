"""The obvious PyTorch everything is checked against: `[N, V]` logits, any dtype, any device.

    logits = transform(hidden @ weight.T + bias)
    logps = log_softmax(logits)[targets]

`transform` is, in this order: z * logit_scale, softcap * tanh(z / softcap), z / temperature.

Shapes: N rows, D hidden size, V vocabulary.
"""

from typing import NamedTuple

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
    """bool: the target is the first maximum of the logits, as argmax."""
    density: Tensor | None = None
    """Share of (row, vocabulary tile) cells that a sparse backward computes, where the upstream gradients of all rows
    are of one size. None where the backward is dense."""
    bound: Tensor | None = None
    """Probability that it spreads evenly over the tokens of its tile, likewise; see `fastdpo.head.impl.sparsity`."""


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
        stats: compute `Stats` too.

    Returns:
        `logps [N]`, the log-sum-exp of the transformed logits `lse [N]`, and `Stats` or None; floating results in the
        dtype of `hidden`.

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
            entropy=-(log_probs.exp() * log_probs).sum(-1),
            log_sum_sq_probs=(2 * log_probs).logsumexp(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == targets,
        ),
    )

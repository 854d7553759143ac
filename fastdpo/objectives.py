"""Preference objectives: plain PyTorch on a few numbers per pair.

One objective is one function of `Pairs` that returns the losses [B]; `OBJECTIVES` maps its name to it. To add one,
add a function and a line in the table.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What an objective sees of B preference pairs: float32 [B] each, in nats, summed over completion tokens."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(y_w | x) - log pi_ref(y_w | x), [B]."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(y_l | x) - log pi_ref(y_l | x), [B]."""
        return self.rejected_logps - self.ref_rejected_logps


class DPOOutput(NamedTuple):
    """Per-pair results of `dpo_loss`, [B] each. Rewards are beta times the log-ratio, in nats, and detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


Objective = Callable[[Pairs, float, float], Tensor]  # (pairs, beta, label_smoothing) -> losses [B]


def sigmoid(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """DPO; with label_smoothing e > 0, conservative DPO.

    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z),   z = beta (log-ratio of chosen - log-ratio of rejected)

    e = 0: Eq. 7 of Rafailov et al., https://arxiv.org/abs/2305.18290; else Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    margins = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    return losses


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": sigmoid,
}


def check_objective(loss_type: str, beta: float, label_smoothing: float) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless these settings make sense."""
    if loss_type not in OBJECTIVES:
        near = difflib.get_close_matches(str(loss_type), OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {sorted(OBJECTIVES)}"
        raise ValueError(f"loss_type {loss_type!r} is unknown: {hint}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive number, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> DPOOutput:
    """Compute the loss of each preference pair from log-probabilities summed over completion tokens.

    Args:
        chosen_logps: log pi(y_w | x) under the policy, [B], nats, any float dtype (computed in it).
        rejected_logps: log pi(y_l | x) under the policy, [B].
        ref_chosen_logps: log pi_ref(y_w | x) under the frozen reference, [B].
        ref_rejected_logps: log pi_ref(y_l | x) under the frozen reference, [B].
        loss_type: name in `fastdpo.objectives.OBJECTIVES`; formulas and papers stand there.
        beta: strength of the pull towards the reference, > 0; 0.1 to 0.5 is usual.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5).

    Returns:
        `DPOOutput`: losses, chosen_rewards, rejected_rewards, [B] each.

    Raises:
        ValueError: unknown `loss_type`, `beta` or `label_smoothing` out of range, or shapes that differ.
    """
    check_objective(loss_type, beta, label_smoothing)
    pairs = Pairs(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    for name, logps in zip(Pairs._fields, pairs, strict=True):
        if logps.dim() != 1 or logps.shape != chosen_logps.shape:
            shapes = f"got {list(logps.shape)}, chosen_logps {list(chosen_logps.shape)}"
            raise ValueError(f"{name} must be [B], the shape of chosen_logps: {shapes}")
    losses = OBJECTIVES[loss_type](pairs, beta, label_smoothing)
    return DPOOutput(losses, beta * pairs.chosen_logratios.detach(), beta * pairs.rejected_logratios.detach())

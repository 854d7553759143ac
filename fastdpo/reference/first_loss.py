"""The first loss of a run says whether the reference is what it seems: a policy compared with itself loses ln 2."""

import math
from collections.abc import Sequence

import torch

LN_2_AT_FIRST = ("sigmoid", "robust", "sigmoid_norm")
"""Objectives whose loss at equal policy and reference is ln 2, whatever beta and label_smoothing."""

# (float32, 16 bits). Precomputed values come from other batches, where 16 bits round otherwise, token by token.
_ONLINE = (1e-6, 1e-3)
_PRECOMPUTED = (1e-4, 3e-2)


def first_loss_is_known(
    loss_type: Sequence[str],
    *,
    ref_is_policy: bool,
    loss_weights: Sequence[float] | None = None,
    columns: Sequence[str] = (),
    use_weighting: bool = False,
) -> bool:
    """Whether the first loss, before any update, must be ln 2.

    Args:
        loss_type: the objectives of the run; the loss is known for a single one of `LN_2_AT_FIRST`.
        ref_is_policy: the reference is the policy as passed: a copy made by `resolve_reference`, a new adapter
            switched off, or a copy of the adapter. Not a model that was given, nor an adapter that was.
        loss_weights: factors of the objectives; 1 each if None.
        columns: of the dataset; `weight` and `margin` shift the loss.
        use_weighting: WPO's weights, which scale it.
    """
    return (
        len(loss_type) == 1
        and loss_type[0] in LN_2_AT_FIRST
        and ref_is_policy
        and list(loss_weights or (1.0,)) == [1.0]
        and not use_weighting
        and not {"weight", "margin"} & set(columns)
    )


def check_first_loss(
    loss: float, dtype: torch.dtype, *, precomputed: bool = False, largest_reward: float = 0.0
) -> None:
    """Raise unless the mean loss of the first batch is ln 2; call it where `first_loss_is_known`.

    Args:
        loss: mean over the pairs of the first batch, before any update. Reading it waits for the device, once per run.
        dtype: that of the forward: autocast's where it is on, else the weights'.
        precomputed: the reference values come from the dataset or the cache.
        largest_reward: beta times the largest |log pi| of a response. Sums over long responses round, and policy and
            reference may run different implementations of the head, so the bound is at least float32's epsilon of it.

    Raises:
        ValueError: it is not; says by how much, and what usually is the cause.
    """
    bound = (_PRECOMPUTED if precomputed else _ONLINE)[dtype in (torch.bfloat16, torch.float16)]
    bound = max(bound, largest_reward * torch.finfo(torch.float32).eps)
    if abs(loss - math.log(2)) < bound:  # a loss that is NaN fails too
        return
    causes = (
        "dropout or another random layer is on (disable_dropout=False), or the model's forward depends on train() or "
        "eval(), or the adapter's initialisation changed the base weights or is not the identity"
    )
    if precomputed:
        causes = (
            "the precomputed reference values belong to another model, to other token ids (another tokenizer, template "
            f"or max_length) or to another precision; or {causes}"
        )
    raise ValueError(
        f"the first loss is {loss:.7f}, but policy and reference are the same model, so it must be ln 2 = "
        f"{math.log(2):.7f} within {bound:.1g} in {str(dtype).removeprefix('torch.')}. The reference is not what it "
        f"seems: {causes}. Nothing has been trained."
    )

"""Turn the log-probs of responses into the loss: apply the objectives and weight the examples.

An optimizer step's loss is the sum of two fractions, each over all its micro-batches on all processes:

    loss = sum of the examples' losses / number of examples
         + sum over the chosen tokens of -log pi / number of chosen tokens         (sft, orpo, cpo and rpo_alpha)

`compute` returns the two numerators of a micro-batch, so that k micro-batches or k processes add up to the loss of one
large batch. An example's weight multiplies its terms in both numerators; the denominators ignore it.

Shapes: B examples, K responses of an example, R responses of the batch, M completion tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head.eager import Stats
from fastdpo.loss.objectives import DIVERGENCES, OBJECTIVES, Beta
from fastdpo.loss.options import EXAMPLE_NUMBERS, PARAMETERS, ObjectiveSettings
from fastdpo.loss.sequences import Sequences, sum_responses, wpo_weights
from fastdpo.loss.whole_step import StepTotals, Values, step_context


class DPOOutput(NamedTuple):
    """Per-pair results of `dpo_loss`, [B] each. Rewards are beta times the log-ratio, in nats, and detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class LossOutput(NamedTuple):
    """A micro-batch's part of an optimizer step's loss, and the values that metrics report."""

    losses: Tensor
    """`[B]`, weighted. The caller sums them and divides by the number of examples in the optimizer step."""
    token_loss: Tensor | None
    """Scalar, which the caller divides by the number of chosen tokens in the optimizer step; None if the objective has
    no likelihood term."""
    chosen_rewards: Tensor
    """`[B]`, detached: beta times the log-ratio. Without a reference it is beta times log pi, averaged over the tokens
    if the objective averages. Ranked examples have the reward of the best response. Unpaired examples have the reward
    of a desirable response, and 0 for an undesirable one."""
    rejected_rewards: Tensor
    """`[B]`, detached, as `chosen_rewards`. Ranked examples have the mean over all responses but the best. Unpaired
    examples have the reward of an undesirable response, and 0 for a desirable one."""
    sequence_logps: Tensor
    """`[R]`, detached: log pi of each response, summed over its tokens (not discounted by LD-DPO)."""
    ref_sequence_logps: Tensor | None
    """`[R]`: the same under the reference; None if there is no reference."""
    weights: Tensor | None = None
    """`[B]`, detached: factors of the examples' losses, WPO's included. None if no example is weighted."""
    kl: Tensor | None = None
    """Scalar: KTO's estimate of the divergence, over the whole optimizer step; None for other objectives."""


def step_mean(out: LossOutput, totals: StepTotals) -> Tensor:
    """Return the micro-batch's part of the optimizer step's loss, a differentiable scalar."""
    loss = out.losses.sum() / totals.examples
    return loss if out.token_loss is None else loss + out.token_loss / totals.chosen_tokens


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> DPOOutput:
    """Compute the loss of each preference pair from log-probabilities summed over completion tokens.

    The batch counts as the whole optimizer step: the mean of `losses` is the loss, and `aot` sorts these pairs.

    Args:
        chosen_logps: log pi(y_w | x) under the policy, [B], nats, any float dtype (16-bit: computed in float32).
        rejected_logps: log pi(y_l | x) under the policy, [B].
        ref_chosen_logps: log pi_ref(y_w | x) under the frozen reference, [B]; None only if no objective reads it.
        ref_rejected_logps: log pi_ref(y_l | x) under the frozen reference, [B].
        loss_type: one or several names in `fastdpo.loss.objectives.OBJECTIVES`, which has their formulas and papers.
        beta: strength of the pull towards the reference, > 0, one number or [B]; 0.1 to 0.5 is usual.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5).
        chosen_lengths: completion tokens of y_w, [B], which `ipo`, `sigmoid_norm`, `simpo`, `orpo` and every objective
            with a likelihood term read.
        rejected_lengths: completion tokens of y_l, [B].
        margin: what beta times the difference of the log-ratios must exceed, [B] (ODPO).
        weight: factor of each pair's loss, [B].
        **options: the other fields of `fastdpo.loss.options.ObjectiveSettings`, such as `loss_weights`, except
            `ld_alpha` and `use_weighting`, which need the log-probs of single tokens.

    Returns:
        `DPOOutput`: losses, chosen_rewards, rejected_rewards, [B] each. A likelihood term is spread over the losses so
        that their mean contains its mean over all chosen tokens.

    Raises:
        ValueError: a setting is unknown, out of range or incompatible with another, a tensor that an objective reads
            is missing, or shapes differ.
    """
    settings = ObjectiveSettings(
        loss_type=(loss_type,) if isinstance(loss_type, str) else tuple(loss_type),
        beta=0.1 if isinstance(beta, Tensor) else beta,
        label_smoothing=label_smoothing,
        **options,
    )
    if settings.kind != "preference":
        raise ValueError(
            f"loss_type {settings.loss_type[0]!r} does not take pairs; call its function in fastdpo.loss.objectives"
        )
    for name, off in (("ld_alpha", None), ("use_weighting", False)):
        if getattr(settings, name) != off:
            raise ValueError(f"{name} needs the log-probs of tokens, which dpo_loss does not see; leave it out")
    own = {"beta": beta if isinstance(beta, Tensor) else None, "margin": margin, "weight": weight}
    settings.check_columns(name for name, x in own.items() if x is not None)
    tensors = {
        "chosen_logps": chosen_logps, "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, **own,
    }  # fmt: skip
    _check_tensors(tensors, settings)
    exact = chosen_logps.dtype if chosen_logps.dtype.itemsize > 2 else torch.float32
    given = {name: x.to(exact) for name, x in tensors.items() if x is not None}

    def both(name: str) -> Tensor | None:
        sides = given.get(name.format("chosen")), given.get(name.format("rejected"))
        return None if sides[0] is None or sides[1] is None else torch.stack((sides[0], sides[1]))

    inputs = _pair_inputs(both("{}_logps"), both("ref_{}_logps"), both("{}_lengths"), settings)
    inputs |= _options(given, inputs, settings)
    if settings.needs_step_context:
        inputs |= step_context([_step_values(inputs, settings)])[0]
    losses = _evaluate(inputs, settings)
    if settings.nll_weight:
        losses = losses - settings.nll_weight * inputs["chosen_logps"] / inputs["chosen_lengths"].mean()
    if weight is not None:
        losses = losses * given["weight"]
    return DPOOutput(losses, *_rewards(inputs, settings))


def compute(
    batch: Mapping[str, Any],
    logps: Tensor,
    ref_token_logps: Tensor | None,
    settings: ObjectiveSettings,
    *,
    stats: Stats | None = None,
    context: Values | None = None,
) -> LossOutput:
    """Compute a micro-batch's part of an optimizer step's loss, without waiting for the device.

    Args:
        batch: a batch of `fastdpo.shared_prefix_batch`. The function reads `cu_target`, the indices of the examples'
            responses, `label` (unpaired) and the examples' own `weight`, `margin` and `beta`. If `ref_token_logps` is
            None, it reads the batch's `ref_token_logps`, or their sums over responses, `ref_logps` `[R]`.
        logps: log-probs of the completion tokens under the policy, `[M]`, nats.
        ref_token_logps: the same under the reference, `[M]`.
        settings: the objective.
        stats: statistics of the tokens' distributions, `[M]`, for `use_weighting`.
        context: what the objective reads from the whole optimizer step, made by `step_context`. None means that this
            micro-batch is the whole step.

    Raises:
        ValueError: the batch holds other examples than the objective takes, or lacks a tensor that it reads.
    """
    sequences, inputs = _inputs(batch, logps, ref_token_logps, settings)
    if settings.needs_step_context:
        inputs |= step_context([_step_values(inputs, settings)])[0] if context is None else context
    losses = _evaluate(inputs, settings)
    weights = batch.get("weight")
    if settings.use_weighting:
        if stats is None:
            raise ValueError("use_weighting needs the statistics of the tokens: pass stats")
        wpo = wpo_weights(logps, stats.log_sum_sq_probs, batch)
        weights = wpo if weights is None else wpo * weights
    token_loss = None
    if settings.nll_weight:
        nll = -sequences.chosen_logps
        token_loss = settings.nll_weight * (nll if weights is None else nll * weights).sum()
    if weights is not None:
        losses = losses * weights
    ref_logps = None if sequences.whole_ref_logps is None else sequences.whole_ref_logps.detach()
    return LossOutput(
        losses,
        token_loss,
        *_rewards(inputs, settings),
        sequences.whole_logps.detach(),
        ref_logps,
        None if weights is None else weights.detach(),
        inputs.get("kl"),
    )


def step_values(
    batch: Mapping[str, Any], logps: Tensor, ref_token_logps: Tensor | None, settings: ObjectiveSettings
) -> Values:
    """Return the values of this micro-batch that the losses of other examples in the optimizer step depend on.

    Arguments and errors are those of `compute`.

    Returns:
        Detached values `[B]` by name, for `step_context`; empty if `settings.needs_step_context` is False.
    """
    return _step_values(_inputs(batch, logps, ref_token_logps, settings)[1], settings)


# Responses to what the objectives read


def _inputs(
    batch: Mapping[str, Any], logps: Tensor, ref_token_logps: Tensor | None, settings: ObjectiveSettings
) -> tuple[Sequences, dict[str, Any]]:
    kind = "unpaired" if "label" in batch else "ranked" if "response_index" in batch else "preference"
    if kind != settings.kind:
        raise ValueError(f"loss_type {settings.loss_type[0]!r} takes {settings.kind} examples, the batch is {kind}")
    settings.check_columns(name for name in EXAMPLE_NUMBERS if batch.get(name) is not None)
    sequences = sum_responses(batch, logps, ref_token_logps, settings)
    if kind == "preference":
        lengths = batch["cu_target"].diff()[sequences.edges]
        inputs = _pair_inputs(sequences.logps, sequences.ref_logps, lengths, settings)
    else:
        ref_logps = sequences.ref_logps
        logratios = sequences.logps if ref_logps is None else sequences.logps - ref_logps
        if kind == "unpaired":
            inputs = _unpaired_inputs(batch, logratios, settings)
        else:
            present = sequences.edges < len(sequences.whole_logps)
            inputs = {"ranked_logratios": logratios.T, "ranked_mask": present.T}
    return sequences, inputs | _options(batch, inputs, settings)


def _pair_inputs(
    logps: Tensor | None, ref_logps: Tensor | None, lengths: Tensor | None, settings: ObjectiveSettings
) -> dict[str, Any]:
    """Split `[2, B]` tensors into the inputs `[B]` that objectives on pairs read."""
    assert logps is not None
    inputs = dict(zip(("chosen_logps", "rejected_logps"), logps, strict=True))
    if lengths is not None:
        inputs |= zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True)
    if settings.reference_free:
        ref_logps = torch.zeros_like(logps)
    if ref_logps is None:
        return inputs
    logratios = logps - ref_logps
    scores = DIVERGENCES[settings.f_divergence_type](logratios, settings.f_alpha_divergence_coef)
    for name, both in (("ref_{}_logps", ref_logps), ("{}_logratios", logratios), ("{}_scores", scores)):
        inputs |= zip((name.format("chosen"), name.format("rejected")), both, strict=True)
    return inputs


def _unpaired_inputs(batch: Mapping[str, Any], logratios: Tensor, settings: ObjectiveSettings) -> dict[str, Any]:
    if settings.needs_kl and len(logratios) < 2:
        raise ValueError(f"loss_type {settings.loss_type[0]!r} needs kl_ids in every example")
    return {"logratios": logratios[0], "kl_logratios": logratios[1:].flatten().detach(), "label": batch["label"]}


def _options(columns: Mapping[str, Any], inputs: Mapping[str, Any], settings: ObjectiveSettings) -> dict[str, Any]:
    """Return the settings by name, with the examples' own beta if they have one, and the margin z of pairs."""
    beta: Beta = settings.beta if columns.get("beta") is None else columns["beta"]
    options: dict[str, Any] = vars(settings) | {"beta": beta}
    if "chosen_scores" in inputs:
        z = beta * (inputs["chosen_scores"] - inputs["rejected_scores"])
        options["z"] = z if columns.get("margin") is None else z - columns["margin"]
    return options


# The objectives


def _evaluate(inputs: Mapping[str, Any], settings: ObjectiveSettings) -> Tensor:
    """Return the weighted sum of the objectives, `[B]`."""
    total: Tensor | float = 0.0
    for name, weight in zip(settings.loss_type, settings.weights, strict=True):
        total = total + weight * OBJECTIVES[name](**{p: inputs[p] for p in PARAMETERS[name]})
    assert isinstance(total, Tensor)
    return total


def _step_values(inputs: Mapping[str, Any], settings: ObjectiveSettings) -> Values:
    values, reads = {}, settings.parameters
    if "matched_ref_margins" in reads:
        values["margins"] = inputs["chosen_logps"] - inputs["rejected_logps"]
        values["ref_margins"] = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
    if "matched_chosen" in reads:
        values |= {"chosen": inputs["chosen_logratios"], "rejected": inputs["rejected_logratios"]}
    if "kl" in reads:
        values["kl"] = inputs["kl_logratios"]
    return {name: x.detach() for name, x in values.items()}


def _rewards(inputs: Mapping[str, Any], settings: ObjectiveSettings) -> tuple[Tensor, Tensor]:
    """Return the chosen and the rejected rewards that `LossOutput` describes."""
    if settings.kind == "unpaired":
        rewards, label = inputs["beta"] * inputs["logratios"].detach(), inputs["label"]
        return rewards.where(label, 0.0), rewards.where(~label, 0.0)
    if settings.kind == "ranked":
        logratios, others = inputs["ranked_logratios"].detach(), inputs["ranked_mask"][:, 1:]
        mean = logratios[:, 1:].where(others, 0.0).sum(1) / others.sum(1)
        return inputs["beta"] * logratios[:, 0], inputs["beta"] * mean
    name = "logratios" if settings.needs_reference else "logps"
    sides = []
    for side in ("chosen", "rejected"):
        values = inputs[f"{side}_{name}"]
        if name == "logps" and "chosen_lengths" in PARAMETERS[settings.loss_type[0]]:
            values = values / inputs[f"{side}_lengths"]
        sides.append(inputs["beta"] * values.detach())
    return sides[0], sides[1]


def _check_tensors(tensors: Mapping[str, Tensor | None], settings: ObjectiveSettings) -> None:
    """Check that `dpo_loss` got every tensor that it needs and no reference it ignores, each `[B]`."""
    names = settings.loss_type
    needed = {"reference log-probs": settings.needs_reference, "lengths": settings.needs_lengths}
    for what, name in (("reference log-probs", "ref_{}_logps"), ("lengths", "{}_lengths")):
        for side in ("chosen", "rejected"):
            if needed[what] and tensors[name.format(side)] is None:
                raise ValueError(f"{name.format(side)} must be given: loss_type {list(names)} reads {what}")
    if not settings.needs_reference and tensors["ref_chosen_logps"] is not None:
        raise ValueError(f"ref_chosen_logps must be None: loss_type {list(names)} reads no reference log-probs")
    chosen = tensors["chosen_logps"]
    assert chosen is not None
    for name, x in tensors.items():
        if x is not None and (x.dim() != 1 or x.shape != chosen.shape):
            shapes = f"got {list(x.shape)}, chosen_logps {list(chosen.shape)}"
            raise ValueError(f"{name} must be [B], the shape of chosen_logps: {shapes}")
    beta = tensors["beta"]
    if beta is not None and beta.device.type == "cpu" and not bool((beta > 0).all()):
        raise ValueError(f"beta must be positive in every pair, got {beta.tolist()}")

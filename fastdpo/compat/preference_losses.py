"""Liger's preference losses, with their arguments and results, on fastdpo's head.

The classes take the places of liger-kernel 0.8's `LigerFusedLinearDPOLoss`, `...ORPOLoss`, `...CPOLoss`, `...SimPOLoss`
and `...KTOLoss`. A batch holds hidden states `[R, T, D]`, the weight `[V, D]` of the LM head and labels `[R, T]` that
the caller has shifted: `target[r, t]` is the token that follows `_input[r, t]`. Positions that hold `ignore_index`,
such as prompts and padding, never reach the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.compat.padded_scores import nll_of_other_labels, score, score_reference
from fastdpo.loss import objectives
from fastdpo.loss.batch_loss import dpo_loss
from fastdpo.loss.options import ObjectiveSettings


def _checked(*, beta: float, **settings: Any) -> ObjectiveSettings:
    """Return the objective's settings; the trainer would accept a beta of 0 as TRL does, but it trains nothing."""
    if not beta > 0:
        raise ValueError(f"beta must be a positive number, got {beta}")
    return ObjectiveSettings(beta=beta, **settings)


class FusedLinearDPOLoss(nn.Module):
    """DPO from hidden states, in the place of `LigerFusedLinearDPOLoss`, whose arguments and results it has.

    `loss = FusedLinearDPOLoss(beta=0.1)(lm_head.weight, hidden[:, :-1], labels[:, 1:], ref_input=..., ref_weight=...)`

    It differs from Liger's class where that is wrong: the means of the logits leave out prompts and padding,
    `label_smoothing` makes "sigmoid" conservative DPO, "ipo" and every other objective with a reference works too,
    gradients are summed in float32, and the returned log-probs are differentiable. Inputs on which Liger returns NaN or
    a wrong number raise a ValueError.

    Args:
        ignore_index: the label of positions that do not count.
        beta: strength of the pull towards the reference, above 0.
        alpha: weight of the likelihood term that `compute_nll_loss` adds, not negative.
        compute_nll_loss: whether to add the mean negative log-likelihood of the chosen tokens.
        compiled: accepted without effect, because the head is compiled already.
        use_ref_model: whether there is a reference; without one, its log-probs are 0.
        average_log_prob: whether to average a response's log-probs over its tokens instead of summing them.
        chunk_size: accepted without effect, because the head chooses its tiles itself.
        loss_type: a name in `fastdpo.loss.objectives.OBJECTIVES`, with formula and paper, that takes pairs and reads a
            reference. "aot" and "aot_unpaired" sort the pairs of one call.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5), for the objectives that read it.
        discopop_tau: temperature of "discopop".

    Raises:
        ValueError: a setting is unknown, out of range or has no effect on this `loss_type`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        settings = _checked(
            loss_type=(loss_type,), beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau
        )
        if settings.kind != "preference" or not settings.needs_reference:
            raise ValueError(
                f"loss_type must name an objective on pairs with a reference, such as 'sigmoid', got {loss_type!r}; "
                "FusedLinearORPOLoss, FusedLinearCPOLoss, FusedLinearSimPOLoss and FusedLinearKTOLoss have the others"
            )
        if average_log_prob and settings.needs_lengths:
            raise ValueError(f"average_log_prob must be False: loss_type {loss_type!r} averages over tokens itself")
        _check_alpha(alpha)
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob, self.loss_type = use_ref_model, average_log_prob, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of B pairs.

        Args:
            lin_weight: weight of the LM head, `[V, D]`, float64, float32, bfloat16 or float16.
            _input: hidden states, `[2B, T, D]`, chosen responses first, dtype of `lin_weight`.
            target: labels `[2B, T]`, int64, shifted: `target[r, t]` follows `_input[r, t]`.
            bias: bias of the LM head, `[V]`.
            ref_input: the reference's hidden states, `[2B, T, any D]`; needed if `use_ref_model` is True.
            ref_weight: weight of the reference's LM head, `[V, any D]`. The reference gets no gradients.
            ref_bias: bias of the reference's LM head, `[V]`.

        Returns:
            The loss, a scalar, and a tuple of: chosen_logps `[B]`, rejected_logps `[B]`, mean logit of the chosen
            tokens, of the rejected tokens, nll_loss (0 without `compute_nll_loss`), chosen_rewards `[B]` and
            rejected_rewards `[B]`. All are float32 (float64 for float64 inputs), log-probs and rewards in nats. The
            loss, the log-probs and nll_loss are differentiable.

        Raises:
            ValueError: the number of sequences is odd or 0, a sequence has no label, a label is outside [0, V), shapes
                or dtypes do not match, or a reference is missing or would be ignored.
        """
        batch = score(lin_weight, _input, target, bias, self.ignore_index)
        ref = score_reference(self.use_ref_model, ref_input, ref_weight, ref_bias, target, batch)
        logps = batch.logps
        if self.average_log_prob:
            logps, ref = logps / batch.lengths, ref / batch.lengths
        _, _, chosen_lengths, rejected_lengths = batch.pairs()
        losses, *rewards = dpo_loss(
            *logps.chunk(2),
            *ref.chunk(2),
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            discopop_tau=self.discopop_tau,
        )
        nll = batch.nll() if self.compute_nll_loss else logps.new_zeros(())
        return losses.mean() + self.alpha * nll, (*logps.chunk(2), *batch.mean_logits(), nll, *rewards)


class FusedLinearORPOLoss(nn.Module):
    """ORPO from hidden states, in the place of `LigerFusedLinearORPOLoss`, whose arguments and results it has.

    The loss is `fastdpo.loss.objectives.orpo` plus the negative log-likelihood, https://arxiv.org/abs/2403.07691. It
    differs from Liger's as `FusedLinearDPOLoss` does, and stays finite where a response has probability 1.

    Args:
        ignore_index: the label of positions that do not count.
        beta: weight of the odds ratio, above 0.
        compute_nll_loss: whether to add the mean negative log-likelihood of the chosen tokens.
        compiled: accepted without effect.
        chunk_size: accepted without effect.

    Raises:
        ValueError: beta is not above 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        _checked(loss_type=("orpo",), beta=beta)
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of B pairs.

        Args:
            lin_weight: as in `FusedLinearDPOLoss`, with `_input`, `target` and `bias`.
            _input: hidden states, `[2B, T, D]`.
            target: labels `[2B, T]`, int64, shifted.
            bias: bias of the LM head, `[V]`.
            nll_target: labels of the likelihood term, `[2B, T]`, int64, shifted; its second half is not read. None
                takes `target`. TRL's trainer counts the prompts in this term.

        Returns:
            The loss and a tuple of: chosen_logps `[B]` and rejected_logps `[B]`, averaged over tokens, mean logit of
            the chosen tokens, of the rejected tokens, nll_loss, chosen_rewards `[B]`, rejected_rewards `[B]`, the mean
            of log sigmoid(log odds ratio), and the mean log odds ratio.

        Raises:
            ValueError: as `FusedLinearDPOLoss`, or `nll_target` is malformed or would be ignored.
        """
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("nll_target must be None with compute_nll_loss=False, which would ignore it")
        batch = score(lin_weight, _input, target, bias, self.ignore_index)
        chosen, rejected = (batch.logps / batch.lengths).chunk(2)
        loss = objectives.orpo(*batch.pairs(), self.beta).mean()
        nll = batch.nll() if self.compute_nll_loss else loss.new_zeros(())
        if nll_target is not None:
            nll = nll_of_other_labels(nll_target, target, batch, lin_weight, _input, bias, self.ignore_index)
        with torch.no_grad():
            log_odds_ratio = objectives.log_odds(chosen) - objectives.log_odds(rejected)
            odds = F.logsigmoid(log_odds_ratio).mean(), log_odds_ratio.mean()
        return loss + nll, (chosen, rejected, *batch.mean_logits(), nll, *_rewards(self.beta, chosen, rejected), *odds)


class FusedLinearCPOLoss(nn.Module):
    """CPO from hidden states, in the place of `LigerFusedLinearCPOLoss`, whose arguments and results it has.

    The loss is `fastdpo.loss.objectives.cpo` plus alpha times the negative log-likelihood,
    https://arxiv.org/abs/2401.08417. It differs from Liger's as `FusedLinearDPOLoss` does.

    Args:
        ignore_index: the label of positions that do not count.
        beta: factor of the log-probs' difference, above 0.
        alpha: weight of the likelihood term, not negative.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5).
        compute_nll_loss: whether to add the mean negative log-likelihood of the chosen tokens.
        compiled: accepted without effect.
        average_log_prob: whether to average a response's log-probs over its tokens instead of summing them.
        chunk_size: accepted without effect.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        _checked(loss_type=("cpo",), beta=beta, cpo_alpha=alpha, label_smoothing=label_smoothing)
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.label_smoothing, self.average_log_prob = label_smoothing, average_log_prob

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of B pairs; arguments, results and errors are `FusedLinearDPOLoss`'s."""
        batch = score(lin_weight, _input, target, bias, self.ignore_index)
        chosen, rejected = (batch.logps / batch.lengths if self.average_log_prob else batch.logps).chunk(2)
        loss = objectives.cpo(chosen, rejected, self.beta, self.label_smoothing).mean()
        nll = batch.nll() if self.compute_nll_loss else loss.new_zeros(())
        rewards = _rewards(self.beta, chosen, rejected)
        return loss + self.alpha * nll, (chosen, rejected, *batch.mean_logits(), nll, *rewards)


class FusedLinearSimPOLoss(nn.Module):
    """SimPO from hidden states, in the place of `LigerFusedLinearSimPOLoss`, whose arguments and results it has.

    The loss is `fastdpo.loss.objectives.simpo`, https://arxiv.org/abs/2405.14734, plus, as in Liger, alpha times the
    negative log-likelihood, which the paper does not have: `compute_nll_loss=False` switches it off. It differs from
    Liger's as `FusedLinearDPOLoss` does.

    Args:
        ignore_index: the label of positions that do not count.
        beta: factor of the mean log-probs' difference, above 0; the paper takes 2 to 10.
        alpha: weight of the likelihood term, not negative.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5).
        compute_nll_loss: whether to add the mean negative log-likelihood of the chosen tokens.
        compiled: accepted without effect.
        gamma: margin that the difference must exceed, not negative.
        chunk_size: accepted without effect.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        _checked(loss_type=("simpo",), beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma)
        _check_alpha(alpha)
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.label_smoothing, self.gamma = label_smoothing, gamma

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of B pairs, with log-probs averaged; all else is as in `FusedLinearDPOLoss`."""
        batch = score(lin_weight, _input, target, bias, self.ignore_index)
        loss = objectives.simpo(*batch.pairs(), self.beta, self.gamma, self.label_smoothing).mean()
        chosen, rejected = (batch.logps / batch.lengths).chunk(2)
        nll = batch.nll() if self.compute_nll_loss else loss.new_zeros(())
        rewards = _rewards(self.beta, chosen, rejected)
        return loss + self.alpha * nll, (chosen, rejected, *batch.mean_logits(), nll, *rewards)


class FusedLinearKTOLoss(nn.Module):
    """KTO from hidden states, in the place of `LigerFusedLinearKTOLoss`, whose arguments and results it has.

    The loss is `fastdpo.loss.objectives.kto`, https://arxiv.org/abs/2402.01306. It differs from Liger's as
    `FusedLinearDPOLoss` does. A `kl` of one number per response counts for that response only.

    Args:
        ignore_index: the label of positions that do not count.
        beta: strength of the pull towards the reference, above 0.
        compiled: accepted without effect.
        use_ref_model: whether there is a reference; without one, its log-probs are 0. As in Liger, it is off unless
            you switch it on.
        average_log_prob: whether to average a response's log-probs over its tokens instead of summing them.
        chunk_size: accepted without effect.

    Raises:
        ValueError: beta is not above 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        _checked(loss_type=("kto",), beta=beta)
        self.ignore_index, self.beta = ignore_index, beta
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of R responses. As in Liger, the hidden states come first.

        Args:
            _input: hidden states, `[R, T, D]`.
            lin_weight: weight of the LM head, `[V, D]`, dtype of `_input`.
            target: labels `[R, T]`, int64, shifted.
            bias: bias of the LM head, `[V]`.
            preference_labels: `[R]` bool, True for desirable responses.
            ref_input: the reference's hidden states, `[R, T, any D]`; needed if `use_ref_model` is True.
            ref_weight: weight of the reference's LM head, `[V, any D]`. The reference gets no gradients.
            ref_bias: bias of the reference's LM head, `[V]`.
            kl: estimate of the divergence, in nats, a scalar or `[R]`, which gets no gradient. None means 0.

        Returns:
            The loss and a tuple of sums over the desirable and over the undesirable responses: of log-probs, of the
            logits of their tokens, and of rewards, six scalars.

        Raises:
            ValueError: as `FusedLinearDPOLoss`, or `preference_labels` or `kl` is malformed.
        """
        batch = score(lin_weight, _input, target, bias, self.ignore_index, pairs=False)
        R = len(target)
        label = preference_labels
        if label is None or label.dtype != torch.bool or label.shape != (R,):
            got = "None" if label is None else f"{label.dtype} {list(label.shape)}"
            raise ValueError(f"preference_labels must be bool [{R}], True for desirable responses, got {got}")
        ref = score_reference(self.use_ref_model, ref_input, ref_weight, ref_bias, target, batch)
        kl = batch.logps.new_zeros(()) if kl is None else kl.detach()
        if kl.shape not in ((), (1,), (R,)):
            raise ValueError(f"kl must be a scalar or [{R}], got {list(kl.shape)}")
        logps = batch.logps / batch.lengths if self.average_log_prob else batch.logps
        logratios = logps - (ref / batch.lengths if self.average_log_prob else ref)
        loss = objectives.kto(logratios, label, kl, self.beta, 1.0, 1.0).mean()
        values = (logps, batch.logits * lin_weight.shape[0], self.beta * logratios.detach())
        return loss, tuple(x.where(side, 0.0).sum() for x in values for side in (label, ~label))


def _rewards(beta: float, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rewards of an objective without a reference."""
    return beta * chosen.detach(), beta * rejected.detach()


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and not negative, got {alpha}")

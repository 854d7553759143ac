"""Preference objectives, computed in plain PyTorch from a few numbers per example.

An objective is a function of named tensors that returns the losses `[B]`; `OBJECTIVES` maps its name to it. To add one,
add a function and a line in that table. The names of its parameters say what it reads and which options it allows:

    z                                   beta * (chosen_scores - rejected_scores) - margin; examples may have a margin
    chosen_scores, rejected_scores      f'(pi / pi_ref) of an f-divergence; the log-ratios for DPO's own, reverse KL
    chosen_logratios, rejected_logratios    log pi - log pi_ref
    chosen_logps, rejected_logps        log pi alone
    chosen_lengths, rejected_lengths    completion tokens
    ranked_logratios, ranked_mask       `[B, K]`, best first, for K ranked responses
    logratios, label, kl                for single responses with a label (True: desirable)
    matched_*                           numbers of other examples of the optimizer step, see `fastdpo.loss.whole_step`

A function also takes `beta` (a number or `[B]`) and the options of `fastdpo.loss.options.ObjectiveSettings` that it
reads. Log-probabilities are sums over completion tokens, in nats. In formulas, w marks the chosen response of a pair
and l the rejected one.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Beta: TypeAlias = float | Tensor
Objective: TypeAlias = Callable[..., Tensor]


def _sigmoid(x: Tensor) -> Tensor:
    """Compute sigmoid(x) with a gradient that keeps its digits; torch's y (1 - y) loses them where y is near 1."""
    smaller = torch.where(x > 0, -x, x).sigmoid()
    return torch.where(x > 0, 1 - smaller, smaller)


def _log_sigmoid(x: Tensor) -> Tensor:
    """Compute log sigmoid(x) with derivatives that keep their digits; torch's second one is 0 above 17 in float32."""
    smaller = torch.where(x > 0, -x, x)  # not -|x|, whose derivative at 0 is 0
    return torch.where(x > 0, 0.0, x) - smaller.exp().log1p()


# Pairs, as functions of the margin z


def sigmoid(z: Tensor, label_smoothing: float) -> Tensor:
    """DPO; with label_smoothing e > 0, conservative DPO.

    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

    With e = 0 this is Eq. 7 of Rafailov et al., https://arxiv.org/abs/2305.18290, else Eq. 3 of
    https://ericmitchell.ai/cdpo.pdf. A margin in z makes it ODPO, https://arxiv.org/abs/2402.10571.
    """
    losses = -(1 - label_smoothing) * _log_sigmoid(z)
    if label_smoothing:
        losses = losses - label_smoothing * _log_sigmoid(-z)
    return losses


def hinge(z: Tensor) -> Tensor:
    """SLiC: loss = max(0, 1 - z); Section 2 of https://arxiv.org/abs/2305.10425 with DPO's margin."""
    return F.relu(1 - z)


def robust(z: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO, which is unbiased if a share e of the labels is flipped.

    loss = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

    Section 3.1 of https://arxiv.org/abs/2403.00409.
    """
    losses = -(1 - label_smoothing) * _log_sigmoid(z) + label_smoothing * _log_sigmoid(-z)
    return losses / (1 - 2 * label_smoothing)


def exo_pair(z: Tensor, label_smoothing: float) -> Tensor:
    """EXO for pairs: reverse KL from the policy's preference to the label's, smoothed by e > 0.

    loss = sigmoid(z) (log sigmoid(z) - log(1 - e)) + sigmoid(-z) (log sigmoid(-z) - log e)

    Eq. 16 of https://arxiv.org/abs/2402.00856, which recommends e = 0.001.
    """
    kept = _sigmoid(z) * (_log_sigmoid(z) - math.log1p(-label_smoothing))
    return kept + _sigmoid(-z) * (_log_sigmoid(-z) - math.log(label_smoothing))


def discopop(z: Tensor, discopop_tau: float) -> Tensor:
    """Log-ratio modulated loss, which a language model found, with m = sigmoid(z / tau).

    loss = -(1 - m) log sigmoid(z) + m exp(-z)

    Eq. 5 of https://arxiv.org/abs/2406.08414. m exp(-z) is one exponential here, because exp(-z) alone overflows.
    """
    logistic = -_log_sigmoid(z) * _sigmoid(-z / discopop_tau)
    return logistic + (_log_sigmoid(z / discopop_tau) - z).exp()


# Pairs, averaged over their lengths


def ipo(
    chosen_scores: Tensor, rejected_scores: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: Beta
) -> Tensor:
    """IPO: loss = (s_w / n_w - s_l / n_l - 1 / (2 beta))^2 with scores s and lengths n.

    Eq. 17 of https://arxiv.org/abs/2310.12036 with tau = beta. Its authors and TRL average over tokens, as here.
    """
    return (chosen_scores / chosen_lengths - rejected_scores / rejected_lengths - 0.5 / beta).square()


def sigmoid_norm(
    chosen_scores: Tensor, rejected_scores: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: Beta
) -> Tensor:
    """Length-normalised DPO: loss = -log sigmoid(beta (s_w / n_w - s_l / n_l)) with scores s and lengths n.

    Tulu 3 trains with this loss, https://arxiv.org/abs/2411.15124.
    """
    return -_log_sigmoid(beta * (chosen_scores / chosen_lengths - rejected_scores / rejected_lengths))


# Pairs, as functions of each response's own log-ratio


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: Beta) -> Tensor:
    """Noise contrastive alignment of two responses whose rewards only say which one is better.

    loss = -log sigmoid(beta c) - log sigmoid(-beta c) / 2 - log sigmoid(-beta r) / 2, with log-ratios c and r

    Section 4.1 of https://arxiv.org/abs/2402.05369.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -_log_sigmoid(chosen) - (_log_sigmoid(-chosen) + _log_sigmoid(-rejected)) / 2


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: Beta) -> Tensor:
    """Binary classifier optimization: loss = -log sigmoid(beta c) - log sigmoid(-beta r), with log-ratios c and r.

    Section 4 of https://arxiv.org/abs/2404.04656, without its reward shift, as in TRL 1.16.
    """
    return -_log_sigmoid(beta * chosen_logratios) - _log_sigmoid(-beta * rejected_logratios)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: Beta) -> Tensor:
    """SPPO with a certain winner: loss = (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, with log-ratios c and r.

    Eq. 4.7 of https://arxiv.org/abs/2405.00675 with eta = 1 / beta.
    """
    return (chosen_logratios - 0.5 / beta).square() + (rejected_logratios + 0.5 / beta).square()


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: Beta) -> Tensor:
    """APO for pairs better than the model's own responses: raise the chosen one and lower the rejected one.

    loss = 1 - sigmoid(beta c) + sigmoid(beta r), with log-ratios c and r

    Eq. 7 of https://arxiv.org/abs/2408.06266.
    """
    return _sigmoid(-beta * chosen_logratios) + _sigmoid(beta * rejected_logratios)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: Beta) -> Tensor:
    """APO for pairs worse than the model's own responses: lower both, the rejected one more.

    loss = sigmoid(beta c) + 1 - sigmoid(beta (c - r)), with log-ratios c and r

    Eq. 8 of https://arxiv.org/abs/2408.06266.
    """
    return _sigmoid(beta * chosen_logratios) + _sigmoid(beta * (rejected_logratios - chosen_logratios))


# Pairs, sorted over the optimizer step


def aot(
    chosen_logps: Tensor, rejected_logps: Tensor, matched_ref_margins: Tensor, beta: Beta, label_smoothing: float
) -> Tensor:
    """Alignment by optimal transport, paired: push the policy's margins above the reference's, quantile by quantile.

    loss = `sigmoid` at z = beta (m - m_ref), with margins m = log pi(y_w) - log pi(y_l) and m_ref the reference's
    margin of the same rank in the optimizer step.

    Section 3 of https://arxiv.org/abs/2406.05882 with the logistic loss.
    """
    return sigmoid(beta * (chosen_logps - rejected_logps - matched_ref_margins), label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    matched_rejected: Tensor,
    matched_chosen: Tensor,
    beta: Beta,
    label_smoothing: float,
) -> Tensor:
    """Alignment by optimal transport: push the chosen log-ratios above the rejected ones, quantile by quantile.

    loss = `sigmoid` at z = beta (c - r), with log-ratios c and r of the same rank in the optimizer step

    Section 3 of https://arxiv.org/abs/2406.05882 with the logistic loss. The function adds up two losses of each pair:
    its chosen response against a constant, and its rejected response against a constant. Their sum has the gradient of
    all matched losses, but counts the value of each one twice, so half of the value is subtracted.
    """
    of_chosen = sigmoid(beta * (chosen_logratios - matched_rejected), label_smoothing)
    of_rejected = sigmoid(beta * (matched_chosen - rejected_logratios), label_smoothing)
    both = of_chosen + of_rejected
    return both - both.detach() / 2


# Pairs, without a reference


def sft(chosen_logps: Tensor) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the chosen responses, averaged over all their tokens.

    Its denominator is a number of tokens, not of pairs: `fastdpo.loss.batch_loss` adds it, and each pair's loss is 0.
    """
    return torch.zeros_like(chosen_logps)


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: Beta,
    simpo_gamma: float,
    label_smoothing: float,
) -> Tensor:
    """SimPO: loss = `sigmoid` at z = beta (log pi(y_w) / n_w - log pi(y_l) / n_l) - gamma, with lengths n.

    Eq. 6 of https://arxiv.org/abs/2405.14734, which takes beta from 2 to 10 and gamma from beta / 5 to beta / 2.
    For CPO-SimPO add `sft` to the sum.
    """
    return sigmoid(
        beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - simpo_gamma, label_smoothing
    )


def cpo(chosen_logps: Tensor, rejected_logps: Tensor, beta: Beta, label_smoothing: float) -> Tensor:
    """CPO: loss = `sigmoid` at z = beta (log pi(y_w) - log pi(y_l)), plus cpo_alpha times `sft`.

    Eq. 3 of https://arxiv.org/abs/2401.08417 with its likelihood term, averaged over tokens as in TRL.
    """
    return sigmoid(beta * (chosen_logps - rejected_logps), label_smoothing)


def orpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: Beta
) -> Tensor:
    """ORPO: loss = -beta log sigmoid(log (odds(p_w) / odds(p_l))), plus `sft`; odds(p) = p / (1 - p).

    Eq. 4 to 7 of https://arxiv.org/abs/2403.07691 with lambda = beta and p the geometric mean of the tokens'
    probabilities.
    """
    return -beta * _log_sigmoid(log_odds(chosen_logps / chosen_lengths) - log_odds(rejected_logps / rejected_lengths))


def log_odds(mean_logps: Tensor) -> Tensor:
    """Return log (p / (1 - p)) of `mean_logps` = log p; p stays an ulp below 1, where the odds would be infinite."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-mean_logps.expm1()).log()


# Ranked responses


def plackett_luce(ranked_logratios: Tensor, ranked_mask: Tensor, beta: Beta) -> Tensor:
    """DPO for K ranked responses: each one should beat all those ranked below it.

    loss = -sum_k log (exp(beta c_k) / sum_{j >= k} exp(beta c_j)), with the log-ratio c_k of the response ranked k

    Appendix A.3 of https://arxiv.org/abs/2305.18290; K = 2 is `sigmoid`. Where the mask `[B, K]` is False a
    row has no response.
    """
    K = ranked_logratios.shape[1]
    rewards = (beta[:, None] if isinstance(beta, Tensor) else beta) * ranked_logratios
    itself = torch.eye(K, dtype=torch.bool, device=rewards.device)
    # a constant 0 instead of c_k - c_k, whose two gradients near 1 would cancel the digits of small ones
    differences = (rewards[:, None, :] - rewards[:, :, None]).masked_fill(itself, 0.0)  # [B, k, j]
    from_k_on = torch.ones(K, K, dtype=torch.bool, device=rewards.device).triu(1) & ranked_mask[:, None, :]
    terms = differences.masked_fill(~(from_k_on | itself), -math.inf).logsumexp(-1)
    return terms.where(ranked_mask, 0.0).sum(-1)


# Single responses with a label


def kto(
    logratios: Tensor, label: Tensor, kl: Tensor, beta: Beta, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO: push desirable responses above the KL of policy and reference, and undesirable ones below it.

    loss = w (1 - sigmoid(+-beta (c - kl))), with log-ratio c; desirable responses have + and w = desirable_weight

    Eq. 7 and 8 of https://arxiv.org/abs/2402.01306; kl, their z_0, is estimated over the optimizer step, see
    `fastdpo.loss.whole_step`.
    """
    sign, weights = _by_label(label, logratios, desirable_weight, undesirable_weight)
    return weights * _sigmoid(-sign * beta * (logratios - kl))


def apo_zero_unpaired(
    logratios: Tensor, label: Tensor, beta: Beta, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """`apo_zero` of single responses: loss = w (1 - sigmoid(+-beta c)), with log-ratio c and + for desirable ones.

    Eq. 7 of https://arxiv.org/abs/2408.06266: the label chooses which of its two terms a response gets.
    """
    sign, weights = _by_label(label, logratios, desirable_weight, undesirable_weight)
    return weights * _sigmoid(-sign * beta * logratios)


def _by_label(label: Tensor, like: Tensor, desirable: float, undesirable: float) -> tuple[Tensor, Tensor]:
    """Return the sign and the weight of each response, [B]."""
    yes = label.to(like.dtype)
    return 2 * yes - 1, desirable * yes + undesirable * (1 - yes)


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "plackett_luce": plackett_luce,
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}

# f-divergences: scores f'(t) of the ratio t = pi / pi_ref, as functions of log t, https://arxiv.org/abs/2309.16240


def _expm1(x: Tensor) -> Tensor:
    """Compute exp(x) - 1, constant above a limit near which the dtype would overflow.

    The gradient of torch's `expm1`, which adds 1 to the result, loses its digits where the result is near -1.
    """
    x = x.clamp(max=700.0 if x.dtype == torch.float64 else 80.0)
    return torch.where(x < -1, x.exp() - 1, x.expm1())


def reverse_kl(logratios: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """KL(pi, pi_ref), DPO's own: log t."""
    return logratios


def forward_kl(logratios: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """KL(pi_ref, pi): 1 - 1 / t."""
    return -_expm1(-logratios)


def js_divergence(logratios: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """Jensen-Shannon: log (2 t / (1 + t))."""
    return math.log(2) + _log_sigmoid(logratios)


def alpha_divergence(logratios: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """(t^(a - 1) - 1) / (a - 1), with a the coefficient; a = 1 is reverse KL, a = 0 forward KL."""
    power = f_alpha_divergence_coef - 1
    return logratios if abs(power) < 1e-6 else _expm1(power * logratios) / power


DIVERGENCES: dict[str, Objective] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}

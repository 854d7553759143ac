"""fastdpo.loss.batch_loss against TRL's own code, fed with the same token log-probs; and the bugs that code has."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.loss.batch_loss import compute
from fastdpo.loss.options import ObjectiveSettings
from tests.helpers.token_batches import Step, make_step

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

PROMPT = 3  # tokens before each completion in the padded batches TRL gets

PAIRS = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
PAIRS += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}


def padded(values: Tensor, step: Step) -> Tensor:
    """[M] to [R, T - 1], zero where no completion token is predicted."""
    rows = torch.zeros(len(step.lengths), PROMPT + max(step.lengths) - 1, dtype=values.dtype)
    start = 0
    for i, n in enumerate(step.lengths):
        rows[i, PROMPT - 1 : PROMPT - 1 + n] = values[start : start + n]
        start += n
    return rows


def stub(values: Tensor, step: Step) -> Any:
    """A model whose fused head would give these log-probs."""
    rows = padded(values, step)
    zeros = torch.zeros_like(rows)
    outputs = SimpleNamespace(log_probs=rows, log_sum_sq_probs=padded(step.log_sum_sq_probs, step))
    outputs.entropy = outputs.mean_logits = zeros
    outputs.is_top1 = zeros.bool()
    return lambda **_: outputs


def trainer(settings: ObjectiveSettings, **extra: Any) -> Any:
    """What TRL's loss methods read of their trainer."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    fields = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    fields |= {"loss_types": settings.loss_type, "loss_weights": settings.weights, "args": SimpleNamespace()}
    result = SimpleNamespace(**fields | extra)
    result.args = SimpleNamespace(discopop_tau=settings.discopop_tau, gradient_checkpointing_kwargs=None)
    result.model = torch.nn.Module()
    result.model.is_gradient_checkpointing = False
    result.accelerator, result.precompute_ref_logps, result.aux_loss_enabled = accelerator, False, False
    result._metrics = {"train": defaultdict(list)}
    result._total_train_tokens, result._tp_size = 0, 1
    return result


def trl_dpo(settings: ObjectiveSettings, step: Step) -> tuple[Tensor, Any]:
    """Loss of TRL's DPOTrainer and its metrics."""
    self = trainer(settings, ref_model=stub(step.ref_token_logps, step))
    mask = (padded(torch.ones(step.M), step) > 0).long()
    mask = torch.nn.functional.pad(mask, (1, 0))
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(self, stub(step.logps, step), inputs, False)
    return loss, self._metrics["train"]


def ours(settings: ObjectiveSettings, step: Step) -> tuple[Tensor, Any]:
    out = compute(step.batch, step.logps, step.ref_token_logps, settings, stats=step.stats)
    loss = out.losses.mean()
    if out.token_loss is not None:
        loss = loss + out.token_loss / sum(step.lengths[: len(out.losses)])
    return loss, out


def assert_same(settings: ObjectiveSettings, step: Step) -> None:
    """Loss, gradient and rewards."""
    # TRL takes the logarithms of exo_pair in float32
    bound = 1e-6 if step.logps.dtype == torch.float32 or "exo_pair" in settings.loss_type else 1e-9
    (expected, metrics), (actual, out) = trl_dpo(settings, step), ours(settings, step)
    (expected_grad,) = torch.autograd.grad(expected, step.logps)
    (actual_grad,) = torch.autograd.grad(actual, step.logps)
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=bound, atol=bound)
    for side, rewards in (("chosen", out.chosen_rewards), ("rejected", out.rejected_rewards)):
        if settings.needs_reference:
            assert rewards.mean().item() == pytest.approx(metrics[f"rewards/{side}"][0], abs=bound)
        logps = out.sequence_logps[: len(rewards)] if side == "chosen" else out.sequence_logps[len(rewards) :]
        if settings.ld_alpha is None:
            assert logps.mean().item() == pytest.approx(metrics[f"logps/{side}"][0], abs=1e-5)


def options(loss_type: str, **more: Any) -> ObjectiveSettings:
    smoothing = {"label_smoothing": 0.1} if loss_type in SMOOTHED else {}
    return ObjectiveSettings((loss_type,), beta=0.3, **smoothing | more)


@pytest.mark.parametrize("loss_type", PAIRS)
def test_every_objective_of_its_dpo_trainer(loss_type: str) -> None:
    assert_same(options(loss_type), make_step(7))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"])
def test_every_divergence(loss_type: str, divergence: str) -> None:
    # TRL clamps in float32 at most
    dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64
    assert_same(options(loss_type, f_divergence_type=divergence), make_step(7, dtype=dtype, scale=0.3))


@pytest.mark.parametrize("loss_type", [name for name in PAIRS if name not in ("hinge", "sft", "aot", "aot_unpaired")])
def test_wpo_weighting(loss_type: str) -> None:
    assert_same(options(loss_type, use_weighting=True), make_step(7))


@pytest.mark.parametrize("loss_type", [name for name in PAIRS if name != "sft"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_ld_weighting_of_policy_and_reference(loss_type: str, ld_alpha: float) -> None:
    assert_same(options(loss_type, ld_alpha=ld_alpha), make_step(7))


def test_weighted_sum() -> None:
    names = ("sigmoid", "bco_pair", "sft", "aot")
    assert_same(ObjectiveSettings(names, loss_weights=(0.8, 0.2, 1.5, 0.3)), make_step(7))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("loss_type", "trl_type"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_its_cpo_trainer(loss_type: str, trl_type: str, label_smoothing: float) -> None:
    step = make_step(7)
    settings = ObjectiveSettings((loss_type,), beta=2.0, label_smoothing=label_smoothing)
    self = trainer(settings, alpha=0.0)
    self.loss_type = trl_type
    sums = step.sums(step.logps)
    averaged = sums / torch.tensor(step.lengths) if loss_type == "simpo" else sums
    losses, *rewards = CPOTrainer.cpo_loss(self, *averaged.chunk(2))
    out = compute(step.batch, step.logps, None, settings)
    torch.testing.assert_close(out.losses, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack(rewards), torch.stack([out.chosen_rewards, out.rejected_rewards]))
    if loss_type == "simpo":
        assert out.token_loss is None
    else:
        torch.testing.assert_close(out.token_loss, -step.sums(step.logps)[:7].sum())


def test_its_orpo_trainer() -> None:
    step = make_step(7, dtype=torch.float32)
    settings = ObjectiveSettings(("orpo",), beta=0.3)
    means = step.sums(step.logps) / torch.tensor(step.lengths)
    losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer(settings), *means.chunk(2))
    out = compute(step.batch, step.logps, None, settings)
    torch.testing.assert_close(out.losses, -losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(rewards), torch.stack([out.chosen_rewards, out.rejected_rewards]))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_its_kto_trainer(loss_type: str) -> None:
    step = make_step(7, kind="unpaired")
    settings = ObjectiveSettings((loss_type,), beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    B = len(step.batch["label"])
    main = step.responses(range(B))
    kl = step.sums(step.logps)[B:], step.sums(step.ref_token_logps)[B:]
    self = trainer(settings, ref_model=stub(main.ref_token_logps, main), calculate_KL=loss_type == "kto")
    self.loss_type, models = loss_type, []
    self._compute_kl_logps = lambda model, batch: models.append(model) or kl[len(models) - 1].detach()
    mask = torch.nn.functional.pad((padded(torch.ones(main.M), main) > 0).long(), (1, 0))
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs["label"] = step.batch["label"]
    expected = KTOTrainer._compute_loss(self, stub(main.logps, main), inputs, False)
    actual, _ = ours(settings, step)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, step.logps)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


# What goes wrong in TRL 1.16 and does not here


def test_wpo_weighting_of_hinge() -> None:
    """There an in-place product destroys what the backward of relu needs."""
    settings, step = options("hinge", use_weighting=True), make_step(7)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(trl_dpo(settings, step)[0], step.logps)
    (expected,) = torch.autograd.grad((step.wpo_weights() * compute_losses(options("hinge"), step)).mean(), step.logps)
    (actual,) = torch.autograd.grad(ours(settings, step)[0], step.logps)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_wpo_weighting_of_sft() -> None:
    """There an in-place product is refused by an expanded tensor."""
    settings, step = options("sft", use_weighting=True), make_step(7)
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(settings, step)
    nll = -step.sums(step.logps)[:7]
    expected = (step.wpo_weights() * nll).sum() / sum(step.lengths[:7])
    torch.testing.assert_close(ours(settings, step)[0], expected, rtol=1e-12, atol=1e-12)


def compute_losses(settings: ObjectiveSettings, step: Step) -> Tensor:
    return compute(step.batch, step.logps, step.ref_token_logps, settings).losses


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_sorts_more_than_a_micro_batch(loss_type: str) -> None:
    """There micro-batches of one pair make it plain DPO; here they give what TRL gives for one batch."""
    settings, step = options(loss_type), make_step(7)
    whole = trl_dpo(settings, step)[0]
    alone = torch.stack([trl_dpo(settings, step.pairs([i]))[0] for i in range(7)]).mean()
    plain = ours(ObjectiveSettings(beta=0.3, label_smoothing=0.1), step)[0]
    torch.testing.assert_close(alone, plain)
    assert (whole - alone).abs() > 1e-3
    torch.testing.assert_close(step.in_micro_batches(settings, [1] * 7), whole, rtol=1e-12, atol=1e-12)


def test_label_smoothing_of_plain_dpo() -> None:
    """There it is ignored without a word."""
    step, smooth = make_step(7), ObjectiveSettings(label_smoothing=0.2)
    assert trl_dpo(smooth, step)[0] == trl_dpo(ObjectiveSettings(), step)[0]
    z = 0.1 * (step.sums(step.logps - step.ref_token_logps)[:7] - step.sums(step.logps - step.ref_token_logps)[7:])
    expected = -(0.8 * z.sigmoid().log() + 0.2 * (-z).sigmoid().log()).mean()
    torch.testing.assert_close(ours(smooth, step)[0], expected, rtol=1e-12, atol=1e-12)


def test_likelihood_is_averaged_over_all_tokens_of_the_step() -> None:
    """There every micro-batch has its own mean, whatever its number of tokens."""
    settings, step = options("sft"), make_step(7)
    whole = trl_dpo(settings, step)[0]
    parts = torch.stack([trl_dpo(settings, step.pairs([i]))[0] for i in range(7)]).mean()
    assert (parts - whole).abs() > 1e-2
    torch.testing.assert_close(step.in_micro_batches(settings, [1] * 7), whole, rtol=1e-12, atol=1e-12)

"""Where a reference comes from, how it follows the policy, and what its first loss must be."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from fastdpo.checks import check_first_loss, first_loss_is_known
from fastdpo.model import adapters
from fastdpo.reference import resolve
from fastdpo.reference.sync import SyncReference, check_sync, mix_into
from tests.helpers.trainers import tiny_llama


def peft(*names: str) -> Any:
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), options, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, options)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(generator=torch.Generator().manual_seed(len(key)))
    return model


IDS = torch.tensor([[1, 5, 9, 30]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Modes


def test_an_objective_without_a_reference_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("the policy was copied"))
    assert resolve.resolve_reference(model, None, needs_reference=False) is None


def test_a_reference_that_nothing_would_ask_is_refused() -> None:
    with pytest.raises(ValueError, match="ref_model is given, but the objective"):
        resolve.resolve_reference(tiny_llama(), tiny_llama(), needs_reference=False)
    with pytest.raises(ValueError, match="ref_adapter_name='x' is given, but the objective"):
        resolve.resolve_reference(peft("policy"), None, ref_adapter_name="x", needs_reference=False)


def test_a_named_second_adapter_is_the_reference() -> None:
    model = peft("policy", "frozen")
    model.set_adapter("frozen")
    expected = logits(model)
    model.set_adapter("policy")
    own = logits(model)
    assert resolve.resolve_reference(model, None, ref_adapter_name="frozen") is None
    with adapters.as_reference(model, "frozen"):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), own)
    assert not torch.equal(own, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".policy." in name for name in trained)


@pytest.mark.parametrize(
    ("model", "ref_model", "name", "message"),
    [
        (lambda: peft("policy"), None, "frozen", "'frozen' is no adapter of the model, which has ['policy']"),
        (tiny_llama, None, "frozen", "'frozen' is no adapter of the model, which has none"),
        (lambda: peft("policy", "frozen"), tiny_llama, "frozen", "both ref_model and ref_adapter_name='frozen'"),
        (lambda: peft("policy", "frozen"), None, "policy", "'policy' is the active adapter"),
        (lambda: peft("ref"), None, None, "ref_adapter_name='ref' is the active adapter"),
    ],
)
def test_an_adapter_that_cannot_serve_is_refused(model: Any, ref_model: Any, name: str | None, message: str) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        resolve.resolve_reference(model(), ref_model and ref_model(), ref_adapter_name=name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_keeping_a_reference_changes_no_weight(init: str) -> None:
    """These initialisations take their start from the base weights, and must not do so twice."""
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=init)
    model = get_peft_model(tiny_llama(), options)
    before = logits(model)
    adapters.keep_ref_adapter(model)
    assert torch.equal(logits(model), before)
    with adapters.as_reference(model):
        assert torch.equal(logits(model), before)
    assert model.peft_config["default"].init_lora_weights == init
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".default." not in name]


# TR-DPO


def test_mixing_is_that_of_trl() -> None:
    """`ref = alpha * policy + (1 - alpha) * ref`: the policy has the share alpha."""
    trl = pytest.importorskip("trl.trainer.callbacks")
    policy, ours = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p))
    theirs = copy.deepcopy(ours)
    start = ours.lm_head.weight.detach().clone()
    mix_into(ours, policy, 0.25)
    trl.SyncRefModelCallback._sync_target_model(policy, theirs, 0.25)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.lm_head.weight, 0.25 * policy.lm_head.weight + 0.75 * start)
    mix_into(ours, policy, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), policy.parameters(), strict=True))


def test_mixing_in_bfloat16_rounds_once() -> None:
    policy, reference = (nn.Linear(64, 64).to(torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        exact = torch.lerp(reference.weight.double(), policy.weight.double(), 0.3).to(torch.bfloat16)
        in_bfloat16 = reference.weight.mul(0.7).add(policy.weight, alpha=0.3)
    mix_into(reference, policy, 0.3)
    assert (reference.weight != exact).sum() * 20 < (in_bfloat16 != exact).sum()


def test_it_syncs_after_each_so_many_steps_as_trl() -> None:
    """At global steps every, 2 every, ...; the step just done counts."""
    trl = pytest.importorskip("trl.trainer.callbacks")
    Accelerator(cpu=True)  # TRL asks for its state
    policy, start = nn.Linear(2, 2), nn.Linear(2, 2)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    sync = SyncReference(ours, alpha=0.5, every=3)
    other = trl.SyncRefModelCallback(ref_model=theirs, accelerator=None)
    moved = []
    for step in range(1, 8):
        before = ours.weight.detach().clone()
        state = SimpleNamespace(global_step=step)
        sync.on_step_end(None, state, None, model=policy)
        args = SimpleNamespace(ref_model_sync_steps=3, ref_model_mixup_alpha=0.5)
        other.on_step_end(args, state, None, model=policy)
        torch.testing.assert_close(ours.weight, theirs.weight)
        moved.append(not torch.equal(before, ours.weight))
    assert [step for step, m in zip(range(1, 8), moved, strict=True) if m] == [3, 6]


def test_a_wrapped_policy_is_unwrapped() -> None:
    reference, policy = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapper = nn.Module()
    wrapper.module = policy
    SyncReference(reference, alpha=1.0, every=1).on_step_end(None, SimpleNamespace(global_step=1), None, model=wrapper)
    assert torch.equal(reference.weight, policy.weight)


def test_the_reference_is_in_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    kept = SyncReference(tiny_llama(), alpha=0.5, every=3)
    kept.save(tmp_path / "checkpoint-6")
    other = SyncReference(tiny_llama(), alpha=0.5, every=3)
    with torch.no_grad():
        for p in other.ref_model.parameters():
            p.add_(1.0)
    other.load(tmp_path / "checkpoint-6")
    assert all(
        torch.equal(a, b) for a, b in zip(other.ref_model.parameters(), kept.ref_model.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="was not saved with sync_ref_model=True"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match="the weights of another model"):
        SyncReference(nn.Linear(2, 2), alpha=0.5, every=3).load(tmp_path / "checkpoint-6")


def test_a_sync_with_peft_is_refused() -> None:
    check_sync(tiny_llama(), tiny_llama())
    with pytest.raises(ValueError, match="sync_ref_model=True needs a reference with weights of its own"):
        check_sync(peft("policy"), None)


def test_a_reference_of_other_weights_cannot_follow() -> None:
    """It would fail at the first sync, hours later, or broadcast."""
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is \(200, 48\) in ref_model and \(331, 48\) in the model"
    ):
        check_sync(tiny_llama(), tiny_llama(vocab_size=200))
    with pytest.raises(
        ValueError, match=r"model.layers.2.\S+ is \(48, 48\) in ref_model and not in the model, 9 in all"
    ):
        check_sync(tiny_llama(), tiny_llama(num_hidden_layers=3))
    with pytest.raises(
        ValueError, match=r"model.layers.1.\S+ is not in ref_model and \(48, 48\) in the model, 9 in all"
    ):
        check_sync(tiny_llama(), tiny_llama(num_hidden_layers=1))


# The first loss


def check_loss(loss: float, dtype: torch.dtype, *, precomputed: bool = False, largest_reward: float = 0.0) -> None:
    losses = torch.tensor([loss], dtype=torch.float64)
    check_first_loss(losses, torch.tensor([0.0, -largest_reward]), dtype, precomputed=precomputed)


@pytest.mark.parametrize(
    ("dtype", "precomputed", "off"),
    [
        (torch.float32, False, 2e-6),
        (torch.bfloat16, False, 2e-3),
        (torch.float32, True, 2e-4),
        (torch.float16, True, 4e-2),
        (torch.float32, False, math.nan),
        (torch.float32, False, math.inf),
    ],
)
def test_a_first_loss_that_is_not_ln_2_stops(dtype: torch.dtype, precomputed: bool, off: float) -> None:
    with pytest.raises(ValueError, match=r"must be ln 2 = 0\.6931472.*The reference is not what it seems"):
        check_loss(math.log(2) + off, dtype, precomputed=precomputed)
    with pytest.raises(ValueError, match="Nothing has been trained"):
        check_loss(math.log(2) - off, dtype, precomputed=precomputed)


def test_a_first_loss_of_ln_2_passes() -> None:
    check_loss(float(torch.tensor(math.log(2))), torch.float32)
    check_loss(math.log(2) + 5e-4, torch.bfloat16)
    check_loss(math.log(2) + 5e-5, torch.float32, precomputed=True)
    check_loss(math.log(2) + 2e-5, torch.float32, largest_reward=200.0)  # 1000 tokens of 2 nats at beta 0.1
    with pytest.raises(ValueError, match="within 1e-06 in float32"):
        check_loss(math.log(2) + 2e-6, torch.float32, largest_reward=5.0)
    with pytest.raises(ValueError, match="within 2e-05 in float32"):
        check_loss(math.log(2) + 3e-5, torch.float32, largest_reward=200.0)


def test_trl_s_stale_reference_would_be_found() -> None:
    """0.690245: the loss of a reference that was read again from disk after the policy had been edited."""
    with pytest.raises(ValueError, match=r"the first loss is 0\.6902450"):
        check_loss(0.690245, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"loss_type": ["robust"]}, True),
        ({"loss_type": ["ipo"]}, False),
        ({"loss_type": ["sigmoid", "sft"]}, False),
        ({"ref_is_policy": False}, False),
        ({"loss_weights": [2.0]}, False),
        ({"loss_weights": [1.0]}, True),
        ({"columns": ["prompt_ids", "margin"]}, False),
        ({"columns": ["weight"]}, False),
        ({"columns": ["beta"]}, True),
        ({"use_weighting": True}, False),
    ],
)
def test_when_the_first_loss_is_known(changes: dict[str, Any], known: bool) -> None:
    options: dict[str, Any] = {"loss_type": ["sigmoid"], "ref_is_policy": True} | changes
    assert first_loss_is_known(options.pop("loss_type"), **options) is known

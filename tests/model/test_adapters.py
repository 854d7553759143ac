"""Every kind of adapter that PEFT has: it trains on packed batches with an exact reference, or is refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model import adapters
from fastdpo.model.adapters import wrap_adapter
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.reference import resolve
from fastdpo.reference.fingerprint import fingerprint
from tests.helpers.tiny import PAIRS, make_model, stock_logps
from tests.helpers.trainers import losses, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of settings that are meant here

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, dict[str, Any]] = {  # but for BOFT, which compiles an extension, and AdaMSS, which needs scikit-learn
    "ADALORA": QV | {"total_step": 10},
    "BEFT": QV,
    "C3A": QV | {"block_size": 8},  # its start is random
    "DEFT": QV,
    "DELORA": QV,
    "FOURIERFT": QV | {"n_frequency": 20},  # its start is random
    "FROD": QV,
    "GLORA": QV,
    "GRALORA": QV,
    "HIRA": QV,
    "HRA": QV,
    "IA3": QV | {"feedforward_modules": []},
    "LILY": QV,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": QV,
    "LOKR": QV,
    "MISS": QV | {"r": 8},
    "OFT": QV,
    "OSF": QV,
    "PEANUT": QV,
    "PSOFT": QV | {"r": 4},
    "PVERA": QV,
    "RANDLORA": QV,
    "ROAD": QV | {"group_size": 8},
    "SHIRA": QV | {"r": 4},
    "SUPERTUNING": QV,
    "TINYLORA": QV,
    "TRAINABLE_TOKENS": {"token_indices": [*range(3, 60)]},
    "UNILORA": QV,  # its start is random
    "VBLORA": QV | {"vector_length": 8, "num_vectors": 8, "topk": 2},  # its start is random
    "VERA": QV,
    "WAVEFT": QV | {"n_frequency": 64},
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "target_parameters": {"target_parameters": ["k_proj.weight"]},
    "tokens": {"trainable_token_indices": [*range(3, 60)]},
}
CASES = [*KINDS, *(f"LORA-{name}" for name in LORA)]


def config_of(case: str) -> Any:
    kind, _, variant = case.partition("-")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"this PEFT has no {kind}")
    options = {"r": 4, "target_modules": ["q_proj"]} | LORA[variant] if variant else KINDS[kind]
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)


def base_model(**overrides: Any) -> Any:
    return make_model("llama", num_key_value_heads=4, **overrides).eval()


BATCH = shared_prefix_batch(PAIRS)


@torch.no_grad()
def score(model: Any) -> Tensor:
    logps: Tensor = model(**BATCH).logps
    return logps


@torch.no_grad()
def score_reference(model: Any) -> Tensor:
    with adapters.as_reference(model):
        return score(model)


def step(model: Any) -> list[str]:
    """One step of gradient descent; names of the weights that it changed."""
    model.zero_grad()
    model(**BATCH).logps.square().sum().backward()
    changed = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p.requires_grad:
                p.sub_(0.3 * p.grad / p.grad.abs().max().clamp(min=1e-9))
    model.zero_grad()
    return changed


@pytest.fixture(scope="module")
def base_logps() -> Tensor:
    model = base_model()
    patch_forward(model)
    return score(model)


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_trains_with_an_exact_reference(case: str, base_logps: Tensor) -> None:
    torch.manual_seed(0)
    model = wrap_adapter(base_model(), config_of(case), keeps_reference=True).eval()
    assert resolve.resolve_reference(model, None) is None
    patch_forward(model)
    start, reference = score(model), score_reference(model)
    if adapters.has_ref_adapter(model):
        assert torch.equal(reference, start)
    else:
        assert torch.equal(reference, base_logps)
        with adapters.as_reference(model):
            assert fingerprint(model)[0] == fingerprint(base_model())[0]
        torch.testing.assert_close(start, base_logps, rtol=1e-4, atol=1e-4)
    assert step(model)
    assert torch.equal(score_reference(model), reference)
    assert not torch.equal(score(model), start)
    with torch.no_grad():  # the adapter in a packed batch is what it is on a sequence alone
        torch.testing.assert_close(score(model), stock_logps(model, PAIRS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if case != "LILY"])
def test_a_trained_adapter_is_its_own_reference(case: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base_model(), config_of(case)).eval()
    patch_forward(model)
    step(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    start = score(model)
    wrap_adapter(model, None, keeps_reference=True)
    model.eval()
    assert resolve.resolve_reference(model, None) is None
    assert torch.equal(score(model), start)
    assert torch.equal(score_reference(model), start)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    step(model)
    assert torch.equal(score_reference(model), start)
    assert not torch.equal(score(model), start)


def test_an_adapter_that_cannot_be_copied_is_named() -> None:
    """LILY's layers share what they train."""
    model = get_peft_model(base_model(), config_of("LILY")).eval()
    patch_forward(model)
    step(model)
    with pytest.raises(ValueError, match=r"^the adapter \(LilyConfig\) changes the model before .*; pass ref_model$"):
        wrap_adapter(model, None, keeps_reference=True)


REFUSED: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "POLY": QV,
    "SHADOW": {},
    "LORA": QV | {"alora_invocation_tokens": [5]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_more_than_layers_is_refused_before_anything_is_loaded(kind: str, make: Callable[..., Any]) -> None:
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"this PEFT has no {kind}")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **REFUSED[kind])
    with pytest.raises(
        ValueError, match=rf"^{type(config).__name__} cannot be trained on packed batches: .*LoraConfig$"
    ):
        make("no/such/model", peft_config=config)


def test_a_model_that_came_with_a_prompt_is_refused(make: Callable[..., Any]) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_TUNING"](task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PrefixTuningConfig cannot be trained on packed batches: it puts virtual"):
        make(get_peft_model(tiny_llama(), config))


def test_a_config_that_is_none_or_does_not_fit_is_named(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"peft_config must be a peft.PeftConfig, such as .*, got dict"):
        make(peft_config={"r": 4})
    with pytest.raises(ValueError, match="nosuch"):
        make(peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["nosuch"]))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_no_part_of_the_adapter(bias: str, make: Callable[..., Any]) -> None:
    """Switching the adapter off leaves them as they are."""

    def model() -> Any:
        return make_model("qwen2", vocab_size=331)

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias=bias)
    with pytest.raises(ValueError, match=r"q_proj.base_layer.bias.* pass ref_model, or freeze them \(bias='none'\)"):
        make(model(), peft_config=config)
    trainer = make(model(), ref_model=model(), peft_config=config, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{"trainable_token_indices": [3, 9, 40, 41, 42]}, {"modules_to_save": ["lm_head"]}])
def test_the_trainer_s_reference_is_the_base_model(
    tied: bool,
    options: dict[str, Any],
    make: Callable[..., Any],
) -> None:
    full = make(tiny_llama(tie_word_embeddings=tied))
    batch = next(iter(full.get_train_dataloader()))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    trainer = make(tiny_llama(tie_word_embeddings=tied), peft_config=config, learning_rate=1e-2)
    expected = full._reference_logps(batch)
    assert torch.equal(trainer._reference_logps(batch), expected)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert torch.equal(trainer._reference_logps(batch), expected)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


def test_what_the_user_froze_stays_frozen() -> None:
    """PEFT trains the whole adapter again when it is switched on."""
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    resolve.resolve_reference(model, None)
    with adapters.as_reference(model):
        pass
    adapters.keep_ref_adapter(model)
    with adapters.as_reference(model):
        pass
    assert all(p.requires_grad == ("lora_B.default" in name) for name, p in model.named_parameters())


def test_an_adapter_loaded_for_inference_is_named() -> None:
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape("from_pretrained(..., is_trainable=True)")):
        resolve.resolve_reference(model, None)


def test_dora_is_refused_with_zero3() -> None:
    plain = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapters.check_zero3(plain)
    adapters.check_zero3(base_model())
    plain.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], use_dora=True))
    with pytest.raises(ValueError, match=re.escape("use_dora (adapter 'second') is not supported with ZeRO-3")):
        adapters.check_zero3(plain)

"""`use_liger_kernel`: Liger's kernels in the layers, fastdpo's head on top, in the policy and in its reference."""

import math
import sys
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks.studies import liger_families
from fastdpo import DPOConfig
from fastdpo.compat import liger
from fastdpo.model.scoring_forward import is_patched
from fastdpo.trainer import dpo_trainer
from tests.helpers.tiny import make_model
from tests.helpers.trainers import losses, tiny_llama

CALLS: list[int] = []


def of_liger(function: Any) -> FunctionType:
    function.__module__ = "liger_kernel.fake"
    return function  # type: ignore[no-any-return]


@of_liger
def norm_forward(self: Any, hidden: Tensor) -> Tensor:
    CALLS.append(id(self))
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


@of_liger
def lce_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("Liger's own head is on")


def apply_to_instance(
    model: Any, *, rms_norm: bool = True, fused_linear_cross_entropy: bool = True, cross_entropy: bool = False
) -> None:
    """What liger-kernel 0.8 does to an instance, in the two places that matter here."""
    assert not cross_entropy
    if fused_linear_cross_entropy:
        model.forward = MethodType(lce_forward, model)
    for layer in model.model.layers if rms_norm else ():
        vars(layer.input_layernorm)["forward"] = MethodType(norm_forward, layer.input_layernorm)


def apply_known_options(model: Any, **options: bool) -> None:
    """Liger drops the options that it has not for a model, without a word."""
    apply_to_instance(model, **{name: given for name, given in options.items() if name != "swigu"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that patches as Liger does, with kernels that run anywhere."""
    package, transformers, patches = (
        ModuleType(f"liger_kernel{name}") for name in ("", ".transformers", ".transformers.monkey_patch")
    )
    package.transformers, transformers.monkey_patch = transformers, patches  # type: ignore[attr-defined]
    transformers._apply_liger_kernel_to_instance = apply_known_options  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_instance}  # type: ignore[attr-defined]
    for module in (package, transformers, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger.liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    CALLS.clear()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_trains_with_our_head_and_liger_s_layers(adapter: bool, make: Callable[..., Any]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]) if adapter else None
    plain = make(peft_config=config)
    trainer = make(peft_config=config, use_liger_kernel=True)
    assert CALLS  # the self-check ran the model as it trains
    for one in (plain, trainer):
        one.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    models = [trainer.model.get_base_model()] if adapter else [trainer.model, trainer.ref_model]
    for model in models:
        assert is_patched(model)
        norms = [layer.input_layernorm for layer in model.model.layers]
        assert {id(norm) for norm in norms} <= set(CALLS)
        assert all(norm.forward.__self__ is norm for norm in norms)


@pytest.mark.usefixtures("installed")
def test_what_the_user_chose_is_kept_but_for_the_head(
    make: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {"rms_norm": False, "fused_linear_cross_entropy": True, "swigu": False}
    trainer = make(use_liger_kernel=True, liger_kernel_config=config, max_steps=1)
    assert trainer.args.liger_kernel_config == {
        "rms_norm": False,
        "swigu": False,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }
    assert "liger_kernel_config: fused_linear_cross_entropy is switched off: fastdpo" in caplog.text
    said = "liger_kernel_config: swigu has no effect on LlamaForCausalLM, for which Liger has the options rms_norm"
    assert said in caplog.text
    trainer.train()
    assert not CALLS
    assert config["fused_linear_cross_entropy"]


@pytest.mark.usefixtures("installed")
def test_a_reference_that_is_given_gets_it_too(make: Callable[..., Any]) -> None:
    reference = tiny_llama()
    make(ref_model=reference, use_liger_kernel=True, max_steps=1).train()
    assert {id(layer.input_layernorm) for layer in reference.model.layers} <= set(CALLS)


@pytest.mark.usefixtures("installed")
def test_a_model_without_kernels_is_told(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    make(make_model("qwen2", vocab_size=331), use_liger_kernel=True, max_steps=1)
    assert "use_liger_kernel has no effect: Liger has no kernels for Qwen2ForCausalLM" in caplog.text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "error", [ImportError("cannot import X"), NotImplementedError("no rope"), TypeError("no tower")]
)
def test_what_liger_cannot_change_is_refused(
    error: Exception, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in these ways with models that it knows by name, or with options that it has not for them."""

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", fail)
    with pytest.raises(ValueError, match=f"Liger cannot change LlamaForCausalLM: {error}; set use_liger_kernel=False"):
        make(use_liger_kernel=True)


@pytest.mark.usefixtures("installed")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("wrapped", [False, True], ids=["new", "wrapped before"])
def test_an_adapter_of_a_norm_is_refused(wrapped: bool, make: Callable[..., Any]) -> None:
    """Liger would replace the forward of PEFT's layer, and nothing would train."""
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
    model = get_peft_model(tiny_llama(), config) if wrapped else tiny_llama()
    with pytest.raises(ValueError, match=r"forward of model.layers.0.input_layernorm, which an adapter wraps"):
        make(model, peft_config=None if wrapped else config, use_liger_kernel=True)


def test_without_the_package_the_command_is_given(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a model is loaded."""
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match=r"^use_liger_kernel=True needs .*: pip install 'fastdpo\[liger\]'$"):
        make("no/such/model", use_liger_kernel=True)


@pytest.mark.usefixtures("installed")
def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="use_liger_kernel=True needs a GPU"):
        liger.prepare(DPOConfig(use_cpu=True, use_liger_kernel=True))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The package itself; return a function that makes a model whose modeling module is as before after the test."""
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        liger_families.interpret(monkeypatch.setattr)

    def make(family: str, **changes: Any) -> Any:
        model = make_model(family, num_hidden_layers=1, **changes)
        module = sys.modules[type(model).__module__]
        for name, value in vars(module).items():
            if not name.startswith("__"):
                monkeypatch.setattr(module, name, value)
        return model

    return make


def put_into(model: Any, **config: bool) -> None:
    args = DPOConfig(use_cpu=not torch.cuda.is_available(), use_liger_kernel=True, liger_kernel_config=config)
    liger.prepare(args)
    liger.apply(model, args)


KINDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen3": ({}, {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 1}),  # with norms of queries and keys
    "gemma": ({}, {"LigerGEGLUMLP": 1, "LigerRMSNorm": 3}),  # adds 1 to the weights of norms
    "phi3": ({"partial_rotary_factor": 0.5}, {"LigerPhi3SwiGLUMLP": 1, "LigerRMSNorm": 3}),
    "mixtral": ({}, {"LigerExperts": 1, "LigerRMSNorm": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_kernels_of_other_families(family: str, package: Callable[..., Any], device: torch.device) -> None:
    changes, kinds = KINDS[family]
    found = liger_families.compare(package(family, **changes).to(device))
    assert found["replaced"] == kinds
    assert found["logps"] < 1e-5
    assert found["gradients"] < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "kernel", "activation"),
    [
        ("granite", {"hidden_act": "gelu"}, "swiglu", "silu"),
        ("gemma2", {"hidden_activation": "gelu"}, "geglu", "gelu_pytorch_tanh"),
    ],
)
def test_another_activation_is_refused(
    family: str, changes: dict[str, Any], kernel: str, activation: str, package: Callable[..., Any]
) -> None:
    model, other = (package(family, **changes) for _ in range(2))
    said = rf"compute {activation} in model.layers.0.mlp of \w+, whose own .*GELU.*; set .*=\{{'{kernel}': False\}}"
    with pytest.raises(ValueError, match=said):
        put_into(model)
    put_into(other, **{kernel: False})


@pytest.mark.slow
def test_the_package_itself(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All its kernels for Llama, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("liger_kernel")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger changes the module; that is undone after
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        liger_families.interpret(monkeypatch.setattr)
    # few tokens and no self-check, because the interpreter runs five programs for each token of a forward
    monkeypatch.setattr(dpo_trainer, "agreed_layout", lambda trainer, layout, *_, **__: layout)
    short = [
        {"prompt_ids": [1, 7], "chosen_ids": [9, 10, 2], "rejected_ids": [41, 2]},
        {"prompt_ids": [1, 60, 3, 8], "chosen_ids": [61, 2], "rejected_ids": [4, 90, 2]},
    ]
    data = Dataset.from_list(short)
    settings = {"use_cpu": on_cpu, "max_steps": 2, "per_device_train_batch_size": 1, "data": data}
    plain = make(tiny_llama(num_hidden_layers=1), **settings)
    plain.train()
    trainer = make(tiny_llama(num_hidden_layers=1), use_liger_kernel=True, **settings)
    for model in (trainer.model, trainer.ref_model):
        assert sum(map(liger._is_replaced, model.modules())) == 4  # three norms and an MLP
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-4)

"""Check PEFT adapters, add one to a policy, and let a policy without its adapter answer as the reference."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import is_peft_available

from fastdpo.model.body_and_head import can_probe
from fastdpo.model.scoring_forward import evaluating

logger = logging.getLogger("fastdpo")

REF_ADAPTER = "ref"


def wrap_adapter(model: Any, peft_config: Any | None, *, keeps_reference: bool) -> Any:
    """Return the policy with its adapter: a new one made from `peft_config`, or the one that it came with.

    `keeps_reference` keeps a copy of the adapter as "ref" (see `keep_ref_adapter`) if the policy came with it, or if
    the new adapter changes the model before training (PiSSA, OLoRA, LoftQ, random).

    Raises:
        ValueError: both are given, or the adapter can't be trained on packed batches.
        ImportError: `peft_config` is given and PEFT is not installed.
    """
    if peft_config is not None and (is_peft_model(model) or is_in_place(model)):
        raise ValueError("model already has an adapter; pass peft_config or a model with an adapter, not both")
    if is_in_place(model):
        _check_in_place(model)
    if is_peft_model(model):
        check_adapter(model.active_peft_config)
        if keeps_reference:
            keep_ref_adapter(model)
        return model
    if peft_config is None:
        return model
    if not is_peft_available():
        raise ImportError("peft_config needs the peft library: pip install 'fastdpo[peft]'")
    return add_adapter(model, peft_config, keeps_reference=keeps_reference)


def lora_config(*, target_modules: list[str] | None, **options: Any) -> Any:
    """Return the `peft.LoraConfig` of a new adapter of a causal LM; `target_modules` None leaves them to PEFT."""
    from peft import LoraConfig

    # PEFT reads this word, outside of a list, as all linear layers but the head
    modules: Any = "all-linear" if target_modules == ["all-linear"] else target_modules
    return LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **options)


def is_peft_model(model: Any) -> bool:
    """Whether `model` is wrapped by PEFT."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_in_place(model: Any) -> bool:
    """Whether `model.add_adapter` of transformers put an adapter into the model, without PEFT's wrapper."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _check_in_place(model: Any) -> None:
    """Refuse an adapter that packed batches can't train, and trained weights that would not be saved with it."""
    for name in model.active_adapters():
        check_adapter(model.peft_config[name])
    saved = {tensor.data_ptr() for tensor in model.get_adapter_state_dict().values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"weights outside the model's adapter are trained ({', '.join(lost[:3])}, {len(lost)} in all), but only "
            "what model.add_adapter added would be saved; freeze them, or pass peft_config with modules_to_save instead"
        )


def load_in_place(model: Any, folder: Path | str) -> None:
    """Read the adapter of a checkpoint into a model for which `is_in_place` holds.

    Raises:
        ValueError: the checkpoint does not hold this adapter.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder) / "adapter_model.safetensors"
    saved = {name.removeprefix("base_model.model."): t for name, t in load_file(path).items()} if path.is_file() else {}
    own = model.get_adapter_state_dict()
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
        raise ValueError(
            f"{folder} does not hold the adapter {model.active_adapters()} of this {type(model).__name__}: its "
            f"{len(saved)} tensors are not the adapter's {len(own)}"
        )
    set_peft_model_state_dict(model, saved, adapter_name=model.active_adapters()[0])


def is_saved(model: Any, name: str, tensor: Tensor) -> bool:
    """Whether a tensor of the model's state, with this name, may belong into the files that `save_pretrained` writes.

    With PEFT, these are the tensors of adapters, those that are trained, and the embeddings, but no others of the base.
    """
    if not is_peft_model(model) or tensor.requires_grad or not model.peft_config.keys().isdisjoint(name.split(".")):
        return True
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(tensor is each for part in embeddings if part is not None for each in part.parameters())


def has_ref_adapter(model: Any) -> bool:
    """Whether `model` came with an adapter called "ref"."""
    return is_peft_model(model) and REF_ADAPTER in model.peft_config


def check_ref_adapter(model: Any, ref_model: Any, name: str) -> None:
    """Refuse a `ref_adapter_name` that cannot be the reference."""
    found = list(model.peft_config) if is_peft_model(model) else []
    if name not in found:
        raise ValueError(f"ref_adapter_name={name!r} is no adapter of the model, which has {found or 'none'}")
    if ref_model is not None:
        raise ValueError(f"both ref_model and ref_adapter_name={name!r} are given; leave one out")
    if name in model.active_adapters:
        raise ValueError(
            f"ref_adapter_name={name!r} is the active adapter, which is trained; call model.set_adapter with the "
            "other, or pass ref_model"
        )


def check_adapter(config: Any) -> None:
    """Refuse an adapter that cannot be trained on packed batches.

    Args:
        config: a `peft.PeftConfig`; None for a model without an adapter.

    Raises:
        ValueError: `config` is not a `peft.PeftConfig`, or the adapter's effect on a token depends on more than its
            layers' inputs at that token.
    """
    if config is None:
        return
    name = type(config).__name__
    if not hasattr(config, "peft_type"):
        raise ValueError(f"peft_config must be a peft.PeftConfig, such as peft.LoraConfig(), got {name}")
    if config.is_prompt_learning:
        reason = "it puts virtual tokens or past keys and values before the prompt"
    elif config.is_adaption_prompt:
        reason = "it adds a prompt to the attention of a whole sequence"
    elif config.peft_type == "XLORA":
        reason = "it weighs its adapters by a forward of its own over each sequence"
    elif config.peft_type == "POLY":
        reason = "it reads a task id beside each sequence"
    elif config.peft_type == "SHADOW":
        reason = "its layers exchange more than hidden states"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "alora_invocation_tokens switches it on at a position of each sequence"
    else:
        return
    raise ValueError(
        f"{name} cannot be trained on packed batches: {reason}; use an adapter of the layers, such as peft.LoraConfig"
    )


def check_zero3(model: Any) -> None:
    """Refuse DoRA, whose layers ZeRO-3 can't recompute in the backward: it has let their weights go by then."""
    for name, config in model.peft_config.items() if is_peft_model(model) else ():
        if getattr(config, "use_dora", False):
            raise ValueError(
                f"use_dora (adapter {name!r}) is not supported with ZeRO-3; use FSDP2, ZeRO-2 or plain LoRA"
            )


def add_adapter(model: Any, config: Any, *, keeps_reference: bool) -> Any:
    """Return the model in PEFT's wrapper with a new adapter.

    Args:
        model: a causal LM.
        config: a `peft.PeftConfig`.
        keeps_reference: make sure that the policy can answer as the reference. If the new adapter does not change the
            logits yet (always so for plain LoRA, tried on a few tokens otherwise), the reference is the policy without
            the adapter; if it does, a copy of the adapter is kept for the reference.

    Raises:
        ValueError: PEFT cannot add the adapter, or nothing can serve as the reference.
    """
    check_adapter(config)
    is_plain = _is_lora(config) and config.init_lora_weights in (True, "gaussian")
    base = None if is_plain or not can_probe(model) else _logits(model)
    try:
        model = with_adapter(model, config)
    except (AttributeError, KeyError, TypeError) as error:  # what PEFT raises for settings that don't fit the model
        raise ValueError(f"PEFT cannot add {type(config).__name__} to {type(model).__name__}: {error}") from error
    trained, total = model.get_nb_trainable_parameters()
    logger.info("adapter: %s of %s parameters are trained", f"{trained:,}", f"{total:,}")
    if keeps_reference and not is_plain:
        starts_at_base = [base is not None and _starts_at(model, base)]
        if torch.distributed.is_initialized():  # where weights are sharded, only the first process has them all
            torch.distributed.broadcast_object_list(starts_at_base)
        if not starts_at_base[0]:
            keep_ref_adapter(model)
    return model


def with_adapter(model: Any, config: Any) -> Any:
    """Return the model in PEFT's wrapper with a new adapter, unchecked.

    Raises:
        ValueError: the config names no modules, and PEFT has no choice of its own for this model.
    """
    from peft import get_peft_model

    try:
        with peft_is_older():
            return get_peft_model(model, config)
    except ValueError as error:
        if "specify `target_modules`" not in str(error):
            raise
        raise ValueError(
            f"PEFT does not know which modules of a {model.config.model_type!r} model should get an adapter: name them "
            "in target_modules (lora_target_modules on the command line), or set it to all-linear"
        ) from error


@contextmanager
def peft_is_older() -> Iterator[None]:
    """Hide the warning that PEFT uses a property's name from an earlier transformers; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def keep_ref_adapter(model: Any) -> None:
    """Copy a PEFT model's active adapter to a frozen one named "ref", which `as_reference` then uses.

    Raises:
        ValueError: PEFT cannot hold a copy of this kind of adapter.
    """
    name = model.active_adapter
    config = copy.deepcopy(model.peft_config[name])
    start = None if _is_lora(config) or not can_probe(model) else _logits(model)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA, OLoRA and others would take their start from the base weights again
    config.inference_mode = True  # AdaLoRA takes a second adapter only if that is frozen
    failure = "the copy answers differently"
    try:
        with warnings.catch_warnings(), _keeping_flags(model):
            warnings.filterwarnings("ignore", message=".*adapter")
            model.add_adapter(REF_ADAPTER, config)
        _copy_adapter(model, name)
        with as_reference(model):
            is_copy = start is None or torch.equal(_logits(model), start)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        failure, is_copy = str(error), False
    if not is_copy:
        raise ValueError(
            f"the adapter ({type(config).__name__}) changes the model before training, and PEFT cannot keep a copy of "
            f"it to be the reference ({failure}); pass ref_model"
        )
    logger.info("reference: adapter %r, a copy of %r as passed", REF_ADAPTER, name)


@torch.no_grad()
def _copy_adapter(model: Any, name: str) -> None:
    """Copy the tensors of the adapter `name`, which have this name in their path, to the adapter "ref"."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for key, tensor in tensors.items():
        parts = key.split(".")
        if name in parts:
            other = tensors.get(".".join(REF_ADAPTER if part == name else part for part in parts))
            if other is not None:
                other.data.copy_(tensor.data)


def _is_lora(config: Any) -> bool:
    """Whether the adapter is plain LoRA, whose effect at the start is known and which PEFT can copy."""
    from peft import LoraConfig

    return type(config) is LoraConfig


def _starts_at(model: Any, base: Tensor) -> bool:
    """Whether the logits are `base` with a new adapter, up to float32 rounding, and exactly `base` without it."""
    on = _logits(model)
    with as_reference(model):
        off = _logits(model)
    bound = 16 * torch.finfo(torch.float32).eps * (1 + float(base.abs().max()))
    return torch.equal(off, base) and float((on - off).abs().max()) <= bound


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Return the logits `[1, 8, V]` of eight fixed tokens."""
    device = next(model.parameters()).device
    with evaluating(model):
        logits: Tensor = model(input_ids=torch.arange(1, 9, device=device)[None], use_cache=False).logits
    return logits


def trained_without_adapter(model: Any) -> list[str]:
    """Return the names of trained weights that still take part with the adapters off; PEFT freezes all others then."""
    with warnings.catch_warnings(), _keeping_flags(model):
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
        with model.disable_adapter():
            return [name for name, p in model.get_base_model().named_parameters() if p.requires_grad]


@contextmanager
def _keeping_flags(model: nn.Module) -> Iterator[None]:
    """Restore every `requires_grad` after the block, because PEFT sets it for all of an adapter that it switches on."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def as_reference(model: Any, adapter: str | None = None) -> Iterator[None]:
    """Inside the block, a PEFT model answers as the reference: with `adapter` if it has that one, else with none.

    `adapter` None stands for "ref"; if training has a `ref_adapter_name`, pass that name.
    """
    adapter = REF_ADAPTER if adapter is None else adapter
    with _keeping_flags(model):
        if adapter not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        previous = model.active_adapter
        model.set_adapter(adapter)
        try:
            yield
        finally:
            model.set_adapter(previous)

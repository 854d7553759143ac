"""The reference policy: where it comes from, and how to make a model answer as it."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import is_peft_available

logger = logging.getLogger("fastdpo")

REF_ADAPTER = "ref"


def is_peft_model(model: Any) -> bool:
    """Whether `model` is wrapped by PEFT."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def has_ref_adapter(model: Any) -> bool:
    """Whether `model` came with an adapter called "ref"."""
    return is_peft_model(model) and REF_ADAPTER in model.peft_config


def resolve_reference(
    model: Any,
    ref_model: PreTrainedModel | None,
    *,
    ref_adapter_name: str | None = None,
    needs_reference: bool = True,
    copies: bool = True,
) -> PreTrainedModel | None:
    """The frozen model to compare with; None where there is none, or where the policy serves, through `as_reference`.

    - a model given: used as it is;
    - PEFT, none given: the policy with its adapters off. An adapter that was trained before, or that does not start
      as the identity, is copied to one named "ref" by `keep_ref_adapter`, so that training starts at the reference;
    - PEFT with an adapter called `ref_adapter_name`: the policy with that one instead of its own;
    - full fine-tuning, none given: a copy of the policy as passed, never read from disk again;
      (`copies` False: nothing, for all that is asked of the reference is known before training);
    - an objective that `needs_reference` not: nothing is copied or kept.

    Call it before anything patches `model`.

    Raises:
        ValueError: `ref_model` is `model`, weights outside the adapters train and no reference is given, the named
            adapter can't serve, or a reference is given that nothing would ask.
    """
    if not needs_reference:
        if ref_model is not None or ref_adapter_name is not None:
            given = "ref_model" if ref_model is not None else f"ref_adapter_name={ref_adapter_name!r}"
            raise ValueError(f"{given} is given, but the objective (loss_type) uses no reference; leave it out")
        return None
    if ref_adapter_name is None and ref_model is None and has_ref_adapter(model):
        ref_adapter_name = REF_ADAPTER
    if ref_adapter_name is not None:
        _check_ref_adapter(model, ref_model, ref_adapter_name)
    if ref_model is model:
        raise ValueError("ref_model is the same object as model, so it would be trained too; leave it out")
    if ref_model is None and is_peft_model(model):
        switched_off = (model.base_model.prefix, ".modules_to_save.")  # what `disable_adapter` undoes
        trained = [
            name for name, p in model.named_parameters() if p.requires_grad and not any(s in name for s in switched_off)
        ]
        if trained:
            raise ValueError(
                f"weights outside the adapters are trained ({', '.join(trained[:3])}, {len(trained)} in all), so the "
                "policy without its adapters is not the reference; pass ref_model"
            )
        return None
    if ref_model is None:
        if not copies:
            return None
        ref_model = copy.deepcopy(model)
        logger.info("reference: a frozen copy of the policy as passed")
    ref_model.requires_grad_(False)
    ref_model.eval()
    return ref_model


def _check_ref_adapter(model: Any, ref_model: Any, name: str) -> None:
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


def keep_ref_adapter(model: Any) -> None:
    """Copy a PEFT model's active adapter to a frozen one named "ref", which `as_reference` then uses."""
    name = model.active_adapter
    config = copy.deepcopy(model.peft_config[name])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA, OLoRA and others would take their start from the base weights again
    model.add_adapter(REF_ADAPTER, config)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            model.get_parameter(key.replace(f".{name}.", f".{REF_ADAPTER}.")).data.copy_(parameter.data)
    logger.info("reference: adapter %r, a copy of %r as passed", REF_ADAPTER, name)


@contextmanager
def as_reference(model: Any, adapter: str | None = None) -> Iterator[None]:
    """Within it a PEFT model answers as the reference: with its `adapter` if it has one, else with none.

    `adapter` is "ref" if None; where training has a `ref_adapter_name`, give that.
    """
    adapter = REF_ADAPTER if adapter is None else adapter
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

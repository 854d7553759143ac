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


def resolve_reference(model: Any, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
    """The frozen model to compare with; None where the policy itself serves, through `as_reference`.

    - a model given: used as it is;
    - PEFT, none given: the policy with its adapters off. An adapter that was trained before is copied to one named
      "ref" by `keep_ref_adapter`, so that training starts at the reference;
    - full fine-tuning, none given: a copy of the policy as passed, never read from disk again.

    Call it before anything patches `model`.

    Raises:
        ValueError: `ref_model` is `model`, or weights outside the adapters train and no reference is given.
    """
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
        ref_model = copy.deepcopy(model)
        logger.info("reference: a frozen copy of the policy as passed")
    ref_model.requires_grad_(False)
    ref_model.eval()
    return ref_model


def keep_ref_adapter(model: Any) -> None:
    """Copy a PEFT model's active adapter to a frozen one named "ref", which `as_reference` then uses."""
    name = model.active_adapter
    model.add_adapter(REF_ADAPTER, model.peft_config[name])
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            model.get_parameter(key.replace(f".{name}.", f".{REF_ADAPTER}.")).data.copy_(parameter.data)
    logger.info("reference: adapter %r, a copy of %r as passed", REF_ADAPTER, name)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Within it a PEFT model answers as the reference: with its "ref" adapter if it has one, else with none."""
    if REF_ADAPTER not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    previous = model.active_adapter
    model.set_adapter(REF_ADAPTER)
    try:
        yield
    finally:
        model.set_adapter(previous)

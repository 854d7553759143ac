"""Find the reference, the frozen model that training compares the policy with."""

import logging
from typing import Any

from transformers import PreTrainedModel

from fastdpo.model.adapters import (
    REF_ADAPTER,
    check_ref_adapter,
    has_ref_adapter,
    is_peft_model,
    trained_without_adapter,
)
from fastdpo.sharding import copy_model, engine_without_optimizer, zero_stage

logger = logging.getLogger("fastdpo")


def resolve_reference(
    model: Any,
    ref_model: PreTrainedModel | None,
    *,
    ref_adapter_name: str | None = None,
    needs_reference: bool = True,
    copies: bool = True,
) -> PreTrainedModel | None:
    """Return the frozen reference; None if there is none, or if the policy serves as its own through `as_reference`.

    - A model is given: it is used as it is.
    - PEFT, and no model is given: the policy with its adapters off. An adapter that was trained before, or that does
      not start as the identity, has been copied to one named "ref" by `keep_ref_adapter` or `add_adapter`, and the
      policy with this copy is the reference, so that training starts at the reference.
    - PEFT with an adapter called `ref_adapter_name`: the policy with that adapter instead of its own.
    - Full fine-tuning, and no model is given: a copy of the policy as passed; nothing is read from disk again. With
      `copies=False` there is no copy, because the reference's log-probs are all known before training.
    - The objective needs no reference (`needs_reference=False`): nothing is copied or kept.

    Call it before anything patches `model`.

    Raises:
        ValueError: nothing of `model` trains, `ref_model` is `model`, weights outside the adapters train and no
            reference is given, the named adapter can't serve, or the objective does not use the reference given.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no weight of the model would be trained (requires_grad is False for all); an adapter is loaded for "
            "training by PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if not needs_reference:
        if ref_model is not None or ref_adapter_name is not None:
            given = "ref_model" if ref_model is not None else f"ref_adapter_name={ref_adapter_name!r}"
            raise ValueError(f"{given} is given, but the objective (loss_type) uses no reference; leave it out")
        return None
    if ref_adapter_name is None and ref_model is None and has_ref_adapter(model):
        ref_adapter_name = REF_ADAPTER
    if ref_adapter_name is not None:
        check_ref_adapter(model, ref_model, ref_adapter_name)
    if ref_model is model:
        raise ValueError("ref_model is the same object as model, so it would be trained too; leave it out")
    if ref_model is None and is_peft_model(model):
        trained = trained_without_adapter(model)
        if trained:
            raise ValueError(
                f"weights outside the adapters are trained ({', '.join(trained[:3])}, {len(trained)} in all), so the "
                "policy without its adapters is not the reference; pass ref_model, or freeze them (bias='none')"
            )
        return None
    if ref_model is None:
        if not copies:
            return None
        ref_model = copy_model(model)
        logger.info("reference: a frozen copy of the policy as passed")
    ref_model.requires_grad_(False)
    ref_model.eval()
    return ref_model


def prepare_reference(trainer: Any, ref_model: Any) -> Any:
    """Return the frozen reference on its device, sharded as the trainer's policy will be."""
    accelerator = trainer.accelerator
    if (stage := zero_stage(accelerator)) is not None:  # accelerate would make one engine only
        return (
            engine_without_optimizer(trainer, ref_model).module.eval()
            if stage == 3
            else ref_model.to(accelerator.device)
        )
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, ref_model).eval()
    return accelerator.prepare_model(ref_model, evaluation_mode=True)

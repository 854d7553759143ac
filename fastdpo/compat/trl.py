"""Read the arguments of old and new versions of TRL's `DPOTrainer`, or refuse them by name.

TRL is never imported; its classes are recognised by the module that defines them.
"""

import copy
import difflib
import logging
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import ProcessorMixin, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.config import DPOConfig

logger = logging.getLogger("fastdpo")

_NO_EFFECT = {
    *("padding_free", "pad_to_multiple_of", "pad_token", "label_pad_token_id", "padding_value"),
    *("use_logits_to_keep", "generate_during_eval", "base_model_attribute_name", "force_use_ref_model"),
}
"""Old and new settings of TRL that cannot change a loss, because nothing is padded or generated here."""

_INSTEAD = {
    "activation_offloading": "use gradient_checkpointing=True",
    "truncation_mode": "max_prompt_length cuts the start of prompts, max_length the end of responses",
    "use_liger_loss": "the head is fused anyway",
    "ref_model_init_kwargs": "pass ref_model as a model that is loaded",
    "model_adapter_name": "call model.set_adapter",
    "is_encoder_decoder": "only decoders can be trained",
    "model_init": "pass model",
    "preprocess_logits_for_metrics": "packed batches keep no logits",
    "compute_metrics": "packed batches keep no logits; read the metrics that evaluation logs",
    "quantization_config": "pass it in args.model_init_kwargs={'quantization_config': ...}",
}
"""For each argument that is not supported, what to do instead."""


def resolve(args: Any, processing_class: Any, others: Mapping[str, Any]) -> tuple[DPOConfig, Any]:
    """Return the config and the tokenizer of a trainer.

    Args:
        args: a `DPOConfig`, `trl.DPOConfig` or `transformers.TrainingArguments`; None means `DPOConfig()`.
        processing_class: the tokenizer, or None.
        others: further arguments by name; those that are None are ignored.

    Raises:
        ValueError: an argument is not supported; the message names it, and what to use instead.
        TypeError: an argument is unknown.
    """
    for name, value in others.items():
        if value is None:
            continue
        if name == "tokenizer":
            if processing_class is not None:
                raise ValueError("both tokenizer and processing_class are given, which mean the same; leave one out")
            logger.warning("tokenizer is the old name of processing_class; it is used as processing_class")
            processing_class = value
        elif name in {f.name for f in fields(DPOConfig)}:
            raise ValueError(f"{name} is a setting, not an argument of DPOTrainer: pass args=DPOConfig({name}=...)")
        elif name in _INSTEAD:
            raise ValueError(f"{name} is not supported: {_INSTEAD[name]}")
        elif name in _NO_EFFECT:
            raise ValueError(f"{name} has no effect on packed batches; leave it out")
        else:
            known = ("tokenizer", "processing_class", "train_dataset", "eval_dataset", "peft_config", "callbacks")
            near = difflib.get_close_matches(name, (*known, "ref_model", "data_collator", "optimizers"), n=1)
            raise TypeError(f"DPOTrainer has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, but only text can be trained on; pass its "
            "tokenizer: processing_class=processor.tokenizer"
        )
    if isinstance(processing_class, str):
        raise ValueError(
            f"processing_class must be a tokenizer, got {processing_class!r}; pass "
            f"AutoTokenizer.from_pretrained({processing_class!r})"
        )
    return _config(args), processing_class


def _config(args: Any) -> DPOConfig:
    """Return `args` as a `DPOConfig`: fields of the same name keep their values, including default values."""
    if args is None:
        return DPOConfig()
    if isinstance(args, DPOConfig):
        return args
    cls = type(args)
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args must be a fastdpo.DPOConfig, got {cls.__name__}; its fields have the names of TRL's")
    trl = [c.__name__ for c in cls.__mro__ if c.__module__.partition(".")[0] == "trl"]
    if trl and "DPOConfig" not in trl:
        raise ValueError(f"args is TRL's {trl[0]}, which is for another kind of training; pass a fastdpo.DPOConfig")
    ours = {f.name for f in fields(DPOConfig) if f.init}
    values, unread = {}, []
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in ours:
            values[field.name] = value
        elif value == _default(field) or field.name in _NO_EFFECT:
            continue
        elif trl:
            instead = _INSTEAD.get(field.name, "leave it out")
            raise ValueError(f"{field.name}={value!r} of trl.DPOConfig is not supported: {instead}")
        else:
            unread.append(field.name)
    del values["logging_nan_inf_filter"]  # on by default in transformers, and must be off here
    if values["accelerator_config"] == AcceleratorConfig():
        del values["accelerator_config"]
    values = {name: copy.copy(value) for name, value in values.items()}
    if "f_divergence_type" in values:  # an enum in older versions of TRL
        values["f_divergence_type"] = getattr(value := values["f_divergence_type"], "value", value)
    config = DPOConfig(**values)
    name = f"{'trl' if trl else cls.__module__.partition('.')[0]}.{cls.__name__}"
    logger.info(
        "args is a %s and is read as a fastdpo.DPOConfig; each field keeps its value, even where the defaults differ: "
        "learning_rate=%g, logging_steps=%g, bf16=%s%s",
        *(name, config.learning_rate, config.logging_steps, config.bf16),
        f"; not read: {', '.join(unread)}" if unread else "",
    )
    if config.label_smoothing and "sigmoid" in config.loss_type:
        logger.warning(
            "label_smoothing=%g makes the loss 'sigmoid' conservative DPO here; TRL 1 reads it with other losses only",
            config.label_smoothing,
        )
    return config


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()

"""Read the arguments of old and new versions of TRL's `DPOTrainer`, or refuse them by name.

TRL is never imported; its classes are recognised by the module that defines them.
"""

import copy
import logging
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProcessorMixin, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.config import DPOConfig
from fastdpo.settings.names import OLD_NAMES, known_only, shown

logger = logging.getLogger("fastdpo")

ARGUMENTS = (
    *("model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
    *("compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"),
)
"""The arguments of TRL 1.16's `DPOTrainer`, in its order."""


def resolve(
    model: Any,
    args: Any,
    processing_class: Any,
    *,
    compute_metrics: Any = None,
    quantization_config: Any = None,
    **others: Any,
) -> tuple[DPOConfig, Any]:
    """Return the config and the tokenizer of a trainer.

    Args:
        model: the policy, or its name.
        args: a `DPOConfig`, `trl.DPOConfig` or `transformers.TrainingArguments`; None means `DPOConfig` with the name
            of the model in `output_dir`, as TRL has it.
        processing_class: the tokenizer, or None.
        compute_metrics: must be None.
        quantization_config: goes to `model_init_kwargs` of the config, of which a copy is returned.
        others: further arguments by name; old ones that are None are ignored.

    Raises:
        ValueError: an argument is not supported; the message names it, and what to use instead.
        TypeError: an argument is unknown, or of the wrong type.
    """
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model must be a language model, or its name or path as text, got {type(model).__name__}")
    if (tokenizer := others.pop("tokenizer", None)) is not None:
        if processing_class is not None:
            raise ValueError("both tokenizer and processing_class are given, which mean the same; leave one out")
        logger.warning("tokenizer is the old name of processing_class; it is used as processing_class")
        processing_class = tokenizer
    settings = {f.name for f in fields(DPOConfig)}
    for name in settings & others.keys():
        if others.pop(name) is not None:
            raise ValueError(f"{name} is a setting, not an argument of DPOTrainer: pass args=DPOConfig({name}=...)")
    known_only("DPOTrainer", others, ARGUMENTS)
    if compute_metrics is not None:
        raise ValueError(
            "compute_metrics is not supported, because packed batches have no logits to give to it; leave it out, and "
            "read the metrics that evaluation logs, such as eval_rewards/accuracies"
        )
    _check_processing_class(processing_class, model)
    return _quantized(model, _config(model, args), quantization_config), processing_class


def _name(model: Any) -> str:
    """Return the name or path that a model is loaded from; "" if there is none."""
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None) or ""


def _check_processing_class(given: Any, model: Any) -> None:
    if given is None and not _name(model):
        raise ValueError(
            "processing_class is None, and the model was not loaded from a folder or the Hub, where its tokenizer "
            "would be; pass processing_class=AutoTokenizer.from_pretrained(...)"
        )
    if isinstance(given, ProcessorMixin) and hasattr(given, "image_processor") and hasattr(given, "tokenizer"):
        return
    if isinstance(given, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(given).__name__}, but only text and images can be trained on; pass its "
            "tokenizer: processing_class=processor.tokenizer"
        )
    if isinstance(given, str):
        raise ValueError(
            f"processing_class must be a tokenizer, got {given!r}; pass AutoTokenizer.from_pretrained({given!r})"
        )
    if given is not None and not hasattr(given, "bos_token_id"):
        raise TypeError(
            f"processing_class must be a tokenizer, got {type(given).__name__}; pass AutoTokenizer.from_pretrained(...)"
        )


def set_pad_token(tokenizer: Any, token: str | None) -> None:
    """Make `token` the pad token of a tokenizer, if it is not None.

    Raises:
        ValueError: the tokenizer does not know the token.
    """
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token={token!r} is not in the tokenizer's vocabulary; leave it out, or add it before")
    tokenizer.pad_token = token


def _quantized(model: Any, args: DPOConfig, quantization_config: Any) -> DPOConfig:
    """Return `args` with `quantization_config` among the arguments of `from_pretrained`."""
    if quantization_config is None:
        return args
    if not isinstance(model, str):
        raise ValueError(
            "quantization_config only applies to a model given by name, and this one is already loaded; leave it out, "
            "or pass the model's name"
        )
    given: Any = args.model_init_kwargs or {}
    if "quantization_config" in given:
        raise ValueError("quantization_config is given twice, as an argument and in model_init_kwargs; leave one out")
    args = copy.copy(args)
    args.model_init_kwargs = given | {"quantization_config": quantization_config}
    return args


def _config(model: Any, args: Any) -> DPOConfig:
    """Return `args` as a `DPOConfig`: fields of the same name keep their values, including default values."""
    if args is None:
        return DPOConfig(f"{Path(name).name}-DPO" if (name := _name(model)) else None)
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
        elif value == _default(field):
            continue
        elif trl:
            instead = OLD_NAMES.get(field.name, "leave it out")
            raise ValueError(f"{field.name}={shown(value)} of trl.DPOConfig is not supported: {instead}")
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

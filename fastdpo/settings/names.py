"""Names that do not exist: what the user may have meant, and what to do instead of those of older versions."""

import difflib
import functools
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")

_NO_PADDING = "leave it out, because packed batches have no padding"

OLD_NAMES = {
    # settings of TRL 0.7 to 0.29, as fields of DPOConfig or as arguments of DPOTrainer
    "base_model_attribute_name": "leave it out, because fastdpo finds the body of the model itself",
    "force_use_ref_model": "leave it out, because a ref_model that you pass is always used",
    "generate_during_eval": "leave it out; the report of `fastdpo train` shows answers to held-out prompts",
    "is_encoder_decoder": "leave it out, because only decoders can be trained",
    "label_pad_token_id": _NO_PADDING,
    "padding_value": _NO_PADDING,
    "max_target_length": "use max_completion_length",
    "model_adapter_name": "call model.set_adapter(name) before you pass the model",
    "ref_model_init_kwargs": "load the reference yourself, and pass it as ref_model",
    "tools": "put them into a column `tools` of the dataset",
    "use_liger_loss": "leave it out, because the head is always fused",
    "use_logits_to_keep": "leave it out, because prompt tokens never reach the head",
    "use_num_logits_to_keep": "leave it out, because prompt tokens never reach the head",
    # arguments of trainers
    "model_init": "pass the model itself as model",
    "optimizer_cls_and_kwargs": "pass optimizers=(optimizer, scheduler)",
    "preprocess_logits_for_metrics": "leave it out, because no logits are computed",
    # settings of transformers 4
    "evaluation_strategy": "use eval_strategy",
    "no_cuda": "use use_cpu",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "group_by_length": "use tokens_per_batch, which fills batches with examples up to a number of tokens",
    "include_inputs_for_metrics": "leave it out, because no logits are computed",
    "include_tokens_per_second": "leave it out, because tokens_per_second is always logged",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_model_id": "use hub_model_id",
    "push_to_hub_organization": "put it in front of the name in hub_model_id, as organization/name",
    "push_to_hub_token": "use hub_token",
    "save_safetensors": "leave it out, because models are always saved as safetensors",
    "use_mps_device": "leave it out, because the device is found without it",
    "warmup_ratio": "use warmup_steps, which takes a share below 1 too",
    **dict.fromkeys(("fp16_backend", "half_precision_backend", "fp16_opt_level"), "use fp16 or bf16 alone"),
}
"""Settings and arguments of TRL and transformers that are gone, each with what to do instead."""

MEANT = {
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "dataset_path": "dataset_name",
    "dpo": "sigmoid",
    "epochs": "num_train_epochs",
    "kto_pair": "kto",
    "label_smoothing_epsilon": "label_smoothing",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_length",
    "model": "model_name_or_path",
    "ref_model": "ref_model_name_or_path",
    "scheduler": "lr_scheduler_type",
}
"""Names that users of other libraries type, each with ours, where the most similar spelling would mislead."""


_FEW = 8
"""Most names that a message lists if it has the nearest one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests a valid name for an unknown one; "" if no valid name is similar."""
    known = list(known)
    meant = {other: ours for other, ours in MEANT.items() if ours in known}
    near = difflib.get_close_matches(name, [*known, *meant], n=1)
    return f"; did you mean {meant.get(near[0], near[0])!r}?" if near else ""


def check_name(what: str, value: object, known: Iterable[str | None]) -> None:
    """Refuse a value of a setting or argument that must be one of some names.

    Raises:
        ValueError: it is none of them; the message begins with `what` and has the nearest name, or lists all.
    """
    if value in (known := list(known)):
        return
    names = [name for name in known if name is not None]
    near = nearest(value, names) if isinstance(value, str) else ""
    if near and len(names) > _FEW:
        raise ValueError(f"{what} {value!r} is unknown{near}")
    raise ValueError(f"{what} must be one of {', '.join(names)}, got {shown(value)}{near}")


def known_only(owner: str, given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return `given` without old names whose value is None.

    Args:
        owner: what messages call the class that takes the names.
        given: values by name.
        known: the names that the class has.

    Raises:
        ValueError: an old name has a value; the message says what to do instead.
        TypeError: a name is unknown; the message has the nearest known name.
    """
    for name in given:
        if name in known:
            continue
        if name not in OLD_NAMES:
            raise TypeError(f"{owner} has no argument {name!r}{nearest(name, known)}")
        if given[name] is not None:
            raise ValueError(f"{owner} does not take {name}={shown(given[name])}: {OLD_NAMES[name]}")
    return {name: value for name, value in given.items() if name in known}


def shown(value: Any) -> str:
    """Return what a message of one line says of a user's value: a function's name, an object's type, or plain data."""
    if name := getattr(value, "__qualname__", None):
        return "a lambda" if name.endswith("<lambda>") else str(name)
    plain = value is None or isinstance(value, (str, int, float, list, tuple, set, dict))
    return reprlib.repr(value) if plain else f"a {type(value).__name__}"


def in_words(cls: type[T]) -> type[T]:
    """Let a dataclass refuse an argument that it lacks with the messages of `known_only`."""
    init, known = cls.__init__, {f.name for f in fields(cls) if f.init}  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        init(self, *args, **known_only(type(self).__name__, given, known))

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls

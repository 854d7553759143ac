"""Every check of a training's settings (`config` is a `DPOConfig`) that needs no model."""

import logging
import re
from dataclasses import fields
from numbers import Real
from typing import Any

from accelerate.utils import DynamoBackend

from fastdpo.config.auto import AUTO, given_tokens
from fastdpo.head.linear_logprobs import BACKWARDS, IMPLS
from fastdpo.loss.options import ObjectiveSettings, without_effect
from fastdpo.model.attention.backends import BACKENDS
from fastdpo.settings.config_file import check_dtype
from fastdpo.settings.names import check_name

logger = logging.getLogger("fastdpo")

AT_LEAST_ONE = (
    *("max_prompt_length", "max_completion_length", "tokens_per_batch"),
    *("ref_model_sync_steps", "precompute_ref_batch_size"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
)
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
TRUNCATION_MODES = ("keep_start", "keep_end")
ON_BAD_ROW = ("error", "drop")
SELF_CHECK = ("fallback", "error")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_values(config: Any, settings: ObjectiveSettings) -> None:
    """Raise `ValueError` for a value that is out of range, or that another setting excludes."""
    if (coef := config.router_aux_loss_coef) is not None and not 0 <= coef < float("inf"):
        raise ValueError(f"router_aux_loss_coef must be finite and at least 0 (0 switches it off), got {coef}")
    if config.truncation_mode == "keep_end" and settings.needs_kl:
        raise ValueError(
            f"truncation_mode='keep_end' is not possible with loss_type {config.loss_type}, whose KL term takes "
            "other prompts; use 'keep_start' with max_prompt_length"
        )
    if config.max_length is not None and config.max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt and a completion token), got {config.max_length}")
    epochs: Any = config.num_train_epochs
    if not isinstance(epochs, Real) or not float(epochs) >= 0:  # nor nan
        raise ValueError(f"num_train_epochs must be a number of at least 0, got {epochs!r}")
    for name in AT_LEAST_ONE:
        if (value := getattr(config, name)) not in (None, AUTO) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (most := config.group_by_prompt) is not None:
        if most < 2:
            raise ValueError(
                f"group_by_prompt must be at least 2 examples of a prompt, got {most}; unset it for no groups"
            )
        for name in ("prefix_sharing", "disable_dropout"):
            if not getattr(config, name):
                raise ValueError(
                    f"group_by_prompt={most} computes a response once for all its pairs, which {name}=False excludes; "
                    "leave one of the two out"
                )
    if config.tokens_per_batch or config.longest_first or config.group_by_prompt:
        for name, only in (("dataloader_drop_last", False), ("train_sampling_strategy", "random")):
            if (value := getattr(config, name, only)) != only:
                raise ValueError(
                    f"{name}={value!r} has no effect together with tokens_per_batch, longest_first or group_by_prompt, "
                    "which choose the batches; leave it out"
                )
    for name, allowed in (
        ("attention_backend", ("auto", *BACKENDS)),
        ("head_impl", IMPLS),
        ("head_backward", BACKWARDS),
        ("on_bad_row", ON_BAD_ROW),
        ("self_check", SELF_CHECK),
        ("truncation_mode", TRUNCATION_MODES),
        ("torch_compile_mode", (None, *COMPILE_MODES)),
        ("torch_compile_backend", (None, *[backend.value.lower() for backend in DynamoBackend])),
    ):
        check_name(name, getattr(config, name, None), allowed)
    in_bytes("head_workspace", config.head_workspace, at_least=2**20)
    if config.logging_nan_inf_filter:
        raise ValueError(
            "logging_nan_inf_filter must be False: it would log a plausible number for a loss that is not finite"
        )


def check_auto(config: Any) -> None:
    """Refuse options of checkpointing that choose layers, as `gradient_checkpointing=auto` does."""
    given = getattr(config, "activation_checkpointing_kwargs", None) or config.gradient_checkpointing_kwargs
    if "every_n_layers" in (given or {}):
        raise ValueError(
            "gradient_checkpointing=auto chooses the layers that are recomputed, as every_n_layers of "
            "activation_checkpointing_kwargs does; leave one of the two out"
        )


def in_bytes(name: str, size: Any, at_least: int = 0) -> int:
    """Return a size that is given in bytes or with a unit, as in `max_shard_size`: GiB is 2^30 bytes, GB 10^9.

    Raises:
        ValueError: the size of the field `name` is none, or is below `at_least` bytes.
    """
    given = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)}|)\s*", str(size), re.IGNORECASE)
    if given is None or isinstance(size, bool):
        raise ValueError(
            f"{name} must be a number of bytes, or a number with a unit such as 256MiB or 3GiB, got {size!r}"
        )
    found = int(float(given[1]) * {unit.lower(): value for unit, value in UNITS.items()}.get(given[2].lower(), 1))
    if found < at_least:
        raise ValueError(f"{name} must be at least {at_least} bytes ({at_least / 2**20:g}MiB), got {size!r}")
    return found


def check_reference(config: Any, settings: ObjectiveSettings) -> None:
    """Refuse settings of the reference that exclude each other, and switch off what the objective does not use."""
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(config, name) and not settings.needs_reference:
            logger.warning("%s is switched off, because loss_type %s uses no reference", name, config.loss_type)
            setattr(config, name, False)
    if config.sync_ref_model and config.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model changes the reference during training, so its log-probs can't be computed before; "
            "set precompute_ref_log_probs=False"
        )
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {config.ref_model_mixup_alpha}")


def warn_of_no_effect(config: Any, settings: ObjectiveSettings) -> None:
    """Log which settings have no effect; TRL accepts them too."""
    defaults = {f.name: f.default for f in fields(config)}
    for why, names in (
        (f"on loss_type {config.loss_type}", without_effect(config)),
        ("on packed batches", ("padding_free", "pad_to_multiple_of")),
        (
            "without sync_ref_model",
            () if config.sync_ref_model else ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        ),
        (
            f"beside tokens_per_batch={config.tokens_per_batch}, which fills the batches",
            ("per_device_train_batch_size",) if given_tokens(config) else (),
        ),
    ):
        if set_ := [name for name in names if getattr(config, name) not in (defaults[name], None)]:
            given = ", ".join(f"{name}={getattr(config, name)!r}" for name in set_)
            logger.warning("%s %s no effect %s", given, "has" if len(set_) == 1 else "have", why)
    if settings.beta == 0:
        logger.warning("beta is 0, so no loss that it scales depends on the policy: such a loss trains nothing")
    if not all(settings.weights):
        logger.warning("loss_weights %s: a loss with the weight 0 trains nothing", list(settings.weights))


def checked_init_kwargs(kwargs: Any) -> Any:
    """Return `model_init_kwargs` with the old name `torch_dtype` replaced, or raise `ValueError`."""
    if kwargs is None:
        return None
    if not isinstance(kwargs, dict):
        raise ValueError(f"model_init_kwargs must be a dict or a JSON object, got {kwargs!r}")
    if "torch_dtype" in kwargs:
        kwargs = dict(kwargs)
        old = kwargs.pop("torch_dtype")
        if kwargs.setdefault("dtype", old) != old:
            raise ValueError(f"model_init_kwargs has torch_dtype={old!r} and another dtype; leave torch_dtype out")
    check_dtype("dtype of model_init_kwargs", kwargs.get("dtype"))
    return kwargs

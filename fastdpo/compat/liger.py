"""`use_liger_kernel`: Liger's kernels in the layers of a model, together with fastdpo's head."""

import logging
import os
from typing import Any

from torch import nn
from transformers.integrations import liger
from transformers.utils import is_liger_kernel_available

from fastdpo.config import DPOConfig
from fastdpo.model.adapted_layers import adapted_modules, unwrap

logger = logging.getLogger("fastdpo")

_OF_THE_HEAD = ("fused_linear_cross_entropy", "cross_entropy")
"""Liger's options that replace the model's forward or the loss."""


def prepare(args: DPOConfig) -> None:
    """Switch Liger's own head off in `args`, for the Trainer applies Liger again at the start of training.

    Call it before a model is loaded.

    Raises:
        ImportError: liger-kernel is not installed; the message has the command that installs it.
        ValueError: Liger's kernels can't run on this device.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ImportError("use_liger_kernel=True needs the package liger-kernel: pip install 'fastdpo[liger]'")
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("use_liger_kernel=True needs a GPU, because Liger's kernels do not run on a CPU; leave it out")
    config = dict(args.liger_kernel_config or {})
    if given := [name for name in _OF_THE_HEAD if config.get(name)]:
        logger.warning("liger_kernel_config: %s is switched off: fastdpo computes the head", " and ".join(given))
    args.liger_kernel_config = config | dict.fromkeys(_OF_THE_HEAD, False)


def apply(model: Any, args: DPOConfig) -> None:
    """Put Liger's kernels into a model, in place. Call this after `prepare` and before `patch_forward`.

    Args:
        model: a causal LM, or a PEFT model around one.
        args: settings; nothing happens unless `use_liger_kernel` is set.

    Raises:
        ValueError: Liger cannot change this model, or an adapter wraps a module that it changes.
    """
    if not args.use_liger_kernel:
        return
    base = unwrap(model)
    name = type(base).__name__
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("use_liger_kernel has no effect: Liger has no kernels for %s", name)
        return
    try:
        liger.apply_liger_kernel(model, args.liger_kernel_config)
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"Liger cannot change {name}: {error}; set use_liger_kernel=False") from error
    if wrapped := _inside_an_adapter(base):
        raise ValueError(
            f"Liger replaces the forward of {wrapped}, which an adapter wraps, so one of the two would have no effect; "
            "leave that module out of the adapter, or set liger_kernel_config={'rms_norm': False, ...}"
        )
    replaced = sum(map(_is_replaced, base.modules()))
    logger.info("Liger's kernels are in %d modules of %s; its cross-entropy is off", replaced, name)


def _is_replaced(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", "").startswith("liger_kernel")


def _inside_an_adapter(model: nn.Module) -> str | None:
    """Return the name of a PEFT module that is, or contains, a module whose forward Liger replaced; else None."""
    return next((name for name, each in adapted_modules(model) if any(map(_is_replaced, each.modules()))), None)

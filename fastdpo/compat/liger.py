"""`use_liger_kernel`: Liger's kernels in the layers of a model, together with fastdpo's head."""

import inspect
import logging
import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
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
        ValueError: Liger cannot change this model, computes another activation than the model does, or an adapter wraps
            a module that it changes.
    """
    if not args.use_liger_kernel:
        return
    base = unwrap(model)
    name = type(base).__name__
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("use_liger_kernel has no effect: Liger has no kernels for %s", name)
        return
    options = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[base.config.model_type]).parameters.keys() - {"model"}
    if unused := sorted(set(args.liger_kernel_config or ()) - options - set(_OF_THE_HEAD)):
        logger.warning(
            "liger_kernel_config: %s has no effect on %s, for which Liger has the options %s",
            *(" and ".join(unused), name, ", ".join(sorted(options - set(_OF_THE_HEAD)))),
        )
    try:
        liger.apply_liger_kernel(model, args.liger_kernel_config)
    except (AssertionError, AttributeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"Liger cannot change {name}: {error}; set use_liger_kernel=False") from error
    if wrapped := _inside_an_adapter(base):
        raise ValueError(
            f"Liger replaces the forward of {wrapped}, which an adapter wraps, so one of the two would have no effect; "
            "leave that module out of the adapter, or set liger_kernel_config={'rms_norm': False, ...}"
        )
    if found := _other_activation(base):
        kernel, other = found
        raise ValueError(
            f"Liger would compute {other}; set liger_kernel_config={{'{kernel}': False}} or use_liger_kernel=False"
        )
    replaced = kinds(base)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items())) or "none"
    logger.info("Liger's kernels are in %d modules of %s (%s); its cross-entropy is off", replaced.total(), name, said)


def kinds(model: nn.Module) -> Counter[str]:
    """Return the names of Liger's classes that run in a model, and the number of modules that each one replaced."""
    return Counter(_kind(module) for module in model.modules() if _is_replaced(module))


def _is_replaced(module: nn.Module) -> bool:
    places = (getattr(vars(module).get("forward"), "__module__", ""), type(module).__module__)
    return any(place.startswith("liger_kernel") for place in places)


def _kind(module: nn.Module) -> str:
    """Return the name of Liger's class whose forward a module runs."""
    forward = vars(module).get("forward", type(module).forward)
    return str(getattr(forward, "__qualname__", type(module).__name__)).split(".")[0]


def _other_activation(model: nn.Module) -> tuple[str, str] | None:
    """Return Liger's option of an MLP's kernel that computes another activation than the MLP, and say where; else None.

    Liger replaces an MLP by the model's type, without a look at its activation.
    """
    x = torch.linspace(-4, 4, 65)
    for name, module in model.named_modules():
        own = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if own is None or not _is_replaced(module):
            continue
        kernel, activation = ("geglu", "gelu_pytorch_tanh") if "GEGLU" in _kind(module) else ("swiglu", "silu")
        if not torch.allclose(own(x), ACT2FN[activation](x), rtol=0, atol=1e-5):
            return kernel, f"{activation} in {name} of {type(model).__name__}, whose own activation is {own}"
    return None


def _inside_an_adapter(model: nn.Module) -> str | None:
    """Return the name of a PEFT module that is, or contains, a module whose forward Liger replaced; else None."""
    return next((name for name, each in adapted_modules(model) if any(map(_is_replaced, each.modules()))), None)

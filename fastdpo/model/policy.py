"""The policy: loaded or built, wrapped in its adapter, and the layout of batches that is exact on it."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import is_peft_available

from fastdpo.config import DPOConfig
from fastdpo.data.packing import LAYOUTS
from fastdpo.model.scoring_forward import Layout, layout_of
from fastdpo.reference import resolve
from fastdpo.settings.config_file import nearest
from fastdpo.settings.failures import loading

logger = logging.getLogger("fastdpo")

_OF_MODEL = ("dtype", "attn_implementation", "experts_implementation")
"""What `from_config` takes; all else is for the config."""
_BUILT = "_fastdpo_built"
"""On a model that `model_init_kwargs` has been applied to."""


def load_policy(model: Any, args: DPOConfig, *, setting: str = "model") -> Any:
    """The model itself, or the one of this name or path, in float32 unless `args.model_init_kwargs` says otherwise.

    An adapter's folder may hold the adapter that was its reference in training (`ref`, or `args.ref_adapter_name`) in
    one of its own, as PEFT saves it; it is loaded too, frozen.

    Raises:
        ValueError: `model_init_kwargs` are given for a model that is loaded already, or one of them is unknown.
        OSError: there is no such model, or a file of it is broken; the message begins with `setting`.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs and not vars(model).get(_BUILT):
            raise ValueError("model_init_kwargs only applies to a model given by name; this one is already loaded")
        return model
    with loading(setting, model):
        try:
            return _from_pretrained(model, args)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in _options(args):
                raise
            advice = nearest(unknown[1], ()) or "; leave it out"
            raise ValueError(f"model_init_kwargs {unknown[1]!r} is unknown to this model{advice}") from error


def _from_pretrained(model: str, args: DPOConfig) -> Any:
    options = _options(args)
    if (Path(model) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        with resolve.peft_is_older():
            policy = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **options)
        reference = args.ref_adapter_name or resolve.REF_ADAPTER
        if (Path(model) / reference / "adapter_config.json").is_file():
            policy.load_adapter(str(Path(model) / reference), adapter_name=reference, is_trainable=False)
            logger.info("reference: adapter %r, saved beside the one in %s", reference, model)
        return policy
    return AutoModelForCausalLM.from_pretrained(model, **options)


def smallest_vocab(*models: Any) -> int:
    """Of the models that are there, the fewest entries: ids that all of them know are below it."""
    return min(int(model.get_input_embeddings().weight.shape[0]) for model in models if model is not None)


def _options(args: DPOConfig) -> dict[str, Any]:
    """Of `from_pretrained`."""
    assert not isinstance(args.model_init_kwargs, str)  # __post_init__ parsed it
    return {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})


def wrap_adapter(model: Any, peft_config: Any | None, *, keeps_reference: bool) -> Any:
    """The policy with its adapter: a new one of `peft_config`, or the one it came with.

    `keeps_reference` keeps a copy as "ref", see `fastdpo.reference.resolve`: of the latter, and of a new one that
    changes the model before training (PiSSA, OLoRA, LoftQ, random).

    Raises:
        ValueError: both are given, or the adapter can't be trained here.
        ImportError: `peft_config` is given and PEFT is not installed.
    """
    if resolve.is_peft_model(model):
        if peft_config is not None:
            raise ValueError("model already has an adapter; pass peft_config or a PEFT model, not both")
        resolve.check_adapter(model.active_peft_config)
        if keeps_reference:
            resolve.keep_ref_adapter(model)
        return model
    if peft_config is None:
        return model
    if not is_peft_available():
        raise ImportError("peft_config needs the peft library: pip install 'fastdpo[peft]'")
    return resolve.add_adapter(model, peft_config, keeps_reference=keeps_reference)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, in place; the config, which is saved, keeps what it said."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention layers keep theirs as a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def choose_layout(models: Sequence[Any], prefix_sharing: bool) -> Layout:
    """The best layout of batches that is exact on all `models`; `prefix_sharing` False: without shared prefixes."""
    found = [layout_of(model) for model in models]
    layout, reason = max(found, key=lambda choice: LAYOUTS.index(choice[0]))
    if not prefix_sharing and layout in ("shared", "tree"):
        layout, reason = "packed", "prefix_sharing=False"
    padding = "batches are padded" if layout == "padded" else "batches hold no padding"
    if layout in ("shared", "tree"):
        logger.info("%s, and what an example's responses have in common, as the prompt, is computed once", padding)
    else:
        logger.info("%s, and a prompt is computed once for each of its responses, because %s", padding, reason)
    return layout


def build_policy(config_name: str, args: DPOConfig) -> Any:
    """A model with random weights of a config; float32, too, unless `args.model_init_kwargs` says otherwise.

    What else `model_init_kwargs` holds goes to config and model.

    Raises:
        ValueError: `model_init_kwargs` holds what neither knows.
    """
    options = _options(args)
    of_model = {name: options.pop(name) for name in _OF_MODEL if name in options}
    code = {"trust_remote_code": options["trust_remote_code"]}
    with loading("config_name", config_name):
        config, unknown = AutoConfig.from_pretrained(config_name, return_unused_kwargs=True, **options)
    if unknown := sorted(unknown.keys() - code.keys()):
        raise ValueError(f"model_init_kwargs {unknown[0]!r} has no effect on random weights; leave it out")
    if of_model["dtype"] == "auto":
        of_model["dtype"] = config.dtype or "float32"
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, **of_model, **code)
    vars(model)[_BUILT] = True
    logger.info("built %s with random weights, %.1f M parameters", type(model).__name__, model.num_parameters() / 1e6)
    return model

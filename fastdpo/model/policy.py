"""Load the policy and its tokenizer, or build a policy with random weights, and switch off its dropout."""

import logging
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from fastdpo.model import adapters
from fastdpo.settings.config_file import nearest
from fastdpo.settings.failures import loading
from fastdpo.untrusted.model_folder import check_model_folder

logger = logging.getLogger("fastdpo")

_OF_MODEL = ("dtype", "attn_implementation", "experts_implementation")
"""The options that `from_config` takes; all others go to the config."""
_BUILT = "_fastdpo_built"
"""The attribute that marks a model to which `build_policy` has applied `model_init_kwargs`."""


def load_policy(model: Any, args: Any, *, setting: str = "model") -> Any:
    """Return the model, loaded in float32 (unless `args.model_init_kwargs` says otherwise) if it is a name or path.

    In the folder of an adapter, PEFT saves the adapter that was its reference in training (`ref`, or
    `args.ref_adapter_name`) as a folder of its own. That adapter is loaded too, and frozen.

    Raises:
        ValueError: `model_init_kwargs` are given for a model that is loaded already, or one of them is unknown, or a
            file of the model's folder leads out of it or is too large.
        OSError: there is no such model, or a file of it is broken; the message begins with `setting`.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs and not vars(model).get(_BUILT):
            raise ValueError("model_init_kwargs only applies to a model given by name; this one is already loaded")
        _keep_differentiable(model)
        return model
    check_model_folder(setting, model, trusts_code=args.trust_remote_code)
    with loading(setting, model):
        try:
            policy = _from_pretrained(model, args)
            _keep_differentiable(policy)
            return policy
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in _options(args):
                raise
            advice = nearest(unknown[1], ()) or "; leave it out"
            raise ValueError(f"model_init_kwargs {unknown[1]!r} is unknown to this model{advice}") from error


def _from_pretrained(model: str, args: Any) -> Any:
    options = _options(args)
    if (Path(model) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        with adapters.peft_is_older():
            policy = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **options)
        reference = args.ref_adapter_name or adapters.REF_ADAPTER
        if (Path(model) / reference / "adapter_config.json").is_file():
            policy.load_adapter(str(Path(model) / reference), adapter_name=reference, is_trainable=False)
            logger.info("reference: adapter %r, saved beside the one in %s", reference, model)
        return policy
    return AutoModelForCausalLM.from_pretrained(model, **options)


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting 4-bit weights for inference, which stops every gradient behind them.

    On some CPUs it does so at the first evaluation, and training goes on with gradients that are silently 0.

    Raises:
        ValueError: it has done so already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name} were rewritten for inference when the model was evaluated, and can't be "
                "trained; load the model again"
            )
        module.support_avx512bf16_for_cpu = False


def load_tokenizer(model: Any, args: Any) -> Any:
    """Load the tokenizer that lies beside the weights of a loaded model."""
    folder = model.config._name_or_path
    check_model_folder("model", folder, trusts_code=args.trust_remote_code)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)


def smallest_vocab(*models: Any) -> int:
    """Return the fewest embedding rows of all models that are not None; ids below this number are known to all."""
    return min(int(model.get_input_embeddings().weight.shape[0]) for model in models if model is not None)


def _options(args: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained`."""
    assert not isinstance(args.model_init_kwargs, str)  # __post_init__ parsed it
    return {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, in place; the model's config, which is saved with it, stays unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention layers keep their dropout as a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def build_policy(config_name: str, args: Any) -> Any:
    """Build a model with random weights from a config, in float32 unless `args.model_init_kwargs` says otherwise.

    The other entries of `model_init_kwargs` go to the config or to the model.

    Raises:
        ValueError: neither the config nor the model knows an entry of `model_init_kwargs`.
    """
    options = _options(args)
    of_model = {name: options.pop(name) for name in _OF_MODEL if name in options}
    code = {"trust_remote_code": options["trust_remote_code"]}
    check_model_folder("config_name", config_name, trusts_code=args.trust_remote_code)
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

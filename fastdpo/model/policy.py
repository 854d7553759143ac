"""Load the policy and its tokenizer, or build a policy with random weights, and switch off its dropout."""

import functools
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    set_seed,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from fastdpo.model import adapters
from fastdpo.settings.config_file import advice as advice_on
from fastdpo.settings.failures import loading
from fastdpo.settings.names import check_name
from fastdpo.untrusted.model_folder import check_model_folder

logger = logging.getLogger("fastdpo")

_OF_MODEL = ("dtype", "attn_implementation", "experts_implementation")
"""The options that `from_config` takes; all others go to the config."""
_OF_FILES = (
    *("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only", "force_download"),
    *("proxies", "code_revision", "gguf_file"),
)
"""The options that say which files to read."""
_BUILT = "_fastdpo_built"
"""The attribute that marks a model to which `build_policy` has applied `model_init_kwargs`."""


def load_policy(model: Any, args: Any, *, setting: str = "model") -> Any:
    """Return the model, loaded in float32 (unless `args.model_init_kwargs` says otherwise) if it is a name or path.

    In the folder of an adapter, PEFT saves the adapter that was its reference in training (`ref`, or
    `args.ref_adapter_name`) as a folder of its own. That adapter is loaded too, and frozen.

    Raises:
        ValueError: one of `model_init_kwargs` is unknown, or a file of the model's folder leads out of it or is too
            large.
        OSError: there is no such model, or a file of it is broken; the message begins with `setting`.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs and not vars(model).get(_BUILT):
            logger.warning("model_init_kwargs has no effect on a model that is already loaded")
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
            advice = advice_on(unknown[1], ()) or "; leave it out"
            if unknown[1] in ("load_in_4bit", "load_in_8bit"):
                advice = f"; write model_init_kwargs={{'quantization_config': BitsAndBytesConfig({unknown[1]}=True)}}"
            raise ValueError(f"model_init_kwargs {unknown[1]!r} is unknown to this model{advice}") from error


def _from_pretrained(model: str, args: Any) -> Any:
    options = _options(args)
    if (Path(model) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

        with adapters.peft_is_older():
            adapter = PeftConfig.from_pretrained(model)
            name = adapter.base_model_name_or_path
            files = {"trust_remote_code": args.trust_remote_code, "revision": adapter.revision}
            if not name or auto_class(AutoConfig.from_pretrained(name, **files)) is AutoModelForCausalLM:
                policy = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **options)
            else:  # PEFT knows no class that loads a vision tower
                base = AutoModelForImageTextToText.from_pretrained(name, **options | files)
                policy = PeftModel.from_pretrained(base, model, is_trainable=True)
        reference = args.ref_adapter_name or adapters.REF_ADAPTER
        if (Path(model) / reference / "adapter_config.json").is_file():
            policy.load_adapter(str(Path(model) / reference), adapter_name=reference, is_trainable=False)
            logger.info("reference: adapter %r, saved beside the one in %s", reference, model)
        return policy
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        files = {name: options[name] for name in _OF_FILES if name in options}
        config = AutoConfig.from_pretrained(config or model, **files)
    return auto_class(config).from_pretrained(model, **options)


def load_weights(model: Any, folder: Path | str) -> None:
    """Read the weights of a checkpoint into a model, in place and exactly.

    transformers saves some models, such as LLaVA and Mixtral, under names or in shapes that differ from those of their
    parameters, and its Trainer, which compares names, leaves such a model as it is. `from_pretrained` converts them.

    Args:
        model: a `PreTrainedModel`, without PEFT's wrapper; of one with `model.add_adapter`, only the adapter is read.
        folder: where `save_pretrained` wrote a model of the same class.

    Raises:
        ValueError: the folder's weights are not those of this model.
    """
    if adapters.is_in_place(model):
        adapters.load_in_place(model, folder)
        return
    # the widest dtype holds the weights of all others exactly; torch can't compare those of 8 bits, the narrowest
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = functools.reduce(torch.promote_types, {each for each in dtypes if each.itemsize > 1})
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    loaded, info = type(model).from_pretrained(folder, dtype=dtype, **options)
    own, found = model.state_dict(), loaded.state_dict()
    problems = {problem: info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems["mismatched_keys"] |= {name for name, _ in _shapes(own) ^ _shapes(found)}
    for problem, names in problems.items():
        if names and (found := _same_names(own, folder)) is None:
            name = type(model).__name__
            raise ValueError(
                f"{folder} does not hold the weights of this {name}: {problem} {sorted(map(str, names))[:3]}"
            )
    model.load_state_dict(found, strict=False)


def _same_names(own: dict[str, Tensor], folder: Path | str) -> dict[str, Tensor] | None:
    """Return the saved tensors if they fit a model by name, else None.

    So fits a model that was changed after it was made: `from_pretrained` does not know of weights added or taken out.
    """
    saved: dict[str, Tensor] = {}
    for file in Path(folder).glob("model*.safetensors"):
        saved |= load_file(file)
    held = {own[name].data_ptr() for name in saved.keys() & own.keys()}  # of tied weights, one name is saved
    fits = _shapes(saved) <= _shapes(own)
    return saved if fits and all(name in saved or own[name].data_ptr() in held for name in own) else None


def _shapes(state: dict[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in state.items()}


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads all weights of a checkpoint: a vision tower is kept, too.

    Args:
        config: the checkpoint's config, whose `architectures` names the class that was saved.
    """
    names = set[str]()
    for each in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        names.update([each] if isinstance(each, str) else each)
    own_code = getattr(config, "auto_map", None) or {}
    sees = AutoModelForImageTextToText.__name__ in own_code and AutoModelForCausalLM.__name__ not in own_code
    if sees or not names.isdisjoint(config.architectures or ()):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def configs_of(path: str | None, trust_remote_code: bool, revision: str | None = None) -> tuple[Any, Any | None]:
    """Return the config of the model that `load_policy` would load, and its adapter's config or None."""
    adapter = None
    if (Path(path or "") / "adapter_config.json").is_file():
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(path)
        adapter.inference_mode = False
        path, revision = adapter.base_model_name_or_path, adapter.revision
    files = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    return AutoConfig.from_pretrained(path, **files), adapter


def _keep_differentiable(model: nn.Module) -> None:
    """Let bitsandbytes compute alike in training and evaluation.

    On some CPUs it rewrites 4-bit weights at the first evaluation, and training goes on with gradients that are
    silently 0. In evaluation it also rounds the inputs of 8-bit layers to 8 bits, which changes log-probs by more than
    a reference may differ; these layers stay in training mode.

    Raises:
        ValueError: it has done so already.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            module.training = True
            vars(module)["train"] = _stays
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name} were rewritten for inference when the model was evaluated, and can't be "
                "trained; load the model again"
            )
        module.support_avx512bf16_for_cpu = False


def _stays(mode: bool = True) -> None:
    """Ignore a change between training and evaluation."""


def load_tokenizer(model: Any, args: Any, *, setting: str = "processing_class", images: bool = False) -> Any:
    """Load the tokenizer that lies beside the weights of a loaded model, or in a folder, or in a repository on the Hub.

    Args:
        model: a loaded model, or the name or path of one.
        args: a `DPOConfig`; those of its `model_init_kwargs` that say which files to read, such as `revision`, count.
        setting: what an error calls the place.
        images: load the processor, which has the tokenizer, for rows with images.

    Raises:
        ValueError: the model was not loaded from anywhere.
        OSError: no tokenizer lies there; the message begins with `setting`.
    """
    options = _options(args)
    files = {name: options[name] for name in _OF_FILES if name in options and name != "force_download"}
    if not (name := model if isinstance(model, str) else model.config._name_or_path):
        raise ValueError(
            "processing_class is None, and the model was not loaded from a folder or the Hub, where its tokenizer "
            "would be; pass processing_class=AutoTokenizer.from_pretrained(...)"
        )
    check_model_folder(setting, name, trusts_code=args.trust_remote_code)
    with loading(setting, name):
        loaded = (AutoProcessor if images else AutoTokenizer).from_pretrained(name, **files)
    if images and not hasattr(loaded, "image_processor"):
        raise ValueError(
            f"{setting}: {name!r} holds no processor of images that transformers can load, only a "
            f"{type(loaded).__name__}, and the dataset has images; save the model's own processor there, or remove the "
            "column of images"
        )
    return loaded


def align_pad_token(model: Any, tokenizer: Any) -> None:
    """Give the tokenizer a pad token if it has none, and let the model's configs name the same one, as TRL does.

    Nothing is padded in training, but what is saved must agree: `generate` and other trainers read it.
    """
    if getattr(tokenizer, "pad_token_id", None) is None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            return
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def smallest_vocab(*models: Any) -> int:
    """Return the fewest embedding rows of all models that are not None; ids below this number are known to all."""
    weights = [model.get_input_embeddings().weight for model in models if model is not None]
    return min(int(getattr(weight, "ds_shape", weight.shape)[0]) for weight in weights)  # ZeRO-3 leaves no rows in it


def _options(args: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained`.

    Raises:
        ValueError: there is no such `attn_implementation`.
    """
    assert not isinstance(args.model_init_kwargs, str)  # __post_init__ parsed it
    options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    attention = options.get("attn_implementation")
    if isinstance(attention, str) and "/" not in attention:  # with a slash it is a kernel on the Hub
        check_name("attn_implementation", attention, ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()))
    return options


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
    model = auto_class(config).from_config(config, **of_model, **code)
    vars(model)[_BUILT] = True
    logger.info("built %s with random weights, %.1f M parameters", type(model).__name__, model.num_parameters() / 1e6)
    return model

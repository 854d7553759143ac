"""Merge an adapter into its base model, and check what was merged and what was saved by their log-probs.

Base and merged weights have the dtype in which the base was saved. Everything runs on the CPU.
"""

import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from fastdpo.model.adapters import REF_ADAPTER, peft_is_older
from fastdpo.model.policy import auto_class
from fastdpo.model.self_check import RELATIVE_ERROR
from fastdpo.settings.failures import loading

logger = logging.getLogger("fastdpo")

LENGTHS = (5, 11, 16, 24)
"""Lengths of the sequences on which log-probs are compared, in tokens."""


class Merged(NamedTuple):
    """What `save_merged` measured; errors are the largest differences of log-probs, in nats."""

    dtype: str
    """Dtype of the merged weights."""
    effect: float
    """How much the adapter changes log-probs."""
    merge_error: float
    """The merged model against base and adapter."""
    saved_error: float
    """The model that was saved, loaded again, against base and adapter."""
    bound: float
    """The bound of both errors."""


def save_merged(adapter: str, base: str | None, output: Path, *, trust_remote_code: bool = False) -> Merged:
    """Merge an adapter into its base model, and save the result with its tokenizer; nothing is left after a failure.

    Args:
        adapter: folder or Hub repository of the adapter.
        base: folder or Hub repository of the base model; None: the one that the adapter names.
        output: folder to write to, which is new or empty.
        trust_remote_code: run the code in the base model's repository.

    Raises:
        ValueError: PEFT can't merge the adapter, the adapter does not fit the base model, or log-probs differ.
        FloatingPointError: the log-probs of base and adapter are not finite.
        OSError: a model can't be loaded or written.
    """
    model, tokenizer, base = _load(adapter, base, trust_remote_code)
    dtypes = {name: p.dtype for name, p in model.get_base_model().named_parameters()}
    sequences = _sequences(model, tokenizer)
    before = _logps(model, sequences)
    if not before.isfinite().all():
        raise FloatingPointError(f"{adapter}: the log-probs of base model and adapter are not finite")
    with model.disable_adapter():
        effect = _difference(_logps(model, sequences), before)
    bound = max(RELATIVE_ERROR[dtype] for dtype in _floating(dtypes)) * (1 + float(before.abs().max()))
    merged = _merge(model, dtypes)
    merge_error = _difference(_logps(merged, sequences), before)
    _check("merging changed", merge_error, bound)
    _say_rounding(effect, merge_error, merged.dtype)
    is_tied, dtype = _is_tied(merged), _name(merged.dtype)
    try:
        logger.info("saving the merged model")
        merged.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        _copy_processor(adapter, base, output)
        del model, merged  # the weights fit into memory once
        options = {"trust_remote_code": trust_remote_code}
        saved = _class_of(str(output), options).from_pretrained(output, dtype="auto", **options)
        if _is_tied(saved) != is_tied:
            raise ValueError(
                f"{type(saved).__name__} ties its embeddings, whatever its config says, and this adapter changes "
                "one of them, so a merged model can't be saved; deploy base model and adapter as they are"
            )
        saved_error = _difference(_logps(saved, sequences), before)
        _check("saving and loading changed", saved_error, bound)
    except BaseException:
        for path in output.iterdir() if output.exists() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return Merged(dtype, effect, merge_error, saved_error, bound)


# Loading


def _load(adapter: str, base: str | None, trust_remote_code: bool) -> tuple[Any, Any, str]:
    """Return the base model with its adapter, in evaluation mode, the tokenizer or None, and the base model's name."""
    with loading("adapter", adapter):
        config = PeftConfig.from_pretrained(adapter)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        raise ValueError(
            f"adapter: {adapter!r} is a {type(config).__name__}, which has no weights of layers that could be merged; "
            "deploy base model and adapter as they are"
        )
    if getattr(config, "layer_replication", None):  # PEFT would merge into the layers that share a weight
        raise ValueError(
            f"adapter: {adapter!r} copies layers of its base model (layer_replication), which share their weights and "
            "can't be merged one by one; deploy base model and adapter as they are"
        )
    revision = None if base else config.revision
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"adapter: {adapter!r} names no base model; give it as --model_name_or_path")
    logger.info("loading the base model %s", base)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading("the adapter's base model, for which --model_name_or_path may name another place,", base):
        model = _class_of(base, options).from_pretrained(base, dtype="auto", **options)
    model = _dequantized(model, base)
    tokenizer = _tokenizer(adapter, base, options)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rows = {tensor.shape[0] for tensor in load_peft_weights(adapter, device="cpu").values() if tensor.ndim == 2}
    if tokenizer is not None and len(tokenizer) > vocabulary and len(tokenizer) in rows:  # new tokens were trained
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if (Path(adapter) / REF_ADAPTER / "adapter_config.json").is_file():
        logger.info("%s is merged; %r beside it, the reference of its training, is left out", adapter, REF_ADAPTER)
    try:
        with warnings.catch_warnings(record=True) as caught, peft_is_older(), loading("adapter", adapter):
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, adapter, config=config)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"adapter: {adapter!r} does not fit {base!r}: {' '.join(str(error).split())}") from error
    for message in (str(each.message) for each in caught):
        if message.startswith("Found missing adapter keys"):
            raise ValueError(f"adapter: {adapter!r} does not fit {base!r}: {message[:300]}")
    return model.eval(), tokenizer, base


def _dequantized(model: Any, base: str) -> Any:
    """Return the model with plain weights, for merging into quantised ones would round them again."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    logger.info("%s is quantised: its weights are made plain ones, and are saved as such", base)
    try:
        model = model.dequantize()
    except (NotImplementedError, AttributeError, TypeError, ImportError) as error:
        raise ValueError(
            f"the base model {base!r} is quantised in a way that can't be undone ({error}); give the model that it was "
            "made from as --model_name_or_path"
        ) from error
    model._weight_conversions = None  # or saving would try to quantise again
    return model


def _tokenizer(adapter: str, base: str, options: dict[str, Any]) -> Any:
    """Load the tokenizer saved with the adapter, else that of the base model; None, with a warning, without either."""
    found = cached_file(
        adapter,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        return AutoTokenizer.from_pretrained(adapter) if found else AutoTokenizer.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer is saved with the merged model, because none can be loaded: %s", error)
        return None


def _class_of(model: str, options: dict[str, Any]) -> Any:
    return auto_class(AutoConfig.from_pretrained(model, **options))


def _copy_processor(adapter: str, base: str, output: Path) -> None:
    """Copy the files of a processor of images, from beside the adapter or else the base model, if there are any."""
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        for source in (adapter, base):
            quiet = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
            found = cached_file(source, name, **{f"_raise_exceptions_for_{k}": v for k, v in quiet.items()})
            if found:
                shutil.copyfile(found, output / name)
                break


# Merging


def _merge(model: Any, dtypes: dict[str, torch.dtype]) -> Any:
    """Return the base model with the adapter merged into its weights, which keep their `dtypes`."""
    base = model.get_base_model()
    configs = {id(each): each for each in (base.config, base.config.get_text_config())}.values()
    ties = any(getattr(each, "tie_word_embeddings", False) for each in configs)
    _untie_where_merged(base)
    logger.info("merging")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied embeddings, which are handled here
            merged = model.merge_and_unload(progressbar=sys.stderr.isatty(), safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        name = type(model.active_peft_config).__name__
        raise ValueError(f"PEFT can't merge this {name}: {' '.join(str(error).split())}") from error
    for name, parameter in merged.named_parameters():  # PEFT holds what it trains in float32
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    if ties and not _is_tied(merged):
        logger.warning(
            "the adapter changes the embeddings or the head, which are one tensor in the base model: the merged model "
            "has the two apart, which takes %.0f MiB more",
            merged.get_output_embeddings().weight.nbytes / 2**20,
        )
        for each in configs:  # or the two would be one again when the model is loaded
            each.tie_word_embeddings = False
    return merged


def _untie_where_merged(base: Any) -> None:
    """Give the head a weight of its own if an adapter of head or embeddings would be merged into both of them.

    PEFT merges in place. Where one tensor serves as embeddings and head, it would change the other of the two as well,
    or, with `ensure_weight_tying`, both of them twice.
    """
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    # of trained tokens PEFT itself knows that they are tied
    merges = [isinstance(each, BaseTunerLayer) and not isinstance(each, TrainableTokensLayer) for each in layers]
    if any(merges) and _is_tied(base):
        head = layers[1].get_base_layer() if merges[1] else layers[1]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _is_tied(model: Any) -> bool:
    """Whether embeddings and head are one tensor."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    first, second = (getattr(each, "weight", None) for each in layers)
    return first is not None and second is not None and first.data_ptr() == second.data_ptr()


# Checking


def _sequences(model: Any, tokenizer: Any) -> list[Tensor]:
    """Draw sequences `[1, L]` of ordinary tokens, always the same for a vocabulary."""
    size = int(model.get_base_model().config.get_text_config().vocab_size)
    special: set[int] = set()
    if tokenizer is not None:
        size, special = min(size, len(tokenizer)), set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(size) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return [ordinary[torch.randint(len(ordinary), (1, n), generator=generator)] for n in LENGTHS]


@torch.no_grad()
def _logps(model: Any, sequences: list[Tensor]) -> Tensor:
    """Return the log-probs of all tokens but the first of each sequence, `[M]` float32, by the model's own forward."""
    model.eval()
    parts = []
    for ids in sequences:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        parts.append(log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1))
    return torch.cat(parts)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _check(what: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise ValueError(
            f"{what} the log-probs by up to {error:.2g} nats (bound {bound:.2g}), so no model is saved; deploy base "
            "model and adapter as they are"
        )


def _say_rounding(effect: float, error: float, dtype: torch.dtype) -> None:
    if effect == 0:
        logger.warning("the adapter does not change the log-probs: it may never have been trained")
    elif error > effect / 2:
        logger.warning(
            "rounding to %s changes the log-probs by %.1e nats, and the adapter by only %.1e: much of what was trained "
            "may be lost in the merged model",
            *(_name(dtype), error, effect),
        )


def _floating(dtypes: dict[str, torch.dtype]) -> list[torch.dtype]:
    return [dtype for dtype in set(dtypes.values()) if dtype in RELATIVE_ERROR]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

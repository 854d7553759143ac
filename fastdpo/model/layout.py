"""Decide, from a model's class and config, which layout of a batch is exact on it. No other module decides this.

A layout is exact if it gives the log-probs of each sequence alone, up to rounding. `fastdpo.data.packing` makes the
layouts; `fastdpo.model.self_check` confirms the choice by numbers on the model itself.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from fastdpo.data.packing import LAYOUTS
from fastdpo.data.vision.batch import image_token_of
from fastdpo.model.adapted_layers import puts_prompts_first, unwrap
from fastdpo.model.body_and_head import locate_head

logger = logging.getLogger("fastdpo")

Layout = Literal["shared", "packed", "tree", "padded"]

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers whose packed computation is exact."""

_HYBRID_TYPES = LAYER_TYPES | {"attention", "linear_attention", "mamba", "conv", "mlp", "moe"}
INSTALL = "pip install 'fastdpo[hybrid]'"


def choose_layout(models: Sequence[Any], prefix_sharing: bool, *, trains: bool = True) -> Layout:
    """Return the best layout that is exact on all `models`; `prefix_sharing=False` excludes those that share."""
    found = [layout_of(model, trains=trains) for model in models]
    layout, reason = max(found, key=lambda choice: LAYOUTS.index(choice[0]))
    if not prefix_sharing and layout in ("shared", "tree"):
        layout, reason = "packed", "prefix_sharing=False"
    padding = "batches are padded" if layout == "padded" else "batches hold no padding"
    if layout in ("shared", "tree"):
        logger.info("%s, and what an example's responses share, such as the prompt, is computed once", padding)
    else:
        logger.info("%s, and a prompt is computed once for each of its responses, because %s", padding, reason)
    return layout


def layout_of(model: Any, *, trains: bool = True) -> tuple[Layout, str]:
    """Choose the best layout of a batch that is exact on a model: shared, tree, packed (nothing is shared) or padded.

    If the answer is "tree", this call has also made the model's recurrent layers follow trees (see `_follows_trees`).

    Args:
        model: a causal LM of transformers, or a PEFT model around one. The answer depends on its dropout as set now.
        trains: whether the batches are for training; otherwise nothing drops out.

    Returns:
        The layout, and the reason in words.

    Raises:
        ValueError: no layout is exact on the model; the message names its class and the reason.
    """
    model = checked_model(model)
    if reason := only_padded(model):
        return "padded", reason
    if trains and _attention_dropout(model):
        return "padded", "it drops out attention weights (disable_dropout=False), which only padded batches support"
    recurrent = has_state(model)
    if trains and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        reason = "it uses dropout (disable_dropout=False), and a token computed once can have only one mask"
        return "padded" if recurrent else "packed", reason
    if recurrent:
        return "tree", "its recurrent layers follow the batch's tree by tree-recurrence"
    return "shared", "its attention is causal, full or sliding, and goes through transformers' AttentionInterface"


def checked_model(model: Any) -> Any:
    """Return the causal LM inside PEFT's wrapper, or raise a ValueError if no layout can be exact on it."""
    if puts_prompts_first(model):
        raise refusal(model, "it puts trained prompts before the tokens; use an adapter of its layers")
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise refusal(model, "it is not a model of transformers")
    if model.config.is_encoder_decoder:
        raise refusal(model, "it is an encoder and a decoder")
    return model


def refusal(model: Any, reason: str) -> ValueError:
    """Return the error for a model that cannot run a batch exactly."""
    return ValueError(f"{type(model).__name__} cannot run these batches: {reason}")


def has_state(model: Any) -> bool:
    """Whether layers carry a state from token to token; LFM2's convolutions show only in the kinds of its layers."""
    unknown = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    return bool(getattr(model, "_is_stateful", False)) or bool(unknown and unknown <= _HYBRID_TYPES)


def only_padded(model: PreTrainedModel) -> str | None:
    """Return why packed batches would not be exact on this model, or None if they are exact."""
    config: Any = model.config.get_text_config()
    if config is not model.config and (reason := _sees_otherwise(model)):
        return reason
    if unknown := set(getattr(config, "layer_types", None) or ()) - _HYBRID_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if not has_state(model) and not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    limit, rope_type = rope_limit(config)
    if limit is not None:
        return f"its {rope_type} RoPE depends on the longest sequence in the batch"
    return _follows_trees(model) if has_state(model) else None


def check_images(model: Any) -> None:
    """Check that a model's images become tokens of its prompts, in an order that batches can keep.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: they don't; the message names the model's class and the reason.
    """
    model = checked_model(model)
    reason = _sees_otherwise(model)
    if reason is None and image_token_of(model.config) is None:
        reason = "its config names no token that stands for an image"
    if reason is not None:
        raise refusal(model, f"{reason}; train it on text alone, without the column of images")


def image_blocks(model: Any) -> str | None:
    """Return in which layers the tokens of an image see each other in both directions: "all", "sliding" or None."""
    if model.config.model_type == "gemma3":
        return "all"
    text = model.config.get_text_config()
    return "sliding" if getattr(text, "use_bidirectional_attention", None) == "vision" else None


def _sees_otherwise(model: Any) -> str | None:
    """Return why a model's images are not tokens that only later tokens see (or its own, in `image_blocks`)."""
    text = model.config.get_text_config()
    takes = inspect.signature(locate_head(model).decoder.forward).parameters
    if getattr(text, "cross_attention_layers", None):
        return "its layers look at the images by cross-attention"
    if "pixel_values" not in takes:
        return "its images do not become tokens inside its decoder"
    if "token_type_ids" in takes and image_blocks(model) is None:
        return "its prompt is read in both directions"
    return None


def rope_limit(config: Any) -> tuple[int | None, str]:
    """Return the sequence length beyond which a RoPE changes with the length (None: it never does), and its type."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [p for p in rope.values() if isinstance(p, dict)] or [rope]:
        rope_type = parameters.get("rope_type", "default")
        if "dynamic" in rope_type:
            return config.max_position_embeddings, rope_type
        if rope_type == "longrope":
            return parameters.get("original_max_position_embeddings", config.max_position_embeddings), rope_type
    return None, "default"


def check_sharded(model: Any, max_length: int | None) -> None:
    """Refuse a model whose weights processes gather together if they may call it different numbers of times.

    Raises:
        ValueError: beyond a length, a longrope RoPE needs a call for each row, and rows may be longer.
    """
    model = unwrap(model)
    limit, rope_type = rope_limit(model.config)
    if rope_type == "longrope" and limit is not None and (max_length is None or max_length > limit):
        raise refusal(
            model,
            f"beyond {limit} tokens it reads rows one by one, and processes that share its weights have different "
            f"numbers of rows; set max_length <= {limit} (it is {max_length}), or use DDP",
        )


def _attention_dropout(model: nn.Module) -> bool:
    """Whether attention weights may drop out; layers keep the probability as a number or as a module's `p`.

    Dropout modules directly inside an attention layer count, except those of the residual stream, which GPT-2 names so.
    An adapter's dropout lies deeper, inside the projections, and acts on hidden states.
    """
    by_number = any(
        "dropout" in name and isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
    )
    return by_number or any(
        isinstance(child, nn.Dropout) and child.p > 0 and "resid" not in name
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
        for name, child in module.named_children()
    )


def _follows_trees(model: Any) -> str | None:
    """Make a model's recurrent layers follow the tree of each example, by the tree-recurrence package.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.

    Returns:
        None if they follow trees now, else the reason why they don't.
    """
    if importlib.util.find_spec("tree_recurrence") is None:
        return f"its layers carry a state from token to token ({INSTALL} may let them follow shared prompts)"
    tree_recurrence: Any = importlib.import_module("tree_recurrence")  # untyped where it is not installed
    support = tree_recurrence.install(model)
    if support.mode == "tree":
        return None
    tree_recurrence.uninstall(model)
    return f"its layers carry a state from token to token, and tree-recurrence answers: {support.reason}"

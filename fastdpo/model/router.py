"""Compute the balancing loss of a mixture-of-experts router, for a batch in any layout.

The loss is that of the Switch Transformer, https://arxiv.org/abs/2101.03961:

    E * sum_e f_e P_e        f_e: tokens sent to expert e, P_e: mean probability of e, over all layers' tokens

Both are means over the tokens of the full sequences, where a prompt counts once for each of its responses.
transformers weights each row by its entry in the attention mask. So the mask passed here holds n for a row that n
responses share, and 0 for the rows that fill up a batch. The loss itself and its coefficient are the model's own.

The last token of a sequence predicts nothing, so it is in no batch and does not count; a plain forward of the full
sequences does count it.

Shapes: T rows, S segments, K key-path entries, R responses, D hidden size.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.packing import edges
from fastdpo.model.body_and_head import own_outputs

logger = logging.getLogger("fastdpo")


def coefficient(model: Any, given: float | None) -> float:
    """Return the coefficient of a model's balancing loss; 0.0 means that the objective has no such loss.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.
        given: the user's coefficient; None takes that of the model's config, as TRL does.

    Raises:
        ValueError: a coefficient was given for a model that computes no balancing loss; the message names its class.
    """
    config = model.config.get_text_config()
    takes = inspect.signature(type(model).forward).parameters
    if hasattr(config, "output_router_logits") and "output_router_logits" in takes:
        return float((getattr(config, "router_aux_loss_coef", None) or 0.0) if given is None else given)
    if given:
        raise ValueError(
            f"router_aux_loss_coef is {given}, but {type(model).__name__} computes no balancing loss of a router; "
            "leave it out"
        )
    if given is None and (own := getattr(config, "router_aux_loss_coef", None)):
        logger.warning(
            "router_aux_loss_coef=%s of the model's config has no effect: %s computes no balancing loss",
            own,
            type(model).__name__,
        )
    return 0.0


def why_it_differs(config: Any) -> str:
    """Return why the router of a model with this config may compute a batch in another way; "" if it has no router."""
    settings = vars(config.get_text_config())
    if not any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings.items()):
        return ""
    noise = ", ".join(f"{name}={value}" for name, value in settings.items() if "jitter" in name and value)
    if noise:
        return (
            f"the router draws experts or noise at random in training, but not in the reference ({noise} in the "
            "model's config; pass ref_model to train with it)"
        )
    return "the router sends a token that is nearly tied between experts elsewhere when sums round otherwise"


def balancing_loss(
    forward: Callable[..., Any], decoder: nn.Module, outputs: Sequence[Any], batch: Mapping[str, Any], hidden: Tensor
) -> Tensor:
    """Return the balancing loss, a scalar, that the model's own forward computes from its decoder's router logits.

    Args:
        forward: the causal LM's own forward, bound.
        decoder: the module of the causal LM that ran the batch.
        outputs: what the decoder returned, once or for each padded row, with `output_router_logits=True`.
        batch: from `fastdpo.shared_prefix_batch`.
        hidden: `[rows, D]`; only the first row is used, as input of the forward's head.

    Raises:
        ValueError: there are no router logits, none has a gradient, or the forward returns no loss.
    """
    logits = [getattr(each, "router_logits", None) for each in outputs]
    if all(logits):
        weights = _multiplicity(batch)
        layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
        if hidden.requires_grad and not any(layer.requires_grad for layer in layers):
            raise ValueError(
                "no gradient reaches the router's balancing loss; set use_reentrant=False for gradient checkpointing, "
                "or router_aux_loss_coef=0"
            )
        options = {"attention_mask": weights, "output_router_logits": True}
        output = own_outputs(forward, decoder, hidden[:1].detach(), router_logits=layers, **options)
        if isinstance(loss := getattr(output, "aux_loss", None), Tensor):
            return loss
    raise ValueError("this model returns no balancing loss of its router; set router_aux_loss_coef=0")


def _multiplicity(batch: Mapping[str, Any]) -> Tensor:
    """Count the full sequences that each row belongs to, `[1, T]` or `[R, L]` float32, without a device sync.

    A response counts once for each example that holds it. The last target of a response is predicted from a segment
    whose key path is the whole sequence.
    """
    if batch.get("cu_target") is None:
        raise ValueError("the balancing loss needs cu_target, the bounds of the responses; pass the whole batch")
    held = edges(batch).flatten()  # the number of responses stands for no response
    counts = torch.zeros(len(batch["cu_target"]), device=held.device)
    of_response = counts.index_add_(0, held, torch.ones(len(held), device=held.device))[:-1]
    if batch.get("attention_mask") is not None:
        weights: Tensor = batch["attention_mask"] * of_response[:, None]
        return weights
    kv_index, ends = batch["tree_kv_index"], batch["tree_cu_seqlens_q"][1:]
    last_rows = batch["logit_index"][batch["cu_target"][1:].long() - 1]
    segments = torch.searchsorted(ends, last_rows.to(ends.dtype), right=True)
    responses = torch.zeros(len(ends), device=kv_index.device).index_add_(0, segments, of_response)
    entries = torch.arange(len(kv_index), device=kv_index.device, dtype=ends.dtype)
    of_entry = responses[torch.searchsorted(batch["tree_cu_seqlens_k"][1:], entries, right=True)]
    rows = torch.zeros(batch["input_ids"].shape[1], device=kv_index.device)
    return rows.index_add_(0, kv_index, of_entry)[None]

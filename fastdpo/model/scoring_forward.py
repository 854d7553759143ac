"""A causal language model as a body and a head, and the layouts of a batch that run through it exactly.

    hidden    = decoder(batch)                          every row of a packed batch, or padded rows
    logps[m]  = log p(target_ids[m] | hidden[logit_index[m]])      only where a token is scored, see
    `fastdpo.model.body_and_head`

`patch_forward` puts this into the instance's own `forward`. Nothing of the model is cached: decoder and head are looked
up on each call, for PEFT and FSDP replace them after patching.

`layout_of` says which layout of a batch (see `fastdpo.data.packing`) is the best exact one for a model, from what is
known of its class and config; `fastdpo.model.self_check` then confirms it by numbers on the model itself.

Shapes: T rows of a packed batch, R padded rows of L tokens, M targets, D hidden size, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.head.eager import Stats
from fastdpo.model import body_and_head, hybrid, router
from fastdpo.model.attention import registered
from fastdpo.model.body_and_head import Head

Layout = Literal["shared", "packed", "tree", "padded"]

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers whose packed computation is exact."""
_HYBRID_TYPES = LAYER_TYPES | {"attention", "linear_attention", "mamba", "conv", "mlp", "moe"}

_INPUTS = ("input_ids", "logit_index", "target_ids")
_PACKED_INPUTS = (*_INPUTS, "position_ids", *registered.METADATA)
_PADDED_INPUTS = (*_INPUTS, "position_ids", "attention_mask")
_NOT_FOR_THE_MODEL = (
    *("cu_target", "ref_logps", "ref_token_logps", "pair_index", "response_index"),
    *("weight", "margin", "beta", "label", "tree_seqlens_k"),
    *("num_tokens", "num_padded_tokens", "num_packed_tokens"),
)

logger = logging.getLogger("fastdpo")


class TokenScores(NamedTuple):
    """What a batch's forward returns."""

    logps: Tensor
    """`[M]` float32, nats."""
    stats: Stats | None
    """Statistics of each target's distribution, `[M]` each, detached, where `with_stats` asked for them."""
    aux_loss: Tensor | None = None
    """Scalar: the balancing loss of a mixture's router (`fastdpo.model.router`), where `with_aux_loss` asked for it."""


class _Patch(NamedTuple):
    impl: Any
    backward: Any
    attention: str  # backend
    forward: Callable[..., Any] | None  # the instance's own, where it had one before
    place: int  # of the decoder, see body_and_head.locate
    own: str | None  # why the model's own head is used
    padded: str | None  # why batches must be padded


def find_head(model: Any) -> Head:
    """Find the body and the head of a model, and check that its batches can be scored.

    The head is tried on a few random hidden states where the weights are there; what it can't follow is left to the
    model's own forward, and `Head.own` says why.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: no layout of a batch is exact on it; names the class and the reason.
    """
    return _find(model)[1]


def layout_of(model: Any) -> tuple[Layout, str]:
    """Choose the best layout of a batch that is exact on a model: shared, tree, packed (nothing is shared) or padded.

    Where it is "tree", the model's recurrent layers have been made to follow one (see `fastdpo.model.hybrid`).

    Args:
        model: as `find_head`. Its dropout counts as it is set now.

    Returns:
        The layout, and the reason in words.

    Raises:
        ValueError: as `find_head`, as far as that needs no look at the head.
    """
    model = _checked(model)
    if reason := _only_padded(model):
        return "padded", reason
    if _attention_dropout(model):
        return "padded", "it drops out attention weights (disable_dropout=False), which only padded batches can"
    recurrent = _has_state(model)
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        reason = "it uses dropout (disable_dropout=False), and a token computed once has one mask only"
        return "padded" if recurrent else "packed", reason
    if recurrent:
        return "tree", "its recurrent layers follow the batch's tree by tree-recurrence"
    return "shared", "its attention is causal, full or sliding, and goes through transformers' AttentionInterface"


def patch_forward(model: Any, *, impl: str = "auto", backward: str = "auto", attention_backend: str = "auto") -> None:
    """Let `model(**batch)` score a batch of `fastdpo.shared_prefix_batch`, and leave every other call as it was.

    A call with `logit_index` runs the batch without a cache and returns `TokenScores`; `with_stats=True` adds the
    statistics, `with_aux_loss=True` a mixture's balancing loss. Fields that only the loss needs may be passed and are
    ignored. All other calls, `generate()` included, run the model's own forward. Where batches can be packed, it is on
    transformers' SDPA attention from now on, else on the attention it came with.

    A `copy.deepcopy` of a patched model is patched too and independent of it. Patching again changes the options.

    Args:
        model: a causal LM of transformers, or a PEFT model around one; changed in place (the instance, not its class).
        impl: implementation of the head, see `fastdpo.linear_logprobs`.
        backward: its backward, see `fastdpo.linear_logprobs`.
        attention_backend: of packed batches, one of `fastdpo.model.attention.backends.BACKENDS`; "auto": the best that
            a layer can have. A batch on a device that cannot have it raises a ValueError.

    Raises:
        ValueError: as `find_head`.
    """
    place, head = _find(model)
    model = _unwrap(model)
    if head.own:
        logger.warning("%s: the logits are computed in chunks by the model's own head: %s", _name(model), head.own)
    padded = _only_padded(model)
    if padded is None:
        _set_attention(model)
    previous = vars(model).get("_fastdpo")
    own = previous.forward if previous else vars(model).get("forward")
    vars(model)["_fastdpo"] = _Patch(impl, backward, attention_backend, own, place, head.own, padded)
    if not previous:
        # a bound method of a function that holds no model: deepcopy binds it to the copy
        vars(model)["forward"] = MethodType(_make_forward(type(model)), model)


def is_patched(model: Any) -> bool:
    """Whether `patch_forward` has been called on a model, or on what PEFT wraps."""
    return "_fastdpo" in vars(_unwrap(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it nothing drops out; module by module as before afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _make_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("logit_index") is not None:
            return _score(self, *args, **kwargs)
        return _own_forward(self)(*args, **kwargs)

    # generate() and Trainer read the signature; __wrapped__ would let accelerate unwrap the patch
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    return forward


def _own_forward(model: Any) -> Callable[..., Any]:
    """Return the model's forward as it would be without the patch."""
    patch = vars(model).get("_fastdpo")
    own = patch.forward if patch else vars(model).get("forward")
    return own or MethodType(type(model).forward, model)


def _score(model: nn.Module, *, with_stats: bool = False, with_aux_loss: bool = False, **batch: Any) -> TokenScores:
    """Run a batch through body and head."""
    patch = vars(model)["_fastdpo"]
    head = body_and_head.locate(model, patch.place)
    packed = batch.get("attention_mask") is None
    inputs = _PACKED_INPUTS if packed else _PADDED_INPUTS
    if missing := [name for name in inputs if batch.get(name) is None]:
        raise ValueError(
            f"a packed batch needs {', '.join(missing)}, a padded one attention_mask; make it with "
            "fastdpo.shared_prefix_batch"
        )
    extra = {name for name, value in batch.items() if value is not None and value is not False}
    if extra := extra.difference(inputs, _NOT_FOR_THE_MODEL):
        raise ValueError(f"a {'packed' if packed else 'padded'} batch takes no {', '.join(sorted(extra))}")
    options: dict[str, Any] = {"output_router_logits": True} if with_aux_loss else {}
    hidden, outputs = (_packed_hidden if packed else _padded_hidden)(model, head.decoder, batch, options)
    forward = _own_forward(model)
    aux_loss = router.balancing_loss(forward, head.decoder, outputs, batch, hidden) if with_aux_loss else None
    hidden = hidden.index_select(0, batch["logit_index"])

    if patch.own or head.own:
        scores = body_and_head.own_scores(model, forward, head.decoder, hidden, batch["target_ids"], with_stats)
    else:
        options = {"impl": patch.impl, "backward": patch.backward}
        scores = body_and_head.fused_scores(head, hidden, batch["target_ids"], with_stats, **options)
    if not with_stats:
        return TokenScores(scores, None, aux_loss)
    logps, stats = scores
    return TokenScores(logps, stats._replace(entropy=stats.entropy.detach()), aux_loss)


def _packed_hidden(
    model: Any, decoder: nn.Module, batch: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """`[T, D]` of one row of tokens, and what the decoder returned."""
    input_ids = batch["input_ids"]
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids of a packed batch must be [1, T], got {tuple(input_ids.shape)}")
    if reason := vars(model)["_fastdpo"].padded:
        raise _refusal(model, f"{reason}; they must be padded (layout='padded')")
    if _has_state(model) and _begins_inside_a_segment(batch):
        raise _refusal(model, "its layers carry a state, so shared prompts need layout='tree'")
    name = model.config._attn_implementation
    if name != registered.NAME:
        raise _refusal(model, f"its attention is {name!r} and not {registered.NAME!r}; call patch_forward (again)")
    with registered.packing():
        outputs = decoder(
            input_ids=input_ids,
            # unused; but without one transformers looks for sequences in position_ids, which waits for the device
            attention_mask=torch.ones_like(input_ids),
            position_ids=batch["position_ids"],
            use_cache=False,
            **options,
            **registered.layer_kwargs(batch, vars(model)["_fastdpo"].attention),
        )
    return outputs[0][0], [outputs]


def _begins_inside_a_segment(batch: dict[str, Any]) -> bool:
    """Whether a branch's trunk is not a segment of its own, told without a look at the device."""
    T, kv = batch["input_ids"].shape[1], batch["tree_kv_index"].shape[0]
    filled = batch.get("num_packed_tokens", T) < T
    segments = batch["tree_cu_seqlens_q"].shape[0] - 1 - filled
    # something is shared, and yet there are no more segments than responses
    return bool(kv > T and segments < batch["cu_target"].shape[0])


def _padded_hidden(
    model: Any, decoder: nn.Module, batch: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """`[R L, D]` of rows padded on the right, as an ordinary call of the decoder, and what that returned."""
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        shapes = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"input_ids and attention_mask of a padded batch must be [R, L], got {shapes[0]}, {shapes[1]}")
    # positions are the model's own, which need not begin with 0 (RoBERTa), and right for right padding
    options = {"use_cache": False, **options}
    accepted = inspect.signature(decoder.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        options = {name: value for name, value in options.items() if name in accepted}

    limit, rope_type = _rope_limit(model.config)
    if limit is None or input_ids.shape[1] <= limit:
        outputs = decoder(input_ids=input_ids, attention_mask=attention_mask, **options)
        return outputs[0].flatten(0, 1), [outputs]
    if rope_type != "longrope":
        raise _refusal(
            model,
            f"beyond {limit} tokens its {rope_type} RoPE depends on the batches before; set max_length <= {limit}",
        )
    # the longest row of a call chooses the frequencies for all
    position_ids = batch["position_ids"] * attention_mask
    rows = zip(input_ids.split(1), attention_mask.split(1), position_ids.split(1), strict=True)
    each = [decoder(input_ids=i, attention_mask=m, position_ids=p, **options) for i, m, p in rows]
    return torch.cat([outputs[0][0] for outputs in each]), each


# What is exact


def _find(model: Any) -> tuple[int, Head]:
    """Find the head and where the decoder is."""
    model = _checked(model)
    tried = []
    for place in body_and_head.places(model):
        head = body_and_head.locate(model, place)
        head = head._replace(own=head.own or body_and_head.outside(model, head))
        if not body_and_head.can_probe(model):
            return place, head
        reason, failure = body_and_head.probe(model, _own_forward(model), head)
        if failure is None:
            return place, head._replace(own=head.own or reason)
        tried.append(failure)
    head = body_and_head.locate(model)
    if head.own is None and body_and_head.outside(model, head) is None:  # a forward that is not a class's own
        return 0, head
    raise _refusal(model, tried[0])


def _checked(model: Any) -> Any:
    """Return the causal LM inside, if any layout can be exact on it."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise _refusal(model, "it puts trained prompts before the tokens; use an adapter of its layers")
    model = _unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise _refusal(model, "it is not a model of transformers")
    if model.config.is_encoder_decoder:
        raise _refusal(model, "it is an encoder and a decoder")
    return model


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return type(model).__name__


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(f"{_name(model)} cannot run these batches: {reason}")


def _set_attention(model: Any) -> None:
    model.set_attn_implementation(registered.NAME)
    if model.config._attn_implementation != registered.NAME:
        raise _refusal(model, f"its attention stays {model.config._attn_implementation!r} when it is set")


def _has_state(model: Any) -> bool:
    """Whether layers carry a state; LFM2's short convolutions are only to be told by the kinds of its layers."""
    unknown = set(getattr(model.config, "layer_types", None) or ()) - LAYER_TYPES
    return bool(getattr(model, "_is_stateful", False)) or bool(unknown and unknown <= _HYBRID_TYPES)


def _only_padded(model: PreTrainedModel) -> str | None:
    """Why packed batches would not be exact on this model; None if they are."""
    config: Any = model.config
    if config.get_text_config() is not config:
        return "it is not a decoder of text alone"
    if unknown := set(getattr(config, "layer_types", None) or ()) - _HYBRID_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if not _has_state(model) and not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    limit, rope_type = _rope_limit(config)
    if limit is not None:
        return f"its {rope_type} RoPE depends on the longest sequence in the batch"
    return hybrid.follows_trees(model) if _has_state(model) else None


def _rope_limit(config: Any) -> tuple[int | None, str]:
    """Length up to which a RoPE that changes with the length is the same for all, and its type; None: it never does."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [p for p in rope.values() if isinstance(p, dict)] or [rope]:
        rope_type = parameters.get("rope_type", "default")
        if "dynamic" in rope_type:
            return config.max_position_embeddings, rope_type
        if rope_type == "longrope":
            return parameters.get("original_max_position_embeddings", config.max_position_embeddings), rope_type
    return None, "default"


def _attention_dropout(model: nn.Module) -> bool:
    """Whether attention weights may drop out: attention layers keep a number, or a module whose `p` they pass on.

    An attention layer's own modules count, but for those of the residual stream (GPT-2 names them so); what an adapter
    puts into its projections is deeper and drops out hidden states.
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

"""Run a packed or padded batch through the body of a causal language model, and score its targets with the head.

    hidden    = decoder(batch)                          every row of a packed batch, or padded rows
    logps[m]  = log p(target_ids[m] | hidden[logit_index[m]])      only where a token is scored

`fastdpo.model.body_and_head` computes the second line. `patch_forward` puts both into the instance's own `forward`.
Nothing of the model is cached: decoder and head are looked up on each call, because PEFT and FSDP replace them after
patching.

Shapes: T rows of a packed batch, R padded rows of L tokens, M targets, D hidden size, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.data.vision.batch import image_token_of, kinds_of_tokens
from fastdpo.head.eager import Stats
from fastdpo.head.impl.interface import WORKSPACE_BYTES
from fastdpo.model import body_and_head, router
from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.attention import registered
from fastdpo.model.body_and_head import Head
from fastdpo.model.layout import check_images, checked_model, has_state, image_blocks, only_padded, refusal, rope_limit
from fastdpo.sharding import decided_by_first, is_in_zero3, is_sharded

_INPUTS = ("input_ids", "logit_index", "target_ids")
_PACKED_INPUTS = (*_INPUTS, "position_ids", *registered.METADATA)
_PADDED_INPUTS = (*_INPUTS, "position_ids", "attention_mask")
_NOT_FOR_THE_MODEL = (
    *("cu_target", "ref_logps", "ref_token_logps", "pair_index"),
    *("chosen", "rejected", "completion", "kl", "response_index", "num_sequences", "num_targets"),
    *("weight", "margin", "beta", "label", "tree_seqlens_k", "image_inputs", "image_blocks"),
    *("num_tokens", "num_padded_tokens", "num_packed_tokens"),
)

logger = logging.getLogger("fastdpo")


class TokenScores(NamedTuple):
    """What a batch's forward returns."""

    logps: Tensor
    """`[M]` float32, nats."""
    stats: Stats | None
    """Statistics of each target's distribution, `[M]` each, detached; None unless `with_stats` asked for them."""
    aux_loss: Tensor | None = None
    """Scalar, the balancing loss of `fastdpo.model.router`; None unless `with_aux_loss` asked for it."""


class _Patch(NamedTuple):
    impl: Any
    backward: Any
    workspace: int
    attention: str  # backend
    forward: Callable[..., Any] | None  # the instance's own, where it had one before
    place: int  # of the decoder, see body_and_head.locate_head
    own: str | None  # why the model's own head is used
    padded: str | None  # why batches must be padded
    unscaled: bool  # whether its forward leaves out the scale that its config has
    compiled: bool = False  # whether torch.compile runs its layers


def find_head(model: Any) -> Head:
    """Find the body and the head of a model, and check that its batches can be scored.

    Where all weights are present, the fused head is tried on a few random hidden states. If it differs from the model's
    own head, the model's own forward will compute the logits, and `Head.own` says why.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: no layout of a batch is exact on the model; the message names its class and the reason.
    """
    model = checked_model(model)
    place, own, unscaled = _search(model)
    head = body_and_head.locate_head(model, place)._replace(own=own)
    return head._replace(logit_scale=1.0) if unscaled else head


def patch_forward(
    model: Any,
    *,
    impl: str = "auto",
    backward: str = "auto",
    workspace: int = WORKSPACE_BYTES,
    attention_backend: str = "auto",
) -> None:
    """Let `model(**batch)` score a batch of `fastdpo.shared_prefix_batch`, and leave every other call as it was.

    A call with `logit_index` runs the batch without a cache and returns `TokenScores`; `with_stats=True` adds the
    statistics, `with_aux_loss=True` the balancing loss of a mixture of experts. Fields that only the loss needs may be
    passed and are ignored. All other calls, `generate()` included, run the model's own forward. From now on they use
    transformers' SDPA attention if the model's batches can be packed, else the attention that the model came with.

    A `copy.deepcopy` of a patched model is patched too and independent of it. Patching again changes the options.

    Args:
        model: a causal LM of transformers, or a PEFT model around one; changed in place (the instance, not its class).
        impl: implementation of the head, see `fastdpo.linear_logprobs`.
        backward: backward of the head, see `fastdpo.linear_logprobs`.
        workspace: bound of the head's memory in bytes, see `workspace_bytes` of `fastdpo.linear_logprobs`.
        attention_backend: for packed batches, one of `fastdpo.model.attention.backends.BACKENDS`; "auto" takes the best
            that a layer can use. A batch on a device that cannot run the backend raises a ValueError.

    Raises:
        ValueError: as in `find_head`.
    """
    model = checked_model(model)
    # with FSDP's cpu_ram_efficient_loading, only the first process has weights that can be tried
    place, own, unscaled = decided_by_first(lambda: _search(model)) if is_fsdp_enabled() else _search(model)
    if own:
        logger.warning("%s: the logits are computed in chunks by the model's own head: %s", type(model).__name__, own)
    padded = only_padded(model)
    if padded is None:
        _set_attention(model)
    previous = vars(model).get("_fastdpo")
    forward = previous.forward if previous else vars(model).get("forward")
    patch = _Patch(impl, backward, workspace, attention_backend, forward, place, own, padded, unscaled)
    vars(model)["_fastdpo"] = patch
    if not previous:
        # a bound method of a function that holds no model: deepcopy binds it to the copy
        vars(model)["forward"] = MethodType(_make_forward(type(model)), model)


def compile_layers(model: Any, **options: Any) -> int:
    """Compile the layers of the decoder in place, for packed and padded batches of all lengths; return their number.

    The code around them stays as it is, because it depends on the batch and on who wraps the model. Layers with equal
    settings share what is compiled. The names of the weights stay too, and a `copy.deepcopy` is not compiled. Calls
    that score no batch, such as those of `generate()`, run the layers as they are.

    Args:
        model: a patched model.
        options: of `torch.compile`.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(**options)
    state = vars(unwrap(model))
    state["_fastdpo"] = state["_fastdpo"]._replace(compiled=bool(layers))
    return len(layers)


def decoder_layers(model: Any) -> list[Any]:
    """Return the layers of a model's decoder that can be compiled, and recomputed, one by one, in their order.

    Those of a tower that sees images are left out, because they do not run on text.
    """
    model = unwrap(model)
    decoder = model.get_decoder() or model  # code of others may know no decoder
    return [each for each in decoder.modules() if isinstance(each, GradientCheckpointingLayer)]


def is_patched(model: Any) -> bool:
    """Whether `patch_forward` has been called on a model, or on what PEFT wraps."""
    return "_fastdpo" in vars(unwrap(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the block, and restore each module's own flag after it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def may_leave_unused(model: Any) -> bool:
    """Return whether a batch may leave trainable weights of a model unused, which DDP must then look for in each step.

    They are those of a tower for images, of an expert to which no token goes, of a layer that is dropped, or those that
    the model's own forward on eight tokens does not reach, such as the attention of BART's decoder to an encoder.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.
    """
    config, trained = model.config, [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    has_tower = config.get_text_config() is not config
    has_experts = any("expert" in name for name, _ in trained)
    drops = any(getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop"))
    if has_tower or has_experts or drops or not body_and_head.can_probe(model):
        return True
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with torch.enable_grad(), evaluating(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    reached, nodes = set[Any](), [logits.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in reached:
            reached.add(node)
            nodes += [before for before, _ in node.next_functions]
    weights = {id(node.variable) for node in reached if hasattr(node, "variable")}
    return any(id(p) not in weights for _, p in trained)


def _make_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("logit_index") is not None:
            return _score(self, *args, **kwargs)
        # generation would compile the layers again, for its cache and for each prompt
        as_they_are = vars(self)["_fastdpo"].compiled
        with torch.compiler.set_stance("force_eager") if as_they_are else nullcontext():
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
    head = body_and_head.locate_head(model, patch.place)
    head = head._replace(logit_scale=1.0) if patch.unscaled else head
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
        if is_in_zero3(model):  # where the backward would recompute the logits with weights that are not gathered
            raise refusal(
                model, f"its own head computes the logits ({patch.own or head.own}); with ZeRO-3, use FSDP2 or ZeRO-2"
            )
        scores = body_and_head.own_scores(model, forward, head.decoder, hidden, batch["target_ids"], with_stats)
    else:
        options = {"impl": patch.impl, "backward": patch.backward, "workspace_bytes": patch.workspace}
        scores = body_and_head.fused_scores(head, hidden, batch["target_ids"], with_stats, **options)
    if not with_stats:
        return TokenScores(scores, None, aux_loss)
    logps, stats = scores
    return TokenScores(logps, stats._replace(entropy=stats.entropy.detach()), aux_loss)


def _packed_hidden(
    model: Any, decoder: nn.Module, batch: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """Return the hidden states `[T, D]` of one row of tokens, and what the decoder returned."""
    input_ids = batch["input_ids"]
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids of a packed batch must be [1, T], got {tuple(input_ids.shape)}")
    if reason := vars(model)["_fastdpo"].padded:
        raise refusal(model, f"{reason}; they must be padded (layout='padded')")
    if has_state(model) and _begins_inside_a_segment(batch):
        raise refusal(model, "its layers carry a state, so shared prompts need layout='tree'")
    name = model.config.get_text_config()._attn_implementation
    if name != registered.NAME:
        raise refusal(model, f"its attention is {name!r} and not {registered.NAME!r}; call patch_forward (again)")
    layer_kwargs = registered.layer_kwargs(batch, vars(model)["_fastdpo"].attention)
    if vars(model)["_fastdpo"].compiled:
        registered.leave_lengths_open(layer_kwargs)
    if batch.get("image_blocks") and (layers := image_blocks(model)):
        layer_kwargs["tree_image_blocks"] = (layers == "all", batch["image_blocks"])
    with registered.packing():
        outputs = decoder(
            input_ids=input_ids,
            # not used; but without it transformers looks for sequences in position_ids, which waits for the device
            attention_mask=torch.ones_like(input_ids),
            position_ids=batch["position_ids"],
            use_cache=False,
            **_image_inputs(model, batch),
            **options,
            **layer_kwargs,
        )
    return outputs[0][0], [outputs]


def _image_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the body takes of a batch's images."""
    inputs: dict[str, Any] = batch.get("image_inputs") or {}
    if inputs:
        check_images(model)
    return inputs


def _begins_inside_a_segment(batch: dict[str, Any]) -> bool:
    """Whether branches begin inside a segment (layout `shared`, not `tree`), without waiting for the device."""
    T, kv = batch["input_ids"].shape[1], batch["tree_kv_index"].shape[0]
    filled = batch.get("num_packed_tokens", T) < T
    segments = batch["tree_cu_seqlens_q"].shape[0] - 1 - filled
    # something is shared, and yet there are no more segments than responses
    return bool(kv > T and segments < batch["cu_target"].shape[0])


def _padded_hidden(
    model: Any, decoder: nn.Module, batch: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """Return the hidden states `[R L, D]` of rows padded on the right, and what each call of the decoder returned."""
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        shapes = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"input_ids and attention_mask of a padded batch must be [R, L], got {shapes[0]}, {shapes[1]}")
    # the model makes its own positions, which need not begin with 0 (RoBERTa) and are right for padding on the right
    options = {"use_cache": False, **options}
    if images := _image_inputs(model, batch):
        options |= images | kinds_of_tokens(decoder, input_ids, image_token_of(model.config))
    accepted = inspect.signature(decoder.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        options = {name: value for name, value in options.items() if name in accepted}

    limit, rope_type = rope_limit(model.config)
    if limit is None or input_ids.shape[1] <= limit:
        outputs = decoder(input_ids=input_ids, attention_mask=attention_mask, **options)
        return outputs[0].flatten(0, 1), [outputs]
    if rope_type != "longrope" or images:
        raise refusal(
            model,
            f"beyond {limit} tokens its {rope_type} RoPE depends on earlier batches; set max_length <= {limit}",
        )
    if is_sharded(model):  # processes would call it for different numbers of rows, and wait for each other
        raise refusal(
            model, f"beyond {limit} tokens it reads rows one by one; with sharded weights, set max_length <= {limit}"
        )
    # the longest row of a call chooses the frequencies for all its rows, so each row has a call of its own
    position_ids = batch["position_ids"] * attention_mask
    rows = zip(input_ids.split(1), attention_mask.split(1), position_ids.split(1), strict=True)
    each = [decoder(input_ids=i, attention_mask=m, position_ids=p, **options) for i, m, p in rows]
    return torch.cat([outputs[0][0] for outputs in each]), each


# What is exact


def _search(model: Any) -> tuple[int, str | None, bool]:
    """Return the place of the decoder, why the fused head does not compute the logits (None: it does), and `unscaled`.

    `unscaled` says whether the model's forward leaves out the scale of the logits that its config has.
    """
    tried = []
    for place in body_and_head.places(model):
        head = body_and_head.locate_head(model, place)
        own = head.own or body_and_head.outside(model, head)
        if not body_and_head.can_probe(model):
            return place, own, False
        reason, failure = body_and_head.probe(model, _own_forward(model), head._replace(own=own))
        if failure is None and reason and head.logit_scale != 1 and model.config.get_text_config() is not model.config:
            plain = head._replace(own=own, logit_scale=1.0)  # Aya Vision leaves out the scale of its text model
            if body_and_head.probe(model, _own_forward(model), plain) == (None, None):
                return place, own, True
        if failure is None:
            return place, own or reason, False
        tried.append(failure)
    head = body_and_head.locate_head(model)
    # a forward that replaces the class's own may need more than hidden states; by its weights the fused head is right
    if head.own is None and body_and_head.outside(model, head) is None:
        return 0, None, False
    raise refusal(model, tried[0])


def _set_attention(model: Any) -> None:
    text = model.config.get_text_config()
    # a tower that sees the images keeps its own, which is not causal
    part = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    model.set_attn_implementation(registered.NAME if part is None else {part: registered.NAME})
    if text._attn_implementation != registered.NAME:
        raise refusal(model, f"its attention stays {text._attn_implementation!r} when it is set")

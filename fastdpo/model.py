"""A causal language model as a body and a head: finds both, and lets a packed batch run through them.

    hidden[t] = decoder(input_ids, position_ids)                     every row of the packed batch
    logps[m]  = log p(target_ids[m] | hidden[logit_index[m]])        by the fused op, only where a token is scored

`patch_forward` puts this into the instance's own `forward`, and the head is a call of the `lm_head` module whose
Linear computes the fused op for that one call. So whatever hooks into modules (DDP, FSDP, PEFT) sees an ordinary
forward. Nothing is cached: decoder and head are looked up on each call, for PEFT and FSDP replace them after patching.

Shapes: T rows, M targets, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from fastdpo import attention
from fastdpo.eager import Stats
from fastdpo.logprobs import linear_logprobs, linear_logprobs_with_stats

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers whose packed computation is exact."""

_INPUTS = ("input_ids", "position_ids", "logit_index", "target_ids", *attention.METADATA)
_NOT_FOR_THE_MODEL = (
    *("cu_target", "ref_logps", "ref_token_logps", "pair_index", "response_index"),
    *("weight", "margin", "beta", "label"),
    *("num_tokens", "num_padded_tokens", "num_packed_tokens"),
)


class Head(NamedTuple):
    """Where the parts of a causal LM are, and what its logits go through after the matmul."""

    decoder: nn.Module
    """`decoder(input_ids=...)[0]` are the hidden states the head is applied to."""
    lm_head: nn.Module
    """The module to call: a Linear, or PEFT's wrapper around copies of one."""
    linears: tuple[nn.Module, ...]
    """The Linears, or LoRA's wrappers of one, that calling `lm_head` may end in."""
    logit_scale: float
    """Factor of the raw logits."""
    softcap: float | None
    """Bound c of c * tanh(logits / c), after the factor."""


class TokenScores(NamedTuple):
    """What a packed batch's forward returns."""

    logps: Tensor
    """`[M]` float32, nats."""
    stats: Stats | None
    """Statistics of each target's distribution, `[M]` each, detached, where `with_stats` asked for them."""


class _Patch(NamedTuple):
    impl: Any
    backward: Any
    forward: Callable[..., Any] | None  # the instance's own, where it had one before


def find_head(model: Any) -> Head:
    """Find the body and the head of a model, and check that packed batches are exact on it.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: it has something that packing or the fused head cannot follow; names the class and the reason.
    """
    model = _unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise _refusal(model, "it is not a model of transformers")
    if reason := _unpackable(model):
        raise _refusal(model, reason)
    head = _locate(model)
    inside = {id(x) for part in (head.decoder, head.lm_head) for x in (*part.parameters(), *part.buffers())}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if id(x) not in inside:
            raise _refusal(model, f"{name} is neither in its decoder nor in its output embeddings")
    return head


def patch_forward(model: Any, *, impl: str = "auto", backward: str = "auto") -> None:
    """Let `model(**batch)` score a batch of `fastdpo.shared_prefix_batch`, and leave every other call as it was.

    A call with `logit_index` runs the packed batch without a cache and returns `TokenScores`; `with_stats=True` adds
    the statistics. Fields that only the loss needs may be passed and are ignored. All other calls, `generate()`
    included, run the model's own forward, on transformers' SDPA attention from now on.

    A `copy.deepcopy` of a patched model is patched too and independent of it. Patching again changes the options.

    Args:
        model: a causal LM of transformers, or a PEFT model around one; changed in place (the instance, not its class).
        impl: implementation of the head, see `fastdpo.linear_logprobs`.
        backward: its backward, see `fastdpo.linear_logprobs`.

    Raises:
        ValueError: as `find_head`.
    """
    find_head(model)
    model = _unwrap(model)
    model.set_attn_implementation(attention.NAME)
    _check_attention(model)
    previous = vars(model).get("_fastdpo")
    own = previous.forward if previous else vars(model).get("forward")
    vars(model)["_fastdpo"] = _Patch(impl, backward, own)
    if not previous:
        # a bound method of a function that holds no model: deepcopy binds it to the copy
        vars(model)["forward"] = MethodType(_make_forward(type(model)), model)


def _make_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("logit_index") is not None:
            return _score(self, *args, **kwargs)
        own = vars(self)["_fastdpo"].forward
        return own(*args, **kwargs) if own else type(self).forward(self, *args, **kwargs)

    # generate() and Trainer read the signature; __wrapped__ would let accelerate unwrap the patch
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    return forward


def _score(model: nn.Module, *, with_stats: bool = False, **batch: Any) -> TokenScores:
    """Run a packed batch through body and head."""
    if missing := [name for name in _INPUTS if batch.get(name) is None]:
        raise ValueError(f"a packed batch needs {', '.join(missing)}; make it with fastdpo.shared_prefix_batch")
    extra = {name for name, value in batch.items() if value is not None and value is not False}
    if extra := extra.difference(_INPUTS, _NOT_FOR_THE_MODEL):
        raise ValueError(f"a packed batch takes no {', '.join(sorted(extra))}")
    input_ids, targets = batch["input_ids"], batch["target_ids"]
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids of a packed batch must be [1, T], got {tuple(input_ids.shape)}")
    _check_attention(model)

    head, patch = _locate(model), vars(model)["_fastdpo"]
    with attention.packing():
        outputs = head.decoder(
            input_ids=input_ids,
            # unused; but without one transformers looks for sequences in position_ids, which waits for the device
            attention_mask=torch.ones_like(input_ids),
            position_ids=batch["position_ids"],
            use_cache=False,
            **attention.layer_kwargs(batch),
        )
    hidden = outputs[0][0].index_select(0, batch["logit_index"])

    op = linear_logprobs_with_stats if with_stats else linear_logprobs
    options = {"logit_scale": head.logit_scale, "softcap": head.softcap, "impl": patch.impl, "backward": patch.backward}

    def compute(linear: Any, hidden: Tensor) -> Any:
        base = linear if isinstance(linear, nn.Linear) else linear.get_base_layer()
        return op(hidden, base.weight, targets, base.bias, low_rank=_low_rank(linear, hidden), **options)

    with _computing(head.linears, compute):
        scores = head.lm_head(hidden)
    if not with_stats:
        return TokenScores(scores, None)
    logps, stats = scores
    return TokenScores(logps, stats._replace(entropy=stats.entropy.detach()))


@contextmanager
def _computing(linears: tuple[nn.Module, ...], forward: Callable[[nn.Module, Tensor], Any]) -> Iterator[None]:
    """Within it the Linears compute `forward(linear, hidden)`."""
    for linear in linears:
        vars(linear)["forward"] = partial(forward, linear)
    try:
        yield
    finally:
        for linear in linears:
            del vars(linear)["forward"]


def _low_rank(linear: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return LoRA's part of the head, `scaling * A(dropout(hidden)) [N, R]` and `B [V, R]`, of all active adapters."""
    if isinstance(linear, nn.Linear) or linear.disable_adapters or linear.merged:
        return None
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if not names:
        return None
    a = [linear.lora_A[n](linear.lora_dropout[n](hidden.to(linear.lora_A[n].weight.dtype))) for n in names]
    hidden2 = torch.cat([linear.scaling[n] * x for n, x in zip(names, a, strict=True)], 1)
    weight2 = torch.cat([linear.lora_B[n].weight for n in names], 1)
    return hidden2.to(hidden.dtype), weight2.to(hidden.dtype)


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot run packed batches: {reason}")


def _locate(model: Any) -> Head:
    """Find body and head as they are now, and check the head."""
    decoder = model.get_decoder()
    if decoder is model:  # Llama4ForCausalLM
        decoder = model.model
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise _refusal(model, "it has no output embeddings")
    return Head(decoder, lm_head, _linears(model, lm_head), *_transform(model.config))


def _linears(model: Any, lm_head: nn.Module) -> tuple[nn.Module, ...]:
    linears: list[Any] = [lm_head]
    found: tuple[nn.Module, ...] | None = None
    if not isinstance(lm_head, nn.Linear) and is_peft_available():
        from peft.tuners import lora
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(lm_head, lora.Linear) and not lm_head.lora_variant and not any(lm_head.lora_bias.values()):
            linears, found = [lm_head.get_base_layer()], (lm_head,)
        elif isinstance(lm_head, BaseTunerLayer):
            raise _refusal(
                model,
                f"its output embeddings have an adapter ({type(lm_head).__name__}) that is not plain LoRA; leave them "
                "out of target_modules, or train them whole with modules_to_save",
            )
        elif isinstance(lm_head, ModulesToSaveWrapper):
            linears = [lm_head.original_module, *lm_head.modules_to_save.values()]
    for linear in linears:
        # type(...).forward: quantized Linears are subclasses; FSDP's subclasses keep nn.Linear's
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not plain or "forward" in vars(linear):
            raise _refusal(model, f"its output embeddings are {type(linear).__name__}, not a plain nn.Linear")
    return found or tuple(linears)


def _transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft-cap of the logits, by the names the models of transformers 5.17 to 5.23 use."""

    def first(default: Any, *names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

    scale = first(1.0, "logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
    scaling = first(1.0, "logits_scaling")  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    return scale, first(None, "final_logit_softcapping", "logits_soft_cap")


def _check_attention(model: Any) -> None:
    name = model.config._attn_implementation
    if name != attention.NAME:
        raise _refusal(model, f"its attention is {name!r} and not {attention.NAME!r}; call patch_forward (again)")


def _unpackable(model: PreTrainedModel) -> str | None:
    """Why packed batches would not be exact on this model; None if they are."""
    config: Any = model.config
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "it is not a decoder of text alone"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [p for p in rope.values() if isinstance(p, dict)] or [rope]:
        rope_type = parameters.get("rope_type", "default")
        if "dynamic" in rope_type or rope_type == "longrope":
            return f"its {rope_type} RoPE depends on the longest sequence in the batch"
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", None) != 0:
        return "its router's balancing loss would count shared tokens once; set output_router_logits=False"
    return None

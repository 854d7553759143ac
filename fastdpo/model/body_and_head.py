"""The two parts of a causal language model, and what its logits are.

    logits = cap(scale * lm_head(decoder(input_ids)))        the fused head: known matmul, known transform
    logits = forward(decoder := the hidden states)           the model's own head, whatever it computes

Where body and head are, and scale and cap, are read off the model and its config by the names that transformers
uses. `probe` then compares both lines on a few rows of random hidden states, so a name that is not known here, a hook,
or layers between body and head are noticed, and the model's own head is used instead: its own forward runs with the
decoder answering with hidden states that are already there, in chunks of rows, each computed again in the backward.

Shapes: M rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_peft_available

from fastdpo.head.eager import Stats
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats

CHUNK_BYTES = 2**27
"""Bound of the float32 logits of a chunk of rows of the model's own head."""


class Head(NamedTuple):
    """Where the parts of a causal LM are, and what its logits go through after the matmul."""

    decoder: nn.Module
    """`decoder(input_ids=...)[0]` are the hidden states the head is applied to."""
    lm_head: nn.Module | None
    """The module to call: a Linear, or PEFT's wrapper around copies of one. None: only the model's forward knows."""
    linears: tuple[nn.Module, ...]
    """The Linears, or an adapter's wrappers of one, that calling `lm_head` may end in; empty where `own` says why."""
    logit_scale: float
    """Factor of the raw logits."""
    softcap: float | None
    """Bound c of c * tanh(logits / c), after the factor."""
    vocab: int | None
    """So many tokens, from the first, have logits; None: all that the Linear has."""
    own: str | None
    """Why the model's own forward computes the logits; None where the fused op does."""


def locate_head(model: Any, place: int = 0) -> Head:
    """Find body and head as they are now: PEFT and FSDP replace them.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.
        place: which of the modules that may be the decoder to take.
    """
    decoder = _decoders(model)[place]
    lm_head = model.get_output_embeddings()
    linears, own = _linears(lm_head)
    return Head(decoder, lm_head, linears, *_transform(model.config.get_text_config()), own)


def outside(model: nn.Module, head: Head) -> str | None:
    """Why the logits are more than the head's module makes of the body's output, judged by where the weights are."""
    parts = (head.decoder, head.lm_head)
    inside = {id(x) for part in parts if part for x in (*part.parameters(), *part.buffers())}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if id(x) not in inside:
            return f"{name} is neither in its decoder nor in its output embeddings"
    return None


def places(model: Any) -> range:
    """All values of `place` that `locate_head` takes."""
    return range(len(_decoders(model)))


def _decoders(model: Any) -> list[nn.Module]:
    """Modules that may be the decoder, the likeliest first."""
    found = [model.get_decoder(), model.base_model, getattr(model, "model", None), getattr(model, "transformer", None)]
    if model.config.get_text_config() is not model.config:
        found[:2] = found[1::-1]  # inside a body that also sees
    others = {id(m): m for m in found if isinstance(m, nn.Module) and m is not model}  # Llama4 answers itself
    return list(others.values())


def _linears(lm_head: Any) -> tuple[tuple[nn.Module, ...], str | None]:
    """Return the Linears whose call can be the fused op's, or why there is none."""
    if lm_head is None:
        return (), "it has no output embeddings that it would name"
    linears: list[Any] = [lm_head]
    found: tuple[nn.Module, ...] | None = None
    if not isinstance(lm_head, nn.Linear) and is_peft_available():
        from peft.tuners import lora
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(lm_head, lora.Linear) and not lm_head.lora_variant and not any(lm_head.lora_bias.values()):
            linears, found = [lm_head.get_base_layer()], (lm_head,)
        elif isinstance(lm_head, BaseTunerLayer):
            name = type(lm_head).__name__
            return (), f"its output embeddings have an adapter ({name}) that is neither plain LoRA nor trained tokens"
        elif isinstance(lm_head, TrainableTokensWrapper):  # tied to embeddings of which some rows are trained
            linears, found = [lm_head.original_module], (lm_head.token_adapter,)
        elif isinstance(lm_head, ModulesToSaveWrapper):
            linears = [lm_head.original_module, *lm_head.modules_to_save.values()]
    for linear in linears:
        # type(...).forward: quantized Linears are subclasses; FSDP's subclasses keep nn.Linear's
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not plain or "forward" in vars(linear):
            return (), f"its output embeddings are {type(linear).__name__}, not a plain nn.Linear"
    return found or tuple(linears), None


def _transform(config: Any) -> tuple[float, float | None, int | None]:
    """Factor and soft-cap of the logits and their number, by the names the models of transformers 5.17 to 5.23 use."""

    def first(default: Any, *names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

    scale = first(1.0, "logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies; Inkling divides by its own
    scaling = first(1.0, "logits_scaling", "logits_mup_width_multiplier")
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    # Gemma, RecurrentGemma, xLSTM
    softcap = first(None, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, softcap, first(None, "unpadded_vocab_size")


# Scoring hidden states


def fused_scores(head: Head, hidden: Tensor, targets: Tensor, with_stats: bool, **options: Any) -> Any:
    """`[M]` log-probs (and `Stats`) by a call of the head's module, whose Linear computes the fused op meanwhile.

    So whatever hooks into modules (DDP, FSDP, ZeRO, PEFT) sees an ordinary forward.
    """
    op = linear_logprobs_with_stats if with_stats else linear_logprobs
    options |= {"logit_scale": head.logit_scale, "softcap": head.softcap}

    def cut(x: Any) -> Any:
        return x if x is None or head.vocab is None else x[: head.vocab]

    def compute(linear: Any, hidden: Tensor) -> Any:
        base = linear if isinstance(linear, nn.Linear) else linear.get_base_layer()
        weight, bias = cut(base.weight), cut(base.bias)
        hidden = hidden.to(weight.dtype)  # Mamba's residual is float32
        low_rank = _low_rank(linear, hidden)
        if low_rank is not None:
            low_rank = low_rank[0], cut(low_rank[1])
        return op(hidden, weight, targets, bias, low_rank=low_rank, **options)

    assert head.lm_head is not None
    with _computing(head.linears, compute):
        return head.lm_head(hidden)


def own_scores(
    model: Any, forward: Callable[..., Any], decoder: nn.Module, hidden: Tensor, targets: Tensor, with_stats: bool
) -> Any:
    """`[M]` log-probs (and `Stats`) of the logits of the model's own forward, in chunks of rows.

    Args:
        model: the causal LM.
        forward: its own forward, bound.
        decoder: the module in it that answers with `hidden`.
        hidden: `[M, D]`.
        targets: `[M]`.
        with_stats: return `(logps, Stats)`, the statistics detached.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = own_logits(forward, decoder, hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        log_probs = logits.log_softmax(-1)
        logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        if not with_stats:
            return (logps,)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
            top = logits.argmax(-1) == targets
            return logps, entropy, (2 * log_probs).logsumexp(-1), logits.mean(-1), top

    vocab = model.config.get_text_config().vocab_size
    rows = max(CHUNK_BYTES // (4 * vocab), 1)
    parts = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        # nothing of a chunk's logits is kept
        parts.append(checkpoint(chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, t))
    logps, *stats = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return (logps, Stats(*stats)) if with_stats else logps


class _Hidden(tuple):  # type: ignore[type-arg]
    """A decoder's outputs of which only the hidden states are known, and the router's logits where given."""

    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def own_logits(forward: Callable[..., Any], decoder: nn.Module, hidden: Tensor) -> Tensor:
    """`[M, V]`: what the model's own forward makes of hidden states `[M, D]`."""
    output = own_outputs(forward, decoder, hidden)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    if logits.ndim != 3 or logits.shape[:2] != (1, hidden.shape[0]):
        raise ValueError(f"its forward answers {tuple(logits.shape)} to {(1, hidden.shape[0])} tokens")
    return logits[0]


def own_outputs(
    forward: Callable[..., Any],
    decoder: nn.Module,
    hidden: Tensor,
    *,
    router_logits: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> Any:
    """What the model's own forward returns where its decoder answers `hidden` `[M, D]` and `router_logits`."""
    calls = []

    def answer(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        outputs = _Hidden((hidden[None],))
        outputs.router_logits = router_logits
        return outputs

    ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
    with _computing((decoder,), answer):
        output = forward(input_ids=ids, **options)
    if len(calls) != 1:
        raise ValueError(f"its forward calls its decoder {len(calls)} times")
    return output


@torch.no_grad()
def probe(model: Any, forward: Callable[..., Any], head: Head) -> tuple[str | None, str | None]:
    """Compare both heads on random hidden states, small and large, so that scale and soft-cap both show.

    Args:
        model: the causal LM, neither in training nor sharded.
        forward: its own forward, bound.
        head: what `locate_head` found.

    Returns:
        Why the fused head is not the model's own, and why even the model's own can't be run on hidden states alone;
        None where there is no reason.
    """
    text = model.config.get_text_config()
    weight = next((x.weight for x in _leaves(head.linears) if head.own is None), None)
    first = next(x for x in model.parameters() if x.is_floating_point())  # others are quantised
    device, dtype = (first.device, first.dtype) if weight is None else (weight.device, weight.dtype)
    D = weight.shape[1] if weight is not None else getattr(text, "hidden_size", None)
    if D is None:
        D = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, D, generator=generator).to(device, dtype)
    try:
        largest = own_logits(forward, head.decoder, row).abs().max().float()
        # largest logits of 1 to 1000; norms in the head undo it, and are no concern of the fused one
        sizes = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device)[:, None] / largest.clamp(min=1e-3)
        hidden = (row.float() * sizes.clamp(max=1e4)).to(dtype)
        logits = own_logits(forward, head.decoder, hidden)
    except Exception as error:  # whatever a model's code raises when it is given less than it wants
        return None, f"its own forward does not run on hidden states alone: {error}"
    if head.own:
        return None, None
    V = logits.shape[1]
    targets = torch.randint(V, (64,), generator=generator).to(device)
    rows = torch.arange(4, device=device).repeat_interleave(16)
    try:
        logps = fused_scores(head, hidden[rows], targets, False, impl="torch")
    except ValueError as error:
        return str(error), None
    log_probs = logits.double().log_softmax(-1)
    expected = log_probs[rows, targets]
    # the model rounds its logits to its dtype
    bound = max(1e-3, 8 * torch.finfo(logits.dtype).eps, 8 * torch.finfo(dtype).eps) * (
        1 + logits.double().abs().amax(-1)
    )
    errors = (logps - expected).abs()
    if bool((errors <= bound[rows]).all()):
        return None, None
    return (
        f"its log-probs differ by {float(errors.max()):.2g} from those of its output embeddings "
        f"(scale {head.logit_scale:g}, soft-cap {head.softcap})"
    ), None


def can_probe(model: nn.Module) -> bool:
    """Whether the weights are all there: neither sharded nor on the meta device."""
    return all(x.numel() > 0 and not x.is_meta and type(x.data) is Tensor for x in model.parameters())


@contextmanager
def _computing(modules: tuple[nn.Module, ...], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it the modules compute `forward(module, ...)`, also where `module.compile()` has been called."""
    before = [vars(module).get("forward") for module in modules]
    compiled = [module._compiled_call_impl for module in modules]
    for module in modules:
        vars(module)["forward"] = partial(forward, module)
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, own, call in zip(modules, before, compiled, strict=True):
            module._compiled_call_impl = call
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


def _leaves(linears: tuple[Any, ...]) -> Iterator[Any]:
    for linear in linears:
        yield linear if isinstance(linear, nn.Linear) else linear.get_base_layer()


def _low_rank(linear: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What active adapters add to the head, as `hidden2 [N, R]` and `weight2 [V, R]` in the dtype of `hidden`."""
    if isinstance(linear, nn.Linear) or linear.disable_adapters or linear.merged:
        return None
    add, names = (_lora, "lora_A") if hasattr(linear, "lora_A") else (_trained_tokens, "trainable_tokens_delta")
    parts = [add(linear, name, hidden) for name in linear.active_adapters if name in getattr(linear, names)]
    if not parts:
        return None
    hidden2, weight2 = (torch.cat(factors, 1).to(hidden.dtype) for factors in zip(*parts, strict=True))
    return hidden2, weight2


def _lora(linear: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`scaling * A(dropout(hidden))` and `B`."""
    a = linear.lora_A[name]
    return linear.scaling[name] * a(linear.lora_dropout[name](hidden.to(a.weight.dtype))), linear.lora_B[name].weight


def _trained_tokens(linear: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the new rows of some tokens add to their logits, and which tokens they are.

    The addition and what rounding it left, so that the logits of these tokens are as exact as the others in 16 bits.
    """
    weight, new = linear.get_base_layer().weight, linear.trainable_tokens_delta[name]
    tokens = torch.tensor(linear.token_indices[name]).to(weight.device, non_blocking=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    added = hidden.to(exact) @ (new.to(exact) - weight[tokens].to(exact)).T
    rounded = added.to(hidden.dtype)
    rest = (added - rounded.to(exact)).to(hidden.dtype)
    which = hidden.new_zeros(len(weight), len(tokens)).scatter_(0, tokens[None], 1.0)
    return torch.cat([rounded, rest], 1), torch.cat([which, which], 1)

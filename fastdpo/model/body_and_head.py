"""Split a causal language model into body and head, and compute log-probs from the body's hidden states.

    logits = cap(scale * lm_head(decoder(input_ids)))        the fused head: known matmul, known transform
    logits = forward(decoder := the hidden states)           the model's own head, whatever it computes

The body is the decoder, which outputs hidden states; the head is all that makes logits of them. Body, head, scale
and cap are found in the model and its config by the names that transformers uses. `probe` then compares the two lines
above on a few rows of random hidden states. If they differ, because of a name that this module does not know, a hook,
or layers between body and head, the model's own head is used: its own forward runs with a decoder that returns the
hidden states computed before, in chunks of rows, each computed again in the backward.

Shapes: M rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdpo.head.eager import Stats
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
from fastdpo.model.adapted_layers import base_linear, linears_of_head, low_rank
from fastdpo.sharding import is_sharded, largest

CHUNK_BYTES = 2**27
"""Most bytes of float32 logits that the model's own head computes in one chunk of rows."""


class Head(NamedTuple):
    """The parts of a causal LM, and what happens to its logits after the matmul."""

    decoder: nn.Module
    """`decoder(input_ids=...)[0]` are the hidden states that the head is applied to."""
    lm_head: nn.Module | None
    """The module to call: a Linear, or PEFT's wrapper around copies of one. None: only the model's forward knows."""
    linears: tuple[nn.Module, ...]
    """The Linears (or an adapter's wrappers of one) that a call of `lm_head` may run; empty where `own` says why."""
    logit_scale: float
    """Factor of the raw logits."""
    softcap: float | None
    """Bound c of c * tanh(logits / c), applied after the factor."""
    vocab: int | None
    """Only this many tokens, counted from the first, have logits; None: all rows of the Linear."""
    own: str | None
    """Why the model's own forward computes the logits; None where the fused op does."""


def locate_head(model: Any, place: int = 0) -> Head:
    """Find body and head as they are now; PEFT and FSDP may replace them between two calls.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.
        place: which of the possible decoders to take, one of `places`.
    """
    decoder = _decoders(model)[place]
    lm_head = model.get_output_embeddings()
    linears, own = _linears(lm_head)
    return Head(decoder, lm_head, linears, *_transform(model.config.get_text_config()), own)


def outside(model: nn.Module, head: Head) -> str | None:
    """Return a reason against the fused head, a tensor that is in neither body nor head; None if there is none."""
    parts = (head.decoder, head.lm_head)
    inside = {id(x) for part in parts if part for x in (*part.parameters(), *part.buffers())}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if id(x) not in inside:
            return f"{name} is neither in its decoder nor in its output embeddings"
    return None


def places(model: Any) -> range:
    """Return all values of `place` that `locate_head` takes."""
    return range(len(_decoders(model)))


def _decoders(model: Any) -> list[nn.Module]:
    """Return the modules that may be the decoder, the likeliest first."""
    found = [model.get_decoder(), model.base_model, getattr(model, "model", None), getattr(model, "transformer", None)]
    if model.config.get_text_config() is not model.config:
        found[:2] = found[1::-1]  # it is inside a body that also sees images
    others = {id(m): m for m in found if isinstance(m, nn.Module) and m is not model}  # Llama4 returns itself
    return list(others.values())


def _linears(lm_head: Any) -> tuple[tuple[nn.Module, ...], str | None]:
    """Return the Linears whose call the fused op can replace, or why there are none."""
    if lm_head is None:
        return (), "its get_output_embeddings() returns none"
    try:
        called, linears = linears_of_head(lm_head)
    except ValueError as error:
        return (), str(error)
    for linear in linears:
        # quantized Linears are subclasses with a forward of their own; FSDP's subclasses keep that of nn.Linear
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not plain or "forward" in vars(linear):
            return (), f"its output embeddings are {type(linear).__name__}, not a plain nn.Linear"
    return called, None


def _transform(config: Any) -> tuple[float, float | None, int | None]:
    """Return factor, soft-cap and number of the logits, by the names that models of transformers 5.17 to 5.23 use."""

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
    """Call the head's module while its Linear computes the fused op, and return `[M]` log-probs (and `Stats`).

    To everything that hooks into modules (DDP, FSDP, ZeRO, PEFT), this is an ordinary forward.
    """
    op = linear_logprobs_with_stats if with_stats else linear_logprobs
    options |= {"logit_scale": head.logit_scale, "softcap": head.softcap}

    def compute(linear: Any, hidden: Tensor) -> Any:
        hidden, weight, bias, low_rank = _operands(head, linear, hidden)
        return op(hidden, weight, targets, bias, low_rank=low_rank, **options)

    assert head.lm_head is not None
    with _computing(head.linears, compute):
        return head.lm_head(hidden)


Operands: TypeAlias = tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]
"""The tensors hidden, weight, bias and low_rank, arguments of `linear_logprobs`."""


def operands(head: Head, hidden: Tensor) -> Operands:
    """Call the head's module on `hidden` `[M, D]`, and return what its Linear would multiply."""
    assert head.lm_head is not None
    with _computing(head.linears, lambda linear, hidden: _operands(head, linear, hidden)):
        result: Operands = head.lm_head(hidden)
    return result


def _operands(head: Head, linear: Any, hidden: Tensor) -> Operands:
    def cut(x: Any) -> Any:
        return x if x is None or head.vocab is None else x[: head.vocab]

    base = base_linear(linear)
    weight, bias = cut(base.weight), cut(base.bias)
    hidden = hidden.to(weight.dtype)  # Mamba's residual is float32
    added = low_rank(linear, hidden)
    return hidden, weight, bias, None if added is None else (added[0], cut(added[1]))


def own_scores(
    model: Any, forward: Callable[..., Any], decoder: nn.Module, hidden: Tensor, targets: Tensor, with_stats: bool
) -> Any:
    """Return `[M]` log-probs (and `Stats`) from the logits of the model's own forward, in chunks of rows.

    Args:
        model: the causal LM.
        forward: its own forward, bound.
        decoder: its decoder, which returns `hidden` meanwhile.
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
    for h, t in _chunks(model, hidden, targets, rows):
        # the backward computes a chunk's logits again, so none are kept
        parts.append(checkpoint(chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, t))
    logps, *stats = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if len(logps) > len(targets):  # rows were repeated
        logps, *stats = (column[: len(targets)].clone() for column in (logps, *stats))
    return (logps, Stats(*stats)) if with_stats else logps


def _chunks(model: nn.Module, hidden: Tensor, targets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of at most `rows` rows.

    The weights of a sharded head are gathered for each chunk by all processes together, so there all of them make as
    many chunks as the one with most rows; where rows are too few, the last one is repeated.
    """
    chunks = -(-len(targets) // rows)
    if is_sharded(model):
        chunks = largest(chunks, hidden.device)
        index = torch.arange(max(len(targets), chunks), device=hidden.device).clamp(max=len(targets) - 1)
        yield from zip(hidden[index].tensor_split(chunks), targets[index].tensor_split(chunks), strict=True)
    else:
        yield from zip(hidden.split(rows), targets.split(rows), strict=True)


class _Hidden(tuple):  # type: ignore[type-arg]
    """A decoder's outputs that hold only the hidden states and, if given, the router's logits; all else is None."""

    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # whoever finds `_fields` takes it for a namedtuple
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def own_logits(forward: Callable[..., Any], decoder: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits `[M, V]` that the model's own forward computes from hidden states `[M, D]`."""
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
    """Run the model's own forward while its decoder returns `hidden` `[M, D]` and `router_logits`."""
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
    """Compare the fused head and the model's own on random hidden states, small and large, to test scale and soft-cap.

    Args:
        model: the causal LM, neither in training nor sharded.
        forward: its own forward, bound.
        head: what `locate_head` found.

    Returns:
        The reason why the fused head differs from the model's own, and the reason why even the model's own can't be run
        on hidden states alone. Either is None if it does not apply.
    """
    text = model.config.get_text_config()
    weight = next((base_linear(x).weight for x in head.linears), None)
    first = next(x for x in model.parameters() if x.is_floating_point())  # the others are quantised
    device, dtype = (first.device, first.dtype) if weight is None else (weight.device, weight.dtype)
    D = getattr(text, "hidden_size", None)  # RemBERT's own head widens the hidden states before the weight
    if weight is not None and (D is None or not head.own):
        D = weight.shape[1]
    if D is None:
        D = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, D, generator=generator).to(device, dtype)
    try:
        largest = own_logits(forward, head.decoder, row).abs().max().float()
        # for largest logits of 1 to 1000; a norm in the model's own head undoes this, but the fused head has none
        sizes = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device)[:, None] / largest.clamp(min=1e-3)
        hidden = (row.float() * sizes.clamp(max=1e4)).to(dtype)
        logits = own_logits(forward, head.decoder, hidden)
    except Exception as error:  # a model's code may raise anything when inputs are missing
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
    """Whether all weights are present, neither sharded nor on the meta device."""
    return all(x.numel() > 0 and not x.is_meta and type(x.data) is Tensor for x in model.parameters())


@contextmanager
def _computing(modules: tuple[nn.Module, ...], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, calls of the modules run `forward(module, ...)`, even after `module.compile()`."""
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

"""Check before training, on the user's own model and first batch, that scores are those of the model's own forward.

`fastdpo.model.scoring_forward` knows a model only by the names in its class and config, which may mislead. So three
things are checked by numbers:

- the head: the log-probs of up to 64 positions of the first batch are compared with a log-softmax of the logits of the
  model's own forward on each sequence alone. The sequence is cut after these positions, which exposes a model that
  looks ahead;
- the layout: three tiny pairs in the batch's layout are compared with the same pairs as padded rows;
- the attention: every attention layer must call the registered function.

The bound of an error is derived from the dtype, or from how much the model's own log-probs change with padding.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.vision.batch import KEPT, Collate, VisionCollator, example_order, image_token_of, kinds_of_tokens
from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.attention.registered import NAME
from fastdpo.model.layout import Layout
from fastdpo.model.scoring_forward import TokenScores, evaluating
from fastdpo.sharding import is_sharded, reshard

_PADDING = 8
# allowed errors, relative to 1 + the largest log-prob; that of float32 is about 1000 times its rounding
RELATIVE_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

logger = logging.getLogger("fastdpo")


class SelfCheck(NamedTuple):
    """The result of the check; errors are the largest differences of log-probs, in nats."""

    layout: Layout
    """The layout that is exact: the one that was checked, or "padded" instead."""
    head_error: float
    """Error of scored positions of the batch, against the model's own forward."""
    layout_error: float
    """Error of three tiny pairs in the layout, against padded rows; if it is "padded", against each sequence alone."""
    bound: float
    """The bound of both errors."""
    attention_layers: int
    """How many attention layers called the registered function; padded rows need none."""
    reason: str = ""
    """Why padded rows are used instead of the layout that was checked; empty if they are not."""

    def __str__(self) -> str:
        return (
            f"on the first rows the log-probs differ by at most {self.head_error:.1e} nats from the model's own "
            f"forward, and by {self.layout_error:.1e} from padded batches (up to {self.bound:.1e} is allowed)"
        )


def agreed_layout(trainer: Trainer, layout: Layout, ref_model: Any | None, collate: Collate) -> Layout:
    """Run `checked_layout` on the first examples of a trainer; all processes get the same answer.

    Args:
        trainer: a trainer whose model is patched.
        layout: the layout to check.
        ref_model: the reference, where it is not a copy of the policy.
        collate: as in `self_check`.
    """
    args: Any = trainer.args
    examples = list(islice(trainer.train_dataset, 2))
    models = [trainer.model]
    if ref_model is not None:
        models.append(ref_model if is_sharded(ref_model) else ref_model.to(args.device))
    with trainer.accelerator.autocast():
        fallback = args.self_check == "fallback"
        layouts = [checked_layout(models, examples, layout, fallback=fallback, collate=collate)]
    for each in models:
        reshard(each)
    broadcast_object_list(layouts)  # rounding might differ between processes
    return layouts[0]


def checked_layout(
    models: Iterable[Any],
    examples: list[dict[str, Any]],
    layout: Layout,
    *,
    fallback: bool = True,
    collate: Collate = shared_prefix_batch,
) -> Layout:
    """Check patched models on a batch of `examples`, and return the layout that is exact on all: `layout` or "padded".

    Args:
        models: the policy and, unless it is a copy of it, the reference; each as in `self_check`.
        examples: as in `fastdpo.shared_prefix_batch`.
        layout: the layout to check.
        fallback: as in `self_check`.
        collate: as in `self_check`.

    Raises:
        ValueError, FloatingPointError: as in `self_check`.
    """
    for which, model in zip(("model", "reference"), models, strict=False):
        device = next(model.parameters()).device
        batch = send_to_device(collate(examples, layout=layout), device)
        checked = self_check(model, batch, layout=layout, fallback=fallback, examples=examples, collate=collate)
        logger.info("self-check of the %s passed: %s", which, checked)
        layout = checked.layout
    return layout


@torch.no_grad()
def self_check(
    model: Any,
    batch: dict[str, Any],
    *,
    layout: Layout,
    fallback: bool = False,
    positions: int = 64,
    examples: Sequence[Mapping[str, Any]] = (),
    collate: Collate = shared_prefix_batch,
) -> SelfCheck:
    """Compare a patched model's scores of a batch with its own forward.

    Random state, training mode and gradients are left as they are.

    Args:
        model: a model that `fastdpo.model.scoring_forward.patch_forward` has patched, also inside a wrapper (PEFT, DDP,
            FSDP).
        batch: from `fastdpo.shared_prefix_batch` with this layout, on the model's device.
        layout: the layout of the batch.
        fallback: if padded rows are exact but this layout is not, warn and return "padded" instead of raising.
        positions: number of positions of the batch that are compared with the model's own forward.
        examples: the examples of the batch, if they have images.
        collate: what made the batch of them.

    Raises:
        ValueError: the scores are not the model's own; the message names the class, the numbers and what to do.
        FloatingPointError: the model's own log-probs are not finite.
        torch.OutOfMemoryError: memory runs out; `fallback` does not apply, because padded rows would take more.
    """
    device = batch["input_ids"].device
    name = _class_name(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
        sequences = _sequences(batch, positions)
        images = _images(examples, collate, len(sequences))
        alone, noise = _own_logps(model, sequences, device, images, collate)
        if not alone.isfinite().all():
            raise FloatingPointError(
                f"{name}: the model's own log-probs are not finite on the first examples. Check its weights, and in "
                "fp16 its activations (use bf16)."
            )
        dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
        if torch.is_autocast_enabled(device.type):
            dtypes.add(torch.get_autocast_dtype(device.type))
        pairs = _tiny_pairs(_text_of(model, batch["input_ids"]))
        tiny_rows = shared_prefix_batch(pairs, layout="padded")
        tiny_alone, tiny_noise = _own_logps(model, _sequences(tiny_rows, 10**9, part=1), device)
        # a model that is sure of the batch's tokens is unsure of these, and larger log-probs have larger rounding
        noise, largest = max(noise, tiny_noise), float(torch.cat((alone, tiny_alone)).abs().max())
        rounding = max(RELATIVE_ERROR.get(dtype, 0.0) for dtype in dtypes) * (1 + largest)
        # log-probs that padding changes much more than rounding does are no noise: the model sees the padding
        bound = min(max(4 * noise, rounding), 4 * rounding)

        pairs_of_rows = [_as_pair(*sequence) | kept for sequence, kept in zip(sequences, images, strict=True)]
        rows = collate(pairs_of_rows, layout="padded")
        head_error = _error(_score(model, rows, device)[: len(alone)], alone)
        if not head_error <= bound:
            raise ValueError(
                f"{name}: log-probs of padded rows differ from the model's own forward by {head_error:.2g} nats (bound "
                f"{bound:.2g}). A hook on lm_head or a change of the logits that fastdpo does not know of would do "
                "that: remove it, or call patch_forward after adding it; if there is none, the class cannot be padded"
            )

        padded = _score(model, tiny_rows, device)
        layout_error = _error(padded, tiny_alone)
        if not layout_error <= bound:
            raise ValueError(
                f"{name}: log-probs of padded rows differ from each sequence alone by {layout_error:.2g} nats (bound "
                f"{bound:.2g}), so no layout of a batch is exact on it"
            )
        layers, wrong = 0, ""
        selected = batch | _first_positions(batch, sequences)
        try:
            with _watching(model) as (ran, called):
                if layout != "padded":
                    tiny = shared_prefix_batch(pairs, layout=layout, across_examples=layout != "packed")
                    layout_error = _error(_score(model, tiny, device), padded)
                error = _error(_score(model, selected, device), alone)
        except torch.OutOfMemoryError:  # padded rows would take more
            raise
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as problem:
            if layout == "padded":
                raise
            wrong = str(problem)
        else:
            head_error = max(head_error, error)
            silent = [type(module).__name__ for module in ran if module not in called]
            layers = len(called)
            if layout == "padded":
                if not error <= bound:
                    raise ValueError(
                        f"{name}: log-probs differ by {error:.2g} nats (bound {bound:.2g}) once the tokens after them "
                        "are left out, so it looks ahead; set is_decoder=True in the config of an encoder"
                    )
            elif not (layout_error <= bound and error <= bound):
                worst = max(layout_error, error)
                wrong = f"its log-probs differ from those of padded rows by {worst:.2g} nats (bound {bound:.2g})"
            elif layout != "tree" and not called:
                wrong = "no layer calls fastdpo's attention"
            elif silent:
                wrong = f"{len(silent)} of its {len(ran)} attention layers ({silent[0]}) never call fastdpo's attention"
        if not wrong:
            return SelfCheck(layout, head_error, layout_error, bound, layers)
        if not fallback:
            raise ValueError(f"{name} is not exact in layout {layout!r}: {wrong}; use padded rows (layout='padded')")
        logger.warning(
            "%s: batches are padded, and a prompt is computed once for each of its responses, which is slower: without "
            "padding (layout %r) %s",
            name,
            layout,
            wrong,
        )
        return SelfCheck("padded", head_error, layout_error, bound, 0, wrong)


def _inner(model: Any) -> Any:
    """Return the causal LM inside DDP, torch.compile and PEFT."""
    while not hasattr(model, "config"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return unwrap(model)


def _class_name(model: Any) -> str:
    return type(_inner(model)).__name__


def _sequences(batch: dict[str, Any], positions: int, part: int = 2) -> list[tuple[list[int], int]]:
    """Return sequences of a batch, first responses first, each with the number of its last tokens that are scored.

    Each is cut after the first `1 / part` of its response, so that a model that looks ahead scores it differently from
    the batch.
    """
    input_ids, logit_index, targets = (batch[name].cpu() for name in ("input_ids", "logit_index", "target_ids"))
    bounds = batch["cu_target"].tolist()
    sequences = []
    for start, end in pairwise(bounds):
        if positions <= 0:
            break
        end = min(start + -((start - end) // part), start + positions)
        positions -= end - start
        row = int(logit_index[end - 1])
        if "attention_mask" in batch:
            L = input_ids.shape[1]
            tokens = input_ids[row // L, : row % L + 1]
        else:
            cu_q, cu_k = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
            segment = next(s for s in range(len(cu_q) - 1) if cu_q[s] <= row < cu_q[s + 1])
            # each path ends with its segment's own rows
            path = batch["tree_kv_index"].cpu()[cu_k[segment] : cu_k[segment + 1] - (cu_q[segment + 1] - 1 - row)]
            tokens = input_ids[0, path]
        sequences.append(([*tokens.tolist(), int(targets[end - 1])], end - start))
    return sequences


def _first_positions(batch: dict[str, Any], sequences: list[tuple[list[int], int]]) -> dict[str, Any]:
    """Return the fields that make a batch score only the positions of `sequences`."""
    starts = batch["cu_target"].tolist()
    index = torch.cat([torch.arange(s, s + n) for s, (_, n) in zip(starts, sequences, strict=False)])
    index = index.to(batch["logit_index"].device)
    return {"logit_index": batch["logit_index"][index], "target_ids": batch["target_ids"][index]}


def _as_pair(ids: list[int], scored: int) -> dict[str, Any]:
    return {"prompt_ids": ids[:-scored], "chosen_ids": ids[-scored:], "rejected_ids": ids[-scored:]}


def _images(examples: Sequence[Mapping[str, Any]], collate: Collate, count: int) -> list[dict[str, Any]]:
    """Return, for each of the first sequences of a batch, the columns that its images are read from."""
    if not isinstance(collate, VisionCollator):
        return [{}] * count
    return [{c: examples[i][c] for c in KEPT if c in examples[i]} for i in example_order(examples)[:count]]


def _text_of(model: Any, input_ids: Tensor) -> Tensor:
    """Return ids without those of images, for which there would be no features."""
    token = image_token_of(_inner(model).config)
    return input_ids if token is None else input_ids[input_ids != token]


def _tiny_pairs(input_ids: Tensor) -> list[dict[str, Any]]:
    """Make three pairs from tokens of the batch: without and with a common start, and one more of the first prompt."""
    tokens = input_ids.flatten().cpu()
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        picked: list[int] = tokens[torch.randint(len(tokens), (n,), generator=generator)].tolist()
        return picked

    start = draw(2)
    first = {"prompt_ids": draw(7), "chosen_ids": draw(9), "rejected_ids": draw(4)}
    return [
        first,
        {"prompt_ids": draw(3), "chosen_ids": start + draw(3), "rejected_ids": start + draw(10)},
        {"prompt_ids": first["prompt_ids"], "chosen_ids": first["chosen_ids"][:4] + draw(2), "rejected_ids": draw(5)},
    ]


def _score(model: Any, batch: dict[str, Any], device: torch.device) -> Tensor:
    scores: TokenScores = model(**send_to_device(batch, device))
    return scores.logps


def _own_logps(
    model: Any,
    sequences: list[tuple[list[int], int]],
    device: torch.device,
    images: Sequence[Mapping[str, Any]] = (),
    collate: Collate = shared_prefix_batch,
) -> tuple[Tensor, float]:
    """Return log-probs by the model's own forward on each sequence alone, and how much padding changes them."""
    alone, noise = [], 0.0
    for i, (ids, n) in enumerate(sequences):
        seen = collate.inputs_of(images[i]) if images and isinstance(collate, VisionCollator) else {}
        seen = send_to_device(seen, device)
        row = torch.tensor([ids[:-1]], device=device)
        padded = torch.cat((row, row.new_zeros(1, _PADDING)), 1)
        mask = (torch.arange(padded.shape[1], device=device) < row.shape[1]).long()[None]
        parts = []
        # without a mask, transformers would warn of padding where a row begins or ends with the pad token
        for tokens, real, keep in ((row, torch.ones_like(row), n), (padded, mask, n + _PADDING)):
            inputs = {"input_ids": tokens, "attention_mask": real}
            if seen:
                inner = _inner(model)
                inputs |= seen | kinds_of_tokens(inner, inputs["input_ids"], image_token_of(inner.config))
            logits = model(**inputs, use_cache=False, **_keep(model, keep)).logits[0, -keep:][:n]
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            parts.append(log_probs.gather(-1, torch.tensor(ids[-n:], device=device)[:, None]).squeeze(-1))
        alone.append(parts[0])
        noise = max(noise, _error(*parts))
    return torch.cat(alone), noise


def _keep(model: Any, n: int) -> dict[str, int]:
    """Return the argument that limits logits to the last `n` rows, if the model has one."""
    inner = _inner(model)
    return {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


@contextmanager
def _watching(model: nn.Module) -> Iterator[tuple[dict[nn.Module, None], set[nn.Module]]]:
    """Inside the block, collect the attention layers that run and those that call the registered function."""
    ran: dict[nn.Module, None] = {}
    called: set[nn.Module] = set()
    ours = ALL_ATTENTION_FUNCTIONS[NAME]

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.add(module)
        return ours(module, *args, **kwargs)

    hooks = [
        layer.register_forward_pre_hook(lambda module, _: ran.setdefault(module)) for layer in _attention_layers(model)
    ]
    AttentionInterface.register(NAME, call)
    try:
        yield ran, called
    finally:
        AttentionInterface.register(NAME, ours)
        for hook in hooks:
            hook.remove()


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """Return the innermost modules whose class is called an attention."""

    def is_attention(module: nn.Module) -> bool:
        return type(module).__name__.endswith("Attention")

    def is_set(module: nn.Module) -> bool:  # a tower that sees the images keeps its own
        return getattr(getattr(module, "config", None), "_attn_implementation", NAME) == NAME

    found = [m for m in model.modules() if is_attention(m) and is_set(m)]
    return [m for m in found if not any(is_attention(child) for child in m.modules() if child is not m)]

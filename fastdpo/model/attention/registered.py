"""Register attention over packed batches with transformers, under the name "fastdpo".

Each segment of a packed row (see `fastdpo.data.packing`) attends causally to its key path: the shared rows before it,
then its own. Once keys and values are gathered along the paths, this is ordinary variable-length attention, so it needs
no kernel of its own; `fastdpo.model.attention.backends` computes it. The backend that a layer gets is logged once.

The window of a layer reaches it through its mask: while `packing()` is on, the mask that a model builds is the width
of its window, or None. Some models (Qwen2-MoE, Phi-MoE) tell the layer about its window in no other way.

Without a packed batch's metadata, `attention` is transformers' own SDPA, so that generation works. While `packing()` is
on it raises an error instead, because a model that drops the metadata would mix sequences silently.

Shapes: T rows, S segments, K key-path entries, H query heads, G key-value heads, D head size.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdpo.head.impl.interface import autocast_dtype
from fastdpo.model.attention import backends
from fastdpo.model.attention.backends import Usable
from fastdpo.model.attention.image_blocks import with_blocks
from fastdpo.model.attention.key_paths import Paths, key_paths
from fastdpo.model.attention.opaque import attend_opaquely

logger = logging.getLogger("fastdpo")

_WORDS = {
    "varlen": "torch's FlashAttention, on sequences of any length",
    "flash": "the flash_attn package's FlashAttention, on sequences of any length",
    "grid": "torch's scaled_dot_product_attention, on sequences of similar length together",
    "plain grid": "matmuls and a softmax in float32, because it has soft-caps or attention sinks",
}

NAME = "fastdpo"

METADATA = (
    "tree_kv_index",
    "tree_cu_seqlens_q",
    "tree_cu_seqlens_k",
    "tree_max_seqlen_q",
    "tree_max_seqlen_k",
)
"""Fields of a packed batch that every attention layer needs."""


class _Packing(threading.local):  # torch.compile does not follow a ContextVar
    on = False

    def get(self) -> bool:
        return self.on


_PACKING = _Packing()


@contextmanager
def packing() -> Iterator[None]:
    """Inside the block, masks are windows, and attention without the batch's metadata raises."""
    before, _PACKING.on = _PACKING.on, True
    try:
        yield
    finally:
        _PACKING.on = before


def layer_kwargs(batch: dict[str, Any], backend: str = "auto") -> dict[str, Any]:
    """Return what the layers need of a packed batch: its `METADATA`, and what is derived from it once per forward.

    Args:
        batch: from `fastdpo.shared_prefix_batch`, on the device. With `tree_seqlens_k`, the lengths of the key paths as
            Python ints, a grid on CUDA has less padding.
        backend: "auto", or one of `fastdpo.model.attention.backends.BACKENDS`. It travels with the batch, because
            gradient checkpointing runs layers again when a context manager's block has ended.

    Raises:
        ValueError: there is no backend of this name, or it cannot run on the batch's device.
    """
    metadata = {name: batch[name] for name in METADATA}
    usable = backends.usable(backend, batch["input_ids"].device)
    paths = key_paths(*metadata.values(), T=batch["input_ids"].shape[1], seqlens_k=batch.get("tree_seqlens_k"))
    return metadata | {"tree_paths": paths, "tree_backends": usable}


def leave_lengths_open(layer_kwargs: dict[str, Any]) -> None:
    """Let torch.compile make code for batches of all lengths at once, not first for the lengths of this one."""
    for tensor in layer_kwargs["tree_paths"]:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_kv_index: Tensor | None = None,
    tree_paths: Paths | None = None,
    tree_backends: Usable | None = None,
    tree_image_blocks: tuple[bool, Sequence[tuple[int, int, int]]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along key paths; without metadata and outside `packing()`, act as transformers' SDPA.

    Args:
        module: the attention layer; its name appears in errors.
        query: `[1, H, T, D]`, rotated.
        key: `[1, G, T, D]`, rotated; H is a multiple of G.
        value: `[1, G, T, D]`; its D may differ from the others'.
        attention_mask: for a packed batch the window that `mask` returned: a query sees this many entries of its path,
            the last of which is itself; None: all of them.
        scaling: factor of the scores, 1/sqrt(D) if None.
        dropout: 0 for a packed batch, because a token that is computed once could have only one mask.
        sliding_window: None or, for a packed batch, equal to `attention_mask`.
        softcap: bound c of c * tanh(scores / c), applied after the factor.
        s_aux: `[H]`, attention sinks: for each head the score of one more key, which has no value and all queries see.
        tree_kv_index: `[K]`; if it is given, the batch is packed.
        tree_paths: from `layer_kwargs`.
        tree_backends: from `layer_kwargs`.
        tree_image_blocks: for a model that lets the tokens of an image see each other, whether that holds in all layers
            (else in those with a window), and the blocks as in `fastdpo.data.vision.batch.VisionCollator`.
        **kwargs: whatever else the model passes; for a packed batch, read only to refuse what is not supported.

    Returns:
        `[1, T, H, D]` in the dtype of `query` (or of autocast, where it is on), and None for the attention weights.

    Raises:
        ValueError: metadata is missing, the layer cannot use the backend asked for, or for a packed batch it asks for
            something that is not supported (dropout, masks, biases, non-causal attention).
    """
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise ValueError(
            f"{type(module).__name__} has attention sinks of shape {tuple(s_aux.shape)}, not one for each of the "
            f"{query.shape[1]} heads"
        )
    if s_aux is not None:
        # attention comes in blocks, whose gradients would be added up with the few digits of bfloat16
        s_aux = s_aux.to(torch.promote_types(s_aux.dtype, torch.float32))
    if tree_kv_index is None and not _PACKING.get():
        kwargs |= {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        return _unpacked(module, query, key, value, attention_mask, **kwargs), None
    if tree_kv_index is None or tree_paths is None or tree_backends is None:
        raise ValueError(
            f"{type(module).__name__} got no packing metadata (the tree_* arguments of "
            "fastdpo.model.attention.registered.layer_kwargs): the model does not pass its keyword arguments on to "
            "attention"
        )
    if dropout > 0:
        raise ValueError(
            f"attention dropout must be 0 with packed batches, {type(module).__name__} has {dropout}; set "
            "disable_dropout=True, or set the dropout field of the model's config (attention_dropout, attn_pdrop, "
            "...) to 0.0"
        )
    if isinstance(attention_mask, Tensor) or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a mask or bias of its own, which packed batches cannot follow")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal, and packed batches need causal attention")
    if sliding_window and sliding_window != attention_mask:
        raise ValueError(
            f"{type(module).__name__} has sliding_window={sliding_window}, but its mask is for {attention_mask}"
        )

    # from here on they are [T, heads, D], under autocast already in autocast's dtype
    dtype = autocast_dtype(query) or query.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options: dict[str, Any] = {"scaling": scaling, "window": attention_mask, "softcap": softcap, "sinks": s_aux}
    name, against = backends.choose_backend(tree_backends, query, value, **options)
    if not torch.compiler.is_compiling():
        is_plain = softcap is not None or s_aux is not None
        _say(type(module).__name__, f"plain {name}" if is_plain and name == "grid" else name, against * query.is_cuda)
    attend = attend_opaquely if torch.compiler.is_compiling() else backends.attend
    out = attend(name, tree_paths, query, key, value, **options)
    if tree_image_blocks is not None and (tree_image_blocks[0] or attention_mask is not None):
        out = with_blocks(out, query, key, value, tree_image_blocks[1], **options)
    return out[None], None


@lru_cache
def _say(layer: str, name: str, against: str) -> None:
    """Log how a layer attends and, on CUDA, what keeps it from a faster way."""
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() if name == "varlen" else None
    against = against.replace("not varlen:", "not torch's FlashAttention:").replace("not flash:", "not flash_attn's:")
    words = _WORDS[name] + f" ({active})" * bool(active)
    logger.info("attention of %s: %s%s", layer, words, f"; {against}" * bool(against))


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Compute transformers' SDPA, `[B, T, H, D]`, also with the soft-caps and sinks that it lacks."""
    if softcap is None and s_aux is None:
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return output
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias besides a soft-cap or sinks, which is not supported")
    Q = query.shape[2]
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        if Q == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
            attention_mask = torch.ones(1, 1, Q, key.shape[2], dtype=torch.bool, device=query.device)
        else:  # a cache may have room for more than it holds
            key, value = key[:, :, :Q], value[:, :, :Q]
    options = {name: kwargs[name] for name in ("scaling", "dropout")}
    out: Tensor = backends.plain(query, key, value, mask=attention_mask, softcap=softcap, sinks=s_aux, **options)
    return out.transpose(1, 2).contiguous()


def mask(*args: Any, **kwargs: Any) -> Tensor | int | None:
    """Return the width of the window (None if there is none) inside `packing()`, else transformers' SDPA mask.

    Args:
        *args: as in `transformers.masking_utils.sdpa_mask`; models give them by name.
        **kwargs: as in `transformers.masking_utils.sdpa_mask`.

    Raises:
        ValueError: inside `packing()`, the model asks for more than a causal mask with or without a window.
    """
    if not _PACKING.get():
        built: Tensor | None = sdpa_mask(*args, **kwargs)
        return built
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
        raise ValueError("the model's attention is not plain causal or sliding, so its batches cannot be packed")
    window: int | None = kwargs.get("local_size")
    return window


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)

"""Attention over packed batches, registered with transformers under the name "fastdpo".

Each segment of a packed row (see `fastdpo.packing`) attends causally to its key path: the shared rows before it, then
its own. Gathering keys and values by path makes that an ordinary variable-length call, so nothing here is a kernel:

- `varlen`: `torch.nn.attention.varlen`, FlashAttention inside torch, with more keys than queries in a segment and the
  causal diagonal at the bottom right. CUDA, 16 bits, heads of at most 256.
- `grid`: whole paths as right-padded rows `[S, L]` of scaled_dot_product_attention. No padding mask is needed, for
  padding comes after everything a real query may see. Everything else.

The window of a layer comes by way of its mask: while `packing()` is on, the mask a model builds is the width of its
window, or None. Some models (Qwen2-MoE, Phi-MoE) tell the layer nothing else.

Without the batch's metadata the function is transformers' own SDPA, so that generation works; while `packing()` is on
it raises instead, because a model that drops the metadata would mix sequences silently.

Shapes: T rows, S segments, K key-path entries, L longest key path, H query heads, G key-value heads, D head size.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fastdpo"

METADATA = (
    "tree_kv_index",
    "tree_cu_seqlens_q",
    "tree_cu_seqlens_k",
    "tree_max_seqlen_q",
    "tree_max_seqlen_k",
)
"""Fields of a packed batch that every attention layer needs."""

_PACKING: ContextVar[bool] = ContextVar("fastdpo_packing", default=False)
# torch 2.11 takes fewer key-value heads as they come; later ones want to be told
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@contextmanager
def packing() -> Iterator[None]:
    """Within it masks are windows, and attention without the batch's metadata raises."""
    token = _PACKING.set(True)
    try:
        yield
    finally:
        _PACKING.reset(token)


def layer_kwargs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the layers need of a packed batch: its `METADATA` and the grid's indices, made here once per forward.

    - `tree_grid` `[S, L]`: the row of each entry of a key path. Padding repeats rows of the batch, spread out.
    - `tree_grid_back` `[T]`: where a row is in the flattened grid.
    - `tree_bands`: masks of sliding windows by width, filled by the first layer that needs one.

    Everything is computed on the batch's device, without waiting for it.
    """
    kv_index, cu_q, cu_k, _, L = (batch[name] for name in METADATA)
    T = batch["input_ids"].shape[1]
    place = torch.arange(L, device=kv_index.device)
    entry = cu_k[:-1, None] + place
    grid = torch.where(entry < cu_k[1:, None], kv_index[entry.clamp(max=kv_index.shape[0] - 1)], place)

    row = torch.arange(T, device=kv_index.device)
    segment = torch.searchsorted(cu_q[1:], row.int(), right=True)
    # a segment's own rows end its path
    back = segment * L + (cu_k.diff() - cu_q[1:])[segment] + row
    return {name: batch[name] for name in METADATA} | {
        "tree_grid": grid,
        "tree_grid_back": back,
        "tree_bands": {},
    }


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
    tree_kv_index: Tensor | None = None,
    tree_cu_seqlens_q: Tensor | None = None,
    tree_cu_seqlens_k: Tensor | None = None,
    tree_max_seqlen_q: int | None = None,
    tree_max_seqlen_k: int | None = None,
    tree_grid: Tensor | None = None,
    tree_grid_back: Tensor | None = None,
    tree_bands: dict[int, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within key paths, or, without metadata and outside `packing()`, as transformers' SDPA.

    Args:
        module: the attention layer; its name appears in errors.
        query: `[1, H, T, D]`, rotated.
        key: `[1, G, T, D]`, rotated; H is a multiple of G.
        value: `[1, G, T, D]`; its D may differ from the others'.
        attention_mask: for a packed batch what `mask` returned: a query sees itself and so many entries of its path
            less one before it; None: all.
        scaling: factor of the scores, 1/sqrt(D) if None.
        dropout: 0 for a packed batch: what is shared could have only one mask.
        sliding_window: None or, for a packed batch, equal to `attention_mask`.
        tree_kv_index: `[K]`; this and all below from `layer_kwargs`, which describes them.
        tree_cu_seqlens_q: `[S + 1]` int32.
        tree_cu_seqlens_k: `[S + 1]` int32.
        tree_max_seqlen_q: longest segment.
        tree_max_seqlen_k: L.
        tree_grid: `[S, L]`.
        tree_grid_back: `[T]`.
        tree_bands: `[L, L]` bool by width of the window.
        **kwargs: whatever else the model passes; only looked at for features that are not computed.

    Returns:
        `[1, T, H, D]` in the dtype of `query` (under autocast: autocast's), and None for the attention weights.

    Raises:
        ValueError: metadata is missing, or the layer asks for what is not computed (soft-cap, attention sinks; for
            packed batches also dropout, masks, biases and non-causal attention).
    """
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"{type(module).__name__} uses {feature}, which fastdpo's attention does not compute yet")
    if tree_kv_index is None and not _PACKING.get():
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    if tree_kv_index is None or tree_grid is None or tree_grid_back is None or tree_bands is None:
        raise ValueError(
            f"{type(module).__name__} got no packing metadata (tree_* of fastdpo.attention.layer_kwargs): "
            "the model does not pass its keyword arguments on to attention"
        )
    if dropout > 0:
        raise ValueError(
            f"attention dropout must be 0 with packed batches, {type(module).__name__} has {dropout}; "
            "set attention_dropout=0.0 in the model's config"
        )
    if isinstance(attention_mask, Tensor) or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a mask or bias of its own, which packed batches cannot follow")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal, and packed batches need causal attention")
    if sliding_window and sliding_window != attention_mask:
        raise ValueError(
            f"{type(module).__name__} has sliding_window={sliding_window}, but its mask is for {attention_mask}"
        )

    # from here on [T, heads, D], under autocast already in its dtype
    dtype = _autocast_dtype(query)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if _fits_varlen(query, key, value):
        paths = (tree_cu_seqlens_q, tree_cu_seqlens_k, tree_max_seqlen_q, tree_max_seqlen_k)
        out = _varlen(query, key, value, tree_kv_index, paths, scaling, attention_mask)
    else:
        out = _grid(query, key, value, tree_grid, tree_grid_back, tree_bands, scaling, attention_mask)
    return out[None], None


def _autocast_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _fits_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    D = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and D <= 256
        and D % 8 == 0
        and value.shape[-1] == D
        and _has_flash(query.device)
    )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor,
    paths: tuple[Any, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    if kv_index.shape[0] != key.shape[0]:  # as many entries as rows: nothing is shared, every path is its segment
        key, value = key.index_select(0, kv_index), value.index_select(0, kv_index)
    # the window's left side does not count the query itself
    window_size = (window - 1 if window else -1, 0)
    out = varlen_attn(query, key, value, *paths, scale=scaling, window_size=window_size, **_GQA)
    assert isinstance(out, Tensor)  # a tuple only where return_aux asks for more
    return out


def _grid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Tensor,
    back: Tensor,
    bands: dict[int, Tensor],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    S, L = grid.shape
    rows = grid.view(-1)
    query, key, value = (x.index_select(0, rows).unflatten(0, (S, L)).transpose(1, 2) for x in (query, key, value))
    band = None
    if window and window < L:
        if window not in bands:
            place = torch.arange(L, device=grid.device)
            age = place[:, None] - place
            bands[window] = (age >= 0) & (age < window)
        band = bands[window]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:
        # the memory-efficient kernel, the best one for what comes here, knows no grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, back)


def mask(*args: Any, **kwargs: Any) -> Tensor | int | None:
    """Within `packing()` the width of the window, None if there is none; else transformers' SDPA mask.

    Args:
        *args: as `transformers.masking_utils.sdpa_mask`; models give them by name.
        **kwargs: the same.

    Raises:
        ValueError: within `packing()` the model asks for more than a causal mask with or without a window.
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

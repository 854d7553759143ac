"""Compute attention over key paths by one of three backends, and choose the backend of a layer.

- `varlen`: `torch.nn.attention.varlen`, the FlashAttention inside torch. A segment has more keys than queries, with the
  causal diagonal at the bottom right. Users may activate FlashAttention 3 or 4 for it
  (`torch.nn.attention.activate_flash_attention_impl`); this module does not, because it would change a whole process.
- `flash`: the same with the flash_attn package, which also supports soft-caps.
- `grid`: scaled_dot_product_attention on whole paths as rows padded on the right, where segments of similar length go
  together. It needs no padding mask, because padding comes after everything that a real query may see. Layers with
  soft-caps or attention sinks use plain matmuls and a softmax in float32 instead, at most `SCORES` scores at a time,
  which the backward computes again instead of keeping them.

Shapes: T rows, S segments, K key-path entries, H query heads, G key-value heads, D head size.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdpo.model.attention.key_paths import ROUNDING, Paths, gather
from fastdpo.settings.names import check_name

BACKENDS = ("varlen", "flash", "grid")
"""Names of the backends, in the order of preference."""

SCORES = 2**24
"""Most scores that plain matmuls compute at a time: 64 MiB in float32, and a few times as much with the softmax."""

MOST_QUERIES = 128
"""On the CPU, most queries of a path that are computed together, if the path is at least twice as long."""


class Usable(NamedTuple):
    """The backends that a batch may use."""

    backend: str
    """The backend asked for, or "auto"."""
    refused: dict[str, str]
    """For each backend that the device cannot run, the reason."""


def usable(backend: str, device: torch.device) -> Usable:
    """Return which backends a device can run.

    Raises:
        ValueError: there is no backend of this name, or the device cannot run it.
    """
    check_name("attention_backend", backend, ("auto", *BACKENDS))
    refused = {name: why for name in BACKENDS if (why := _refused_by_device(name, device))}
    if why := refused.get(backend):
        raise ValueError(f"attention_backend={backend!r} cannot be used: {why}; 'auto' takes what can")
    return Usable(backend, refused)


def choose_backend(usable: Usable, query: Tensor, value: Tensor, **options: Any) -> tuple[str, str]:
    """Return the best backend that a layer can use, and the reasons against better ones.

    Args:
        usable: what `usable` returned for the device.
        query: `[T, H, D]`.
        value: `[T, G, Dv]`.
        **options: `scaling`, `window`, `softcap` and `sinks` of `attend`.

    Raises:
        ValueError: the layer cannot use the backend asked for.
    """
    against: list[str] = []
    for name in BACKENDS if usable.backend == "auto" else (usable.backend,):
        why = usable.refused.get(name) or _refused_by_layer(name, query, value, **options)
        if why is None:
            return name, "; ".join(against)
        against.append(f"not {name}: {why}")
    raise ValueError(f"attention_backend={name!r} cannot be used: {why}; 'auto' takes what can")


def _refused_by_device(name: str, device: torch.device) -> str | None:
    if name == "grid":
        return None
    if name == "varlen" and _VARLEN is None:
        return "this torch has no torch.nn.attention.varlen"
    if name == "flash" and _FLASH is None:
        return "the flash_attn package is not installed (pip install 'fastdpo[flash]')"
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if name == "varlen" and torch.version.hip is not None:
        return "it runs on CUDA, not on ROCm"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


def _refused_by_layer(
    name: str,
    query: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> str | None:
    D = query.shape[-1]
    if name == "grid":
        return None
    takes = (_VARLEN if name == "varlen" else _FLASH) or frozenset()
    if query.dtype not in (torch.bfloat16, torch.float16):
        dtype = str(query.dtype).removeprefix("torch.")
        return f"it takes bfloat16 or float16 (bf16=True), not {dtype}"
    if D > 256 or D % 8 or value.shape[-1] != D:
        return f"heads of {D} and {value.shape[-1]} are not of one size, a multiple of 8 and at most 256"
    if sinks is not None:
        return "it does not know attention sinks"
    if softcap is not None and "softcap" not in takes:
        return "it does not know soft-caps"
    if window and "window_size" not in takes:
        return "this version does not know windows"
    if scaling not in (None, D**-0.5) and not {"scale", "softmax_scale"} & takes:
        return "this version does not know a scale"
    return None


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _parameters(function: Callable[..., Any] | None) -> frozenset[str] | None:
    return frozenset(inspect.signature(function).parameters) if function else None


_varlen_attn = _optional("torch.nn.attention.varlen", "varlen_attn")
_flash_attn = _optional("flash_attn", "flash_attn_varlen_func")
# arguments of the installed versions: torch 2.10 takes is_causal, 2.11 window_size instead, 2.12 also enable_gqa
_VARLEN = _parameters(_varlen_attn)
_FLASH = _parameters(_flash_attn)


# Computing attention


def attend(
    name: str,
    paths: Paths,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend causally along key paths by one of `BACKENDS`.

    Args:
        name: as returned by `choose_backend`.
        paths: the key paths of the batch.
        query: `[T, H, D]`.
        key: `[T, G, D]`.
        value: `[T, G, Dv]`.
        scaling: factor of the scores, 1/sqrt(D) if None.
        window: a query sees the last `window` entries of its path up to and including itself; None: all of them.
        softcap: bound c of c * tanh(scores / c), applied after the factor.
        sinks: `[H]`, for each head the score of one more key, which every query sees and which has no value. These
            scores are not scaled.

    Returns:
        `[T, H, Dv]`.
    """
    if name == "grid":
        return _grid(query, key, value, paths, scaling, window, softcap, sinks)
    if paths.kv_index.shape[0] != key.shape[0]:  # the two are equal where nothing is shared
        key, value = (gather(x, paths.kv_index, paths.order, paths.bounds) for x in (key, value))
    # here the window's left side does not count the query itself
    window_size = (window - 1 if window else -1, 0)
    lengths = (paths.cu_seqlens_q, paths.cu_seqlens_k, *paths.longest)
    if name == "varlen":
        assert softcap is None
        out = _varlen_attn(query, key, value, *lengths, **_varlen_options(scaling, window_size))
    else:
        out = _flash_attn(query, key, value, *lengths, **_flash_options(scaling, window_size, softcap))
    assert isinstance(out, Tensor)  # it is a tuple only if an option asks for more
    return out


def _varlen_options(scaling: float | None, window_size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments that the installed `varlen_attn` takes."""
    assert _VARLEN is not None
    options: dict[str, Any] = {"window_size": window_size} if "window_size" in _VARLEN else {"is_causal": True}
    if "scale" in _VARLEN:
        options["scale"] = scaling
    if "enable_gqa" in _VARLEN:  # versions without it accept fewer key-value heads as they are
        options["enable_gqa"] = True
    return options


def _flash_options(scaling: float | None, window_size: tuple[int, int], softcap: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return options | {"softmax_scale": scaling, "causal": True, "window_size": window_size}


def _grid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paths: Paths,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    query = gather(query, paths.query_grid, paths.query_back, None)
    key, value = (gather(x, paths.grid, paths.grid_order, paths.bounds) for x in (key, value))
    shapes, q_lengths = paths.shapes, paths.queries
    counts = [s for s, _ in shapes]
    sizes = [s * length for s, length in shapes]
    queries = query.split([s * q for s, q in zip(counts, q_lengths, strict=True)])
    before = paths.before.split(counts)
    parts = []
    for (s, length), q_length, q, k, v, start in zip(
        shapes, q_lengths, queries, key.split(sizes), value.split(sizes), before, strict=True
    ):
        q = q.unflatten(0, (s, q_length)).transpose(1, 2)
        k, v = (x.unflatten(0, (s, length)).transpose(1, 2) for x in (k, v))
        parts.append(_bucket(q, k, v, start, scaling, window, softcap, sinks).flatten(0, 1))
    return torch.cat(parts).index_select(0, paths.query_back)


def _bucket(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention `[S, Q, H, Dv]` of a bucket, with queries `[S, H, Q, D]` and keys `[S, G, K, D]`.

    torch's kernel for the CPU computes nearly all scores that a mask leaves out. So there the queries of a long path
    come a few at a time, with the keys that one of them may see, which depend on the lengths of the bucket alone.
    """
    Q, K = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scaling": scaling, "window": window}
    # the first own row is at most at this place of its path, because lengths are rounded up
    place = 0 if Q == K else K - Q + ROUNDING - 1
    step = MOST_QUERIES if query.device.type == "cpu" and K >= 2 * MOST_QUERIES else Q
    parts = []
    for i in range(0, Q, step):
        end = min(i + step, Q)
        last = min(place + end, K)
        mask = None  # causal
        if Q < K or i > 0:
            mask = _seen((start[:, None] if Q < K else 0) + torch.arange(i, end).view(1, -1), last, window)
        part = (query[:, :, i:end], key[:, :, :last], value[:, :, :last])
        if softcap is None and sinks is None:
            out = _sdpa(*part, mask=mask, **options)
        else:
            out = plain(*part, mask=mask, softcap=softcap, sinks=sinks, **options)
        parts.append(out.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _seen(place: Tensor, keys: int, window: int | None) -> Tensor:
    """Return `[S, 1, Q, K]`: which of the first K entries of a path the queries at `place` `[S, Q]` see."""
    # the padding's queries stand at the last place, so that each sees something and no gradient is NaN
    age = place.clamp(max=keys - 1)[:, :, None] - torch.arange(keys)
    return ((age >= 0) & (age < (window or keys)))[:, None]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, mask: Tensor | None
) -> Tensor:
    L, groups = query.shape[2], query.shape[1] // key.shape[1]
    if mask is None and window and window < L:
        place = torch.arange(L, device=query.device)
        age = place[:, None] - place
        mask = (age >= 0) & (age < window)
    if groups > 1 and query.is_cuda:
        # the memory-efficient kernel, the best one for these shapes, does not support grouped heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
    )


# Soft-caps and sinks


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention by plain matmuls and a softmax in float32, at most `SCORES` scores at a time.

    Args:
        query: `[N, H, Q, D]`.
        key: `[N, G, K, D]`.
        value: `[N, G, K, Dv]`.
        scaling: as in `attend`.
        softcap: as in `attend`.
        sinks: `[H]`, as in `attend`.
        window: as in `attend`.
        mask: `[N or 1, H or 1, Q, K]`, booleans that are True where a key is seen, or numbers that are added to the
            scores. None: causal, with K = Q.
        dropout: probability with which a weight of the softmax drops out.

    Returns:
        `[N, H, Q, Dv]`.
    """
    N, H, Q, D = query.shape
    K = key.shape[2]
    n = min(max(SCORES // (H * Q * K), 1), N)
    q = min(max(SCORES // (n * H * K), 1), Q)
    scaling = D**-0.5 if scaling is None else scaling
    parts = []
    for a in range(0, N, n):
        for i in range(0, Q, q):
            # a causal block needs no keys after its queries, and none before the window of its first query
            first, last = (max(i - window + 1, 0) if window else 0, min(i + q, Q)) if mask is None else (0, K)
            args: tuple[Any, ...] = (
                query[a : a + n, :, i : i + q],
                *(x[a : a + n, :, first:last] for x in (key, value)),
                _part(mask, slice(a, a + n), slice(i, i + q)) if mask is not None else (i - first, window),
                *(scaling, softcap, sinks, dropout),
            )
            if torch.is_grad_enabled():
                out = checkpoint(_block, *args, use_reentrant=False, preserve_rng_state=dropout > 0)
            else:
                out = _block(*args)
            parts.append(out)
    blocks = [torch.cat(parts[i : i + -(-Q // q)], dim=2) for i in range(0, len(parts), -(-Q // q))]
    return torch.cat(blocks)


def _part(mask: Tensor, batch: slice, queries: slice) -> Tensor:
    return (mask if mask.shape[0] == 1 else mask[batch])[:, :, queries]


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | tuple[int, int | None],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Compute one block of `plain`; the mask may be (place of the first query among the keys, window)."""
    _, H, Q, _ = query.shape
    G, K = key.shape[1:3]
    grouped = query.unflatten(1, (G, H // G)).flatten(2, 3)
    scores = (grouped @ key.transpose(2, 3)).unflatten(2, (H // G, Q)).flatten(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(scores.dtype).min
    if not isinstance(mask, Tensor):
        first, window = mask
        age = torch.arange(first, first + Q, device=query.device)[:, None] - torch.arange(K, device=query.device)
        mask = (age >= 0) & (age < (window or K))
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # the softmax takes them as a key, because a log-sum-exp of large scores is rounded too much
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1)[..., :K].to(value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    out: Tensor = torch.matmul(weights.unflatten(1, (G, H // G)).flatten(2, 3), value)
    out = out.unflatten(2, (H // G, Q)).flatten(1, 2)
    return out

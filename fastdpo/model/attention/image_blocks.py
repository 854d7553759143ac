"""Let the tokens of an image see each other, in models whose attention is causal but for the images (Gemma 3 and 4).

The backends attend causally. The queries of each image are computed once more, over their path up to the image's last
token and without the causal mask, and replace the causal results. A prompt, and all images in it, is a run of rows, so
the keys are a slice.

Shapes: T rows, H query heads, G key-value heads, D head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.model.attention.backends import plain


@torch.compiler.disable  # type: ignore[untyped-decorator]
def with_blocks(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[tuple[int, int, int]],
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the results of attention in which the tokens of each image see all of their image.

    Args:
        out: `[T, H, D]`, the causal results.
        query: `[T, H, D]`.
        key: `[T, G, D]`.
        value: `[T, G, D]`.
        blocks: for each image, the first row of its prompt, its own first row, and the row after its last one.
        scaling: as in `fastdpo.model.attention.backends.attend`, like the arguments after it. The window bounds what a
            token sees to its left, also in its own image.
        window: see `scaling`.
        softcap: see `scaling`.
        sinks: see `scaling`.
    """
    rows, parts = [], []
    for first, start, stop in blocks:
        place = torch.arange(first, stop, device=query.device)
        seen = None
        if window:
            seen = place > place[start - first :, None] - window
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start:stop], key[first:stop], value[first:stop]))
        if softcap is None and sinks is None:
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            block = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
        else:
            shape = (1, 1, stop - start, stop - first)
            mask = q.new_ones(shape, dtype=torch.bool) if seen is None else seen.reshape(shape)
            block = plain(q, k, v, mask=mask, scaling=scaling, softcap=softcap, sinks=sinks)
        rows.append(place[start - first :])
        parts.append(block[0].transpose(0, 1))
    return out.index_copy(0, torch.cat(rows), torch.cat(parts).to(out.dtype))

"""Stand-ins for attention, head and experts in `fastdpo.plan.memory`, which allocate as the real ones do.

They compute nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastdpo.head.impl.interface import autocast_dtype
from fastdpo.model.attention import backends

NAME = "fastdpo_memory"


class HeadMemory(torch.autograd.Function):
    """Allocates what the fused head allocates, and keeps what it keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, live: Any) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        keeps = live.workspaces
        live.workspaces += 1
        scores = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        if needs_weight:  # it keeps as many probabilities as fit
            keeps += 1
            ctx.save_for_backward(hidden, weight)
        elif needs_hidden:  # it keeps the mean weight row under the probabilities
            ctx.save_for_backward(torch.empty_like(hidden, dtype=torch.float32), weight)
        live.workspaces = keeps
        ctx.live = live
        return scores

    @staticmethod
    def backward(ctx: Any, dscores: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        ctx.live.workspaces += 1
        dhidden = torch.empty_like(hidden, dtype=torch.float32) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None
        ctx.live.workspaces = 0
        return None if dhidden is None else dhidden.to(weight.dtype), dweight, None


class _AttentionMemory(torch.autograd.Function):
    """Allocates and keeps what a flash kernel does, for arguments in any layout.

    The computation by plain matmuls also has `scores` attention scores at a time, in float32: three copies of them in
    the forward, six in the backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: int) -> Tensor:
        ctx.scores = scores
        query.new_empty(3 * scores, dtype=torch.float32)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        sums = None if query.dtype == torch.float32 else torch.empty_like(query, dtype=torch.float32)  # for dquery
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums
        query.new_empty(6 * ctx.scores, dtype=torch.float32)
        return *grads, None


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, dtype: Any = None) -> Tensor:
    """Allocate the result of `torch._grouped_mm`, the matmul of experts, whose own fake result is in bfloat16 only.

    Args:
        a: [rows, K] or [G, rows, K].
        b: [K, columns] or [G, K, columns].
        offs: [G], where each group ends: in the rows of `a`, in the columns of `b`, or in the K of both.
        bias: None; torch takes no other value.
        dtype: dtype of the result; None means that of `a`.
    """
    groups: Any = ()
    if a.dim() == b.dim():  # each group has a result of its own
        groups = a.shape[:1] if offs is None else offs.shape
    return a.new_empty(*groups, a.shape[-2], b.shape[-1], dtype=dtype)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    memory_paths: Tensor,
    memory_grid: Tensor,
    memory_backends: backends.Usable,
    memory_chosen: set[str],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    rows = query.shape[2]
    dtype = autocast_dtype(query) or query.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options: dict[str, Any] = {"scaling": scaling, "window": None, "softcap": softcap, "sinks": s_aux}
    name, _against = backends.choose_backend(memory_backends, query, value, **options)
    memory_chosen.add(name)
    if name != "grid":
        if len(memory_paths) != rows:
            key, value = key.index_select(0, memory_paths), value.index_select(0, memory_paths)
        return _AttentionMemory.apply(query, key, value, 0)[None], None
    query, key, value = (x.index_select(0, memory_grid) for x in (query, key, value))
    is_plain = softcap is not None or s_aux is not None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not is_plain:  # grouped key heads are repeated
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = backends.SCORES if is_plain else 0
    out = _AttentionMemory.apply(query, key, value, scores).clone()  # the results of all buckets in one tensor
    return out.index_select(0, torch.zeros(rows, dtype=torch.int64))[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)

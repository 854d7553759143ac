"""Let the LM heads of models return `LazyLogits` for a while."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.compat.lazy.call import HeadCall
from fastdpo.compat.lazy.logits import LazyLogits
from fastdpo.head.impl.interface import autocast_dtype
from fastdpo.head.linear_logprobs import DTYPES
from fastdpo.model.body_and_head import Head, locate_head, operands

logger = logging.getLogger("fastdpo")


@contextmanager
def lazy_heads(models: Iterable[Any]) -> Iterator[None]:
    """Let the heads of causal LMs return `LazyLogits` inside the block.

    A model whose head cannot be fused is left as it is, and a line in the log says why.

    Args:
        models: causal LMs, also inside wrappers of PEFT or DDP; others are ignored.
    """
    with ExitStack() as stack:
        for model in models:
            causal_lm = next((m for m in model.modules() if hasattr(m, "get_output_embeddings")), None)
            if causal_lm is None or causal_lm.get_output_embeddings() is None:
                continue
            if getattr(vars(causal_lm.get_output_embeddings()).get("forward"), "__module__", None) == __name__:
                continue  # inside another block
            head = locate_head(causal_lm)
            if reason := _refused(model, head):
                _say_refused(type(causal_lm).__name__, reason)
                continue
            stack.enter_context(_lazy(head._replace(logit_scale=1.0, softcap=None, vocab=None)))
        yield


def _refused(model: nn.Module, head: Head) -> str | None:
    """Return why the logits of a head must be computed, or None."""
    wrappers = {type(m).__name__ for m in model.modules()} & {"FullyShardedDataParallel", "DataParallel"}
    if wrappers:
        return f"{wrappers.pop()} holds its weights"
    if hasattr(model, "_orig_mod"):
        return "torch.compile compiled it"
    if getattr(model, "static_graph", False):
        return "DDP runs it with static_graph=True"
    if head.own is not None or head.lm_head is None:
        return head.own
    if head.lm_head._forward_hooks or head.lm_head._forward_pre_hooks:
        return "its output embeddings have hooks"
    for x in head.lm_head.parameters():
        if type(x.data) is not Tensor or hasattr(x, "ds_id") or x.numel() == 0:
            return "its output embeddings are sharded"
        if x.dtype not in DTYPES:
            return f"its output embeddings have dtype {x.dtype}"
    return None


@contextmanager
def _lazy(head: Head) -> Iterator[None]:
    lm_head = head.lm_head
    assert lm_head is not None

    def forward(hidden: Tensor) -> LazyLogits:
        del vars(lm_head)["forward"]
        try:
            found = operands(head, hidden.flatten(0, -2))
        finally:
            vars(lm_head)["forward"] = forward
        trained = [x for x in lm_head.parameters() if x.requires_grad]
        call = HeadCall(
            operands=found,
            graph=(found[0], *(x.view_as(x) for x in trained)),
            grad=torch.is_grad_enabled() and bool(trained or found[0].requires_grad),
            autocast=autocast_dtype(found[0]),
        )
        rows = torch.arange(len(found[0]), device=hidden.device)
        return LazyLogits(call, rows.view(hidden.shape[:-1]))

    vars(lm_head)["forward"] = forward
    try:
        yield
    finally:
        del vars(lm_head)["forward"]


@cache
def _say_refused(name: str, reason: str) -> None:
    logger.warning("patch_trl: the logits of %s are computed as before, because %s", name, reason)

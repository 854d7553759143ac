"""Communication between the ranks of a group, each of which holds one shard of the vocabulary.

In the forward the ranks reduce three numbers per row: the largest `others`, the sum of their exponentials, and the
target's logit, which one rank has. In the backward they sum the gradients of hidden.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from fastdpo.head.impl.interface import without_others


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.float() if grad.element_size() < 4 else grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, others: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        largest = torch.stack([target, others])
        dist.all_reduce(largest, ReduceOp.MAX, group=group)
        total = (others - without_others(largest[1])).exp()
        dist.all_reduce(total, group=group)
        merged = largest[1] + total.log()
        ctx.save_for_backward(target > -torch.inf, (others - without_others(merged)).exp())
        return largest[0], merged

    @staticmethod
    def backward(ctx: Any, dtarget: Tensor, dothers: Tensor) -> tuple[Tensor, Tensor, None]:
        mine, share = ctx.saved_tensors
        return dtarget.where(mine, 0.0), dothers * share, None


def sum_gradients(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return `x`, which is the same on all ranks, and sum its gradient over the ranks in the backward."""
    result: Tensor = _SumGradients.apply(x, group)
    return result


def merge(target: Tensor, others: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Merge the shards' `target [N]`, -inf on ranks that do not have it, and `others [N]` into the vocabulary's."""
    result: tuple[Tensor, Tensor] = _Merge.apply(target, others, group)
    return result

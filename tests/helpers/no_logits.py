"""Fail when anything as large as the logits is computed."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoLogits(TorchDispatchMode):
    """Inside this context no operation, in forward or backward, may return a tensor of `limit` elements or more.

    Also looks into fastdpo's own ops. Views count by what they show, so an expanded row of zeros counts too.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdpo":
            key = torch._C.DispatchKey.CUDA if args[0].is_cuda else torch._C.DispatchKey.CPU
            with self:  # straight to the implementation, under this mode again
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, Tensor) or tensor.numel() < self.limit, (
                f"{func} returned a tensor of shape {tuple(tensor.shape)}, the limit is {self.limit} elements"
            )
        return result

"""`activation_offloading`: what the backward pass needs waits in the memory of the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

HOST = "cpu"
SMALLEST = 1024
"""Tensors below this number of elements stay where they are."""


def offloading(model: nn.Module) -> saved_tensors_hooks:
    """Return a context in which autograd keeps the activations of a forward pass on the CPU until the backward pass.

    Tensors that are weights or views of weights, tensors on the CPU and small tensors stay where they are. With
    gradient checkpointing, only the inputs of the checkpointed layers are left to be moved.

    Args:
        model: the model whose weights stay on the device.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        kept = tensor.numel() < SMALLEST or tensor.untyped_storage().data_ptr() in weights
        if kept or tensor.device.type == HOST:
            return tensor.detach()  # the tensor itself could hold the graph that holds it
        on_cpu = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, on_cpu.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, on_cpu = packed
        moved: Tensor = on_cpu.to(device, non_blocking=True)
        return moved

    return saved_tensors_hooks(pack, unpack)

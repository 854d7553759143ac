"""Rows of an LM head like those that training sees, for studies and tests of what a sparse backward costs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """hidden `[N, D]`, weight `[V, D]` and the upstream gradient `[N]` float32; targets `[N]` drawn from the rows."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    dlogps: Tensor


KINDS = ("peaked", "sharp", "anisotropic", "confident", "flat")


def make_rows(kind: str, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Peaked: a power-law rank curve over Zipf-distributed candidates. Anisotropic: embeddings with a common mean.

    Confident: nearly all probability is the first candidate's, as of a model that knows its text.
    """
    weight = torch.randn(V, D) / math.sqrt(D)
    hidden = torch.randn(N, D)
    if kind != "flat":
        zipf = 1 / (torch.arange(V) + 10.0)
        candidates = torch.multinomial(zipf, N * 24, replacement=True).view(N, 24)
        height = {"peaked": 17, "confident": 30}.get(kind, 20) + torch.randn(N, 1)
        slope = 2 + 4 * torch.rand(N, 1)
        for rank in range(24):
            hidden += (height - slope * math.log(rank + 1)) * weight[candidates[:, rank]]
    if kind == "anisotropic":
        direction = torch.randn(D)
        weight += 0.8 * direction / direction.norm()
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    return Rows(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), torch.randn(N, device=device))


class Exact(NamedTuple):
    """Float64 truth on the same rounded inputs."""

    logps: Tensor
    dhidden: Tensor
    dweight: Tensor
    dz: Tensor


def exact(rows: Rows) -> Exact:
    hidden, weight = rows.hidden.double(), rows.weight.double()
    log_probs = (hidden @ weight.T).log_softmax(-1)
    index = rows.targets[:, None]
    dz = -log_probs.exp()
    dz.scatter_add_(1, index, torch.ones_like(dz[:, :1]))
    dz *= rows.dlogps[:, None]
    return Exact(log_probs.gather(1, index).squeeze(1), dz @ weight, dz.T @ hidden, dz)


def error(actual: Tensor, true: Tensor) -> float:
    return float((actual.double() - true).norm() / true.norm())

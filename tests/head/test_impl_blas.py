"""fastdpo.head.impl.blas, with kernels between matmuls, against fastdpo.head.impl.torch, the same in PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.head.impl import blas
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.impl.interface import NOTHING, Grads, Keep, LinearHead, Needs, Transform
from fastdpo.kernels import dlogits_rows, fold_logits

N, D, V, R = 21, 7, 139, 2  # three tiles of rows, three of the vocabulary, the last ragged
OPTIONS = [pytest.param(Transform(), id="plain"), pytest.param(Transform.of(1.7, 5.0, 0.6), id="all-options")]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Tiles of several blocks of the kernels, which are several cells."""
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (8, 64))
    monkeypatch.setattr(torch_impl, "CELL", 8)
    for module in (dlogits_rows, fold_logits):
        monkeypatch.setattr(module, "BLOCK", 32)


@pytest.fixture(params=OPTIONS)
def arguments(request: pytest.FixtureRequest, device: torch.device) -> tuple[Any, ...]:
    hidden, hidden2 = 2 * torch.randn(N, D), torch.randn(N, R)
    weight, weight2, bias = torch.randn(V, D) / 2, torch.randn(V, R) / 2, torch.randn(V)
    weight[70:80] *= 4  # the maximum rises and falls
    targets = torch.randint(V, (N,))
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    targets[1::8] = 63  # last column of a tile
    hidden, hidden2, weight, bias, weight2 = (t.to(device).double() for t in (hidden, hidden2, weight, bias, weight2))
    return hidden, hidden2, targets.to(device), LinearHead(weight, bias, weight2, request.param)


def close(ours: Any, theirs: Any) -> None:
    for name, a, b in zip(theirs._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if isinstance(a, Tensor):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-13, msg=lambda message, name=name: f"{name}: {message}"
            )


@pytest.mark.parametrize("keep", [Keep(expected=True), Keep(shares=True), Keep(probs=True)], ids=str)
def test_forward(keep: Keep, arguments: Any) -> None:
    ours, theirs = (impl.forward(*arguments, True, keep, 2**20) for impl in (blas, torch_impl))
    close(ours._replace(stats=None, kept=None), theirs._replace(stats=None, kept=None))
    close(ours.kept, theirs.kept)
    stats, same = ours.stats, theirs.stats
    is_top1 = [(r.target >= s.top) & (r.target > s.top_before) for r, s in ((ours, stats), (theirs, same))]
    assert torch.equal(*is_top1)  # one keeps the first maximum of a tile, the other the largest before the target
    close(stats._replace(top_before=None), same._replace(top_before=None))


@pytest.mark.parametrize("has_entropy", [False, True], ids=["plain", "entropy"])
def test_backward(has_entropy: bool, arguments: Any) -> None:
    result = torch_impl.forward(*arguments, True)
    dtarget, dothers, dentropy = torch.randn(3, N, dtype=torch.float64, device=arguments[0].device)
    grads = Grads(dtarget, dothers, dentropy if has_entropy else None)
    every = Needs(True, True, True, True, True)
    close(*(Needs(*impl.backward(grads, *arguments, result, every)) for impl in (blas, torch_impl)))


def test_first_of_equal_maxima_is_the_top_one(device: torch.device) -> None:
    weight = torch.zeros(V, 1, device=device)
    weight[[3, 5, 40, 130]] = 2.0  # twice in a block, in another, in another tile
    targets = torch.tensor([3, 5, 40, 130, 7], device=device)
    result = blas.forward(torch.ones(5, 1, device=device), None, targets, LinearHead(weight), True, NOTHING, 2**20)
    is_top1 = (result.target >= result.stats.top) & (result.target > result.stats.top_before)
    assert is_top1.tolist() == [True, False, False, False, False]

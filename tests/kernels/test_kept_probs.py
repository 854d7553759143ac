"""Probabilities that the forward keeps in 16 bits, and their gradients: in Triton's interpreter, or on a GPU."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.head.impl import triton as impl
from fastdpo.head.impl.interface import Grads, Keep, LinearHead, Needs, Transform
from fastdpo.head.impl.tiles import slices
from fastdpo.kernels import kept_probs
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import linear_logprobs_forward as forward_kernel
from fastdpo.kernels.logits_tile import Config
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import make_inputs, relative_error

SMALL = Config(BLOCK_N=16, BLOCK_V=32, BLOCK_D=16, num_warps=4, num_stages=2)
TILE, WHOLE = 16, 64  # two tiles to a block, two blocks to what is kept whole or not at all
N, V, D = 19, 3 * 32 + 13, 16
EVERYTHING = 2**30
"""A workspace in which all probabilities fit."""


@triton.jit
def _round_trip(out_ptr, e_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, kept_probs.decode(kept_probs.encode(tl.load(e_ptr + offs))))


@pytest.fixture(autouse=True, params=["pointers", "tma"])
def small_tiles(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tma = request.param == "tma"
    if tma and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a chip with TMA")
    for module in (forward_kernel, backward_kernel):
        monkeypatch.setattr(module, "default_config", lambda *_: SMALL)
        monkeypatch.setattr(module, "GROUP_N", 2)
    for module in (impl, forward_kernel, kept_probs):
        monkeypatch.setattr(module, "TILE", TILE)
    for module in (impl, forward_kernel):
        monkeypatch.setattr(module, "WHOLE", WHOLE)
    monkeypatch.setattr(forward_kernel, "default_splits", lambda row_blocks, tiles, processors: 3)
    monkeypatch.setattr(forward_kernel, "processors", lambda x: 4)
    monkeypatch.setattr(forward_kernel, "fits_tma", lambda hidden, weight: tma)


def workspace_for(columns: int, itemsize: int) -> int:
    """A workspace in which so many columns of probabilities and their factors fit, and a few bytes more."""
    return N * columns * itemsize + N * columns // TILE * max(itemsize, 4) + 40


def gradients(
    inputs: Any, dlogps: Tensor, transform: Transform, workspace: int, keep: Keep, *, stats: bool = False
) -> Any:
    """dhidden, dweight and dbias, and the result of the forward."""
    hidden, weight, targets, bias = inputs
    head = LinearHead(weight, bias, None, transform)
    result = impl.forward(hidden, None, targets, head, stats, keep, workspace)
    dtarget = (result.others - result.target).sigmoid() * dlogps.to(result.others.dtype)
    needs = Needs(True, True, bias is not None)
    grads = impl.backward(Grads(dtarget, -dtarget), hidden, None, targets, head, result, needs, workspace=9000)
    return grads[: 3 if bias is not None else 2], result


def exact(inputs: Any, dlogps: Tensor, transform: Transform, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, targets, bias = inputs
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = transform.scale * torch.nn.functional.linear(*leaves)
    logps = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return list(torch.autograd.grad(logps, leaves, dlogps.to(dtype)))


def test_sixteen_bits_hold_a_probability_to_a_two_thousandth(device: torch.device) -> None:
    e = torch.cat([torch.rand(490) * torch.exp2(-torch.arange(490) / 8), torch.tensor([1.0, 0.0, 2.0**-62, 1e-30])])
    e = torch.nn.functional.pad(e, (0, 512 - len(e))).to(device)
    out = torch.empty_like(e)
    _round_trip[(1,)](out, e, BLOCK=512)
    held = e >= 2.0**-61
    assert ((out - e).abs() <= 2.0**-11 * e)[held].all()
    assert (out[e < 2.0**-63] == 0).all()
    assert out[490] == 1
    assert out[492] == 2.0**-62


@pytest.mark.parametrize("columns", [64, 128], ids=["half", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_from_kept_probabilities(
    dtype: torch.dtype, columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bars of recomputed gradients hold; what is kept is not recomputed."""
    calls = []
    recompute = impl.linear_logprobs_backward
    monkeypatch.setattr(
        impl, "linear_logprobs_backward", lambda d, *a, **k: calls.append(d.numel()) or recompute(d, *a, **k)
    )
    inputs = make_inputs(dtype, device, bias=True, shape=(N, V, D))
    inputs.weight[20:30] *= 8  # the maximum rises and falls
    dlogps, transform = torch.randn(N, device=device), Transform(-0.7)
    stored = 2 if dtype.itemsize == 2 else dtype.itemsize
    workspace = workspace_for(columns, stored)
    ours, result = gradients(inputs, dlogps, transform, workspace, Keep(probs=True))
    kept = 0 if result.kept.probs is None else result.kept.probs.shape[1]
    assert kept == columns
    assert sum(calls) == N * (128 - columns)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theirs, truth = (exact(inputs, dlogps, transform, t) for t in (wide, torch.float64))
    for name, a, b, c in zip(("dhidden", "dweight", "dbias"), ours, theirs, truth, strict=True):
        assert a.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-13, msg=name)
            continue
        assert_as_accurate(a, b.to(dtype), c, name)


def test_sixteen_bits_add_no_error_to_that_of_bfloat16(device: torch.device) -> None:
    """A second rounding to bfloat16 would add a fifth."""
    inputs = make_inputs(torch.bfloat16, device, shape=(N, V, D))
    dlogps = torch.randn(N, device=device)
    kept, recomputed = (
        gradients(inputs, dlogps, Transform(), EVERYTHING, Keep(probs=probs))[0] for probs in (True, False)
    )
    for a, b, c in zip(kept, recomputed, exact(inputs, dlogps, Transform(), torch.float64), strict=True):
        assert relative_error(a, c) <= 1.06 * relative_error(b, c)


def test_kept_and_recomputed_agree_with_statistics_and_slices(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward slices of the rows keep their parts of the probabilities and of the factors."""
    monkeypatch.setattr(impl, "slices", lambda total, size, *first: slices(total, 10 if size >= 2048 else size, *first))
    inputs = make_inputs(torch.float32, device, shape=(N, V, D))
    dlogps = torch.randn(N, device=device)
    keep = Keep(shares=True, probs=True)
    kept, result = gradients(inputs, dlogps, Transform(), EVERYTHING, keep, stats=True)
    recomputed, _ = gradients(inputs, dlogps, Transform(), EVERYTHING, Keep())
    assert result.kept.probs is not None
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bits_are_the_same_in_every_run(device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True, shape=(N, V, D))
    dlogps = torch.randn(N, device=device)
    runs = [gradients(inputs, dlogps, Transform(), EVERYTHING, Keep(probs=True))[0] for _ in range(2)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_rows_without_other_tokens(device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True, shape=(4, V, D))
    assert inputs.bias is not None
    inputs.bias.fill_(-torch.inf)
    inputs.bias[3] = 0.0
    inputs.targets[:] = 3  # whose probability is 1
    (dhidden, dweight, _), _ = gradients(
        inputs, torch.ones(4, device=device), Transform(), EVERYTHING, Keep(probs=True)
    )
    assert not dhidden.any()
    assert not dweight.any()


def test_a_soft_cap_keeps_none(device: torch.device) -> None:
    """Its slope would be needed too."""
    hidden, weight, _, _ = make_inputs(torch.bfloat16, device)
    head = LinearHead(weight, transform=Transform.of(softcap=3.0))
    assert impl.kept_like(hidden, head, Keep(probs=True), EVERYTHING).probs is None


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("N", [1, 100, 8192, 70000])
def test_what_is_kept_stays_within_the_workspace(N: int, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl, "TILE", 128)
    monkeypatch.setattr(impl, "WHOLE", 256)
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16) for n in (N, 128256))
    for workspace in (2**22, 2**28, 3 * 2**30):
        kept = impl.kept_like(hidden, LinearHead(weight), Keep(shares=shares, probs=True), workspace)
        taken = sum(t.nbytes for t in (kept.probs, kept.factors) if t is not None)
        assert taken <= max(0, workspace - (kept.shares.nbytes if kept.shares is not None else 0))
        if kept.probs is not None:
            assert kept.probs.shape[1] >= 128256 / 16
            assert kept.probs.shape[1] <= 128256 + 255

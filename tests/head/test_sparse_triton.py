"""The sparse backward of the Triton implementation against the PyTorch one with the same cells, and float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies.rows import error, make_rows
from fastdpo.head.impl import cells, sparsity, tiles
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.impl import triton as impl
from fastdpo.head.impl.interface import Grads, Keep, LinearHead, Needs, Transform
from fastdpo.kernels import kept_probs, row_lists, sparse_dhidden, sparse_dlogits, sparse_dweight
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import linear_logprobs_forward as forward_kernel
from fastdpo.kernels.logits_tile import Config

T = 16
N, D, V, R = 50, 40, 205, 3  # ragged in every dimension
SMALL = Config(BLOCK_N=32, BLOCK_V=T, BLOCK_D=32, num_warps=4, num_stages=2)
OPTIONS = [
    pytest.param(Transform(), id="plain"),
    pytest.param(Transform.of(logit_scale=-1.2), id="scale"),
    pytest.param(Transform.of(0.7, 8.0, 0.6), id="softcap"),
]
NEEDS = [
    pytest.param(Needs(True, True, True, True, True), False, id="all-sparse"),
    pytest.param(Needs(True, True, True, True, True), True, id="weights-exact"),
    pytest.param(Needs(hidden=True, hidden2=True), True, id="frozen"),
    pytest.param(Needs(bias=True), False, id="bias"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Cells of 16 columns, two chunks of the vocabulary and several blocks of rows."""
    for module in (forward_kernel, backward_kernel, sparse_dlogits, sparse_dhidden, sparse_dweight):
        monkeypatch.setattr(module, "default_config", lambda *_: SMALL)
    for module in (impl, cells, forward_kernel, row_lists, sparse_dlogits, sparse_dhidden, sparse_dweight):
        monkeypatch.setattr(module, "TILE", T)
    monkeypatch.setattr(row_lists, "BLOCK_N", 8)
    monkeypatch.setattr(torch_impl, "CELL", T)
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (32, 64))


def make_inputs(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    rows = make_rows("sharp", N, D, V, torch.float32, device)
    hidden2, weight2, bias = torch.randn(N, R), 0.3 * torch.randn(V, R), 0.3 * torch.randn(V)
    narrow = [t.to(device, dtype) for t in (rows.hidden / 2, hidden2, rows.weight, bias, weight2)]
    return *narrow, rows.targets, rows.dlogps


def both(
    dtype: torch.dtype,
    transform: Transform,
    needs: Needs,
    exact_weight: bool,
    device: torch.device,
    workspace: int = 24_000,
) -> Any:
    """Gradients from both implementations, with the selection of the first one, and the dense one in float64."""
    hidden, hidden2, weight, bias, weight2, targets, dlogps = make_inputs(dtype, device)
    head = LinearHead(weight, bias, weight2, transform)
    keep = Keep(shares=True)
    theirs = torch_impl.forward(hidden, hidden2, targets, head, keep=keep)
    ours = impl.forward(hidden, hidden2, targets, head, keep=keep, workspace=60_000)
    assert theirs.kept.shares is not None
    assert ours.kept.shares is not None
    torch.testing.assert_close(ours.kept.shares, theirs.kept.shares, rtol=1e-2, atol=1e-6)
    threshold = torch.full_like(theirs.others, 0.02)
    threshold[3::9] = -torch.inf  # full rows
    selection = sparsity.Selection(threshold, *(torch.zeros_like(theirs.others),) * 2)
    dtarget = dlogps.to(theirs.others.dtype) * torch.sigmoid(theirs.others - theirs.target)
    dtarget[::5] = 0
    grads = Grads(dtarget, -dtarget)
    common = (hidden, hidden2, targets, head)
    shared = ours._replace(kept=theirs.kept)  # a share at the threshold must not fall on different sides of it
    a = impl.backward(grads, *common, shared, needs, selection, exact_weight, workspace)
    b = torch_impl.backward(grads, *common, theirs, needs, selection, exact_weight)
    dense = torch_impl.backward(grads, *common, theirs._replace(kept=theirs.kept._replace(shares=None)), needs)
    density = (theirs.kept.shares > 0.02).float().mean()
    assert 0.02 < density < 0.6
    return a, b, dense


@pytest.mark.parametrize(("needs", "exact_weight"), NEEDS)
@pytest.mark.parametrize("transform", OPTIONS)
def test_same_as_in_pytorch(transform: Transform, needs: Needs, exact_weight: bool, device: torch.device) -> None:
    check(torch.float64, transform, needs, exact_weight, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact_weight", [True, False], ids=["weights-exact", "all-sparse"])
def test_every_dtype(exact_weight: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(dtype, Transform.of(0.7, 8.0, 0.6), Needs(True, True, True, True, True), exact_weight, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_all_rows_in_one_block(dtype: torch.dtype, device: torch.device) -> None:
    """Then the kernel of dweight finishes it."""
    check(dtype, Transform(), Needs(True, True, True, True, True), False, device, 400_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_several_blocks_of_rows(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then sums of dweight and dbias go from block to block, and the last one finishes them."""
    slices = tiles.slices
    monkeypatch.setattr(cells, "slices", lambda total, size: slices(total, 20 if size >= 256 else size))
    width = (D + R) * (8 if dtype == torch.float64 else 4)
    workspace = 9000 if dtype == torch.float64 else 3000
    rows, _ = cells._block_shape(N, V, width, dtype.itemsize, workspace - workspace // 4)
    assert rows < N
    check(dtype, Transform(), Needs(True, True, True, True, True), False, device, workspace)


def test_lists_and_kept_probabilities_together(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks of what was kept begin in the middle of the vocabulary, and so do their lists."""
    monkeypatch.setattr(kept_probs, "TILE", T)
    for module in (impl, forward_kernel):
        monkeypatch.setattr(module, "WHOLE", 4 * T)
    hidden, hidden2, weight, bias, weight2, targets, dlogps = make_inputs(torch.float32, device)
    common = (hidden, hidden2, targets, LinearHead(weight, bias, weight2, Transform(-1.2)))
    workspace = 4 * N * (-(-V // T) + 8 * T + 8)  # for the shares, and for 8 tiles with their factors
    result = impl.forward(*common, keep=Keep(shares=True, probs=True), workspace=workspace)
    assert result.kept.probs is not None
    assert result.kept.probs.shape[1] == 8 * T
    threshold = torch.full_like(result.others, 0.02)
    threshold[3::9] = -torch.inf  # full rows
    selection = sparsity.Selection(threshold, *(torch.zeros_like(threshold),) * 2)
    dtarget = dlogps * torch.sigmoid(result.others - result.target)
    needs = Needs(True, True, True, True, True)
    recomputed = result._replace(kept=result.kept._replace(probs=None, factors=None))
    ours, theirs = (
        impl.backward(Grads(dtarget, -dtarget), *common, each, needs, selection, True, 9000)
        for each in (result, recomputed)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check(
    dtype: torch.dtype,
    transform: Transform,
    needs: Needs,
    exact_weight: bool,
    device: torch.device,
    workspace: int = 24_000,
) -> None:
    ours, theirs, dense = both(dtype, transform, needs, exact_weight, device, workspace)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for name, needed, a, b, c in zip(Needs._fields, needs, ours, theirs, dense, strict=True):
        assert (a is not None) == needed
        if a is not None:
            assert a.dtype == dtype
            assert error(a, b.double()) <= tolerance, name
            if "weight" in name or name == "bias":
                assert (error(b, c.double()) <= tolerance) == exact_weight, f"{name}: {error(b, c.double())}"
            else:
                assert error(b, c.double()) > tolerance, "nothing was skipped"


def test_rows_without_upstream_gradient(device: torch.device) -> None:
    dhidden = both(torch.float32, Transform(), Needs(hidden=True), True, device)[0][0]
    assert not dhidden[::5].any()


def test_bitwise_repeatable(device: torch.device) -> None:
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(both(torch.bfloat16, Transform(), Needs(True, True, True, True, True), False, device)[0])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_shares_add_up_to_one(device: torch.device) -> None:
    hidden, hidden2, weight, bias, weight2, targets, _ = make_inputs(torch.float32, device)
    head = LinearHead(weight, bias, weight2)
    result = impl.forward(hidden, hidden2, targets, head, keep=Keep(shares=True), workspace=4 * 13 * 7 * 2)
    assert result.kept.shares is not None
    torch.testing.assert_close(result.kept.shares.sum(1), torch.ones(N, device=device))
    whole = impl.forward(hidden, hidden2, targets, head, stats=True, keep=Keep(shares=True))
    assert torch.equal(whole.target, result.target)
    torch.testing.assert_close(whole.others, result.others)


def test_the_last_cell_is_smaller(device: torch.device) -> None:
    """Means and spread of the ragged cell are over what it has."""
    weight = torch.randn(V, D, device=device)
    means = tiles.cell_means(weight, T, torch.float32)
    torch.testing.assert_close(means[-1], weight[V // T * T :].mean(0))
    sums: Tensor = tiles.cell_sums(weight.T, T)
    torch.testing.assert_close(sums[:, -1], weight[V // T * T :].sum(0))

"""What a backward that skips cells may cost, and that the matmuls it promises to spare are spared."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.studies.rows import KINDS, Exact, Rows, error, exact, make_rows
from fastdpo.head import eager, op
from fastdpo.head import linear_logprobs as linear_logprobs_module
from fastdpo.head.impl import sparsity
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats

N, D, V = 192, 256, 16384 + 40  # the last cell is ragged


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rows(kind: str) -> Rows:
    torch.manual_seed(0)
    return make_rows(kind, N, D, V, torch.bfloat16, torch.device("cpu"))


@pytest.fixture(scope="module")
def true(rows: Rows) -> Exact:
    return exact(rows)


def grads(rows: Rows, backward: Any, *, frozen: bool = False, impl: Any = "torch") -> tuple[Tensor, ...]:
    hidden, weight = rows.hidden.detach().requires_grad_(), rows.weight.detach().requires_grad_(not frozen)
    logps = linear_logprobs(hidden, weight, rows.targets, impl=impl, backward=backward)
    return torch.autograd.grad(logps, [hidden] if frozen else [hidden, weight], rows.dlogps)


def radius(rows: Rows) -> float:
    """Largest distance of an embedding from the mean of its tile."""
    tiles = rows.weight.double().split(torch_impl.CELL)
    return max(float((tile - tile.mean(0)).norm(dim=1).max()) for tile in tiles)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("backward", ["auto", "sparse"])
def test_dhidden_is_better_than_from_bfloat16_logits(backward: str, frozen: bool, rows: Rows, true: Exact) -> None:
    hidden = rows.hidden.detach().requires_grad_()
    logps = F.linear(hidden, rows.weight).float().log_softmax(-1).gather(1, rows.targets[:, None]).squeeze(1)
    (theirs,) = torch.autograd.grad(logps, hidden, rows.dlogps)
    ours = grads(rows, backward, frozen=frozen)[0]
    assert error(ours, true.dhidden) <= error(theirs, true.dhidden) * 1.02  # where both do nothing but round


@pytest.mark.parametrize("backward", ["auto", "sparse"])
def test_the_bound_holds(backward: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where so many cells are active that all would be computed."""
    monkeypatch.setattr(sparsity, "DENSE", 1.0)
    rows = rows._replace(dlogps=rows.dlogps.sign())  # what is reported is for gradients of one size
    true = exact(rows)
    hidden = rows.hidden.detach().requires_grad_()
    _, stats = linear_logprobs_with_stats(hidden, rows.weight, rows.targets, impl="torch", backward=backward)
    assert stats.bound is not None
    bound = radius(rows) * float(stats.bound.norm()) / float(true.dhidden.norm())
    rounding = error(true.dhidden.bfloat16(), true.dhidden)
    assert error(grads(rows, backward, frozen=True)[0], true.dhidden) <= bound + 1.1 * rounding


def test_the_error_is_small_beside_the_gradient(rows: Rows, true: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """However confident the rows are, and however their gradients differ in size: the promise of `sparsity`."""
    monkeypatch.setattr(sparsity, "DENSE", 1.0)
    dlogps = rows.dlogps.pow(5)
    rows = rows._replace(hidden=rows.hidden.float(), weight=rows.weight.float(), dlogps=dlogps)
    error = (grads(rows, "sparse", frozen=True)[0].double() - exact(rows).dhidden).norm()
    size = (dlogps * true.logps.expm1()).norm()
    assert error <= (sparsity.MAX_ROW_MASS * radius(rows) + 1e-5) * size


def test_small_gradients_are_as_exact_as_large_ones(rows: Rows) -> None:
    small = grads(rows._replace(dlogps=2.0**-30 * rows.dlogps), "sparse")
    sparsity._densities.clear()
    for ours, large in zip(small, grads(rows, "sparse"), strict=True):
        assert torch.equal(2.0**30 * ours, large)


def test_a_row_that_is_not_a_number_changes_no_other(rows: Rows) -> None:
    without, with_nan = rows.dlogps.clone(), rows.dlogps.clone()
    without[3], with_nan[3] = 0, torch.nan
    ours = grads(rows._replace(dlogps=with_nan), "sparse", frozen=True)[0]
    sparsity._densities.clear()
    theirs = grads(rows._replace(dlogps=without), "sparse", frozen=True)[0]
    assert ours[3].isnan().all()
    ours[3] = theirs[3]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_peaked_rows_are_sparse_and_flat_ones_are_not(frozen: bool, kind: str, rows: Rows) -> None:
    grads(rows, "sparse", frozen=frozen)
    density = float(sparsity._densities[op.density_key(rows.hidden, rows.weight)][-1].found[0])
    assert {"flat": density >= 0.9, "peaked": density >= 0.1}.get(kind, 0.01 < density < 0.25), density


def test_auto_leaves_dweight_alone(rows: Rows, true: Exact) -> None:
    auto, dense = grads(rows, "auto")[1], grads(rows, "exact")[1]
    assert torch.equal(auto, dense)
    assert error(dense, true.dweight) <= 2.5e-3
    seen = torch.zeros(V, dtype=torch.bool)
    seen[rows.targets] = True
    norms = true.dweight.norm(dim=1)
    errors = (dense.double() - true.dweight).norm(dim=1) / norms
    assert errors[~seen].max() <= 2e-2


def test_sparse_dweight(rows: Rows, true: Exact) -> None:
    dweight = grads(rows._replace(hidden=rows.hidden.float(), weight=rows.weight.float()), "sparse")[1]
    assert error(dweight, true.dweight) <= 5e-3
    T = torch_impl.CELL
    tiles = F.pad(true.dweight, (0, 0, 0, -V % T)).unflatten(0, (-1, T)).sum(1)
    ours = F.pad(dweight.double(), (0, 0, 0, -V % T)).unflatten(0, (-1, T)).sum(1)
    assert error(ours, tiles) <= 1e-5
    worst = (ours - tiles).norm(dim=1) / tiles.norm(dim=1)
    assert worst.max() <= 1e-3, "a tile does not sum to what it should"


def test_mass_is_conserved(rows: Rows) -> None:
    """A direction common to all embeddings must not be felt: dz sums to zero over the vocabulary."""
    common = F.normalize(torch.randn(D), dim=0)
    rows = rows._replace(hidden=rows.hidden.float(), weight=rows.weight.float())
    plain = grads(rows, "sparse", frozen=True)[0]
    hidden, weight = rows.hidden, rows.weight + 10 * common  # shifts all logits of a row alike
    shifted = grads(rows._replace(hidden=hidden, weight=weight), "sparse", frozen=True)[0]
    assert error(shifted, plain.double()) <= 1e-4


def test_the_order_of_the_rows_does_not_matter(rows: Rows) -> None:
    order = torch.randperm(N)
    shuffled = Rows(rows.hidden[order], rows.weight, rows.targets[order], rows.dlogps[order])
    ours, theirs = grads(shuffled, "sparse", frozen=True)[0], grads(rows, "sparse", frozen=True)[0][order]
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4)


def test_sparse_is_honoured_in_every_dtype(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        rows = make_rows("sharp", 64, 256, 8192, dtype, device)
        true = exact(rows)
        exact_error = error(grads(rows, "exact")[0], true.dhidden)
        assert exact_error < 1e-3
        assert error(grads(rows, "auto")[0], true.dhidden) < (1e-3 if dtype.itemsize > 2 else 5e-3)
        assert exact_error < error(grads(rows, "sparse")[0], true.dhidden) < 1e-2


OPTIONS: list[Any] = [
    pytest.param({"softcap": 20.0}, id="softcap"),
    pytest.param({"logit_scale": 0.5, "temperature": 0.5, "softcap": 20.0}, id="transform"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backward", ["auto", "sparse"])
def test_sparse_with_every_option(backward: Any, options: dict[str, Any], device: torch.device) -> None:
    """Bias and low-rank part included; the last gradient sums are checked against float64 autograd."""
    rows = make_rows("peaked", 100, 128, 5000, torch.float32, device)
    bias, hidden2, weight2 = 0.1 * torch.randn(5000), torch.randn(100, 5), 0.1 * torch.randn(5000, 5)
    leaves = [t.to(device).requires_grad_() for t in (rows.hidden, rows.weight, bias, hidden2, weight2)]
    h, w, b, h2, w2 = leaves
    logps = linear_logprobs(h, w, rows.targets, b, low_rank=(h2, w2), impl="torch", backward=backward, **options)
    ours = torch.autograd.grad(logps, leaves, rows.dlogps)
    H, W, B, H2, W2 = wide = [t.detach().double().requires_grad_() for t in leaves]
    true, _, _ = eager.linear_logprobs(torch.cat([H, H2], 1), torch.cat([W, W2], 1), rows.targets, B, **options)
    exact_grads = torch.autograd.grad(true, wide, rows.dlogps.double())
    for name, actual, expected in zip(("h", "w", "b", "h2", "w2"), ours, exact_grads, strict=True):
        assert error(actual, expected) <= (1e-5 if backward == "auto" else 6e-3), name


def test_flat_rows_get_the_dense_gradient(device: torch.device) -> None:
    rows = make_rows("flat", 64, 64, 2000, torch.float32, device)
    for ours, dense in zip(grads(rows, "sparse"), grads(rows, "exact"), strict=True):
        torch.testing.assert_close(ours, dense)


def test_rows_without_upstream_gradient_cost_nothing(device: torch.device) -> None:
    rows = make_rows("sharp", 64, 64, 4096, torch.float32, device)
    dlogps = rows.dlogps.clone()
    dlogps[::2] = 0
    dhidden, dweight = grads(rows._replace(dlogps=dlogps), "sparse")
    assert not dhidden[::2].any()
    some = Rows(rows.hidden[1::2], rows.weight, rows.targets[1::2], dlogps[1::2])
    torch.testing.assert_close(dweight, grads(some, "sparse")[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_auto_chooses_cells_for_16_bits_alone(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    select = sparsity.select
    monkeypatch.setattr(sparsity, "select", lambda *args: chosen.append(dtype) or select(*args))
    grads(make_rows("peaked", 21, 16, 333, dtype, device), "auto")
    assert bool(chosen) == (dtype == torch.bfloat16)


def test_the_bound_is_the_mass_that_is_skipped(device: torch.device) -> None:
    """The largest threshold that a row can do with, and still skip no more than it may."""
    shares = torch.rand(8, 4000, device=device)
    shares[::2] **= 8
    shares[1::2, 40:] *= 1e-4
    shares /= shares.sum(1, keepdim=True)
    weight = torch.tensor([-1.0, 1.0, 0.5, 0.5, 0.1, 0.1, 1e-3, 1e-3], device=device)
    every = torch.ones(8, dtype=torch.bool, device=device)
    nowhere = torch.full((8,), -1, device=device)
    row, cell = 2**-4, 2**-9
    threshold, bound, density, _ = sparsity.select(shares, weight, row, cell)
    scale = weight.square().mean().sqrt()
    mass = shares * weight.abs()[:, None]
    active = sparsity.active_cells(shares, threshold, nowhere, every)
    skipped = mass.masked_fill(active, 0)
    torch.testing.assert_close(bound, skipped.sum(1))
    torch.testing.assert_close(density, active.float().mean(1))
    assert bound.max() <= row * scale
    assert skipped.max() <= cell * scale
    assert not active[6:].any(), "all that is left may be skipped"
    more = mass.masked_fill(sparsity.active_cells(shares, 1.42 * threshold, nowhere, every), 0)
    larger = (more.sum(1) > row * scale) | (1.42 * threshold * weight.abs() > cell * scale)
    assert larger.all(), "a larger threshold would have done"
    assert larger[:6].any()
    assert 0 < (bound[:6] > 0.5 * row * scale).sum() < 6, "some rows stop at the sum, others at the cell"
    assert not sparsity.active_cells(shares, threshold, nowhere, ~every).any(), "no gradient, nothing to compute"


def test_bitwise_repeatable(rows: Rows) -> None:
    first = grads(rows, "sparse")
    for _ in range(2):
        sparsity._densities.clear()
        assert all(torch.equal(a, b) for a, b in zip(first, grads(rows, "sparse"), strict=True))


def test_a_dense_head_is_remembered_and_tried_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows("flat", 16, 64, 2000, torch.bfloat16, device)
    key = op.density_key(rows.hidden, rows.weight)
    monkeypatch.setattr(sparsity, "RETRY", 3)
    assert not sparsity.expect_dense(key)
    grads(rows, "auto", frozen=True)
    assert [sparsity.expect_dense(key) for _ in range(6)] == [True, True, False, True, True, False]


def test_sparse_that_computes_all_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sparsity, "expect_dense", lambda *_: True)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(32, 8)
    said = []
    for backward in ("auto", "sparse", "sparse"):
        linear_logprobs_module._say_dense.cache_clear() if backward == "auto" else None
        with caplog.at_level("INFO", "fastdpo"):
            linear_logprobs(hidden, weight, torch.arange(4), backward=backward)
        said.append(len(caplog.records))
    assert said == [0, 1, 1]
    assert "head_backward='sparse' computes all of them" in caplog.text


def test_a_device_is_asked_about_the_last_but_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has long finished that one; the newest would have to be waited for."""
    monkeypatch.setattr(sparsity, "chip_of", lambda device: sparsity.CHIPS[9, 0])

    class Event:
        asked = 0

        def synchronize(self) -> None:
            self.asked += 1

    key = (torch.device("cuda:0"), torch.bfloat16, (10, 10))
    events = [Event() for _ in range(3)]
    for density, event in zip((0.1, 0.9, 0.1), events, strict=True):
        sparsity._note(key, sparsity.Noted(torch.tensor([density, density, 0.0]), event))
        assert event is events[2] or not sparsity.expect_dense(key), "nothing is known yet, or that it is sparse"
    for event in events:
        event.asked = 0
    assert sparsity.expect_dense(key)
    assert [event.asked for event in events] == [0, 1, 0]
    assert len(sparsity._densities[key]) == 2


@pytest.mark.parametrize("capability", sparsity.CHIPS)
def test_a_chip_takes_the_dense_backward_where_it_is_faster(capability: tuple[int, int]) -> None:
    """A block is dense from the share of active rows on at which lists take as long; the time grows with the cells."""
    chip = sparsity.CHIPS[capability]
    frozen, auto, sparse = (False, True), (True, True), (True, False)
    for gradients in (frozen, auto, sparse):
        times = [sparsity.relative_time(chip, d, 0.8 * d, 0.2 * d, *gradients) for d in (0, 0.1, 0.5, 1)]
        assert times == sorted(times)
        waits_for_cache = capability == (10, 0) and gradients == frozen  # in the forward already
        assert (times[0] < 1) != waits_for_cache
        assert times[-1] > 1
    share = sparsity.dense_block(chip)
    by_lists = sparsity.relative_time(chip, 0.4, 0.0, 0.4, *frozen)
    by_blocks = sparsity.relative_time(chip, 0.4, 0.4 / share, 0.0, *frozen)
    assert by_lists == pytest.approx(by_blocks, rel=0.1)
    assert sparsity.relative_time(chip, 0.1, 0.0, 0.1, *auto) > sparsity.relative_time(chip, 0.1, 0.1, 0.0, *auto)
    assert sparsity.relative_time(chip, 0.1, 0.1, 0.0, *frozen) > sparsity.relative_time(chip, 0.1, 0.1, 0.0, *auto)


# --- units ---


class CountFlops(TorchDispatchMode):
    """Counts the matmuls in it, also inside fastdpo's ops."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastdpo":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        aten = torch.ops.aten  # below autograd, matmul has not become mm
        packet = {aten.addmm_: aten.addmm, aten.matmul: aten.mm}.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def units(rows: Rows, backward: Any, *, frozen: bool, workspace: int = 2**28) -> float:
    """Matmuls of a forward and backward, in units of 2 N D V."""
    hidden, weight = rows.hidden.detach().requires_grad_(), rows.weight.detach().requires_grad_(not frozen)
    with CountFlops() as counter:
        linear_logprobs(
            hidden, weight, rows.targets, impl="torch", backward=backward, workspace_bytes=workspace
        ).backward(rows.dlogps)
    return counter.flops / (2 * hidden.numel() * weight.shape[0])


@pytest.fixture
def sharp() -> Rows:
    return make_rows("sharp", 512, 256, 16384, torch.bfloat16, torch.device("cpu"))


def test_units_of_the_exact_backward(sharp: Rows) -> None:
    """Frozen 2; trained 3 where all probabilities fit into the workspace, 4 less the share that fits where not."""
    assert units(sharp, "exact", frozen=True) == pytest.approx(2)
    assert units(sharp, "exact", frozen=False) == pytest.approx(3)
    assert units(sharp, "exact", frozen=False, workspace=17 * 2**20) == pytest.approx(3.5)  # 8.5 MiB are a tile


@pytest.mark.parametrize(
    ("backward", "frozen", "formula"),
    [
        pytest.param("auto", True, lambda rho, T: 1 + 2 * rho + 1 / T, id="auto-frozen"),
        pytest.param("auto", False, lambda rho, T: 2 + rho + 1 / T, id="auto-trained"),
        pytest.param("sparse", True, lambda rho, T: 1 + 2 * rho + 1 / T, id="sparse-frozen"),
        pytest.param("sparse", False, lambda rho, T: 1 + 3 * rho + 2 / T, id="sparse-trained"),
    ],
)
def test_units_of_the_sparse_backward(backward: str, frozen: bool, formula: Any, sharp: Rows) -> None:
    """rho is what the op reports, and the cells of the targets where they are no others."""
    actual = units(sharp, backward, frozen=frozen)
    rho = float(sparsity._densities[op.density_key(sharp.hidden, sharp.weight)][-1].found[0])
    assert 0.01 < rho < sparsity.DENSE
    assert actual == pytest.approx(formula(rho, torch_impl.CELL), rel=0.02)

"""The op in plain PyTorch, against float64 and against eager PyTorch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.head import eager, op
from fastdpo.head.eager import Stats
from fastdpo.head.impl import torch as impl
from fastdpo.head.impl.interface import Keep, LinearHead
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
from tests.helpers.accuracy import assert_as_accurate


class Options(NamedTuple):
    """The transform."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Inputs(NamedTuple):
    """The tensors, as both functions take them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None


class Results(NamedTuple):
    """All there is to compute."""

    logps: Tensor
    stats: Stats
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor | None


PLAIN = Options()
ALL = Options(logit_scale=1.7, softcap=5.0, temperature=0.6)


def make_inputs(
    N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, *, std: float = 2.0, bias: bool = False
) -> Inputs:
    """Logits of about this standard deviation; targets are the first maximum in every other row."""
    hidden = std * torch.randn(N, D)
    weight = torch.randn(V, D) / math.sqrt(D)
    targets = torch.randint(V, (N,))
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    b = torch.randn(V).to(device, dtype) if bias else None
    return Inputs(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), b)


def logps_of(inputs: Inputs, options: Options = PLAIN) -> Tensor:
    return linear_logprobs(*inputs, **options._asdict(), impl="torch")


def ours(inputs: Inputs, options: Options, dlogps: Tensor, backward: Any = "exact") -> Results:
    inputs = Inputs(*(t if t is None or t is inputs.targets else t.detach().requires_grad_() for t in inputs))
    logps, stats = linear_logprobs_with_stats(*inputs, **options._asdict(), impl="torch", backward=backward)
    leaves = [t for t in (inputs.hidden, inputs.weight, inputs.bias) if t is not None]
    grads = torch.autograd.grad(logps, leaves, dlogps.to(logps.dtype))
    stats = Stats(*(t if t is None else t.detach() for t in stats))
    return Results(logps.detach(), stats, *grads, *([None] if inputs.bias is None else []))


def theirs(inputs: Inputs, options: Options, dlogps: Tensor, dtype: torch.dtype) -> Results:
    """Eager PyTorch in `dtype`."""
    inputs = Inputs(*(t if t is inputs.targets or t is None else t.to(dtype).requires_grad_() for t in inputs))
    logps, _, stats = eager.linear_logprobs(*inputs, *options, stats=True)
    assert stats is not None
    hidden, weight, targets, bias = inputs
    wrt = [t for t in (hidden, weight, bias) if t is not None]
    # of the two ways to write it, the one whose backward starts from lse, rounded, as ours must
    logits = eager.transform_logits(F.linear(hidden, weight, bias), *options)
    difference = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
    grads = torch.autograd.grad(difference, wrt, dlogps.to(dtype))
    return Results(logps, stats, *grads, *([None] if bias is None else []))


def check(inputs: Inputs, options: Options = PLAIN, grad_slack: float = 2.0) -> None:
    """Compare everything. For narrow inputs, eager PyTorch computes in float32 and rounds its gradients as we do."""
    dtype = inputs.hidden.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slack = 2.0
    if dtype == torch.float64:
        slack = grad_slack = 100.0  # nothing is more exact than float64
    dlogps = torch.randn(inputs.targets.shape, dtype=wide, device=inputs.hidden.device)
    results = (ours(inputs, options, dlogps), *(theirs(inputs, options, dlogps, t) for t in (wide, torch.float64)))
    assert results[0].logps.dtype == wide
    assert_as_accurate(*(r.logps for r in results), "logps", slack)
    for name in ("dhidden", "dweight") + ("dbias",) * (inputs.bias is not None):
        actual, same_dtype, exact = (getattr(r, name) for r in results)
        assert actual.dtype == dtype
        assert_as_accurate(actual, same_dtype.to(dtype), exact, name, grad_slack)
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        actual, same_dtype, exact = (getattr(r.stats, name) for r in results)
        assert_as_accurate(actual, same_dtype, exact, name, slack)
    assert torch.equal(results[0].stats.is_top1, results[2].stats.is_top1)


@pytest.fixture
def set_tile(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[int, int], None]:
    return lambda rows, cols: monkeypatch.setitem(impl.TILE_SHAPE, device.type, (rows, cols))


SHAPES = [
    pytest.param(5, 16, 50, (8, 64), id="one-tile"),
    pytest.param(37, 24, 203, (16, 64), id="ragged-tiles"),
    pytest.param(32, 16, 128, (16, 64), id="aligned-tiles"),
    pytest.param(33, 16, 129, (16, 64), id="last-tile-of-one"),
    pytest.param(3, 16, 2, (1, 1), id="tiles-of-one"),
    pytest.param(1, 16, 203, (16, 64), id="one-row"),
    pytest.param(127, 8, 50, (16, 64), id="many-rows"),
    pytest.param(2049, 4, 50, (1024, 1024), id="default-tiles"),
    pytest.param(4, 16, 1, (16, 64), id="one-token"),
]
OPTIONS = [
    pytest.param(PLAIN, False, id="plain"),
    pytest.param(PLAIN, True, id="bias"),
    pytest.param(ALL, True, id="all-options"),
    pytest.param(Options(logit_scale=-0.5), False, id="negative-scale"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D", "V", "tile"), SHAPES)
def test_every_shape(
    N: int, D: int, V: int, tile: Any, dtype: torch.dtype, device: torch.device, set_tile: Any
) -> None:
    set_tile(*tile)
    check(make_inputs(N, D, V, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "bias"), OPTIONS)
def test_every_option(options: Options, bias: bool, dtype: torch.dtype, device: torch.device, set_tile: Any) -> None:
    set_tile(16, 64)
    check(make_inputs(37, 24, 203, dtype, device, bias=bias), options)


@pytest.mark.parametrize("offset", [100.0, -100.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_common_offset(offset: float, dtype: torch.dtype, device: torch.device, set_tile: Any) -> None:
    """All logits near +100, or all below -80: exp is no float32. At 100 lse is known to 4e-6, and therefore p."""
    set_tile(16, 64)
    hidden, weight, targets, _ = make_inputs(37, 24, 203, dtype, device)
    bias = torch.full((203,), offset, device=device, dtype=dtype)
    # at -1000 the log-sum-exp is a multiple of 2^-14: every p of the row is off by up to 3e-5, and all alike
    check(Inputs(hidden, weight, targets, bias), grad_slack=12.0 if offset == -1000 else 8.0)


def test_a_tile_far_above_the_ones_before(device: torch.device, set_tile: Any) -> None:
    """The running maximum rises by 200 nats between two tiles, and falls by as much after."""
    set_tile(16, 64)
    hidden, weight, targets, _ = make_inputs(37, 24, 203, torch.float32, device)
    bias = torch.zeros(203, device=device)
    bias[64:128] = 200.0
    check(Inputs(hidden, weight, targets, bias))


def test_no_rows(device: torch.device, set_tile: Any) -> None:
    set_tile(16, 64)
    inputs = make_inputs(0, 8, 100, torch.bfloat16, device, bias=True)
    result = ours(inputs, ALL, torch.empty(0, device=device))
    assert [t.shape for t in (result.logps, *result.stats[:4])] == [(0,)] * 5
    assert result.dhidden.shape == (0, 8)
    assert not result.dweight.any()
    assert result.dbias is not None
    assert not result.dbias.any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.5e-3), (torch.float32, 1e-5)], ids=str)
def test_keeps_the_promised_precision(dtype: torch.dtype, bound: float, device: torch.device, set_tile: Any) -> None:
    """The bars are absolute: PyTorch's own bfloat16 logits are an order of magnitude off."""
    set_tile(256, 256)
    inputs = make_inputs(512, 64, 1003, dtype, device, std=5.0)
    dlogps = torch.randn(512, device=device)
    actual = ours(inputs, PLAIN, dlogps)
    exact = theirs(inputs, PLAIN, dlogps, torch.float64)
    if dtype == torch.bfloat16:
        error = (actual.logps - exact.logps).abs()
        assert error.max() <= 2e-3
        assert error.square().mean().sqrt() <= 5e-4
    for name in ("dhidden", "dweight"):
        a, e = getattr(actual, name).double(), getattr(exact, name)
        assert (a - e).norm() <= bound * e.norm()


def test_sum_over_a_long_sequence(device: torch.device) -> None:
    inputs = make_inputs(4096, 16, 300, torch.bfloat16, device, std=5.0)
    logps = logps_of(inputs)
    exact, _, _ = eager.linear_logprobs(*(t if t is None or t is inputs.targets else t.double() for t in inputs))
    assert (logps.double().sum() - exact.sum()).abs() <= 5e-2


def test_log_probabilities_are_never_above_zero(device: torch.device, set_tile: Any) -> None:
    set_tile(64, 16)
    inputs = make_inputs(512, 16, 50, torch.bfloat16, device, std=40.0)
    logps = logps_of(inputs)
    assert (logps <= 0).all()
    assert (logps > -1e-12).any(), "no row was confident enough to tell"


def confident(offset: float, device: torch.device) -> tuple[Inputs, float]:
    """One row whose target has p = 0.999999, its logit at `offset`; also the exact 1 - p."""
    V, target = 300, 77
    others = offset - math.log((V - 1) * 0.999999 / 1e-6)
    weight = torch.full((V, 1), others, device=device)
    weight[target] = offset
    z = weight[:, 0].double()
    rest = (z - z[target]).exp().sum() - 1
    inputs = Inputs(torch.ones(1, 1, device=device), weight, torch.tensor([target], device=device), None)
    return inputs, float(rest / (1 + rest))


@pytest.mark.parametrize("offset", [0.0, 20.0, -100.0])
@pytest.mark.parametrize("cols", [1024, 64], ids=["one-tile", "five-tiles"])
def test_confident_target_has_its_log_probability(
    offset: float, cols: int, device: torch.device, set_tile: Any
) -> None:
    set_tile(16, cols)
    inputs, rest = confident(offset, device)
    logps = logps_of(inputs)
    assert logps.item() == pytest.approx(math.log1p(-rest), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 20.0, -100.0])
def test_confident_target_has_its_gradient(offset: float, device: torch.device) -> None:
    """1 - p is 1e-6, where 1 - float32(p) is 6 % off, p from lse at 20 or -100 useless, and bfloat16(p) = 1."""
    inputs, rest = confident(offset, device)
    dweight = ours(inputs, PLAIN, torch.ones(1, device=device)).dweight
    assert dweight[77].item() == pytest.approx(rest, rel=1e-2)


def test_first_of_equal_maxima_is_the_top_one(device: torch.device, set_tile: Any) -> None:
    set_tile(2, 64)
    weight = torch.zeros(200, 1, device=device)
    weight[[3, 5, 150]] = 2.0
    targets = torch.tensor([3, 5, 150, 7], device=device)
    stats = ours(Inputs(torch.ones(4, 1, device=device), weight, targets, None), PLAIN, torch.ones(4)).stats
    assert stats.is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("target", [-1, 100, 2**32 + 3])
def test_target_outside_the_vocabulary_is_nan(
    target: int, device: torch.device, set_tile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA cannot be asked without waiting: the row must not look like a number, the others must not notice."""
    set_tile(2, 64)
    monkeypatch.setattr(op, "check_targets", lambda targets, V: None)  # as on CUDA
    inputs = make_inputs(6, 8, 100, torch.float32, device, bias=True)
    targets = inputs.targets.clone()
    targets[4] = target
    good, bad = (ours(i, PLAIN, torch.ones(6)) for i in (inputs, inputs._replace(targets=targets)))
    assert bad.dbias is not None
    assert bad.logps.isnan().tolist() == [False] * 4 + [True, False]
    assert bad.dhidden.isnan().all(1).tolist() == [False] * 4 + [True, False]
    assert bad.dweight.isnan().all()
    assert bad.dbias.isnan().all()
    others = torch.arange(6, device=device) != 4
    assert torch.equal(bad.logps[others], good.logps[others])


def test_rows_without_upstream_gradient_have_none(device: torch.device) -> None:
    inputs = make_inputs(9, 8, 50, torch.float32, device)
    dlogps = torch.randn(9, device=device)
    dlogps[::2] = 0
    result = ours(inputs, PLAIN, dlogps)
    kept = Inputs(inputs.hidden[1::2], inputs.weight, inputs.targets[1::2], None)
    assert not result.dhidden[::2].any()
    torch.testing.assert_close(result.dweight, ours(kept, PLAIN, dlogps[1::2]).dweight)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_computes_only_the_gradients_asked_for(
    needs: tuple[bool, bool, bool], device: torch.device, set_tile: Any
) -> None:
    set_tile(4, 64)
    inputs = make_inputs(9, 8, 203, torch.float32, device, bias=True)
    dlogps = torch.randn(9, device=device)
    every = ours(inputs, PLAIN, dlogps)
    leaves = [inputs.hidden, inputs.weight, inputs.bias]
    wanted = [leaf.requires_grad_() for leaf, needed in zip(leaves, needs, strict=True) if needed and leaf is not None]
    some = torch.autograd.grad(linear_logprobs(*inputs, impl="torch", backward="exact"), wanted, dlogps)
    full = [grad for grad, needed in zip(every[2:], needs, strict=True) if needed]
    for a, e in zip(some, full, strict=True):
        torch.testing.assert_close(a, e)  # with a frozen head, by another algorithm


def strided(t: Tensor) -> Tensor:
    """The same values, two elements apart in both dimensions and stored column by column."""
    wide = torch.full([2 * n for n in reversed(t.shape)], math.nan, device=t.device).to(t.dtype)
    view = wide.permute(*reversed(range(t.ndim)))[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype, device: torch.device, set_tile: Any) -> None:
    set_tile(16, 64)
    hidden, weight, targets, bias = make_inputs(37, 24, 203, dtype, device, bias=True)
    assert bias is not None
    spaced_targets = torch.stack([targets, targets.new_full((37,), -1)], 1)[:, 0]
    check(Inputs(strided(hidden), strided(weight), spaced_targets, strided(bias)))


def test_three_runs_give_the_same_bits(device: torch.device, set_tile: Any) -> None:
    set_tile(16, 64)
    inputs = make_inputs(100, 24, 203, torch.float32, device, bias=True)
    dlogps = torch.randn(100, device=device)
    first, *others = (ours(inputs, ALL, dlogps) for _ in range(3))
    for other in others:
        for name in ("logps", "dhidden", "dweight", "dbias"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("tile", [(16, 64), (7, 33), (1, 203)], ids=str)
def test_log_probabilities_do_not_depend_on_the_tiles(
    tile: tuple[int, int], device: torch.device, set_tile: Any
) -> None:
    inputs = make_inputs(100, 24, 203, torch.float32, device, std=1.0)
    whole = logps_of(inputs)
    set_tile(*tile)
    tiled = logps_of(inputs)
    assert (whole - tiled).abs().max() <= 1e-6


def test_log_probabilities_do_not_depend_on_the_other_rows(device: torch.device) -> None:
    hidden, weight, targets, _ = make_inputs(100, 24, 203, torch.float32, device, std=1.0)
    together = logps_of(Inputs(hidden, weight, targets, None))
    for rows in (slice(0, 1), slice(40, 57)):
        alone = logps_of(Inputs(hidden[rows], weight, targets[rows], None))
        assert (together[rows] - alone).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mib", [256, 128])
def test_tiles_stay_within_the_workspace(mib: int, dtype: torch.dtype, device: torch.device) -> None:
    """At the largest head there is: a tile and two more; rows of hidden, a slice of weight and of dweight."""
    D, V = 16384, 262144
    hidden = torch.empty(65536, D, dtype=dtype, device="meta")
    rows, cols = impl._tile_shape(hidden, LinearHead(torch.empty(V, D, dtype=dtype, device="meta")), mib * 2**20)
    size = 8 if dtype == torch.float64 else 4
    assert size * (3 * rows * cols + rows * D + 2 * cols * D) <= mib * 2**20
    assert rows >= 256
    assert cols >= (64 if dtype == torch.float64 and mib == 128 else 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shares", [True, False], ids=["sparse", "dense"])
def test_what_is_kept_stays_within_the_workspace(shares: bool, dtype: torch.dtype) -> None:
    """Probabilities fill what a tile and the shares leave, in whole columns of tiles."""
    N, D, V, workspace = 4096, 1024, 128256, 256 * 2**20
    hidden, weight = (torch.empty(n, D, dtype=dtype, device="meta") for n in (N, V))
    head = LinearHead(weight)
    kept = impl.kept_like(hidden, head, Keep(shares=shares, probs=True), workspace)
    rows, cols = impl._tile_shape(hidden, head, workspace)
    taken = sum(t.nbytes for t in (kept.shares, kept.probs) if t is not None)
    taken += impl._tile_bytes(rows, cols, head, torch.float32)
    assert workspace - 2 * N * cols * dtype.itemsize < taken <= workspace  # the last tile is smaller


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_is_float32_whatever_the_global_setting(precision: str, device: torch.device) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    inputs = make_inputs(512, 256, 1000, torch.float32, device)
    expected = ours(inputs, PLAIN, torch.ones(512, device=device))
    try:
        torch.set_float32_matmul_precision(precision)
        chosen = [backend.fp32_precision for backend in backends]
        actual = ours(inputs, PLAIN, torch.ones(512, device=device))
        assert [backend.fp32_precision for backend in backends] == chosen
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual.logps, expected.logps)
    assert torch.equal(actual.dweight, expected.dweight)

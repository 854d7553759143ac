"""fastdpo.head.impl.triton against fastdpo.head.eager in float64: in Triton's interpreter, or on a GPU."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.head import eager
from fastdpo.head.eager import Stats
from fastdpo.head.impl import triton as impl
from fastdpo.head.impl.interface import Forward, Grads, LinearHead, Needs, Transform
from fastdpo.head.linear_logprobs import _merge_stats
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import linear_logprobs_forward as forward_kernel
from fastdpo.kernels.logits_tile import Config
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import LAYOUTS, OPTIONS, PLAIN, D, Inputs, N, Options, V, make_inputs, relative_error

SMALL = Config(BLOCK_N=16, BLOCK_V=16, BLOCK_D=16, num_warps=4, num_stages=2)
LARGE = Config(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, num_stages=2)  # fast in the interpreter
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Several tiles, shares, groups and blocks at sizes the interpreter can do; returns the way to choose others."""

    def set_tiles(config: Config, splits: int = 2, workspace_bytes: int = 16_000) -> None:
        for module in (forward_kernel, backward_kernel):
            monkeypatch.setattr(module, "default_config", lambda *_: config)
            monkeypatch.setattr(module, "GROUP_N", 2)
        monkeypatch.setattr(forward_kernel, "default_splits", lambda row_blocks, tiles, processors: splits)
        monkeypatch.setattr(impl, "TILE", 16)
        monkeypatch.setitem(globals(), "workspace", workspace_bytes)

    set_tiles(SMALL)
    return set_tiles


workspace = 0


def run(inputs: Inputs, options: Options, stats: bool) -> tuple[Forward, Tensor]:
    """The forward, and the log-probabilities; NaN where the target is no token."""
    hidden, weight, targets, bias = inputs
    result = impl.forward(hidden, None, targets, LinearHead(weight, bias, None, Transform.of(*options)), stats)
    valid = (targets >= 0) & (targets < len(weight)) & (result.target < torch.inf)
    return result, F.logsigmoid(result.target - result.others) * torch.where(valid, 1.0, torch.nan).to(result.target)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Stats | None]:
    """logps, lse and statistics of the tensors, the transform and whether to compute the latter."""
    inputs, options, stats = Inputs(*arguments[:4]), Options(*arguments[4:7]), arguments[7]
    result, logps = run(inputs, options, stats)
    lse = torch.logaddexp(result.target, result.others)
    return logps, lse, _merge_stats(logps, result, len(inputs.weight)) if stats else None


def backward(dlogps: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """dhidden, dweight and dbias for the tensors, the transform and the three needs."""
    inputs, options, needs = Inputs(*arguments[:4]), Options(*arguments[4:7]), Needs(*arguments[7:])
    result, logps = run(inputs, options, False)
    dtarget = -logps.expm1() * dlogps.to(logps.dtype)
    head = LinearHead(inputs.weight, inputs.bias, None, Transform.of(*options))
    grads = Grads(dtarget, -dtarget)
    return impl.backward(grads, inputs.hidden, None, inputs.targets, head, result, needs, workspace=workspace)[:3]


def ours(inputs: Inputs, options: Options, dlogps: Tensor) -> dict[str, Tensor]:
    logps, lse, stats = forward(*inputs, *options, True)
    assert stats is not None
    grads = backward(dlogps, *inputs, *options, True, True, inputs.bias is not None)
    gradients = zip(("dhidden", "dweight", "dbias"), grads, strict=True)
    results = {"logps": logps, "lse": lse} | stats._asdict() | dict(gradients)
    return {name: value for name, value in results.items() if value is not None}


def theirs(inputs: Inputs, options: Options, dlogps: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Eager PyTorch in `dtype`, its gradients rounded as ours."""
    wide = Inputs(*(t if t is None or t is inputs.targets else t.to(dtype).requires_grad_() for t in inputs))
    logps, lse, stats = eager.linear_logprobs(*wide, *options, stats=True)
    assert stats is not None
    leaves = {"dhidden": wide.hidden, "dweight": wide.weight} | ({} if wide.bias is None else {"dbias": wide.bias})
    grads = torch.autograd.grad(logps, list(leaves.values()), dlogps.to(dtype))
    results = {"logps": logps.detach(), "lse": lse.detach()} | stats._asdict() | dict(zip(leaves, grads, strict=True))
    return {name: value for name, value in results.items() if value is not None}


def check(inputs: Inputs, options: Options = PLAIN) -> None:
    """Compare everything with float64; PyTorch's own error in float32 and the rounding of results set the bar."""
    dtype = inputs.hidden.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dlogps = torch.randn(inputs.targets.shape, device=inputs.hidden.device)
    actual = ours(inputs, options, dlogps)
    same_dtype, exact = (theirs(inputs, options, dlogps, t) for t in (wide, torch.float64))
    assert actual.keys() == exact.keys()
    assert torch.equal(actual.pop("is_top1"), exact["is_top1"])
    for name, value in actual.items():
        expected_dtype = dtype if name.startswith("d") else wide
        assert value.dtype == expected_dtype, name
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name].detach(), rtol=1e-12, atol=1e-14, msg=name)
        else:
            assert_as_accurate(value, same_dtype[name].detach().to(expected_dtype), exact[name].detach(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "bias"), OPTIONS)
def test_every_option(options: Options, bias: bool, dtype: torch.dtype, device: torch.device, set_tiles: Any) -> None:
    set_tiles(SMALL, 2, 8000 if dtype.itemsize < 8 else 16_000)  # two or three chunks of the vocabulary, blocks of rows
    check(make_inputs(dtype, device, bias=bias), options)


SHAPES = [
    pytest.param((1, V, D), 3, id="one-row"),
    pytest.param((17, 33, 17), 2, id="one-past-a-tile"),
    pytest.param((32, 48, 32), 3, id="whole-tiles"),
    pytest.param((5, 7, 1), 2, id="more-shares-than-tiles"),
]


@pytest.mark.parametrize(("shape", "splits"), SHAPES)
def test_every_shape(shape: tuple[int, int, int], splits: int, device: torch.device, set_tiles: Any) -> None:
    set_tiles(SMALL, splits)
    check(make_inputs(torch.float64, device, shape=shape, bias=True))


def test_no_rows(device: torch.device) -> None:
    results = ours(
        make_inputs(torch.bfloat16, device, shape=(0, V, D), bias=True), PLAIN, torch.zeros(0, device=device)
    )
    assert results["logps"].shape == results["lse"].shape == results["entropy"].shape == (0,)
    assert results["dhidden"].shape == (0, D)
    assert torch.equal(results["dweight"], torch.zeros(V, D, dtype=torch.bfloat16, device=device))
    assert torch.equal(results["dbias"], torch.zeros(V, dtype=torch.bfloat16, device=device))


def test_only_token_has_probability_one(device: torch.device) -> None:
    inputs = make_inputs(torch.float32, device, shape=(5, 1, D), std=100.0)
    results = ours(inputs, PLAIN, torch.ones(5, device=device))
    for name in ("logps", "entropy", "log_sum_sq_probs", "dhidden", "dweight"):
        assert not results[name].any(), name
    torch.testing.assert_close(results["lse"], (inputs.hidden @ inputs.weight.T).squeeze(1))
    torch.testing.assert_close(results["mean_logits"], results["lse"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_keep_their_promise(dtype: torch.dtype, device: torch.device, set_tiles: Any) -> None:
    """Two roundings, of dlogits and of the result: 2.4e-3 in bfloat16, an eighth of that in float16."""
    set_tiles(LARGE, 2, 2**20)
    inputs = make_inputs(dtype, device, shape=(256, 2000, 64))
    dlogps = torch.randn(256, device=device)
    actual, exact = ours(inputs, PLAIN, dlogps), theirs(inputs, PLAIN, dlogps, torch.float64)
    for name in ("dhidden", "dweight"):
        assert relative_error(actual[name], exact[name]) <= 2.5e-3 * torch.finfo(dtype).eps / 2**-7


@pytest.mark.parametrize(("size", "hidden_size"), [(1e-7, 3e3), (1e-4, 10.0), (1e6, 1e-3)])
def test_float16_gradients_survive_any_upstream_gradient(
    size: float, hidden_size: float, device: torch.device, set_tiles: Any
) -> None:
    """Unscaled, 1e-7 * p is a subnormal float16, or none at all, and 1e6 overflows; dweight, times hidden, does not."""
    set_tiles(LARGE, 2, 2**20)
    hidden, weight, targets, _ = make_inputs(torch.float32, device, shape=(64, 1000, 32))
    inputs = Inputs((hidden * hidden_size).half(), (weight / hidden_size).half(), targets)
    dlogps = torch.full((64,), size, device=device)
    exact = theirs(inputs, PLAIN, dlogps, torch.float64)["dweight"]
    _, dweight, _ = backward(dlogps, *inputs, *PLAIN, False, True, False)
    assert dweight is not None
    assert relative_error(dweight, exact) <= 1e-3


def test_gradcheck(device: torch.device, set_tiles: Any) -> None:
    run_forward, run_backward = forward, backward  # the class has its own

    class LinearLogprobs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
            logps, _, _ = run_forward(hidden, weight, targets, bias, *options, False)
            ctx.save_for_backward(hidden, weight, bias, targets)
            return logps

        @staticmethod
        def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
            hidden, weight, bias, targets = ctx.saved_tensors
            grads = run_backward(dlogps, hidden, weight, targets, bias, *options, *ctx.needs_input_grad[:3])
            return *grads, None

    options = Options(1.7, 2.0, 0.8)
    set_tiles(SMALL)
    hidden, weight, targets, bias = make_inputs(torch.float64, device, shape=(2, 18, 2), bias=True)
    assert bias is not None
    leaves = (t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(LinearLogprobs.apply, (*leaves, targets))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_computes_what_is_needed(needed: tuple[bool, bool, bool], device: torch.device) -> None:
    inputs = make_inputs(torch.float32, device, bias=True)
    dlogps = torch.randn(N, device=device)
    results = ours(inputs, PLAIN, dlogps)
    grads = backward(dlogps, *inputs, *PLAIN, *needed)
    for name, grad, wanted in zip(("dhidden", "dweight", "dbias"), grads, needed, strict=True):
        assert (grad is not None) == wanted
        assert grad is None or torch.equal(grad, results[name])


def test_is_no_part_of_the_graph(device: torch.device) -> None:
    hidden, weight, targets, _ = make_inputs(torch.float32, device)
    results = ours(
        Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets), PLAIN, torch.ones(N, device=device)
    )
    assert not any(value.requires_grad for value in results.values())


def test_rows_without_upstream_gradient_contribute_nothing(device: torch.device) -> None:
    inputs = make_inputs(torch.float64, device)
    dlogps = torch.randn(N, device=device)
    dlogps[::3] = 0
    results = ours(inputs, PLAIN, dlogps)
    assert not results["dhidden"][::3].any()
    kept = dlogps != 0
    rest = ours(Inputs(inputs.hidden[kept], inputs.weight, inputs.targets[kept]), PLAIN, dlogps[kept])
    torch.testing.assert_close(results["dweight"], rest["dweight"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("of", ["hidden", "weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(of: str, layout: str, device: torch.device) -> None:
    inputs = make_inputs(torch.float64, device, shape=(20, 20, 20))
    view = LAYOUTS[layout](getattr(inputs, of))
    inputs, dense = inputs._replace(**{of: view}), inputs._replace(**{of: view.contiguous()})
    dlogps = torch.randn(40, device=device)[::2]
    targets = torch.stack([inputs.targets, -inputs.targets], 1)[:, 0]
    actual, expected = ours(inputs._replace(targets=targets), PLAIN, dlogps), ours(dense, PLAIN, dlogps)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("offset", [100.0, -100.0, -1000.0])
def test_common_offset(offset: float, device: torch.device) -> None:
    """All logits near +100, or all below -90, where exp is 0: known to their own rounding, and so is the rest."""
    inputs = make_inputs(torch.float32, device)
    shifted = inputs._replace(bias=torch.full((V,), offset, device=device))
    dlogps = torch.randn(N, device=device)
    actual, exact = ours(shifted, PLAIN, dlogps), theirs(inputs, PLAIN, dlogps, torch.float64)
    rounding = abs(offset) * 2**-23
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert (actual[name] - exact[name]).abs().max() <= 4 * rounding, name
    for name in ("dhidden", "dweight"):
        assert relative_error(actual[name], exact[name]) <= 4 * rounding, name


@pytest.mark.parametrize("masked", [16, 32, 48], ids=["first-tile", "first-share", "a-tile-more"])
def test_masked_tokens_do_not_exist(masked: int, device: torch.device) -> None:
    """A bias of -inf over whole tiles and shares."""
    inputs = make_inputs(torch.float64, device, bias=True)
    assert inputs.bias is not None
    inputs.bias[:masked] = -torch.inf
    inputs = inputs._replace(targets=inputs.targets % (V - masked) + masked)
    dlogps = torch.randn(N, device=device)
    rest = Inputs(inputs.hidden, inputs.weight[masked:], inputs.targets - masked, inputs.bias[masked:])
    actual, expected = ours(inputs, PLAIN, dlogps), theirs(rest, PLAIN, dlogps, torch.float64)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "is_top1", "dhidden"):
        torch.testing.assert_close(actual[name], expected[name].detach(), rtol=1e-12, atol=1e-14, msg=name)
    assert (actual["mean_logits"] == -torch.inf).all()
    assert not actual["dweight"][:masked].any()
    torch.testing.assert_close(actual["dweight"][masked:], expected["dweight"], rtol=1e-12, atol=1e-14)


def test_masked_target_is_impossible(device: torch.device) -> None:
    inputs = make_inputs(torch.float32, device, bias=True)
    assert inputs.bias is not None
    inputs.bias[7] = -torch.inf
    inputs.targets[::2], inputs.targets[1::2] = 7, 8
    results = ours(inputs, PLAIN, torch.ones(N, device=device))
    assert (results["logps"][::2] == -torch.inf).all()
    assert results["logps"][1::2].isfinite().all()
    for name in ("lse", "entropy", "log_sum_sq_probs", "dhidden", "dweight", "dbias"):
        assert results[name].isfinite().all(), name


def test_row_without_a_possible_token_is_nan(device: torch.device) -> None:
    inputs = make_inputs(torch.float32, device)
    inputs = inputs._replace(bias=torch.full((V,), -torch.inf, device=device))
    logps, lse, _ = forward(*inputs, *PLAIN, False)
    assert logps.isnan().all()
    assert (lse == -torch.inf).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: inf - inf
def test_infinite_logit_is_nan(device: torch.device) -> None:
    hidden, weight, _, _ = make_inputs(torch.float32, device)
    targets = torch.arange(N, device=device)
    weight[3] = torch.inf
    assert forward(hidden.abs(), weight, targets, None, *PLAIN, False)[0].isnan().all()


def test_log_probabilities_are_never_positive(device: torch.device, set_tiles: Any) -> None:
    set_tiles(LARGE)
    inputs = make_inputs(torch.bfloat16, device, shape=(512, 50, 16), std=40.0)
    logps, _, _ = forward(*inputs, *PLAIN, False)
    assert (logps <= 0).all()
    assert (logps > -1e-12).any(), "no row was confident enough to tell"


def confident(offset: float, device: torch.device) -> tuple[Inputs, float]:
    """One row whose target has p = 0.999999, its logit at `offset`; also the exact 1 - p."""
    target = 51
    weight = torch.full((V, 1), offset - math.log((V - 1) * 0.999999 / 1e-6), device=device)
    weight[target] = offset
    z = weight[:, 0].double()
    others = float((z - z[target]).exp().sum() - 1)
    inputs = Inputs(torch.ones(1, 1, device=device), weight, torch.tensor([target], device=device))
    return inputs, others / (1 + others)


@pytest.mark.parametrize("offset", [0.0, 20.0, -100.0])
def test_confident_target_has_its_gradient(offset: float, device: torch.device) -> None:
    """1 - p is 1e-6, where 1 - float32(p) is 6 % off, p from lse at 20 or -100 useless, and bfloat16(p) = 1."""
    inputs, others = confident(offset, device)
    logps, _, _ = forward(*inputs, *PLAIN, False)
    assert logps.item() == pytest.approx(math.log1p(-others), rel=1e-4)
    _, dweight, _ = backward(torch.ones_like(logps), *inputs, *PLAIN, False, True, False)
    assert dweight is not None
    assert dweight[51].item() == pytest.approx(others, rel=1e-2)


def test_softcap_is_exact_where_tanh_is_small(device: torch.device) -> None:
    """2 sigmoid(2x) - 1 is off by 3e-4 of tanh(1e-4). With a single token, the logit itself can be read."""
    hidden = torch.tensor([1e-4, -1e-2, 0.1, 0.2499, 0.2501, -3.0], device=device)[:, None]
    one, first = torch.ones(1, 1, device=device), torch.zeros(6, dtype=torch.int64, device=device)
    _, _, stats = forward(hidden, one, first, None, 5.0, 5.0, 1.0, True)
    assert stats is not None
    torch.testing.assert_close(stats.mean_logits.double(), 5 * hidden[:, 0].double().tanh(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("target", [0, 15, 16, 31, 32])
def test_target_in_any_column_of_a_tile(target: int, device: torch.device) -> None:
    hidden, weight, _, _ = make_inputs(torch.float64, device, shape=(1, 33, 5), std=0.5)
    inputs = Inputs(hidden, weight, torch.tensor([target], device=device))
    logps, lse, _ = forward(*inputs, *PLAIN, False)
    dhidden, _, _ = backward(torch.ones_like(lse), *inputs, *PLAIN, True, False, False)
    exact = theirs(inputs, PLAIN, torch.ones_like(lse), torch.float64)
    torch.testing.assert_close(logps, exact["logps"], rtol=1e-13, atol=0)
    torch.testing.assert_close(dhidden, exact["dhidden"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [PLAIN, Options(softcap=5.0)], ids=["plain", "softcap"])
def test_statistics_change_nothing(options: Options, device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True)
    without, with_stats = (forward(*inputs, *options, stats) for stats in (False, True))
    assert without[2] is None
    assert torch.equal(without[0], with_stats[0])
    assert torch.equal(without[1], with_stats[1])


def test_first_of_equal_maxima_is_the_top_one(device: torch.device) -> None:
    weight = torch.zeros(V, 1, device=device)
    weight[[3, 5, 20, 50]] = 2.0  # twice in a tile, in another tile of the share, in the other share
    targets = torch.tensor([3, 5, 20, 50, 7], device=device)
    _, _, stats = forward(torch.ones(5, 1, device=device), weight, targets, None, *PLAIN, True)
    assert stats is not None
    assert stats.is_top1.tolist() == [True, False, False, False, False]


def test_targets_outside_the_vocabulary_are_nan(device: torch.device) -> None:
    """CUDA cannot be asked without waiting: the rows must not look like numbers, the others must not notice."""
    inputs = make_inputs(torch.float32, device)
    bad = inputs._replace(targets=inputs.targets.clone())
    bad.targets[:4] = torch.tensor([-1, -100, V, 2**32 + 3])
    dlogps = torch.ones(N, device=device)
    good, actual = ours(inputs, PLAIN, dlogps), ours(bad, PLAIN, dlogps)
    for name in ("logps", "dhidden"):
        assert actual[name][:4].isnan().all(), name
        assert torch.equal(actual[name][4:], good[name][4:]), name


def test_bitwise_repeatable(device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True)
    dlogps = torch.randn(N, device=device)
    first = ours(inputs, Options(softcap=4.0), dlogps)
    for _ in range(2):
        again = ours(inputs, Options(softcap=4.0), dlogps)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_log_probabilities_do_not_depend_on_tiles_shares_or_other_rows(device: torch.device, set_tiles: Any) -> None:
    inputs = make_inputs(torch.bfloat16, device)
    logps = forward(*inputs, *PLAIN, False)[0]
    set_tiles(LARGE, 1)
    assert (forward(*inputs, *PLAIN, False)[0] - logps).abs().max() <= 1e-6
    alone = forward(inputs.hidden[5:6], inputs.weight, inputs.targets[5:6], None, *PLAIN, False)[0]
    assert (alone - logps[5]).abs() <= 1e-6


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("D", [64, 896, 4100, 16384])
@pytest.mark.parametrize("N", [1, 8192, 65537])
def test_workspace_is_bounded(N: int, D: int, itemsize: int, set_tiles: Any) -> None:
    budget = 256 * 2**20
    set_tiles(SMALL, workspace_bytes=budget)
    acc = max(itemsize, 4)
    rows, columns = impl._block_shape(N, 128_257, D, itemsize, acc, budget)
    assert rows * impl._aligned(columns) * itemsize + columns * D * acc <= budget
    assert rows == N or rows * columns * itemsize >= budget / 4  # and used


@pytest.mark.gpu
def test_waits_for_nothing(device: torch.device) -> None:
    inputs = make_inputs(torch.float16, device, bias=True)
    dlogps = torch.ones(N, device=device)
    ours(inputs, PLAIN, dlogps)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(inputs, PLAIN, dlogps)
    finally:
        torch.cuda.set_sync_debug_mode("default")

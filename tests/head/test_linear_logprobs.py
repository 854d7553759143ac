"""The public op: what it refuses, what it registers with PyTorch, and what autograd may do with it."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdpo.head import autotune, eager, op
from fastdpo.head.eager import Stats
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.impl.interface import Needs
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.no_logits import NoLogits

N, D, V = 21, 16, 67
OPTIONS = {"logit_scale": 1.7, "softcap": 5.0, "temperature": 0.6}
IMPLS = ["torch", "triton", "blas"]


class Head(nn.Module):
    """hidden `[N, D]`, weight `[V, D]` and bias `[V]` as parameters, and targets."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        sizes: tuple[int, int, int] = (N, D, V),
    ) -> None:
        super().__init__()
        N, D, V = sizes
        self.hidden = nn.Parameter(2 * torch.randn(N, D, device=device).to(dtype))
        self.weight = nn.Parameter(torch.randn(V, D, device=device).to(dtype) / math.sqrt(D))
        self.bias = nn.Parameter(torch.randn(V, device=device).to(dtype)) if bias else None
        self.register_buffer("targets", torch.randint(V, (N,), device=device))

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.hidden, self.weight, self.targets, self.bias

    def forward(self, **options: Any) -> Tensor:
        return linear_logprobs(*self.tensors, **options)

    def grads(self) -> list[Tensor | None]:
        grads = [p.grad for p in self.parameters()]
        self.zero_grad()
        return grads


@pytest.fixture
def head(device: torch.device) -> Head:
    return Head(device)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (8, 32))
    monkeypatch.setattr(torch_impl, "CELL", 16)


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["auto", "eager", *IMPLS])
def test_matches_eager_pytorch(impl: Any, dtype: torch.dtype, device: torch.device) -> None:
    head = Head(device, dtype)
    logps, stats = linear_logprobs_with_stats(*head.tensors, impl=impl, **OPTIONS)
    same_dtype, _, same_stats = eager.linear_logprobs(*head.tensors, **OPTIONS, stats=True)
    exact, _, exact_stats = eager.linear_logprobs(*head.double().tensors, **OPTIONS, stats=True)
    assert same_stats is not None
    assert exact_stats is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slack = 100.0 if dtype == torch.float64 else 2.0
    assert_as_accurate(logps, same_dtype, exact, "logps", slack)
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        stat, same, true = (getattr(s, name) for s in (stats, same_stats, exact_stats))
        assert stat.dtype == logps.dtype == wide
        assert_as_accurate(stat, same, true, name, slack)
    assert stats.is_top1.dtype == torch.bool


@pytest.mark.parametrize("impl", ["eager", *IMPLS])
def test_statistics_change_no_digit_and_only_the_entropy_has_a_gradient(impl: Any, head: Head) -> None:
    logps, stats = linear_logprobs_with_stats(*head.tensors, impl=impl)
    assert torch.equal(logps, head(impl=impl))
    assert logps.requires_grad
    assert isinstance(stats, Stats)
    assert [stat is not None and stat.requires_grad for stat in stats] == [True] + [False] * 5


def test_on_meta_tensors_it_computes_shapes() -> None:
    logps, stats = linear_logprobs_with_stats(*Head(torch.device("meta")).tensors)
    assert {t.shape for t in (logps, *stats[:4])} == {(N,)}
    assert logps.is_meta


def test_exact_is_what_auto_means(head: Head) -> None:
    head(impl="torch", backward="auto").sum().backward()
    grads = head.grads()
    head(impl="torch", backward="exact").sum().backward()
    assert_equal(head.grads(), grads)


# --- bad arguments ---

BAD: list[Any] = [
    pytest.param({"hidden": torch.randn(2, N, D)}, r"hidden must be \[N, D\], got shape \(2, 21, 16\)", id="hidden-3d"),
    pytest.param({"weight": torch.randn(V)}, r"weight must be \[V, D\], got shape \(67,\)", id="weight-1d"),
    pytest.param({"weight": torch.randn(V, D + 1)}, r"weight must have the D of hidden, 16, got 17", id="weight-D"),
    pytest.param({"weight": torch.randn(0, D)}, r"weight must have at least one .* got shape \(0, 16\)", id="weight-V"),
    pytest.param(
        {"weight": torch.randn(V, D).bfloat16()},
        r"weight must have the dtype of hidden, torch.float32, got torch.bfloat16",
        id="weight-dtype",
    ),
    pytest.param(
        {"weight": torch.randn(V, D, device="meta")},
        r"weight must be on the device of hidden, cpu, got meta",
        id="weight-device",
    ),
    pytest.param(
        {"targets": torch.zeros(N + 1).long()}, r"targets must have the N of hidden, 21, got 22", id="targets-N"
    ),
    pytest.param({"targets": torch.zeros(N, 1).long()}, r"targets must be \[N\], got shape \(21, 1\)", id="targets-2d"),
    pytest.param(
        {"targets": torch.zeros(N).int()}, r"targets must .* torch.int64, got torch.int32", id="targets-dtype"
    ),
    pytest.param({"bias": torch.zeros(V - 1)}, r"bias must have the V of weight, 67, got 66", id="bias-V"),
    pytest.param({"bias": torch.zeros(V).double()}, r"bias must .* torch.float32, got torch.float64", id="bias-dtype"),
    pytest.param({"logit_scale": 0.0}, r"logit_scale must be finite and not 0, got 0.0", id="scale-zero"),
    pytest.param({"logit_scale": math.nan}, r"logit_scale must be finite and not 0, got nan", id="scale-nan"),
    pytest.param({"softcap": 0.0}, r"softcap must be None, or finite and above 0, got 0.0", id="softcap"),
    pytest.param({"temperature": -1.0}, r"temperature must be finite and above 0, got -1.0", id="temperature"),
    pytest.param({"temperature": math.nan}, r"temperature must be finite and above 0, got nan", id="temperature-nan"),
    pytest.param({"impl": "cuda"}, r"impl must be one of auto, eager, torch, triton, blas, got 'cuda'", id="impl"),
    pytest.param({"backward": "dense"}, r"backward must be one of auto, exact, sparse, got 'dense'", id="backward"),
    pytest.param({"workspace_bytes": 1000}, r"workspace_bytes must be at least 2\^20, got 1000", id="workspace"),
    pytest.param(
        {"low_rank": (torch.randn(N - 1, 3), torch.randn(V, 3))},
        r"low_rank\[0\] must have the N of hidden, 21, got 20",
        id="low-rank-N",
    ),
    pytest.param(
        {"low_rank": (torch.randn(N, 3), torch.randn(V, 4))},
        r"low_rank\[1\] must have the V of weight and the R of low_rank\[0\], \(67, 3\), got \(67, 4\)",
        id="low-rank-R",
    ),
    pytest.param(
        {"low_rank": (torch.randn(N, 3), torch.randn(V, 3)), "impl": "eager"},
        r"impl must be other than 'eager' with shard or low_rank",
        id="low-rank-eager",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D), "targets": torch.zeros(N).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


def test_refuses_a_dtype_without_logits() -> None:
    with pytest.raises(ValueError, match=r"hidden must have a dtype among .*torch.float16, got torch.int64"):
        linear_logprobs(torch.zeros(N, D).long(), torch.zeros(V, D).long(), torch.zeros(N).long())


@pytest.mark.parametrize("impl", ["eager", "torch"])
@pytest.mark.parametrize("target", [-100, V])
def test_refuses_targets_outside_the_vocabulary(impl: Any, target: int) -> None:
    targets = torch.zeros(N).long()
    targets[5] = target
    with pytest.raises(ValueError, match=rf"targets must be in \[0, V\) = \[0, 67\), got {target} at position 5"):
        linear_logprobs(torch.randn(N, D), torch.randn(V, D), targets, impl=impl)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    head = Head(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"impl='triton' needs tensors on CUDA, or .*TRITON_INTERPRET=1.* on cpu"):
        head(impl="triton")


# --- choice of the implementation ---


def test_auto_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(autotune, "find_spec", lambda name: None)
    autotune.has_triton.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        modules = [op.implementation("auto", torch.device("cuda")) for _ in range(2)]
    autotune.has_triton.cache_clear()
    assert modules == [torch_impl, torch_impl]
    assert [r.message for r in caplog.records] == ["Triton is not installed: on CUDA, linear_logprobs runs in PyTorch."]


def test_auto_is_triton_on_cuda_and_torch_on_a_cpu() -> None:
    pytest.importorskip("triton")
    assert op.implementation("auto", torch.device("cuda")).__name__ == "fastdpo.head.impl.triton"
    assert op.implementation("auto", torch.device("cpu")) is torch_impl


# --- autograd ---


@pytest.mark.parametrize(
    ("options", "wrt"),
    [
        pytest.param({}, ("hidden", "weight", "bias"), id="plain"),
        pytest.param({"logit_scale": -1.7}, ("hidden", "weight", "bias"), id="scale"),
        pytest.param({"softcap": 5.0}, ("hidden", "weight", "bias"), id="softcap"),
        pytest.param({"temperature": 0.6}, ("hidden", "weight", "bias"), id="temperature"),
        pytest.param(OPTIONS, ("hidden", "weight", "bias"), id="all-options"),
        pytest.param(OPTIONS, ("hidden",), id="hidden-alone"),
        pytest.param(OPTIONS, ("weight",), id="weight-alone"),
        pytest.param(OPTIONS, ("bias",), id="bias-alone"),
    ],
)
def test_gradcheck(
    options: dict[str, Any], wrt: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (2, 4))
    head = Head(device, torch.float64, sizes=(5, 3, 11))
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in wrt)
    assert torch.autograd.gradcheck(lambda *_: head(impl="torch", **options), [getattr(head, name) for name in wrt])
    head(impl="torch").sum().backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == set(wrt)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_is_computed_that_nobody_needs(impl: Any, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = op.implementation(impl, head.hidden.device)
    backward = module.backward
    monkeypatch.setattr(
        module, "backward", lambda *args: seen.append(next(a for a in args if isinstance(a, Needs))) or backward(*args)
    )
    head.weight.requires_grad_(False)
    head(impl=impl).sum().backward()
    assert seen == [Needs(hidden=True, bias=True)]


UPSTREAM: list[Any] = [
    pytest.param(lambda logps: logps.sum().backward(), id="expanded"),
    pytest.param(lambda logps: logps.backward(torch.ones(N, 3, device=logps.device)[:, 1]), id="strided"),
    pytest.param(lambda logps: logps.double().sum().backward(), id="from-float64"),
]


@pytest.mark.parametrize("backward", UPSTREAM)
@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_of_any_layout(impl: Any, backward: Callable[[Tensor], None], head: Head) -> None:
    head(impl=impl).backward(torch.ones(N, device=head.hidden.device))
    expected = head.grads()
    backward(head(impl=impl))
    assert_equal(head.grads(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_confident_target_has_its_gradient(impl: Any, device: torch.device) -> None:
    """p = 0.999999 at a logit of 20, where lse in float32 cannot tell 1 - p from 0."""
    weight = torch.full((V, 1), 20 - math.log((V - 1) / 1e-6), device=device)
    weight[40] = 20
    weight.requires_grad_()
    linear_logprobs(torch.ones(1, 1, device=device), weight, torch.tensor([40], device=device), impl=impl).backward()
    assert weight.grad is not None
    rest = (weight.double() - 20).exp().sum().item() - 1
    assert weight.grad[40].item() == pytest.approx(rest / (1 + rest), rel=1e-2)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all-options"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_of_low_rank_and_entropy(impl: Any, options: dict[str, Any], device: torch.device) -> None:
    """Through the Triton kernels too; a head of frozen weight and one of trained."""
    head = Head(device, torch.float64, sizes=(3, 2, 19))
    low_rank = [torch.randn(size, 2, dtype=torch.float64, device=device).requires_grad_() for size in (3, 19)]

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, *low_rank: Tensor) -> tuple[Tensor, Tensor]:
        pair: Any = low_rank
        tensors = hidden, weight, head.targets, bias
        logps, stats = linear_logprobs_with_stats(*tensors, low_rank=pair, impl=impl, **options)  # type: ignore[arg-type]
        return logps, stats.entropy

    leaves = (head.hidden, head.weight, head.bias, *low_rank)
    fast = {"fast_mode": impl != "torch"}  # one random direction: the interpreter takes seconds for all of them
    assert torch.autograd.gradcheck(compute, leaves, **fast)
    frozen = tuple(leaf.detach() if i in (1, 2, 4) else leaf for i, leaf in enumerate(leaves) if leaf is not None)
    assert torch.autograd.gradcheck(compute, frozen, **fast)


def test_trainable_token_rows(head: Head) -> None:
    """New rows for some tokens, as a low-rank addition: the weight is neither copied nor trained."""
    tokens = torch.tensor([3, 40, 66], device=head.hidden.device)
    new = torch.randn(3, D, device=head.hidden.device, requires_grad=True)
    hidden, weight = head.hidden.detach().requires_grad_(), head.weight.detach()
    one_hot = torch.nn.functional.one_hot(tokens, V).T.to(hidden.dtype)
    actual = linear_logprobs(hidden, weight, head.targets, low_rank=(hidden @ (new - weight[tokens]).T, one_hot))
    expected = linear_logprobs(hidden, weight.index_copy(0, tokens, new), head.targets, impl="eager")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(logps.sum(), (hidden, new)) for logps in (actual, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_zero_upstream_gradient_gives_zeros(head: Head) -> None:
    (0 * head(impl="torch")).sum().backward()
    for grad in head.grads():
        assert grad is not None
        assert not grad.any()


def test_backward_twice_adds_up(head: Head) -> None:
    logps = head(impl="torch")
    logps.sum().backward(retain_graph=True)
    once = [None if p.grad is None else 2 * p.grad for p in head.parameters()]
    logps.sum().backward()
    assert_equal(head.grads(), once)


def test_second_derivative_is_refused(head: Head) -> None:
    (dhidden,) = torch.autograd.grad(head(impl="torch").sum(), head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        dhidden.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, head: Head) -> None:
    head(impl="torch").sum().backward()
    expected = head.grads()
    hidden = 1.0 * head.hidden  # what a checkpointed decoder hands over
    checkpoint(
        lambda h: linear_logprobs(h, *head.tensors[1:], impl="torch").sum(), hidden, use_reentrant=use_reentrant
    ).backward()
    assert_equal(head.grads(), expected)


@pytest.mark.parametrize("impl", ["eager", *IMPLS])
def test_autocast_casts_as_linear_does(impl: Any, head: Head) -> None:
    with torch.autocast(head.hidden.device.type, dtype=torch.bfloat16):
        logps = head(impl=impl)
        logps.sum().backward()
    narrow = Head(head.hidden.device, torch.bfloat16)
    narrow.load_state_dict(head.state_dict())
    expected = narrow(impl=impl)
    expected.sum().backward()
    assert logps.dtype == torch.float32
    assert torch.equal(logps, expected)
    grads = head.grads()
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    assert_equal(grads, [None if g is None else g.float() for g in narrow.grads()])


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert Head(device, torch.float64)(impl="torch").dtype == torch.float64


def test_autocast_brings_mixed_dtypes_together(head: Head) -> None:
    head.hidden.data = head.hidden.data.bfloat16()
    with torch.autocast(head.hidden.device.type, dtype=torch.bfloat16):
        assert head(impl="torch").dtype == torch.float32


# --- the registered op ---


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "transposed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str, bias: bool, device: torch.device) -> None:
    head = Head(device, torch.float32, bias)
    if not bias:
        head.hidden.data, head.weight.data = (t.data.T.contiguous().T for t in (head.hidden, head.weight))
    options = (0.3, 8.0, impl, bias, [True] * 5, True, bias, 0, V, 2**20, "")
    low_rank = (torch.randn(N, 3, device=device).requires_grad_(), torch.randn(V, 3, device=device).requires_grad_())
    torch.library.opcheck(op.linear_logprobs_op, (*head.tensors, *low_rank, *options))
    tensors = [t if t is None else t.detach() for t in (*head.tensors, None, None)]
    options = (2.8, None, impl, False, [True, True, bias, False, False], False, True, 0, V, 2**20, "")
    results = op.linear_logprobs_op(*tensors, *options)
    arguments = (*tensors, *options, results, torch.ones_like(results[0]), -torch.ones_like(results[0]), None)
    torch.library.opcheck(op.linear_logprobs_backward_op, arguments)
    grads = op.linear_logprobs_backward_op(*arguments)
    assert all(grad.is_contiguous() for grad in grads), "opcheck does not see that strides are not the fake kernel's"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # importing inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str, head: Head) -> None:
    def loss(head: Head) -> Tensor:
        logps, stats = linear_logprobs_with_stats(*head.tensors, impl="torch", **OPTIONS)
        return (logps * stats.entropy).sum() + logps.cos().sum()

    loss(head).backward()
    expected = head.grads()
    torch.compile(loss, fullgraph=True, backend=backend)(head).backward()
    for actual, grad in zip(head.grads(), expected, strict=True):
        torch.testing.assert_close(actual, grad)


def test_compiled_code_still_checks_targets(head: Head) -> None:
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    if head.hidden.is_cuda:
        pytest.skip("CUDA marks the row with NaN instead")
    with pytest.raises(ValueError, match="got 90 at position 0"):
        compiled(head.hidden, head.weight, head.targets * 0 + 90, impl="torch")


# --- memory ---


def test_never_holds_the_logits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 x 512 logits, in tiles of 64 x 64; the largest tensor otherwise is weight, 512 x 16."""
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (64, 64))
    hidden = torch.randn(4096, 16, device=device, requires_grad=True)
    weight = torch.randn(512, 16, device=device, requires_grad=True)
    targets = torch.randint(512, (4096,), device=device)
    limit = 2**18 + 1  # as many fp32 numbers as the workspace holds
    assert limit < 4096 * 512 / 7
    with NoLogits(limit):
        for options in ({}, OPTIONS):
            logps = linear_logprobs(hidden, weight, targets, impl="torch", workspace_bytes=2**20, **options)
            logps.sum().backward()
    with pytest.raises(AssertionError, match=r"\(4096, 512\)"), NoLogits(4096 * 512):
        linear_logprobs(hidden, weight, targets, impl="eager")
    monkeypatch.setitem(torch_impl.TILE_SHAPE, device.type, (4096, 512))  # the mode looks into the op
    with pytest.raises(AssertionError), NoLogits(4096 * 512):
        linear_logprobs(hidden, weight, targets, impl="torch")

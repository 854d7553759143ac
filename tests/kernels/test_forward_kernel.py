"""The dense kernels of the head and their launchers against float64: in Triton's interpreter, or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.head import eager
from fastdpo.head.impl.interface import Transform
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import linear_logprobs_forward as forward_kernel
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.linear_logprobs_forward import MAX_SPLITS, ForwardOutput, default_splits, linear_logprobs_forward
from fastdpo.kernels.linear_logprobs_forward_tma import aligned
from fastdpo.kernels.logits_tile import Config
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import OPTIONS, PLAIN, Inputs, N, Options, V, far_apart, make_inputs, spread

SMALL = Config(BLOCK_N=16, BLOCK_V=32, BLOCK_D=16, num_warps=4, num_stages=2)
TILE = 16  # two to a block; V = 53 ends in the second tile of the second block
SHAPE = (N, V, 40)  # rows of 16-byte multiples, as TMA wants them; three tiles of the hidden size, the last ragged
LowRank = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Several tiles, shares and groups at sizes the interpreter can do; returns the way to choose others."""

    def set_tiles(config: Config = SMALL, splits: int = 2, programs: int = 3, tma: bool = False) -> None:
        for module in (forward_kernel, backward_kernel):
            monkeypatch.setattr(module, "default_config", lambda *_: config)
            monkeypatch.setattr(module, "GROUP_N", 2)
        monkeypatch.setattr(forward_kernel, "TILE", TILE)
        monkeypatch.setattr(forward_kernel, "default_splits", lambda row_blocks, tiles, processors: splits)
        monkeypatch.setattr(forward_kernel, "processors", lambda x: programs)
        monkeypatch.setattr(forward_kernel, "fits_tma", lambda hidden, weight: tma)

    set_tiles()
    return set_tiles


@pytest.fixture(params=["pointers", "tma"])
def kernel(request: pytest.FixtureRequest, device: torch.device, set_tiles: Any) -> str:
    """Both kernels of the forward."""
    tma = request.param == "tma"
    if tma and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a chip with TMA")
    set_tiles(tma=tma)
    return str(request.param)


def make_low_rank(inputs: Inputs, rank: int) -> LowRank:
    hidden, weight = inputs.hidden, inputs.weight
    a, b = (torch.randn(x.shape[0], rank, device=x.device) / rank**0.25 for x in (hidden, weight))
    return a.to(hidden.dtype), b.to(hidden.dtype)


def transform(inputs: Inputs, options: Options, low_rank: LowRank | None) -> tuple[Tensor, Tensor]:
    """x and slope [N, V]."""
    z = F.linear(inputs.hidden, inputs.weight, inputs.bias)
    if low_rank is not None:
        z = z + low_rank[0] @ low_rank[1].T
    x = eager.transform_logits(z, *options)
    if options.softcap is None:
        return x, torch.ones_like(x)
    return x, 1 / (options.logit_scale * z / options.softcap).cosh().square()


def reference(
    inputs: Inputs, options: Options, low_rank: LowRank | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """target_logits, others and tile_masses in `dtype`."""
    wide = Inputs(*(t if t is None or t is inputs.targets else t.to(dtype) for t in inputs))
    x, slope = transform(wide, options, None if low_rank is None else (low_rank[0].to(dtype), low_rank[1].to(dtype)))
    inside = (inputs.targets >= 0) & (inputs.targets < x.shape[1])
    index = inputs.targets.where(inside, 0)[:, None]
    target_logits = x.gather(1, index)[:, 0]
    x = x.scatter(1, index, x.gather(1, index).masked_fill(inside[:, None], -torch.inf))
    masses = F.pad(x + slope.log(), (0, -x.shape[1] % TILE), value=-torch.inf).unflatten(1, (-1, TILE)).logsumexp(2)
    return target_logits.where(inside, -torch.inf), x.logsumexp(1), masses


def check(inputs: Inputs, options: Options = PLAIN, low_rank: LowRank | None = None) -> None:
    actual = linear_logprobs_forward(*inputs, *Transform.of(*options), False, tile_masses=True, low_rank=low_rank)
    wide = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
    same_dtype, exact = (reference(inputs, options, low_rank, dtype) for dtype in (wide, torch.float64))
    assert actual.stats is None
    assert actual.tile_masses is not None
    assert actual.tile_masses.dtype == torch.float32
    values = {"target_logits": actual.target_logits, "others": actual.others, "tile_masses": actual.tile_masses}
    for (name, value), s, e in zip(values.items(), same_dtype, exact, strict=True):
        possible = e > -torch.inf  # a tile may hold nothing but the target, or the end of the vocabulary
        assert torch.equal(value > -torch.inf, possible), name
        value, s, e = (t.masked_fill(~possible, 0.0) for t in (value, s, e))
        if name != "tile_masses" and value.dtype == torch.float64:
            torch.testing.assert_close(value, e, rtol=1e-12, atol=1e-14, msg=name)
        else:
            assert_as_accurate(value, s.to(value.dtype), e, name)


def backward(
    dlogits: Tensor,
    dlogps: Tensor,
    inputs: Inputs,
    forward: ForwardOutput,
    options: Options,
    low_rank: LowRank | None = None,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `dlogits`; `entropy` is the gradient and the value of the entropy of the tokens that are not the target."""
    dtarget = (forward.others - forward.target_logits).sigmoid() * dlogps
    linear_logprobs_backward(
        dlogits, *inputs, forward.others, dtarget, -dtarget, *Transform.of(*options), low_rank=low_rank, entropy=entropy
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "bias"), OPTIONS)
def test_forward(options: Options, bias: bool, dtype: torch.dtype, kernel: str, device: torch.device) -> None:
    check(make_inputs(dtype, device, bias=bias, shape=SHAPE), options)


SHAPES = [
    pytest.param((1, V, 40), 3, id="one-row"),
    pytest.param((17, 33, 24), 2, id="one-past-a-tile"),
    pytest.param((32, 64, 32), 2, id="whole-tiles"),
    pytest.param((5, 7, 8), 2, id="more-shares-than-tiles"),
]


@pytest.mark.parametrize(("shape", "splits"), SHAPES)
def test_every_shape(
    shape: tuple[int, int, int], splits: int, kernel: str, device: torch.device, set_tiles: Any
) -> None:
    set_tiles(splits=splits, tma=kernel == "tma")
    check(make_inputs(torch.float16, device, bias=True, shape=shape))


@pytest.mark.parametrize("rank", [1, 16, 37])
def test_low_rank(rank: int, kernel: str, device: torch.device) -> None:
    inputs = make_inputs(torch.float64, device, bias=True, shape=SHAPE)
    a, b = make_low_rank(inputs, rank)
    check(inputs, Options(1.7, 5.0, 1.3), (spread(a), b.T.contiguous().T))


def test_low_rank_in_bfloat16(kernel: str, device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, shape=SHAPE)
    check(inputs, PLAIN, make_low_rank(inputs, 24))


def test_both_kernels_agree(device: torch.device, set_tiles: Any) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True, shape=SHAPE)
    results = []
    for tma in (False, True):
        if tma and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs a chip with TMA")
        set_tiles(tma=tma)
        results.append(linear_logprobs_forward(*inputs, *Transform(), True, tile_masses=True))
    (*pointers, stats, masses), (*tma_pointers, tma_stats, tma_masses) = results
    for ours, theirs in zip((*pointers, *stats, masses), (*tma_pointers, *tma_stats, tma_masses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_masses_add_up_to_the_others(kernel: str, device: torch.device) -> None:
    inputs = make_inputs(torch.float32, device, bias=True, shape=SHAPE)
    forward = linear_logprobs_forward(*inputs, *Transform(), False, tile_masses=True)
    assert forward.tile_masses is not None
    torch.testing.assert_close(forward.tile_masses.logsumexp(1), forward.others, rtol=1e-6, atol=1e-6)


def test_masses_change_nothing_else(kernel: str, device: torch.device) -> None:
    inputs = make_inputs(torch.bfloat16, device, shape=SHAPE)
    without, with_masses = (
        linear_logprobs_forward(*inputs, *Transform(), True, tile_masses=tile_masses) for tile_masses in (False, True)
    )
    assert without.tile_masses is None
    assert torch.equal(without.target_logits, with_masses.target_logits)
    assert torch.equal(without.others, with_masses.others)
    assert without.stats is not None
    assert with_masses.stats is not None
    assert all(torch.equal(*pair) for pair in zip(without.stats, with_masses.stats, strict=True))


def test_mass_of_a_tile_of_nothing(kernel: str, device: torch.device) -> None:
    """One tile of impossible tokens; one of a single token, impossibly rare, or else the target."""
    inputs = make_inputs(torch.float32, device, bias=True, shape=(3, 2 * TILE + 1, 8))
    assert inputs.bias is not None
    inputs.targets[:] = torch.tensor([2 * TILE, 0, -1])
    inputs.bias[TILE : 2 * TILE] = torch.tensor([-torch.inf], device=device)
    inputs.bias[2 * TILE] = -99.0
    masses = linear_logprobs_forward(*inputs, *Transform(), False, tile_masses=True).tile_masses
    assert masses is not None
    assert masses[:, 0].isfinite().all()
    assert (masses[:, 1] == -torch.inf).all()
    assert masses[0, 2] == -torch.inf
    assert (masses[1:, 2] < -80).all()


def test_shards_of_the_vocabulary_add_up(kernel: str, device: torch.device) -> None:
    """A target outside is in another shard: its logit is -inf here, and others is of all tokens here."""
    inputs = make_inputs(torch.float64, device, bias=True, shape=SHAPE)
    assert inputs.bias is not None
    shards = [
        linear_logprobs_forward(
            inputs.hidden,
            inputs.weight[columns],
            inputs.targets - columns.start,
            inputs.bias[columns],
            *Transform(),
            False,
        )
        for columns in (slice(0, 20), slice(20, V))
    ]
    target_logits, others, _ = reference(inputs, PLAIN, None, torch.float64)
    assert all((shard.target_logits > -torch.inf).any() for shard in shards)
    torch.testing.assert_close(torch.maximum(*(shard.target_logits for shard in shards)), target_logits)
    torch.testing.assert_close(torch.logaddexp(*(shard.others for shard in shards)), others, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", [-1, -100, V, 2**32 + 3])
def test_target_outside(target: int, kernel: str, device: torch.device) -> None:
    inputs = make_inputs(torch.float64, device, shape=SHAPE)
    check(inputs._replace(targets=torch.full_like(inputs.targets, target)))


def test_bitwise_repeatable_by_any_number_of_programs(device: torch.device, set_tiles: Any) -> None:
    inputs = make_inputs(torch.bfloat16, device, bias=True, shape=SHAPE)
    results = []
    for programs in (1, 2, 5, 100):
        set_tiles(programs=programs, tma=device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
        forward = linear_logprobs_forward(*inputs, *Transform(), True, tile_masses=True)
        assert forward.stats is not None
        results.append((forward.target_logits, forward.others, forward.tile_masses, *forward.stats))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_tma_is_for_16_byte_rows(device: torch.device) -> None:
    x = torch.empty(8, 32, dtype=torch.bfloat16, device=device)
    assert aligned(x)
    assert aligned(x[3:, 8:24])
    for misfit in (
        x[:, 1:],
        x[:, 4:],
        x.T,
        x[:1].expand(8, 32),
        x[:, :0],
        x[:0],
        x[:, ::2],
        x.float(),
        x.flatten()[:252].view(9, 28),
    ):
        assert not aligned(misfit)
    assert not forward_kernel.fits_tma(x, x[:, 1:])


def test_dlogits_are_rounded_to_nearest(device: torch.device) -> None:
    """Triton's interpreter would truncate them, and a truncated P is a biased one."""
    hidden, weight, targets, _ = inputs = make_inputs(torch.bfloat16, device)
    forward = linear_logprobs_forward(*inputs, *Transform(), False)
    dlogits = hidden.new_empty(N, V)
    backward(dlogits, torch.ones(N, device=device), inputs, forward, PLAIN)
    exact = torch.nn.functional.one_hot(targets, V) - (hidden.double() @ weight.double().T).softmax(-1)
    assert ((dlogits.double() - exact).abs() <= 1.001 * 2**-9 * exact.abs().log2().floor().add(1).exp2()).all()


@pytest.mark.parametrize("which", ["hidden-rows", "weight-rows", "weight-columns"])
def test_offsets_pass_2_to_the_31(which: str, device: torch.device) -> None:
    hidden, weight, targets, _ = make_inputs(torch.float16, device, shape=(5, 5, 5))
    far = {
        "hidden-rows": lambda: Inputs(far_apart(hidden), weight, targets),
        "weight-rows": lambda: Inputs(hidden, far_apart(weight), targets),
        "weight-columns": lambda: Inputs(hidden, far_apart(weight.T).T, targets),
    }[which]()
    dlogps = torch.ones(5, device=device)
    lse = linear_logprobs_forward(*far, *Transform(), False)[1]
    assert torch.equal(lse, linear_logprobs_forward(hidden, weight, targets, None, *Transform(), False)[1])
    dlogits = hidden.new_empty(2, 5, 5)
    for out, (h, w, _, _) in zip(dlogits, (far, (hidden, weight, targets, None)), strict=True):
        linear_logprobs_backward(out, h, w, targets, None, lse, dlogps, dlogps, *Transform())
    assert torch.equal(dlogits[0], dlogits[1])


def test_dlogits_pass_2_to_the_31(device: torch.device) -> None:
    hidden, weight, targets, _ = make_inputs(torch.float16, device, shape=(5, 5, 5))
    lse = linear_logprobs_forward(hidden, weight, targets, None, *Transform(), False)[1]
    dlogps = torch.ones(5, device=device)
    near, far = hidden.new_empty(5, 5), far_apart(hidden.new_zeros(5, 5))
    for out in (near, far):
        linear_logprobs_backward(out, hidden, weight, targets, None, lse, dlogps, dlogps, *Transform())
    assert torch.equal(near, far)


@pytest.mark.parametrize(
    ("row_blocks", "tiles", "least"),
    [(64, 502, 0.99), (32, 502, 0.98), (16, 502, 0.975), (8, 502, 0.975), (64, 125, 0.975), (1, 502, 0.95)],
)
def test_shares_keep_the_chip_busy(row_blocks: int, tiles: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each processor of the TMA kernel does is counted one pair after another, as the kernel walks them."""
    processors, group = 132, 16
    monkeypatch.setattr(forward_kernel, "GROUP_N", group)
    splits = default_splits(row_blocks, tiles, processors)
    assert splits <= MAX_SPLITS
    shares = [(row, share) for g in range(0, row_blocks, group) for share in range(splits)
              for row in range(g, min(g + group, row_blocks))]  # fmt: skip
    work = [0] * processors
    for pair, (_, share) in enumerate(shares):
        work[pair % processors] += (share + 1) * tiles // splits - share * tiles // splits
    assert sum(work) == row_blocks * tiles
    assert sum(work) / processors / max(work) >= least


def test_no_more_shares_than_tiles() -> None:
    assert default_splits(1, 3, 132) == 3
    assert default_splits(0, 3, 132) <= 3


GRADIENTS = [
    pytest.param(PLAIN, 0, True, id="entropy"),
    pytest.param(PLAIN, 5, False, id="low-rank"),
    pytest.param(Options(1.7, 5.0, 1.3), 5, True, id="all-options"),
]


def exact_dlogits(
    inputs: Inputs, options: Options, low_rank: LowRank | None, dlogps: Tensor, dentropy: Tensor, dtype: torch.dtype
) -> Tensor:
    """Autograd's gradient of a bias of each logit."""
    wide = Inputs(*(t if t is None or t is inputs.targets else t.to(dtype) for t in inputs))
    free = torch.zeros(wide.hidden.shape[0], wide.weight.shape[0], dtype=dtype, device=dlogps.device).requires_grad_()
    z = F.linear(wide.hidden, wide.weight, wide.bias) + free
    if low_rank is not None:
        z = z + low_rank[0].to(dtype) @ low_rank[1].to(dtype).T
    x, index = eager.transform_logits(z, *options), wide.targets[:, None]
    logps = x.log_softmax(1).gather(1, index)[:, 0]
    log_q = x.scatter(1, index, -1e30).log_softmax(1)
    entropy = -(log_q.exp() * log_q).sum(1)
    (dlogits,) = torch.autograd.grad([logps, entropy], free, [dlogps.to(dtype), dentropy.to(dtype)])
    return dlogits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "rank", "has_entropy"), GRADIENTS)
def test_backward(options: Options, rank: int, has_entropy: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_inputs(dtype, device, bias=True)
    low_rank = make_low_rank(inputs, rank) if rank else None
    forward = linear_logprobs_forward(*inputs, *Transform.of(*options), True, low_rank=low_rank)
    assert forward.stats is not None
    dlogps, dentropy = torch.randn(2, N, dtype=forward.others.dtype, device=device)
    entropy = (dentropy, forward.stats[0]) if has_entropy else None
    dlogits = inputs.hidden.new_empty(N, V)
    backward(dlogits, dlogps, inputs, forward, options, low_rank, entropy)
    same_dtype, exact = (
        exact_dlogits(inputs, options, low_rank, dlogps, dentropy * has_entropy, t)
        for t in (forward.others.dtype, torch.float64)
    )
    if dtype == torch.float64:
        torch.testing.assert_close(dlogits, exact, rtol=1e-11, atol=1e-14)
    else:
        assert_as_accurate(dlogits, same_dtype.to(dtype), exact, "dlogits")


def test_impossible_tokens_have_no_entropy_gradient(device: torch.device) -> None:
    inputs = make_inputs(torch.float64, device, bias=True)
    assert inputs.bias is not None
    inputs.bias[:20] = -torch.inf
    inputs.targets[:] = 30
    forward = linear_logprobs_forward(*inputs, *Transform(), True)
    assert forward.stats is not None
    zero, one = torch.zeros_like(forward.others), torch.ones_like(forward.others)
    dlogits = inputs.hidden.new_empty(N, V)
    backward(dlogits, zero, inputs, forward, PLAIN, entropy=(one, forward.stats[0]))
    possible = Inputs(inputs.hidden, inputs.weight[20:], inputs.targets - 20, inputs.bias[20:])
    assert not dlogits[:, :20].any()
    torch.testing.assert_close(dlogits[:, 20:], exact_dlogits(possible, PLAIN, None, zero, one, torch.float64))


@pytest.mark.parametrize(
    "options", [pytest.param(PLAIN, id="plain"), pytest.param(Options(1.7, 2.0, 0.8), id="all-options")]
)
def test_gradcheck_with_low_rank_and_entropy(options: Options, device: torch.device) -> None:
    class LogpsAndEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            hidden, weight, hidden2, weight2, targets = tensors
            forward = linear_logprobs_forward(
                hidden, weight, targets, None, *Transform.of(*options), True, low_rank=(hidden2, weight2)
            )
            assert forward.stats is not None
            ctx.forward = forward
            ctx.save_for_backward(*tensors)
            return F.logsigmoid(forward.target_logits - forward.others), forward.stats[0].clone()

        @staticmethod
        def backward(ctx: Any, dlogps: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
            hidden, weight, hidden2, weight2, targets = ctx.saved_tensors
            dlogits = hidden.new_empty(hidden.shape[0], weight.shape[0])
            entropy = (dentropy, ctx.forward.stats[0])
            backward(
                dlogits, dlogps, Inputs(hidden, weight, targets), ctx.forward, options, (hidden2, weight2), entropy
            )
            return dlogits @ weight, dlogits.T @ hidden, dlogits @ weight2, dlogits.T @ hidden2, None

    inputs = make_inputs(torch.float64, device, shape=(2, 18, 2))
    leaves = (t.requires_grad_() for t in (inputs.hidden, inputs.weight, *make_low_rank(inputs, 1)))
    assert torch.autograd.gradcheck(LogpsAndEntropy.apply, (*leaves, inputs.targets))

"""The warp-specialised forward against float64, its source run by a simulator under many schedules, and with faults."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdpo
from fastdpo.head import eager, linear_logprobs
from fastdpo.head.impl import triton as triton_impl
from fastdpo.head.impl.interface import Keep, LinearHead, Transform
from fastdpo.kernels.linear_logprobs_forward import ForwardOutput
from fastdpo.kernels.logits_tile import Config
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import PLAIN, Inputs, Options, make_inputs
from tests.helpers.warp_simulator import KINDS, SimulatedFault, Simulator

SOURCE = (Path(__file__).parents[2] / "kernels" / "linear_logprobs_forward_gluon.py").read_text()
TILE = 16
CONFIG = Config(BLOCK_N=16, BLOCK_V=32, BLOCK_D=16, num_warps=4, num_stages=3)
SHAPE = (37, 150, 72)  # three blocks of rows, five tiles and five blocks of the hidden size; all ragged
FIRST = [(kind,) for kind in KINDS]
LAST = [tuple(kind for kind in KINDS if kind != last) for last in KINDS]
SCHEDULES = [(), *FIRST, *LAST]  # kinds that go first whenever they can; others at random


def simulate(
    inputs: Inputs,
    options: Options = PLAIN,
    *,
    source: str = SOURCE,
    order: tuple[str, ...] = (),
    config: Config | None = CONFIG,
    splits: int = 2,
    programs: int = 2,
    tile: int = TILE,
) -> ForwardOutput:
    simulator = Simulator(source, order)
    module: dict[str, Any] = simulator.namespace
    module.update(TILE=tile, GROUP_N=2, processors=lambda x: programs, fits_gluon=lambda *tensors: True)
    launch = module["linear_logprobs_forward_gluon"]
    result: ForwardOutput = launch(
        *inputs, *Transform.of(*options), False, tile_masses=True, config=config, splits=splits
    )
    return result


def reference(inputs: Inputs, options: Options, dtype: torch.dtype, tile: int) -> dict[str, Tensor]:
    z = F.linear(inputs.hidden.to(dtype), inputs.weight.to(dtype))
    x, slope = eager.transform_logits(z, *options), torch.ones_like(z)
    if options.softcap is not None:
        slope = 1 / (options.logit_scale * z / options.softcap).cosh().square()
    index = inputs.targets[:, None]
    rest = x.scatter(1, index, -torch.inf)
    masses = F.pad(rest + slope.log(), (0, -x.shape[1] % tile), value=-torch.inf).unflatten(1, (-1, tile)).logsumexp(2)
    return {"target_logits": x.gather(1, index)[:, 0], "others": rest.logsumexp(1), "tile_masses": masses}


def check(inputs: Inputs, actual: ForwardOutput, options: Options = PLAIN, tile: int = TILE) -> None:
    exact, same_dtype = (reference(inputs, options, dtype, tile) for dtype in (torch.float64, torch.float32))
    for name, e in exact.items():
        value = getattr(actual, name)
        possible = e > -torch.inf  # a tile may hold nothing but the target
        assert torch.equal(value > -torch.inf, possible), name
        value, s, e = (t.masked_fill(~possible, 0.0) for t in (value, same_dtype[name], e))
        assert_as_accurate(value, s, e, name)


TRANSFORMS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param(Options(logit_scale=-0.3), id="negative-scale"),
    pytest.param(Options(1.7, 5.0, 1.3), id="softcap"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
def test_results(options: Options, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, torch.device("cpu"), shape=SHAPE)
    check(inputs, simulate(inputs, options), options)


CASES = [
    pytest.param((1, 33, 8), 2, 3, CONFIG, id="one-row-and-less-than-a-block"),
    pytest.param((32, 64, 32), 2, 3, CONFIG, id="whole-blocks"),
    pytest.param((33, 65, 40), 4, 2, CONFIG, id="more-shares-than-tiles"),
    pytest.param((40, 70, 50), 2, 1, CONFIG._replace(num_stages=2), id="two-slots"),
    pytest.param((40, 70, 50), 2, 5, CONFIG._replace(BLOCK_V=TILE, num_stages=6), id="one-mass-a-tile"),
]


@pytest.mark.parametrize(("shape", "splits", "programs", "config"), CASES)
def test_shapes(shape: tuple[int, int, int], splits: int, programs: int, config: Config) -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=shape)
    check(inputs, simulate(inputs, config=config, splits=splits, programs=programs))


@pytest.mark.parametrize("options", [TRANSFORMS[1], TRANSFORMS[2]])
def test_production_tiles(options: Options) -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=(150, 700, 200))
    actual = simulate(inputs, options, config=None, tile=triton_impl.TILE)
    check(inputs, actual, options, triton_impl.TILE)


def test_every_schedule_gives_the_same_bits() -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=SHAPE)
    first, *others = (simulate(inputs, order=order) for order in SCHEDULES)
    check(inputs, first)
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert one is another or torch.equal(one, another)


def test_target_outside_the_vocabulary() -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=(18, 40, 16))
    inputs.targets[:3] = torch.tensor([-1, 40, 2**40])
    actual = simulate(inputs)
    assert torch.equal(actual.target_logits == -torch.inf, torch.arange(18) < 3)
    exact = F.linear(inputs.hidden.double(), inputs.weight.double())[:3].logsumexp(1)
    torch.testing.assert_close(actual.others[:3].double(), exact, rtol=1e-5, atol=1e-5)


WAIT_EMPTY = "mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)"
WAIT_FULL = "mbarrier.wait(full.index(slot), (step // STAGES) & 1)"
ARRIVE = "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=d_start > 0)"
LAST_ARRIVE = "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))"
LAST_WAIT = "z = warpgroup_mma_wait(0, deps=[z])"
ZEROS = "z = gl.full([ROWS, BLOCK_V]"
EXPECT = "hidden_desc.block_type.nbytes + weight_desc.block_type.nbytes"
COPY = "async_load(weight_desc, [tile * BLOCK_V, d_start], full.index(slot), weight_ring.index(slot))"
LAST_TILE = "range(pid_s * tiles // S, (pid_s + 1) * tiles // S):\n            z"
PLANTED = {  # what to change, what takes its place, and what is found; "off by": the results are wrong
    "producer-phase": (WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""), "deadlock"),
    "consumer-phase": (WAIT_FULL, WAIT_FULL.replace("& 1", "& 1 ^ 1"), "before its partition has waited"),
    "producer-does-not-wait": (WAIT_EMPTY, "pass", "a copy overwrites"),
    "consumer-does-not-wait": (WAIT_FULL, "pass", "before its partition has waited"),
    "no-arrival-in-the-loop": (ARRIVE, "pass", "deadlock"),
    "no-arrival-after-the-loop": (LAST_ARRIVE, "pass", "deadlock"),
    "slot-freed-while-it-is-read": (ARRIVE, "mbarrier.arrive(empty.index(slot))", "a copy overwrites|more arrivals"),
    "slot-freed-before-the-last-wait": (
        f"{LAST_WAIT}\n            {LAST_ARRIVE}", f"{LAST_ARRIVE}\n            {LAST_WAIT}", "a copy overwrites",
    ),
    "one-consumer-frees-a-slot": ("init(empty.index(slot), count=2)", "init(empty.index(slot), count=1)",
                                  "more arrivals|a copy overwrites|off by|deadlock"),
    "too-few-bytes": (EXPECT, "hidden_desc.block_type.nbytes", "before its partition has waited|deadlock"),
    "too-many-bytes": (EXPECT, f"{EXPECT} + 16", "deadlock"),
    "swapped-halves": ("slice(HALF * ROWS", "slice((1 - HALF) * ROWS", "off by"),
    "fold-before-the-matmul-ends": (LAST_WAIT, LAST_WAIT.replace("0", "1"), "registers are read"),
    "fold-of-the-wrong-order": ("rescale = gl.exp2(c * m - shift)", "rescale = gl.exp2(c * m_new - shift)", "off by"),
    "steps-start-again": (ZEROS, f"step = 0; {ZEROS}", "before its partition has waited|deadlock|more arrivals"),
    "both-store-the-same-rows": ("BLOCK_N + HALF * ROWS + gl.arange", "BLOCK_N + gl.arange", "written twice"),
    "mass-past-the-end": (" & (v_start + TILE < V)", "", "outside its tensor"),
    "a-copy-too-many": (COPY, f"{COPY}; {COPY}", "a copy overwrites"),
    "a-tile-too-few": (LAST_TILE, LAST_TILE.replace("S):", "S - 1):"), "off by|deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found(name: str) -> None:
    old, new, message = PLANTED[name]
    assert SOURCE.count(old) == 1
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=(20, 100, 56))

    def simulate_all() -> None:
        for order in SCHEDULES:
            check(inputs, simulate(inputs, source=SOURCE.replace(old, new), order=order))

    with pytest.raises(AssertionError, match=message):
        simulate_all()


def test_a_slot_that_is_freed_too_early_is_found_in_any_schedule() -> None:
    """As the rules are checked by what a partition has waited for, a fault needs no bad luck."""
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=(20, 100, 56))
    for order in SCHEDULES:
        with pytest.raises(SimulatedFault):
            simulate(inputs, source=SOURCE.replace(WAIT_FULL, "pass"), order=order)


@pytest.mark.parametrize("asked", ["bias", "stats", "low_rank", "something_new", "device"])
def test_what_the_kernel_does_not_serve_goes_to_the_other_forward(asked: str) -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), bias=asked == "bias", shape=(18, 40, 16))
    module = Simulator(SOURCE).namespace
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module.update(
        fits_gluon=lambda *tensors: asked != "device", linear_logprobs_forward=lambda *a, **k: calls.append((a, k))
    )
    others = {asked: "value"} if asked in ("low_rank", "something_new") else {}
    arguments = (*inputs, 1.0, None, asked == "stats")
    module["linear_logprobs_forward_gluon"](*arguments, tile_masses=True, **others)
    assert calls == [(arguments, {"tile_masses": True, "config": None, "splits": None, **others})]


def test_fits_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = pytest.importorskip("fastdpo.kernels.linear_logprobs_forward_gluon")
    hidden = torch.empty(2, 8, dtype=torch.bfloat16)
    assert not module.fits_gluon(hidden, hidden), "on no GPU"
    monkeypatch.setattr(module, "fits_tma", lambda *tensors: True)
    for capability in ((9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert module.fits_gluon(hidden, hidden) == (capability == (9, 0))


def test_the_implementation_takes_shares_from_its_masses() -> None:
    inputs = make_inputs(torch.bfloat16, torch.device("cpu"), shape=(21, 300, 40))
    module = Simulator(SOURCE).namespace
    config = Config(BLOCK_N=16, BLOCK_V=2 * triton_impl.TILE, BLOCK_D=16, num_warps=4, num_stages=2)
    module.update(CONFIG=config, fits_gluon=lambda *tensors: True)
    head = LinearHead(inputs.weight, None, None, Transform())
    launch = module["linear_logprobs_forward_gluon"]
    result = triton_impl.forward(inputs.hidden, None, inputs.targets, head, keep=Keep(shares=True), launch=launch)
    assert result.kept.shares is not None
    exact = F.linear(inputs.hidden.double(), inputs.weight.double()).scatter(1, inputs.targets[:, None], -torch.inf)
    shares = F.pad(exact.softmax(1), (0, 84)).unflatten(1, (3, 128)).sum(2)
    torch.testing.assert_close(result.kept.shares.double(), shares, rtol=2**-8, atol=1e-6)
    assert_as_accurate(result.others, exact.float().logsumexp(1), exact.logsumexp(1), "others")


def test_a_call_that_is_not_served_is_computed_as_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastdpo.kernels.linear_logprobs_forward_gluon")
    inputs = make_inputs(torch.float32, torch.device("cpu"), bias=True, shape=(5, 33, 16))
    found = []
    for impl in ("triton", "gluon"):
        monkeypatch.setattr(linear_logprobs, "choose_impl", lambda *_, impl=impl: (impl, ""))
        hidden = inputs.hidden.clone().requires_grad_()
        logps = fastdpo.linear_logprobs(hidden, *inputs[1:])
        logps.sum().backward()
        found.append((logps.detach(), hidden.grad))
    assert all(map(torch.equal, *found))

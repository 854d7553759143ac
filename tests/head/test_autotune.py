"""The choice of the fastest implementation, with a clock of its own instead of a device's."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.head import autotune

KEY = "some device, some shape"
COST = {"triton": 3.0, "blas": 2.0}
HIDDEN = torch.empty(0)


class FakeEvent:
    """A moment of a device that is behind until it is told to catch up."""

    now = 0.0
    reached = -1.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return self.at <= FakeEvent.reached

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.query(), "somebody would have waited"
        return end.at - self.at


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "Event", FakeEvent)
    FakeEvent.now, FakeEvent.reached = 0.0, -1.0
    forget()
    yield tmp_path / "choices.json"
    forget()


def forget() -> None:
    """As a new process would."""
    autotune._verdicts = None
    autotune._calls.clear()
    autotune._events.clear()


def call(candidates: tuple[str, ...] = ("triton", "blas"), cost: dict[str, float] = COST) -> str:
    """One forward and backward; the first of each candidate compiles for long."""
    impl = autotune.pick(KEY, candidates)
    first = not autotune._events.get(KEY, {}).get((impl, "forward"))
    for phase in ("forward", "backward"):
        with autotune.timed(KEY, impl, phase, HIDDEN):
            FakeEvent.now += cost[impl] * (50 if first and impl == "blas" else 1)
    return impl


def test_candidates_take_turns_and_the_fastest_wins(cache: Path) -> None:
    trials = [call() for _ in range(2 * autotune.ROUNDS)]
    assert trials == ["triton", "blas"] * autotune.ROUNDS
    assert [call() for _ in range(3)] == ["triton"] * 3, "the device has not caught up, and nobody waits for it"
    assert not cache.exists()
    FakeEvent.reached = FakeEvent.now
    assert [call() for _ in range(3)] == ["blas"] * 3
    assert json.loads(cache.read_text()) == {KEY: "blas"}


def test_a_device_that_is_always_a_call_behind_gets_its_verdict(cache: Path) -> None:
    impls = []
    for _ in range(2 * autotune.ROUNDS + 3):
        FakeEvent.reached = FakeEvent.now - 1  # in the middle of the last backward
        impls.append(call())
    assert impls[-2:] == ["blas"] * 2
    assert json.loads(cache.read_text()) == {KEY: "blas"}


def test_a_verdict_outlives_the_process(cache: Path) -> None:
    cache.write_text(json.dumps({KEY: "blas", "another": "triton"}))
    assert call() == "blas"
    assert not autotune._events


def test_verdicts_of_other_processes_are_kept(cache: Path) -> None:
    for _ in range(2 * autotune.ROUNDS):
        call()
    cache.write_text(json.dumps({"another": "triton"}))
    FakeEvent.reached = FakeEvent.now
    call()
    assert json.loads(cache.read_text()) == {"another": "triton", KEY: "blas"}


def test_a_candidate_that_no_longer_exists_is_no_verdict(cache: Path) -> None:
    cache.write_text(json.dumps({KEY: "cutlass"}))
    assert call() == "triton"


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_broken_file_is_named_and_measured_again(content: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text(content)
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        assert call() == "triton"
    assert str(cache) in caplog.text


def test_a_file_that_cannot_be_written_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("FASTDPO_CACHE", str(cache.parent / "file"))
    for _ in range(2 * autotune.ROUNDS):
        call()
    FakeEvent.reached = FakeEvent.now
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        assert call() == "blas"
        assert call() == "blas"
    assert "timed again next time" in caplog.text


def test_forward_alone_counts_too(cache: Path) -> None:
    """A reference model has no backward."""
    for _ in range(2 * autotune.ROUNDS):
        impl: Any = autotune.pick(KEY, ("triton", "blas"))
        with autotune.timed(KEY, impl, "forward", HIDDEN):
            FakeEvent.now += COST[impl]
    FakeEvent.reached = FakeEvent.now
    assert autotune.pick(KEY, ("triton", "blas")) == "blas"


def test_calls_that_are_no_trial_are_not_timed() -> None:
    with autotune.timed("", "triton", "forward", HIDDEN):
        pass
    assert not autotune._events


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "is_captured", lambda x: x is HIDDEN)
    with autotune.timed(KEY, "triton", "forward", HIDDEN):
        pass
    assert not autotune._events
    with autotune.timed(KEY, "triton", "forward", torch.empty(0)):
        pass
    assert autotune._events


class OnDevice:
    """Stands for hidden states on a GPU."""

    device, dtype, shape, is_cuda = torch.device("cuda"), torch.bfloat16, (5, 4), True


@pytest.fixture
def device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "has_triton", lambda: True)


def choose(workspace: int = 2**28) -> tuple[str, str]:
    hidden: Any = OnDevice()
    return autotune.choose_impl("auto", hidden, torch.empty(7, 4), [True, False, False, False, False], True, workspace)


@pytest.mark.usefixtures("device_of_its_own")
def test_other_kernels_are_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = choose()
    assert before[1]
    assert choose(2**30)[1] != before[1], "with more room, one of them keeps more"
    monkeypatch.setattr(autotune, "version_of_kernels", lambda: "another")
    assert choose()[1] not in ("", before[1])


@pytest.mark.usefixtures("device_of_its_own")
@pytest.mark.parametrize("state", ["is_captured", "several_ranks"])
def test_no_trial_where_it_may_not_be_timed_or_ranks_would_differ(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, state, lambda *_: True)
    assert [choose() for _ in range(3)] == [("triton", "")] * 3


def test_the_version_of_the_kernels_follows_triton_and_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> str:
        return autotune.version_of_kernels.__wrapped__()

    before = now()
    assert now() == before
    monkeypatch.setattr(autotune, "import_module", lambda name: SimpleNamespace(__version__="0.0.1"))
    assert now() != before


@pytest.fixture
def hopper(device_of_its_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which the Gluon forward fits, and a user who allows it."""
    monkeypatch.setenv("FASTDPO_GLUON", "1")
    monkeypatch.setattr(autotune, "has_gluon", lambda: True)
    monkeypatch.setattr(autotune, "version_of_kernels", lambda: "some")
    monkeypatch.setattr(autotune, "import_module", lambda name: SimpleNamespace(fits_gluon=lambda *tensors: True))


def candidates(**options: bool) -> set[str]:
    hidden: Any = OnDevice()
    needs = [True, False, False, False, False]
    return {autotune.choose_impl("auto", hidden, torch.empty(7, 4), needs, True, 2**28, **options)[0] for _ in range(3)}


@pytest.mark.usefixtures("hopper")
def test_the_gluon_forward_is_a_candidate_if_it_serves_the_call() -> None:
    assert candidates(plain=True) == {"triton", "blas", "gluon"}
    assert candidates() == {"triton", "blas"}, "a bias, a low-rank addition or statistics"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("lacking", ["permission", "Gluon", "Hopper", "one process"])
def test_the_gluon_forward_is_absent_quietly(
    lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lacking == "permission":
        monkeypatch.delenv("FASTDPO_GLUON")
    monkeypatch.setattr(autotune, "has_gluon", lambda: lacking != "Gluon")
    module = SimpleNamespace(fits_gluon=lambda *tensors: lacking != "Hopper")
    monkeypatch.setattr(autotune, "import_module", lambda name: module)
    monkeypatch.setattr(autotune, "several_ranks", lambda: lacking == "one process")
    assert "gluon" not in candidates(plain=True)
    assert not caplog.records


@pytest.mark.parametrize("error", [ImportError("no gluon"), AttributeError("no jit")])
def test_a_triton_whose_gluon_differs_is_no_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(autotune, "import_module", fail)
    monkeypatch.setattr(autotune, "has_triton", lambda: True)
    assert autotune.has_gluon.__wrapped__() is False

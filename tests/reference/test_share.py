"""fastdpo.reference.share: the reference's share of the time, and when precomputing would pay."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from fastdpo.model import scoring_forward
from fastdpo.reference.share import ReferenceTime
from tests.helpers.trainers import lora, rows, tiny_llama

REFERENCE, POLICY = 3.0, 7.0
SHARE = REFERENCE / (REFERENCE + POLICY)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only forwards take time: those without gradients, as the reference's, `REFERENCE` seconds."""
    now, score = 1.0, scoring_forward._score

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now += POLICY if torch.is_grad_enabled() else REFERENCE
        return score(*args, **kwargs)

    monkeypatch.setattr(scoring_forward, "_score", timed)
    monkeypatch.setattr("time.perf_counter", lambda: now)


@pytest.fixture
def every_second_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log advise short runs too."""
    monkeypatch.setattr("fastdpo.reference.share.WORTH_SAYING", 1.0)


def shares(trainer: Any) -> list[float]:
    trainer.train()
    assert not any("share" in key for entry in trainer.state.log_history if "eval_loss" in entry for key in entry)
    return [entry["reference/share"] for entry in trainer.state.log_history if "reference/share" in entry]


ASKED: dict[str, dict[str, Any]] = {
    "copy": {},
    "given": {"ref_model": tiny_llama},
    "adapters off": {"peft_config": lambda: lora()},
    "ref adapter": {"peft_config": lambda: lora(init_lora_weights=False)},
    "TR-DPO": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "accumulated": {"gradient_accumulation_steps": 3},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", ASKED)
def test_the_share_of_a_reference_that_is_asked(make: Callable[..., Any], clock: None, kind: str) -> None:
    """Whatever it is, and also amid evaluations, whose time is not of training."""
    settings = {name: value() if callable(value) else value for name, value in ASKED[kind].items()}
    settings |= {"eval_dataset": rows(4, 5), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    assert shares(make(**settings)) == pytest.approx([SHARE] * 3)


def test_the_share_where_a_loss_compares_the_micro_batches_of_a_step(make: Callable[..., Any], clock: None) -> None:
    """Policy and reference run first without gradients, and then the policy again."""
    trainer = make(loss_type="aot", gradient_accumulation_steps=2, max_steps=2)
    assert shares(trainer) == pytest.approx([REFERENCE / (2 * REFERENCE + POLICY)] * 2)


@pytest.mark.parametrize(
    "settings",
    [{"precompute_ref_log_probs": True}, {"reference_free": True}, {"loss_type": "simpo", "beta": 2.0}],
    ids=["precomputed", "reference_free", "simpo"],
)
def test_what_asks_no_reference_has_no_share(
    make: Callable[..., Any],
    clock: None,
    every_second_counts: None,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make(eval_dataset=rows(4, 5), eval_strategy="steps", eval_steps=1, max_steps=2, **settings)
    with caplog.at_level("INFO", "fastdpo"):
        assert shares(trainer) == []
    assert said(caplog) == []


def test_a_resumed_window_keeps_its_share(make: Callable[..., Any], clock: None, tmp_path: Path) -> None:
    """Logged after four steps, the first three of them before the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "logging_steps": 4}
    make(**settings).train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.log_history[0]["reference/share"] == pytest.approx(SHARE)


# When precomputing pays


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "precompute_ref_log_probs=True would" in message]


def test_it_is_said_once_when_precomputing_pays(
    make: Callable[..., Any], clock: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as enough steps were made: 24 steps are three passes over 32 pairs."""
    trainer = make(max_steps=24)
    at: list[int] = []
    with caplog.at_level("INFO", "fastdpo"):
        log = trainer.log

        def logging(*args: Any) -> None:
            before = len(said(caplog))
            log(*args)
            at.extend([trainer.state.global_step] * (len(said(caplog)) - before))

        trainer.log = logging
        trainer.train()
    assert said(caplog) == [
        "reference: it takes 30 % of the time, about 72 s of this run. precompute_ref_log_probs=True would compute it "
        "once, in about 24 s, for all epochs and for later runs on these rows, and pays in this run of 3 epochs"
    ]
    assert at == [20]


def test_a_short_run_says_it_at_its_end(
    make: Callable[..., Any], clock: None, every_second_counts: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "fastdpo"):
        make(max_steps=2).train()
    assert [message.partition(", and pays ")[2] for message in said(caplog)] == [
        "with 5 such runs, or with a second epoch"
    ]


@pytest.mark.parametrize("kind", ["TR-DPO", "stream"])
def test_what_cannot_be_precomputed_is_not_advised(
    make: Callable[..., Any], clock: None, every_second_counts: None, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    settings = {
        "TR-DPO": ASKED["TR-DPO"],
        "stream": {"data": IterableDataset.from_generator(lambda: iter(rows(32).to_list()))},
    }[kind]
    with caplog.at_level("INFO", "fastdpo"):
        assert shares(make(max_steps=2, **settings)) == pytest.approx([SHARE] * 2)
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("seconds", "epochs", "expected"),
    [
        (6000.0, 3.0, "about 1.7 h of this run.*in about 33 min, .*pays in this run of 3 epochs$"),
        (600.0, 1.0, "about 10 min of this run.*in about 10 min, .*pays with 2 such runs, or with a second epoch$"),
        (60.0, 0.3, "about 60 s of this run.*in about 3 min, .*pays with 4 such runs, or with a second epoch$"),
        (59.0, 3.0, None),
    ],
    ids=["epochs", "one-epoch", "part-of-an-epoch", "too-short"],
)
def test_the_advice_follows_from_epochs(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    epochs: float,
    expected: str | None,
) -> None:
    """In a run that was resumed at step 100 of 1100, half of the rest of which is done."""
    now = iter((0.0, seconds * 500 / 1100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    time = ReferenceTime(torch.device("cpu"))
    with time.measured(100):
        pass
    time.log(seconds)
    with caplog.at_level("INFO", "fastdpo"):
        for step in (110, 600, 601):
            time.advise(step, epochs * step / 1100, 1100, ends=False)
    assert len(said(caplog)) == (expected is not None)
    assert all(re.search(str(expected), message) for message in said(caplog)), said(caplog)


# On a device that works on its own


class Device:
    """Work that is queued, and events between it, as CUDA has them."""

    def __init__(self) -> None:
        self.done, self.queued, self.waits = 0.0, 0.0, 0

    def event(self, device: Any, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)


class Event:
    """A place in a device's queue."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.queued

    def query(self) -> bool:
        return self.at <= self.device.done

    def synchronize(self) -> None:
        self.device.waits += not self.query()
        self.device.done = max(self.device.done, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "PyTorch raises"
        return 1e3 * (end.at - self.at)


def test_nothing_waits_for_a_device_before_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch, "Event", device.event)
    time = ReferenceTime(torch.device("cuda"))
    for step in range(4):
        device.queued += POLICY
        with time.measured(step):
            device.queued += REFERENCE
        if step == 1:
            device.done = device.queued  # the host was slow
    assert device.waits == 0
    assert len(time._spans) == 2  # what the device has done is not kept
    device.done = device.queued  # the metrics have been read
    assert time.log(device.done) == {"reference/share": pytest.approx(SHARE)}
    assert device.waits == 0


def test_what_ran_out_of_memory_is_not_counted() -> None:
    time = ReferenceTime(torch.device("cpu"))
    with pytest.raises(MemoryError), time.measured(0):
        raise MemoryError
    assert time.log(1.0) == {}

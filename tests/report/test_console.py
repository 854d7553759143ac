"""fastdpo.report.console and fastdpo.report.log_output: what a run shows on the terminal, once."""

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerState

from fastdpo.model.adapters import wrap_adapter
from fastdpo.model.layout import choose_layout
from fastdpo.report import log_output
from fastdpo.report.console import Bar, Lines, line, replace_callback
from tests.helpers.trainers import rows, tiny_llama

ROOT = Path(__file__).parent.parent.parent
TRAINED = {
    **{"loss": 0.61234, "grad_norm": 1.2345, "learning_rate": 4.5e-4, "rewards/chosen": 0.1, "rewards/margins": 0.0123},
    **{
        "rewards/accuracies": 0.6125,
        "tokens_per_second": 12345.6,
        "peak_memory_gib": 3.14,
        "epoch": 0.28,
        "entropy": 2.0,
    },
}


def state_at(step: int, *, total: int = 0, first: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=first)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (
            TRAINED,
            "step  10/216  epoch 0.28  train  loss 0.6123  margin +0.012  accuracy 61.3%  lr 4.50e-04  "
            "12,346 tokens/s  3.1 GiB  grad norm 1.23",
        ),
        (
            {"loss": 2.5, "aux_loss": 1.02, "learning_rate": 0.0},
            "step  10/216  train  loss 2.5000  aux loss 1.020  lr 0.00e+00",
        ),
        (
            {"eval_loss": 0.5, "eval_rewards/margins": -1.0, "eval_runtime": 3.0, "eval_entropy": 1.0, "epoch": 1.0},
            "step  10/216  epoch 1.00  eval   loss 0.5000  margin -1.000",
        ),
        (
            {"eval_helpful_set_loss": 0.5, "eval_helpful_set_rewards/accuracies": 1.0, "eval_helpful_set_runtime": 3.0},
            "step  10/216  eval helpful_set  loss 0.5000  accuracy 100.0%",
        ),
        (
            {"train_runtime": 3725.4, "train_loss": 0.4, "total_flos": 1e12, "rewards/margins": 2.0, "epoch": 6.0},
            "step  10/216  epoch 6.00  done   mean loss 0.4000  took 1:02:05  last steps:  margin +2.000",
        ),
        ({"train_runtime": 59.6, "train_loss": 0.4}, "step  10/216  done   mean loss 0.4000  took 0:01:00"),
        (
            {"temperature": 0.123456, "phase": "warm", "epoch": 0.5},
            "step  10/216  epoch 0.50  temperature 0.1235  phase warm",
        ),
    ],
    ids=["train", "no-margins", "eval", "named-split", "done", "all-logged", "users-own"],
)
def test_the_line_of_a_record(logs: dict[str, Any], expected: str) -> None:
    before = dict(logs)
    assert line(logs, state_at(10, total=216)) == expected
    assert logs == before  # which goes to the sinks as it is


def test_a_run_of_no_steps_has_no_loss() -> None:
    assert (
        line({"train_runtime": 0.1, "train_loss": 0.0}, state_at(0)) == "step 0  done   no step was made  took 0:00:00"
    )


def test_outside_of_training_there_is_no_total() -> None:
    assert line({"eval_loss": 0.5, "eval_runtime": 1.0}, state_at(0)) == "step 0  eval   loss 0.5000"


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("theirs", "stderr", "ours"),
    [
        (ProgressCallback, Terminal(), Bar),
        (ProgressCallback, io.StringIO(), Lines),
        (PrinterCallback, Terminal(), Lines),
    ],
    ids=["terminal", "file", "disable_tqdm"],
)
def test_the_trainers_own_callback_alone_is_replaced(
    theirs: type, stderr: io.StringIO, ours: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Users(ProgressCallback): ...

    users, users_own_kind = Users(), theirs()
    callbacks = [users, users_own_kind, theirs()]
    monkeypatch.setattr(sys, "stderr", stderr)
    replace_callback(callbacks)
    assert callbacks[:2] == [users, users_own_kind]
    assert type(callbacks[2]) is ours
    notebook: list[Any] = [object()]
    replace_callback(notebook[:])
    assert type(notebook[0]) is object


def test_only_the_first_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for callback in (Lines(), Bar()):
        for first in (False, True):
            callback.on_log(None, state_at(1, first=first), None, logs={"loss": 1.0})
    assert capsys.readouterr() == ("", "step 1  train  loss 1.0000\n" * 2)


def test_a_run_prints_one_line_for_each_record(
    make: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In a file there are no carriage returns, whatever disable_tqdm says."""
    for disable in (True, False):
        settings = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
        trainer = make(**settings, eval_dataset={"a": rows(4, 5), "b": rows(4, 6)}, disable_tqdm=disable)
        capfd.readouterr()
        trainer.train()
        out, err = capfd.readouterr()
        assert out == ""
        assert "\r" not in err
        printed = err.splitlines()
        assert [words.split("  ")[2].strip() for words in printed] == [
            *("train", "eval a", "eval b", "train", "eval a", "eval b", "done"),
        ]
        assert len(printed) == len(trainer.state.log_history)
        assert "last steps:  margin" in printed[-1]


def test_the_bar_survives_the_lines(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    trainer = make(max_steps=3, disable_tqdm=False)
    trainer.train()
    shown = [part for row in stderr.getvalue().split("\n") for part in row.split("\r")[-1:]]
    assert [part.split("  ")[0] for part in shown if part.startswith("step")] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
        "step 3/3",
    ]
    assert "100%|" in shown[-2]  # the bar stands below, complete


# Messages


@contextlib.contextmanager
def nobody_has_configured_logging() -> Iterator[logging.Logger]:
    """As in a user's script; pytest has handlers of its own."""
    logger, root = logging.getLogger("fastdpo"), logging.getLogger()
    before = logger.handlers, logger.level, root.handlers
    logger.handlers, root.handlers = [], []
    logger.setLevel(logging.NOTSET)
    try:
        yield logger
    finally:
        logger.handlers, level, root.handlers = before
        logger.setLevel(level)


def test_messages_are_shown_once_to_who_configured_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_has_configured_logging() as logger:
        for _ in range(2):
            log_output.show()
            logger.info("made of %s", "snow")
        logger.warning("thaws")
        logger.debug("unseen")
    assert capsys.readouterr() == ("", "fastdpo: made of snow\n" * 2 + "fastdpo: warning: thaws\n")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whose", ["root", "fastdpo"])
def test_the_users_own_handlers_show_them_alone(whose: str, when: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with nobody_has_configured_logging() as logger:
        configured = logging.getLogger() if whose == "root" else logger
        if when == "after":
            log_output.show()
        configured.addHandler(logging.StreamHandler(stream))
        if when == "before":
            log_output.show()
            assert logger.level == logging.NOTSET
        logger.warning("thaws")
    assert stream.getvalue() == "thaws\n"
    assert capsys.readouterr() == ("", "")


def test_a_level_of_the_users_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_has_configured_logging() as logger:
        logger.setLevel(logging.ERROR)
        log_output.show()
        logger.warning("thaws")
    assert capsys.readouterr() == ("", "")


def test_the_other_processes_show_warnings_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    with nobody_has_configured_logging() as logger:
        log_output.show()
        logger.info("made of snow")
        logger.warning("thaws")
    assert capsys.readouterr().err == "fastdpo: warning: thaws\n"


@pytest.mark.parametrize(
    ("changes", "sharing", "expected"),
    [
        (
            {},
            True,
            "batches hold no padding, and what an example's responses share, such as the prompt, is computed once",
        ),
        (
            {},
            False,
            "batches hold no padding, and a prompt is computed once for each of its responses, because "
            "prefix_sharing=False",
        ),
        (
            {"attention_dropout": 0.1},
            True,
            "batches are padded, and a prompt is computed once for each of its responses, because it drops out "
            "attention weights (disable_dropout=False), which only padded batches support",
        ),
    ],
    ids=["shared", "off", "padded"],
)
def test_the_layout_is_said_in_words(
    changes: dict[str, Any], sharing: bool, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastdpo"):
        choose_layout([tiny_llama(num_hidden_layers=1, **changes)], sharing)
    assert caplog.messages == [expected]


def test_an_adapter_brings_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    peft = pytest.importorskip("peft")
    warnings.simplefilter("always")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    wrap_adapter(tiny_llama(num_hidden_layers=1), config, keeps_reference=True)
    assert not [warning.message for warning in recwarn]


SCRIPT = """
import sys
from tests.helpers.trainers import NoTokenizer, rows, tiny_llama
import fastdpo
args = fastdpo.DPOConfig(output_dir=sys.argv[1], max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows(4), processing_class=NoTokenizer()).train()
"""


@pytest.mark.slow
def test_a_script_says_how_its_batches_are_computed_and_nothing_else(tmp_path: Path) -> None:
    """No warning of a library's among it, and no line twice."""
    environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "CI": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    rows = [row for row in done.stderr.splitlines() if not row.startswith("  ")]  # those belong to the summary
    ours = [row for row in rows if row.startswith(("fastdpo: ", "step "))]
    if not any(map(find_spec, ("bitsandbytes", "cut_cross_entropy", "liger_kernel"))):  # which log lines of their own
        assert rows == ours
    said = [row.removeprefix("fastdpo: ").partition(",")[0].partition(":")[0] for row in ours]
    assert said == [
        "train dataset",
        "reference",
        "batches hold no padding",
        "attention of LlamaAttention",
        "self-check of the model passed",
        "memory",
        "step 1/1  epoch 1.00  done   mean loss 0.6931  took 0",
    ]
    assert done.stdout == ""

"""Run by a test in two processes: one of two processes gets a signal in the middle of a run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastdpo.checkpoint.preempt import Preempted
from tests.helpers.resumable import hash_of, records
from tests.helpers.trainers import make_trainer


class Signal(TrainerCallback):
    """Sends a signal to the second process alone, in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def run(folder: Path, *callbacks: TrainerCallback) -> None:
    """Train to the end, which is written down, unless a signal comes."""
    trainer = make_trainer(folder, max_steps=5, save_strategy="no", logging_steps=2)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint="auto")
    end = (records(trainer.state.log_history), hash_of(trainer.model))
    (folder / f"end-{trainer.args.process_index}").write_text(json.dumps(end, sort_keys=True))


def main(folder: Path) -> None:
    """Train through; train until the signal stops it, and then to the end; exit as the stopped training did."""
    run(folder / "through")
    try:
        run(folder / "stopped", Signal())
    except Preempted:
        if os.environ["RANK"] == "0":
            (folder / "left").write_text(" ".join(os.listdir(folder / "stopped" / "out")))
        run(folder / "stopped")
        raise

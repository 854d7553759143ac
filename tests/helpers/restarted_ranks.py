"""Run by tests/examples/test_launch.py under `tests.helpers.torchrun`, again after each restart.

A run is trained through; then it is trained again, and one of its processes is killed on the way, once.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.helpers.resumable import hash_of, records
from tests.helpers.trainers import make_trainer, tiny_llama


class Kill(TrainerCallback):
    """Kills the second process after the third step, once."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 3 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, *callbacks: TrainerCallback) -> None:
    """Train five steps with dropout and AdamW, from the last checkpoint if there is one; write down the end."""
    trainer = make_trainer(
        folder,
        tiny_llama(attention_dropout=0.1),
        disable_dropout=False,
        max_steps=5,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint="auto")
    end = (records(trainer.state.log_history), hash_of(trainer.model))
    (folder / f"end-{trainer.args.process_index}").write_text(json.dumps(end, sort_keys=True))


def main(folder: Path) -> None:
    if not (folder / "killed").exists():
        run(folder / "through")
    run(folder / "killed" / "run", Kill(folder / "killed" / "marker"))

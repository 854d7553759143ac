"""Run by tests in processes of their own that are killed: a training that resumes by itself, its end to a file."""

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.trainers import make_trainer, rows, tiny_llama, weights

TIMES = ("tokens_per_second", "runtime", "per_second", "reference/share")
LARGE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 12000}
"""8 million parameters, so that a save of 120 MB takes about a second."""


def records(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a log without the numbers that depend on the time."""
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in history]


def train(folder: Path, *, large: bool = False, resume: str | None = "auto", **settings: Any) -> None:
    """Train for a few steps, with dropout and a reference that follows; write what there is to compare at the end."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "max_steps": 7,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_on_start": True,
        "eval_dataset": rows(6, 5),
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "tokens_per_batch": 64,
        "gradient_accumulation_steps": 2,
        "disable_dropout": False,
        "lr_scheduler_type": "linear",
    } | settings
    model = tiny_llama(attention_dropout=0.1, **(LARGE if large else {}))
    trainer = make_trainer(folder, model, **settings)
    print("training", flush=True)  # noqa: T201
    trainer.train(resume_from_checkpoint=resume)
    end = {
        "log": records(trainer.state.log_history),
        "weights": weights(trainer.model).sum().item().hex(),
        "bits": hash_of(trainer.model),
        "reference": hash_of(trainer.ref_model),
        "histograms": repr(trainer.histograms),
    }
    (folder / "end.tmp").write_text(json.dumps(end))
    os.replace(folder / "end.tmp", folder / "end.json")


def hash_of(model: Any) -> str:
    import hashlib

    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()

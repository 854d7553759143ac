"""A run that resumes a checkpoint of another run: every change is said, and what decides the numbers is refused."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fastdpo.checkpoint import resume
from fastdpo.checkpoint.identity import identity
from tests.helpers.trainers import make_trainer, rows, tiny_llama

SETTINGS: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_length": 18}


def reference(seed: int) -> Any:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + seed / 100)
    return model


def swapped() -> Dataset:
    """Chosen and rejected responses exchanged."""
    names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    return rows(16).rename_columns(names)


# what makes it another run: the words that must be in the error, and the arguments of the trainer
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "beta": ("beta: 0.1 -> 0.2", {"beta": 0.2}),
    "the objective": ("loss_type: ['sigmoid'] -> ['ipo']", {"loss_type": "ipo"}),
    "label smoothing": ("label_smoothing: 0.0 -> 0.1", {"label_smoothing": 0.1}),
    "chosen and rejected swapped": ("training data: 16 rows", {"data": swapped()}),
    "data in another order": ("training data: 16 rows", {"data": rows(16).select(range(15, -1, -1))}),
    "half of the data": ("-> 8 rows", {"data": rows(16).select(range(8))}),
    "the reference": ("reference: ", {"ref_model": reference(2)}),
    "the model's config": ("model config: ", {"model": tiny_llama(rms_norm_eps=1e-5)}),
    "the seed": ("seed: 1 -> 2", {"seed": 2}),
    "gradient accumulation": ("gradient_accumulation_steps: 1 -> 2", {"gradient_accumulation_steps": 2}),
    "the longest row": ("max_length: 18 -> 12", {"max_length": 12}),
    "the budget of tokens": ("tokens_per_batch: None -> 64", {"tokens_per_batch": 64}),
    "the batch size": ("per_device_train_batch_size: 4 -> 2", {"per_device_train_batch_size": 2}),
    "the optimizer": ("optim: ", {"optim": "sgd"}),
}


def trainer(folder: Path, **changes: Any) -> Any:
    given = {"data": rows(16), "ref_model": reference(1)} | SETTINGS | changes
    return make_trainer(folder, **given)


@functools.cache
def saved() -> Path:
    folder = Path(tempfile.mkdtemp())
    trainer(folder).train()
    return folder / "out" / "checkpoint-1"


def refused(words: str, changes: dict[str, Any], folder: Path) -> bool:
    """It is an error that names the change; resume_changed goes on."""
    now = identity(trainer(folder, **changes))
    try:
        resume.begin(folder, str(saved()), now)
    except ValueError as error:
        return words in str(error) and resume.begin(folder, str(saved()), now, changed=True) is not None
    return False


def applied(change: dict[str, Any], words: str, effect: Callable[[Any], bool], folder: Path) -> bool:
    """The run goes on with the new value, which is said, and is truly in effect."""
    resumed = trainer(folder, **change)
    resumed.train(resume_from_checkpoint=str(saved()))
    found = resumed._found
    return found is not None and any(words in text for text in found.new_optimizer_settings) and effect(resumed)


def cases() -> list[tuple[str, Callable[[Path], bool]]]:
    found: list[tuple[str, Callable[[Path], bool]]] = [
        (name, functools.partial(refused, words, changes)) for name, (words, changes) in REFUSED.items()
    ]
    rate = functools.partial(
        applied, {"learning_rate": 5e-4}, "learning_rate: 0.001 -> 0.0005", lambda t: t._get_learning_rate() == 5e-4
    )
    decay = functools.partial(
        applied,
        {"weight_decay": 0.3},
        "weight_decay: 0.0 -> 0.3",
        lambda t: t.optimizer.param_groups[0]["weight_decay"] == 0.3,
    )
    return [*found, ("the learning rate", rate), ("the weight decay", decay)]

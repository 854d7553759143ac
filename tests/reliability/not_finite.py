"""Ways to make a weight NaN or infinite though loss and gradient are finite: no such weight reaches the disk."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from tests.helpers.trainers import lora, make_trainer, rows, tiny_llama


class Spoil(TrainerCallback):
    """Writes a value into a weight at the end of a step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            parameter = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            parameter.data.view(-1)[-1] = self.value


class Broken(torch.optim.SGD):
    """An optimizer whose second update divides by zero."""

    def step(self, closure: Any = None) -> Any:
        self.made = getattr(self, "made", 0) + 1
        super().step(closure)
        if self.made == 2:
            for group in self.param_groups:
                group["params"][0].data.div_(0.0)


def saved_are_finite(folder: Path) -> bool:
    files = [*folder.rglob("*.safetensors")]
    return all(bool(torch.isfinite(tensor).all()) for file in files for tensor in load_file(file).values())


def half() -> nn.Module:
    return tiny_llama().to(torch.float16)


# arguments of the trainer, and what is done to it before it trains
WAYS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "a learning rate of 1e39": ({"learning_rate": 1e39}, lambda t: None),
    "a learning rate of 3e38 for SGD": ({"learning_rate": 3e38, "optim": "sgd", "max_grad_norm": 0.0}, lambda t: None),
    "weight decay nan": ({"weight_decay": math.nan}, lambda t: None),
    "weight decay infinite": ({"weight_decay": math.inf}, lambda t: None),
    "adam_epsilon 0": ({"adam_epsilon": 0.0}, lambda t: t.model.model.embed_tokens.weight.data.mul_(1)),
    "a schedule that overflows": (
        {"learning_rate": 1e30, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9}},
        lambda t: None,
    ),
    "16-bit weights that overflow": ({"model": half, "learning_rate": 1e6}, lambda t: None),
    "a callback that writes nan": ({}, lambda t: t.add_callback(Spoil(1, math.nan))),
    "a callback that writes -inf in the last step": ({}, lambda t: t.add_callback(Spoil(3, -math.inf))),
    "an optimizer that divides by zero": (
        {},
        lambda t: setattr(t, "optimizer", Broken(t.model.parameters(), lr=1e-3)),
    ),
    "an adapter": ({"learning_rate": 1e39, "peft_config": lora}, lambda t: None),
    "the last step alone": ({"learning_rate": 1e39, "max_steps": 1, "save_strategy": "no"}, lambda t: None),
}


def handled(changes: dict[str, Any], prepare: Callable[[Any], Any], folder: Path) -> bool:
    """Training or the final save stops with an error that is true, and every weight on the disk is finite."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "data": rows(12)}
    settings |= {name: value() if callable(value) else value for name, value in changes.items()}
    trainer = make_trainer(folder, **settings)
    prepare(trainer)
    try:
        trainer.train()
        trainer.save_model()
    except FloatingPointError as error:
        true = "not saved" in str(error) or "no weight that is not finite was saved" in str(error)
        return true and saved_are_finite(folder)
    return False


def cases() -> list[tuple[str, Callable[[Path], bool]]]:
    return [(name, functools.partial(handled, *way)) for name, way in WAYS.items()]

"""Run by test_sampler.py, alone and in two processes: the examples a Trainer trains on, in order, to a file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastdpo.data import sampler

PAIRS = 41


def rows() -> Dataset:
    """Pairs of ragged lengths; one exceeds the budget of 64."""
    lengths = [(3 + i % 7, 1 + i * i % 13, 1 + i * 5 % 11) for i in range(PAIRS - 1)] + [(70, 5, 5)]
    return Dataset.from_list(
        [
            {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r, "pair_index": i}
            for i, (p, c, r) in enumerate(lengths)
        ]
    )


class Model(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def forward(self, pair_index: Tensor, **batch: Any) -> dict[str, Tensor]:
        self.seen.append(pair_index.tolist())
        return {"loss": self.weight * pair_index.float().sum()}


class BudgetTrainer(Trainer):
    """The override that `fastdpo.data.sampler` is made for."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        args = self.args
        return sampler.rebatch(
            loader,
            layout="shared",
            seed=args.data_seed or args.seed,
            epochs=1 if args.max_steps > 0 else int(-(-args.num_train_epochs // 1)),
            rank=args.process_index,
            world_size=args.world_size,
            **self.options,
        )


class StopAt(TrainerCallback):
    """Saves at a step and stops there, as a kill after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"pair_index": torch.tensor([example["pair_index"] for example in examples])}


def train(output_dir: str, options: dict[str, Any], stop_at: int = 0, resume: bool = False, **settings: Any) -> Any:
    """The batches of one run, of this process."""
    model = Model()
    args = TrainingArguments(
        output_dir=output_dir,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        optim="sgd",  # has no state: transformers 5.17 cannot load an optimizer's onto several CPU processes
        **{"num_train_epochs": 2, "gradient_accumulation_steps": 2} | settings,
    )
    trainer = BudgetTrainer(model, args, collate, rows(), callbacks=[StopAt(stop_at)] if stop_at else [])
    trainer.options = options
    trainer.train(resume_from_checkpoint=resume)
    return {"seen": model.seen, "steps": trainer.state.global_step, "max_steps": trainer.state.max_steps}


def main(folder: Path, stop_at: int) -> None:
    options = {"tokens_per_batch": 64}
    results = [train(f"{folder}/whole", options)]
    results.append(train(f"{folder}/cut", options, stop_at=stop_at))
    results.append(train(f"{folder}/cut", options, resume=True))
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))

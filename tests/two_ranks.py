"""Run by test_ddp.py under torchrun: one training run on two processes, results to a file."""

import json
import sys

import torch
from datasets import Dataset

import fastdpo
from tests.test_trainer import NoTokenizer, rows, tiny_llama, weights


def train(output_dir: str, data: Dataset, **settings: int) -> dict[str, object]:
    """Two optimizer steps; the log and a digest of the final weights."""
    model = tiny_llama()
    trainer = fastdpo.DPOTrainer(
        model=model,
        args=fastdpo.DPOConfig(
            output_dir=output_dir,
            learning_rate=1e-2,
            optim="sgd",  # Adam would hide a wrong scale of the gradients
            lr_scheduler_type="constant",
            max_steps=2,
            logging_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            **settings,
        ),
        train_dataset=data,
        eval_dataset=rows(6, seed=7),
        processing_class=NoTokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    return {"log": trainer.state.log_history, "eval": metrics, "weights": weights(model).tolist()}


if __name__ == "__main__":
    result = train(sys.argv[1], rows(16), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    if torch.distributed.get_rank() == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(result, file)
    torch.distributed.destroy_process_group()

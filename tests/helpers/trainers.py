"""Trainers of models small enough to train in seconds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import fastdpo

VOCAB = 331


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "initializer_range": 0.2,  # so that gradients are not tiny
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | changes
    )
    return LlamaForCausalLM(config)


def rows(n: int, seed: int = 0) -> Dataset:
    """Tokenised pairs of ragged lengths; the chosen response counts up, the rejected one is noise."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(3, VOCAB, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    pairs = []
    for _ in range(n):
        start = int(torch.randint(3, 200, (), generator=g))
        shared = ids(0, 3)
        chosen = shared + [start + i for i in range(int(torch.randint(2, 9, (), generator=g)))] + [2]
        pairs.append({"prompt_ids": [1, *ids(1, 12)], "chosen_ids": chosen, "rejected_ids": shared + ids(1, 9) + [2]})
    return Dataset.from_list(pairs)


class NoTokenizer:
    """Rows are tokenised already; the Trainer only wants something to save."""

    bos_token_id = None

    def save_pretrained(self, *_: Any) -> None: ...


def make_trainer(
    folder: Path, model: Any = None, ref_model: Any = None, peft_config: Any = None, data: Any = None, **args: Any
) -> "fastdpo.DPOTrainer":
    """A trainer of a tiny model on a few rows that writes into `folder`; `args` go to its config."""
    args = {
        "output_dir": str(folder / "out"),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": 1,
    } | args
    eval_dataset = args.pop("eval_dataset", None)
    return fastdpo.DPOTrainer(
        model=tiny_llama() if model is None else model,
        ref_model=ref_model,
        args=fastdpo.DPOConfig(**args),
        train_dataset=rows(32) if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=NoTokenizer(),
        peft_config=peft_config,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


TOKEN_METRICS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)


def data_for(kind: str, n: int = 12) -> Dataset:
    pairs = rows(n).to_list()
    if kind == "ranked":
        ranked = [[row["chosen_ids"], row["rejected_ids"], *[[5, 6, 2]] * (i % 2)] for i, row in enumerate(pairs)]
        return Dataset.from_list(
            [{"prompt_ids": row["prompt_ids"], "ranked_ids": r} for row, r in zip(pairs, ranked, strict=True)]
        )
    if kind == "unpaired":
        return Dataset.from_list(
            [
                {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids" if i % 3 else "rejected_ids"]}
                | {"label": bool(i % 3)}
                for i, row in enumerate(pairs)
            ]
        )
    return Dataset.from_list(pairs)

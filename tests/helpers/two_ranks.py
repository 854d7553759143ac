"""Run by test_ddp.py in two processes: training runs, results to a file."""

from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from datasets import Dataset

import fastdpo
from fastdpo.config import dpo_config
from tests.helpers import vision
from tests.helpers.trainers import NoTokenizer, data_for, rows, tiny_llama

RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sft": {"loss_type": ["sigmoid", "sft"], "logging_steps": 5},  # more than there are
    "aot": {"loss_type": "aot"},
    "kto": {"loss_type": "kto"},
    "vision": {"per_device_eval_batch_size": 2},
}


def policy(data: Dataset) -> Any:
    """The model before training; for rows with images, one that sees them."""
    return vision.make_model("llava", vision.llava_processor()) if "images" in data.column_names else tiny_llama()


def train(output_dir: str, data: Dataset, **settings: Any) -> dict[str, Any]:
    """Two optimizer steps against a reference that is another model; the log and the final weights."""
    model, reference = policy(data), policy(data)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.05)
    trainer = fastdpo.DPOTrainer(
        model=model,
        ref_model=None if settings.get("reference_free") else reference,
        args=fastdpo.DPOConfig(
            output_dir=output_dir,
            learning_rate=1e-1,
            optim="sgd",  # Adam would hide a wrong scale of the gradients
            lr_scheduler_type="constant",
            max_steps=2,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            **{"logging_steps": 1} | settings,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=vision.llava_processor() if "images" in data.column_names else NoTokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for _, p in sorted(found.items())]
    log = trainer.state.log_history
    return {"log": log, "eval": metrics, "weights": torch.cat([p.double().flatten() for p in weights])}


def dataset(name: str) -> Dataset:
    """Rows for one of `RUNS`."""
    if name == "vision":  # text comes first, so that some batches have no images
        mixed = vision.rows(16, mixed=True)
        return mixed.select(sorted(range(16), key=lambda i: len(mixed[i]["images"])))
    return data_for("unpaired", 16) if name == "kto" else rows(16)


def keep_fsdp_on_cpu() -> None:
    """The library leaves FSDP out where there is no accelerator; gloo can do it."""
    own = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init
    dpo_config.stay_on_cpu = lambda args: None  # which lets all processes load the weights


def main(folder: Path) -> None:
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    results = {name: train(str(folder / "two"), dataset(name), **batch, **RUNS[name]) for name in RUNS}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "two.pt")

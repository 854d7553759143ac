"""Run by test_zero.py in two processes: training runs with DeepSpeed's ZeRO, results to a folder."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType

from fastdpo import cli
from fastdpo.sharding import is_sharded
from tests.helpers import alike
from tests.helpers.alike import ADAMW, PRECOMPUTE, SYNC, trained
from tests.helpers.trainers import tiny_llama

SAVED = ADAMW | {"save_strategy": "steps", "save_steps": 2}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}  # which is that of step 2
COPIED_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
PERSISTENT = {"stage3_param_persistence_threshold": 10**4}
RUNS: dict[str, dict[str, Any]] = {
    "zero1-saved-lora": {"stage": 1, "lora": {}} | SAVED | BEST,
    "zero2-clipped": {"stage": 2, "given": True, "max_grad_norm": 0.5, "learning_rate": 5e-2} | PRECOMPUTE,
    "zero2-saved-synced": {"stage": 2, "tied": True, "evaluate_first": True} | SAVED | SYNC,
    "zero3-aot": {"stage": 3, "given": True, "gradient_checkpointing": True, "loss_type": ["aot"]},
    "zero3-clipped": {"stage": 3, "given": True, "max_grad_norm": 0.5, "learning_rate": 5e-2} | PRECOMPUTE,
    "zero3-synced-tied": {"stage": 3, "tied": True, "evaluate_first": True, "by_name": True} | SYNC,
    "zero3-precomputed-lora": {"stage": 3, "lora": {"target_modules": ["q_proj", "lm_head"]}} | PRECOMPUTE,
    "zero3-modules-to-save": {"stage": 3, "lora": COPIED_HEAD, "by_name": True, "evaluate_first": True},
    "zero3-pissa": {"stage": 3, "lora": {"init_lora_weights": "pissa"}},
    "zero3-saved-synced": {"stage": 3, "by_name": True, "zero": PERSISTENT} | SAVED | SYNC,
    "zero3-cached-saved-lora": {"stage": 3, "lora": {}, "cache_of": "zero3-precomputed-lora"} | SAVED | BEST,
}
"""Settings of `DPOConfig` and of `trainer_of`."""


def let_deepspeed_run_on_cpu() -> None:
    """Let accelerate take DeepSpeed without a GPU, as DeepSpeed itself does."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    communication: Any = importlib.import_module("deepspeed.comm.torch")  # deepspeed.comm has another `torch`
    communication.build_shm_op = lambda: None  # it compiles for minutes, and waits in a busy loop
    own = state.PartialState._prepare_backend

    def prepare(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        if "LOCAL_RANK" in os.environ and not cpu:
            return "gloo", DistributedType.MULTI_GPU
        return own(self, cpu, *args, **kwargs)

    state.PartialState._prepare_backend = prepare
    torch.accelerator.is_available = lambda: True


def config_of_deepspeed(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | zero,
    }


def trainer_of(folder: Path, name: str, *, sharded: bool) -> Any:
    settings = {"cache_of": name, "lora": None} | alike.DEFAULTS | RUNS[name]
    tied, given, by_name = (settings.pop(flag, False) for flag in ("tied", "given", "by_name"))
    stage, zero = settings.pop("stage"), settings.pop("zero", {})
    settings.pop("evaluate_first", None)
    model: Any = tiny_llama(tie_word_embeddings=tied)
    if sharded:
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": False}
        settings |= {"deepspeed": config_of_deepspeed(stage, **zero), "dataloader_pin_memory": False, "bf16": False}
        if by_name:
            model = str(folder / f"start-{tied}")
    else:
        settings["per_device_train_batch_size"] = 8
    return alike.trainer_of(folder, name, model, alike.reference_of() if given else None, **settings)


def run(folder: Path, name: str, *, sharded: bool, resume: str | None = None) -> dict[str, Any]:
    trainer = trainer_of(folder, name, sharded=sharded)
    if sharded:
        assert is_sharded(trainer.model) == (RUNS[name]["stage"] == 3)
    found = alike.run(trainer, evaluate_first=RUNS[name].get("evaluate_first", False), resume=resume)
    found["precomputed"] = trainer._is_precomputed
    if "saved" in name:
        trainer.save_model(str(folder / name / "model"))
    return found


def poisoned(folder: Path, name: str) -> dict[str, Any]:
    """Train until the gradient of the second step is not finite in one process, although the loss is."""
    trainer = trainer_of(folder, name, sharded=True)
    own = trainer.compute_loss
    after_first: dict[str, Any] = {}

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = own(*args, **kwargs)
        if trainer.state.global_step == 1:
            after_first.update(trained(trainer.model))
            if torch.distributed.get_rank() == 1:
                loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    trainer.compute_loss = compute_loss
    said = None
    try:
        trainer.train()
    except FloatingPointError as error:
        said = str(error)
    return {"said": said, "after_first": after_first, "end": trained(trainer.model)}


def by_launcher(folder: Path) -> None:
    """Run `fastdpo train` as `accelerate launch` does with a YAML that asks for ZeRO-3."""
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    }
    cli.main(["train", str(folder / "launched.yaml")])


def main(folder: Path) -> None:
    let_deepspeed_run_on_cpu()
    alike.save_runs(run, folder, list(RUNS))
    for name in ("zero2-clipped", "zero3-clipped"):
        found = poisoned(folder / "poisoned", name)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"poisoned-{name}.pt")
    cli.main(["train", str(folder / "in_file.yaml")])
    by_launcher(folder)

"""Run by test_zero.py under torchrun: training runs on two processes with DeepSpeed's ZeRO, results to a folder."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import state
from accelerate.utils import DistributedType

from fastdpo import cli
from fastdpo.model import body_and_head
from fastdpo.sharding import is_sharded, whole
from tests.helpers.trainers import make_trainer, rows, tiny_llama

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
PRECOMPUTE = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}  # 2 and 1 batches of seven rows
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
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
"""Settings of `DPOConfig`, and those of `trainer_of`."""


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
    """The trainer of a run: three steps of eight pairs."""
    settings = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0} | RUNS[name]
    tied, given, lora = settings.pop("tied", False), settings.pop("given", False), settings.pop("lora", None)
    stage, zero, cache_of = settings.pop("stage"), settings.pop("zero", {}), settings.pop("cache_of", name)
    by_name = settings.pop("by_name", False)
    settings.pop("evaluate_first", None)
    body_and_head.CHUNK_BYTES = settings.pop("chunk_bytes", 2**27)
    model: Any = tiny_llama(tie_word_embeddings=tied)
    if sharded:
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": False}
        settings |= {"deepspeed": config_of_deepspeed(stage, **zero), "dataloader_pin_memory": False, "bf16": False}
        if by_name:
            model = str(folder / f"start-{tied}")
    else:
        settings["per_device_train_batch_size"] = 8
    reference = None
    if given:
        reference = tiny_llama()
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.05)
    return make_trainer(
        folder / name,
        model=model,
        ref_model=reference,
        peft_config=None
        if lora is None
        else peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora),
        data=rows(32),
        eval_dataset=rows(7, seed=5),
        reference_cache_dir=str(folder / "cache" / cache_of),
        self_check="error",
        train_sampling_strategy="sequential",
        **{"max_steps": 3} | settings,
    )


def trained(model: Any) -> dict[str, Any]:
    """The whole weights that a trainer trains."""
    return {name: whole(p).clone() for name, p in sorted(model.named_parameters()) if p.requires_grad}


def run(folder: Path, name: str, *, sharded: bool, resume: str | None = None) -> dict[str, Any]:
    trainer = trainer_of(folder, name, sharded=sharded)
    if sharded:
        assert is_sharded(trainer.model) == (RUNS[name]["stage"] == 3)
    first = trainer.evaluate()["eval_loss"] if RUNS[name].get("evaluate_first") else None
    start = trained(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    end = trained(trainer.model)
    found = {"start": start, "end": end, "log": trainer.state.log_history, "first": first}
    found["eval"] = trainer.evaluate()["eval_loss"]
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


def main(folder: Path, names: list[str]) -> None:
    let_deepspeed_run_on_cpu()
    is_first = os.environ["RANK"] == "0"
    for name in names:
        found = run(folder, name, sharded=True)
        if "saved" in name:
            checkpoint = folder / name / "out" / "checkpoint-2"
            found["resumed"] = run(folder, name, sharded=True, resume=str(checkpoint))["end"]
        if is_first:
            torch.save(found, folder / f"{name}.pt")
    for name in ("zero2-clipped", "zero3-clipped"):
        found = poisoned(folder / "poisoned", name)
        if is_first:
            torch.save(found, folder / f"poisoned-{name}.pt")
    cli.main(["train", str(folder / "in_file.yaml")])
    by_launcher(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(RUNS))

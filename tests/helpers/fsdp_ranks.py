"""Run by test_fsdp.py in several processes: training runs, most with FSDP2, results to a folder."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from transformers import TrainerCallback

from fastdpo.model import body_and_head
from tests.helpers import alike
from tests.helpers.alike import ADAMW, PRECOMPUTE, SYNC
from tests.helpers.trainers import make_trainer, tiny_llama
from tests.helpers.two_ranks import keep_fsdp_on_cpu

FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
RAM_EFFICIENT = {"cpu_ram_efficient_loading": True}  # only the first process reads the weights
CHECKPOINTED = {"activation_checkpointing": True}
SAVED = ADAMW | SYNC | {"save_strategy": "steps", "save_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    # before those with FSDP, whose settings stay in the environment
    "ddp-precomputed-given": {"given": True, "fsdp": None} | PRECOMPUTE,
    "ddp-precomputed-lora": {"lora": {}, "fsdp": None} | PRECOMPUTE,
    "clipped": {"given": True, "max_grad_norm": 0.5, "learning_rate": 5e-2},
    "copy-tied": {"tied": True, "evaluate_first": True},
    "synced-tied": {"tied": True} | SYNC,
    "precomputed-given": {"given": True} | PRECOMPUTE,
    "precomputed-tied": {"tied": True} | PRECOMPUTE,
    "precomputed-lora": {"lora": {}} | PRECOMPUTE,
    "cached-lora": {"lora": {}, "cache_of": "precomputed-lora"},
    "checkpointed": {"given": True, "fsdp": CHECKPOINTED, "gradient_checkpointing": True},
    "lora-head": {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}, "bound": 1e-5},  # it trains large weights, whose rounding counts
    "modules-to-save": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "bound": 1e-5},
    "aot": {"given": True, "loss_type": ["aot"]},
    "partial": {"given": True, "pairs": 28, "max_steps": -1, "num_train_epochs": 1},  # the last step has half the pairs
    "no-wrap": {"given": True, "fsdp": {"auto_wrap_policy": "NO_WRAP"}},
    "gathered-lora": {"lora": {}, "fsdp": {"reshard_after_forward": False}},
    "by-name-tied": {"tied": True, "by_name": True, "fsdp": RAM_EFFICIENT},
    "by-name-own-head": {"by_name": True, "given": True, "logit_scale": 2.0, "fsdp": RAM_EFFICIENT},
    "by-name-lora": {"by_name": True, "lora": {}, "fsdp": RAM_EFFICIENT},
    "bf16": {"given": True, "bf16": True},
    "own-head": {"lora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "chunk_bytes": 2**15},
    "saved-sharded": SAVED | {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "saved-full": SAVED | {"fsdp": {"state_dict_type": "FULL_STATE_DICT"}},
    "saved-lora": ADAMW | {"lora": {}, "save_strategy": "steps", "save_steps": 2},
    "saved-hsdp": SAVED | {"replicas": 2},
}
"""Settings of `DPOConfig` and of `trainer_of`."""
OF_FOUR = ["saved-hsdp"]
"""Runs on four processes, two times two that share the weights."""


def trainer_of(folder: Path, name: str, *, sharded: bool) -> Any:
    settings = {"cache_of": name, "lora": None} | alike.DEFAULTS | RUNS[name]
    tied, given, by_name = (settings.pop(flag, False) for flag in ("tied", "given", "by_name"))
    fsdp, of_model = settings.pop("fsdp", {}), {"tie_word_embeddings": tied}
    if "logit_scale" in settings:  # which Llama's code ignores, so that the name misleads: its own head is used
        of_model["logit_scale"] = settings.pop("logit_scale")
    for other in ("evaluate_first", "bound"):
        settings.pop(other, None)
    replicas = settings.pop("replicas", 1)
    body_and_head.CHUNK_BYTES = settings.pop("chunk_bytes", 2**27)
    if sharded:
        processes = int(os.environ["WORLD_SIZE"])
        settings |= {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
        if replicas > 1:
            settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=2)
        settings |= {} if fsdp is None else {"fsdp": True, "fsdp_config": FSDP | fsdp}
        if by_name:
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch` sets it
    else:
        settings["per_device_train_batch_size"] = 8
    model, reference = tiny_llama(**of_model), alike.reference_of(**of_model) if given else None
    if by_name:
        model, reference = (named(each, folder / name / f"start-{i}") for i, each in enumerate((model, reference)))
    return alike.trainer_of(folder, name, model, reference, **settings)


def named(model: Any, folder: Path) -> str | None:
    """Save a model once without its last norm, which is 1, and return its name.

    The first process sets a missing weight to 1 when it loads the model; in the others it stays on the meta device.
    """
    if model is None:
        return None
    if not dist.is_initialized() or dist.get_rank() == 0:
        weights = model.state_dict()
        del weights["model.norm.weight"]
        model.save_pretrained(folder, state_dict=weights)
    if dist.is_initialized():
        dist.barrier()
    return str(folder)


def run(folder: Path, name: str, *, sharded: bool, resume: str | None = None) -> dict[str, Any]:
    trainer = trainer_of(folder, name, sharded=sharded)
    found = alike.run(trainer, evaluate_first=RUNS[name].get("evaluate_first", False), resume=resume)
    if RUNS[name].get("bf16"):
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(3))))
        with torch.no_grad(), trainer.accelerator.autocast():
            found["logps"] = trainer.model(**batch).logps
    if "saved" in name:
        trainer.save_model(str(folder / name / "model"))
    return found


def refused(folder: Path) -> str:
    """Return why rows beyond the limit of a longrope model are refused, as soon as the trainer is made."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}
    model = tiny_llama(rope_parameters=rope | {"factor": 1.0, "original_max_position_embeddings": 16})
    try:
        make_trainer(folder / "longrope", model=model, fsdp=True, fsdp_config=FSDP, max_length=17)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


class FailsInOne(TrainerCallback):
    """Raises an error in the second process, while the first one waits and can't be interrupted by a signal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1:
            raise FileNotFoundError("row 5 of this process's data is gone")
        time.sleep(60)


def save_runs(folder: Path, names: list[str]) -> None:
    keep_fsdp_on_cpu()
    alike.save_runs(run, folder, names)


def main(folder: Path) -> None:
    """Train all runs of two processes, and fail in one."""
    save_runs(folder, [name for name in RUNS if name not in OF_FOUR])
    (folder / "refused").write_text(refused(folder))
    trainer = trainer_of(folder, "clipped", sharded=True)
    trainer.add_callback(FailsInOne())
    trainer.train(resume_from_checkpoint=False)

"""Trainings that must end alike on one process and on several, whether these shard the weights or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastdpo.sharding import plain_name, whole
from tests.helpers.trainers import make_trainer, rows, tiny_llama

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
PRECOMPUTE = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}  # 2 and 1 batches of seven rows
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
DEFAULTS = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "max_steps": 3}


def reference_of(**changes: Any) -> Any:
    """A reference that is another model than the policy before training."""
    reference = tiny_llama(**changes)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.05)
    return reference


def trainer_of(
    folder: Path, name: str, model: Any, reference: Any, *, cache_of: str, lora: Any, pairs: int = 32, **settings: Any
) -> Any:
    """The trainer of a run: three steps of eight pairs."""
    adapter = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return make_trainer(
        folder / name,
        model=model,
        ref_model=reference,
        peft_config=None if lora is None else peft.LoraConfig(**adapter | lora),
        data=rows(pairs),
        eval_dataset=rows(7, seed=5),
        reference_cache_dir=str(folder / "cache" / cache_of),
        self_check="error",
        train_sampling_strategy="sequential",
        **settings,
    )


def trained(model: Any) -> dict[str, Any]:
    """The whole weights that a trainer trains."""
    parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(p).clone() for name, p in sorted(parameters.items())}


def run(trainer: Any, *, evaluate_first: bool, resume: str | None) -> dict[str, Any]:
    """Train, and evaluate at the end: the weights before and after, how they are sharded, the log and the loss."""
    first = trainer.evaluate()["eval_loss"] if evaluate_first else None
    start = trained(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    end = trained(trainer.model)
    found = {"start": start, "end": end, "log": trainer.state.log_history, "first": first}
    found["mesh"] = {tuple(p.device_mesh.shape) for p in trainer.model.parameters() if isinstance(p, DTensor)}
    found["eval"] = trainer.evaluate()["eval_loss"]
    return found


def save_runs(run: Callable[..., dict[str, Any]], folder: Path, names: list[str]) -> None:
    """Make each run in this process and the others, and again from a checkpoint where it saves one."""
    for name in names:
        found = run(folder, name, sharded=True)
        if "saved" in name:
            checkpoint = folder / name / "out" / "checkpoint-2"
            found["resumed"] = run(folder, name, sharded=True, resume=str(checkpoint))["end"]
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


def flat(weights: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def assert_alike(
    two: dict[str, Any], one: dict[str, Any], bound: float, name: str, *, from_start: bool = False
) -> None:
    """The error of the weights, or of their change, is at most `bound` of the distance they move; the losses agree."""
    assert two["end"].keys() == one["end"].keys()
    moved = flat(one["end"]) - flat(one["start"])
    error = flat(two["end"]) - flat(one["end"])
    if from_start:
        error -= flat(two["start"]) - flat(one["start"])
    assert moved.norm() > 1e-3
    assert error.norm() <= bound * moved.norm(), f"{name}: {error.norm() / moved.norm():.1e}"
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if "aot" not in name:  # whose evaluation is by batches
        assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)


def assert_resumed_alike(found: dict[str, Any]) -> None:
    assert found["end"]
    assert all(torch.equal(found["resumed"][key], weight) for key, weight in found["end"].items())


def assert_adapter_loads(folder: Path, name: str) -> None:
    """The saved adapter is the one that was trained."""
    model = peft.PeftModel.from_pretrained(tiny_llama(), folder / name / "model", is_trainable=True)
    trained = torch.load(folder / f"{name}.pt")["end"]
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    assert all(torch.equal(trained[name], weight) for name, weight in found.items())

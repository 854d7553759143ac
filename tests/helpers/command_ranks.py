"""Run by test_command_ranks.py in two processes: how they divide commands, streams and weights, to files."""

import contextlib
import functools
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from fastdpo import cli
from fastdpo.reference import precompute
from fastdpo.sharding import local, reshard
from tests.helpers.trainers import lora, make_trainer, rows, tiny_llama
from tests.helpers.two_ranks import keep_fsdp_on_cpu


@contextlib.contextmanager
def counting(owner: Any, name: str, note: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside the block, keep what `note` makes of the arguments of each call of a function."""
    notes: list[Any] = []
    function = getattr(owner, name)

    @functools.wraps(function)
    def noting(*args: Any, **options: Any) -> Any:
        notes.append(note(*args, **options))
        return function(*args, **options)

    setattr(owner, name, noting)
    yield notes
    setattr(owner, name, function)


def run(*words: object) -> dict[str, Any]:
    """One command: what it printed, the responses that it scored, and how many times it mapped a dataset."""
    out, code = io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        counting(precompute, "score_batch", lambda _, items, __, *, by, **___: (by, items)) as scored,
        counting(Dataset, "_map_single", lambda *_, **__: 1) as maps,
    ):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
    keys = [[name, key.hex()] for name, items in scored for item in items for key in item.keys]
    return {"code": code, "out": out.getvalue(), "scored": keys, "maps": len(maps)}


def stream(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Four steps on a stream without an end, or the last two again: the rows and tokens of each micro-batch."""
    pairs, pulled = rows(64).to_list(), [0]

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            pulled[0] += 1
            yield pairs[pulled[0] % 64]

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}
    trainer = make_trainer(
        folder / "stream",
        data=IterableDataset.from_generator(endless),
        save_strategy="steps",
        reference_free=True,
        loss_type="simpo",
        **settings,
    )
    seen: list[Any] = []
    step = trainer.training_step

    def noting(model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append([inputs["pair_index"].tolist(), inputs["num_packed_tokens"]])
        return step(model, inputs, *rest)

    trainer.training_step = noting
    trainer.train(resume_from_checkpoint=str(folder / "stream" / "out" / "checkpoint-2") if resume else None)
    return {"seen": seen, "pulled": pulled[0], "log": trainer.state.log_history}


class Count(TrainerCallback):
    """Counts the bytes of weights, gradients and optimizer state that this process keeps after the first step."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        reshard(model)
        parameters = list(model.parameters())
        self.bytes["weights"] = sum(local(p).nbytes for p in parameters)
        self.bytes["gradients"] = sum(local(p.grad).nbytes for p in parameters if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        states = [x for each in optimizer.state.values() for x in each.values() if x.numel() > 1]
        self.bytes["optimizer"] = sum(local(x).nbytes for x in states)


def sharded(folder: Path, **settings: Any) -> dict[str, int]:
    """The bytes that this process keeps of a model that FSDP2 shards."""
    count, fsdp = Count(), {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    reference = tiny_llama()
    options = {"fsdp": True, "fsdp_config": fsdp, "max_steps": 1, "optim": "adamw_torch"}
    trainer = make_trainer(folder / "fsdp", ref_model=None if settings else reference, **options, **settings)
    trainer.add_callback(count)
    trainer.train()
    if trainer.ref_model is not None:
        reshard(trainer.ref_model)
        count.bytes["reference"] = sum(local(p).nbytes for p in trainer.ref_model.parameters())
    return count.bytes


def fails(*_: Any, **__: Any) -> Any:
    raise FloatingPointError("row 3 of this process is not finite")


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # so that nothing was mapped before
    common = ("--config_name", "null", "--dataset_name", folder / "data.jsonl", "--use_cpu", "--report_to", "none")
    models = (*common, "--model_name_or_path", folder / "policy")
    both = ("score", *models, "--ref_model_name_or_path", folder / "reference", "--tokens_per_batch", 300)
    results = {
        "score": run(*both, "--output_dir", folder / "scores"),
        "plan": run("plan", *models, "--output_dir", folder / "plan"),
        # each process has a disk of its own, as on several machines
        "precompute": run("precompute", *models, "--reference_cache_dir", folder / rank, "--output_dir", folder),
    }
    results["stream"] = {"whole": stream(folder), "resumed": stream(folder, resume=True)}
    keep_fsdp_on_cpu()
    torch.distributed.barrier()
    results["fsdp2"] = {"full": sharded(folder), "lora": sharded(folder, peft_config=lora())}
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    if rank == "1":
        precompute.score_batch = fails
    run(*both, "--output_dir", folder / "failed")

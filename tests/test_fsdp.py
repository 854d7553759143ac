"""Two processes that shard the weights with FSDP2, or twice two, train what one does, and leave a model that loads."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers import fsdp_ranks
from tests.helpers.alike import assert_adapter_loads, assert_alike, assert_resumed_alike, flat
from tests.helpers.forks import run_ranks
from tests.helpers.fsdp_ranks import OF_FOUR, RUNS

ALIKE = {
    "copy-tied": "precomputed-tied",
    "checkpointed": "precomputed-given",
    "cached-lora": "precomputed-lora",
    "ddp-precomputed-given": "precomputed-given",
    "ddp-precomputed-lora": "precomputed-lora",
    "saved-full": "saved-sharded",
    "saved-hsdp": "saved-sharded",
    "no-wrap": "precomputed-given",
    "by-name-own-head": "precomputed-given",
    "by-name-tied": "precomputed-tied",
    "gathered-lora": "precomputed-lora",
    "by-name-lora": "precomputed-lora",
}
"""Runs that are the same in one process."""


@pytest.fixture(scope="module")
def folder(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes have trained their runs, and two processes theirs and then failed."""
    return Path(once("fsdp", lambda: run_all(tmp_path_factory.mktemp("fsdp"))))


def run_all(folder: Path) -> str:
    run_ranks(fsdp_ranks.save_runs, folder, OF_FOUR, log=folder / "log", processes=4)
    run_ranks(fsdp_ranks.main, folder, log=folder / "log")
    return str(folder)


@pytest.fixture(scope="module")
def one_process(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a run in this process, once for all that are alike."""

    @functools.cache
    def train(name: str) -> Any:
        return fsdp_ranks.run(tmp_path_factory.mktemp("one"), name, sharded=False)

    return lambda name: train(ALIKE.get(name, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_sharded_training_equals_that_of_one_process(name: str, folder: Path, one_process: Any) -> None:
    two, one = torch.load(folder / f"{name}.pt"), one_process(name)
    bound = RUNS[name].get("bound", 1e-4 if RUNS[name].get("optim") else 1e-6 if "lora" in RUNS[name] else 1e-5)
    assert_alike(two, one, bound, name)
    assert two["mesh"] == (set() if name.startswith("ddp") else {(2, 2)} if name == "saved-hsdp" else {(2,)})
    if RUNS[name].get("evaluate_first"):
        assert two["first"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.slow
def test_in_16_bits_shards_lose_no_more_than_one_process(folder: Path, one_process: Any) -> None:
    """And log-probs are not rounded to 16 bits, as accelerate's settings would do."""
    two, one, truth = torch.load(folder / "bf16.pt"), one_process("bf16"), one_process("no-wrap")
    errors = [(flat(run["end"]) - flat(truth["end"])).norm() for run in (two, one)]
    assert 0 < errors[0] <= 2 * errors[1], errors
    assert two["logps"].dtype == torch.float32
    assert not torch.equal(two["logps"], two["logps"].bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if "saved" in name])
def test_a_resumed_sharded_run_ends_as_the_uninterrupted_one(name: str, folder: Path) -> None:
    assert_resumed_alike(torch.load(folder / f"{name}.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved-sharded", "saved-full", "saved-hsdp"])
def test_both_kinds_of_checkpoints_end_with_a_model_that_loads(name: str, folder: Path) -> None:
    model, info = LlamaForCausalLM.from_pretrained(folder / name / "model", output_loading_info=True)
    assert not any(info.values())
    trained = torch.load(folder / f"{name}.pt")["end"]
    assert all(torch.equal(trained[key], weight) for key, weight in model.named_parameters())


@pytest.mark.slow
def test_an_adapter_trained_with_fsdp_loads(folder: Path) -> None:
    assert_adapter_loads(folder, "saved-lora")


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others_with_its_message(folder: Path) -> None:
    said = "process 1 failed: FileNotFoundError: row 5 of this process's data is gone; this process ends too"
    assert said in (folder / "log").read_text()


@pytest.mark.slow
def test_rows_that_need_calls_of_their_own_are_refused_at_once(folder: Path) -> None:
    assert "set max_length <= 16 (it is 17), or use DDP" in (folder / "refused").read_text()

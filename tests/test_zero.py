"""Two processes that train with DeepSpeed's ZeRO train what one process trains, and leave a model that loads."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers import zero_ranks
from tests.helpers.alike import assert_adapter_loads, assert_alike, assert_resumed_alike
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.forks import run_ranks
from tests.helpers.trainers import tiny_llama
from tests.helpers.zero_ranks import RUNS

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
ALIKE = {"zero3-clipped": "zero2-clipped", "zero3-cached-saved-lora": "zero1-saved-lora"}
"""Runs that are the same in one process."""
BOUNDS = {"adamw": 1e-4, "lora": 1e-6, "full": 1e-5}
"""Largest error of the weights, relative to the distance that training moves them."""


@pytest.fixture(scope="module")
def folder(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained all runs, one after the other, and then two of the command line."""
    return Path(once("zero", lambda: run_all(tmp_path_factory.mktemp("zero"))))


def run_all(folder: Path) -> str:
    prepare(folder)
    run_ranks(zero_ranks.main, folder, log=folder / "log")
    return str(folder)


def prepare(folder: Path) -> None:
    """Write the models that are loaded by name, and what the command line reads."""
    for tied in (False, True):
        tiny_llama(tie_word_embeddings=tied).save_pretrained(folder / f"start-{tied}")
    byte_tokenizer().save_pretrained(folder / "start-False")
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ds.json").write_text(json.dumps(zero_ranks.config_of_deepspeed(2)))
    settings = {
        "model_name_or_path": str(folder / "start-False"),
        "dataset_name": str(folder / "train.jsonl"),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    for name, more in (("in_file", {"deepspeed": str(folder / "ds.json")}), ("launched", {})):
        given = settings | more | {"output_dir": str(folder / name)}
        (folder / f"{name}.yaml").write_text(json.dumps(given))


@pytest.fixture(scope="module")
def one_process(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a run in this process, once for all that are alike."""

    @functools.cache
    def train(name: str) -> Any:
        return zero_ranks.run(tmp_path_factory.mktemp("one"), name, sharded=False)

    return lambda name: train(ALIKE.get(name, name))


@pytest.mark.parametrize("name", list(RUNS))
def test_training_with_zero_equals_that_of_one_process(name: str, folder: Path, one_process: Any) -> None:
    two, one = torch.load(folder / f"{name}.pt"), one_process(name)
    # those of PiSSA and of a copied head are large beside their change, so that their rounding is too
    is_large = "pissa" in name or "modules" in name
    kind = "adamw" if "optim" in RUNS[name] else "lora" if "lora" in RUNS[name] and not is_large else "full"
    # PiSSA's first weights are rounded in another way if a process has other threads
    assert_alike(two, one, BOUNDS[kind], name, from_start="pissa" in name)
    assert two["precomputed"] == ("precompute_ref_log_probs" in RUNS[name] or "cached" in name)
    if RUNS[name].get("evaluate_first"):
        assert two["first"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNS if "saved" in name])
def test_a_resumed_run_ends_as_the_uninterrupted_one(name: str, folder: Path) -> None:
    assert_resumed_alike(torch.load(folder / f"{name}.pt"))


@pytest.mark.parametrize("name", ["zero2-saved-synced", "zero3-saved-synced"])
@pytest.mark.parametrize("place", ["model", "out/checkpoint-2"])
def test_a_model_that_loads_is_saved(name: str, place: str, folder: Path) -> None:
    model, info = LlamaForCausalLM.from_pretrained(folder / name / place, output_loading_info=True)
    assert not any(info.values())
    trained = torch.load(folder / f"{name}.pt")["end"]
    same = [torch.equal(trained[key], weight) for key, weight in model.named_parameters()]
    assert all(same) if place == "model" else not any(same)  # the checkpoint is of a step before


@pytest.mark.parametrize("name", ["zero1-saved-lora", "zero3-cached-saved-lora"])
def test_an_adapter_that_loads_is_saved(name: str, folder: Path) -> None:
    assert_adapter_loads(folder, name)


@pytest.mark.parametrize("name", ["zero2-clipped", "zero3-clipped"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(name: str, folder: Path) -> None:
    found = torch.load(folder / f"poisoned-{name}.pt")
    assert "the gradient norm of step 2 is not finite" in str(found["said"])
    assert found["end"]
    assert all(torch.equal(found["after_first"][key], weight) for key, weight in found["end"].items())


@pytest.mark.parametrize("name", ["in_file", "launched"])
def test_the_command_line_reaches_deepspeed(name: str, folder: Path) -> None:
    model, info = LlamaForCausalLM.from_pretrained(folder / name, output_loading_info=True)
    assert not any(info.values())
    start = dict(tiny_llama().named_parameters())
    assert not any(torch.equal(weight, start[key]) for key, weight in model.named_parameters())
    assert list(folder.glob(f"{name}/checkpoint-2/global_step2/*_optim_states.pt"))

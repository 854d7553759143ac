"""Two processes that shard the weights with FSDP2 train what one process trains, and leave a model that can be loaded."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers import fsdp_ranks
from tests.helpers.fsdp_ranks import RUNS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained all runs, one after the other."""
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "tests/helpers/fsdp_ranks.py", str(folder)], cwd=ROOT, env=environment, check=True, timeout=300
    )
    return folder


def flat(weights: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_sharded_training_equals_that_of_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    two = torch.load(folder / f"{name}.pt")
    one = fsdp_ranks.run(tmp_path, name, sharded=False)
    assert two["end"].keys() == one["end"].keys()
    moved = (flat(one["end"]) - flat(one["start"])).norm()
    error = (flat(two["end"]) - flat(one["end"])).norm()
    bound = 1e-4 if RUNS[name].get("optim") else 1e-6 if "lora" in RUNS[name] else 1e-5
    assert moved > 1e-3
    assert error <= bound * moved, f"{name}: {error / moved:.1e}"
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    assert two["first"] == pytest.approx(one["first"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if "saved" in name])
def test_a_resumed_sharded_run_ends_as_the_uninterrupted_one(name: str, folder: Path) -> None:
    found = torch.load(folder / f"{name}.pt")
    assert all(torch.equal(found["resumed"][key], weight) for key, weight in found["end"].items())

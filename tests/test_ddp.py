"""Two processes under DDP compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_trainer import rows, tiny_llama, weights
from tests.two_ranks import train

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Same loss, metrics and weights: the loss is over the pairs of the optimizer step, on all ranks."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "tests/two_ranks.py", tmp_path / "two", result], cwd=ROOT, env=environment, check=True, timeout=300
    )
    two = json.loads(result.read_text())
    one = train(str(tmp_path / "one"), rows(16), per_device_train_batch_size=8)
    torch.testing.assert_close(torch.tensor(two["weights"]), torch.tensor(one["weights"]), rtol=0, atol=2e-6)
    assert (torch.tensor(one["weights"]) - weights(tiny_llama())).norm() > 1e-2
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens", "logits/chosen"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"):
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4), name

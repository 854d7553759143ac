"""Two processes under DDP, or FSDP2, compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import two_ranks

ROOT = Path(__file__).parent.parent
NAMES = ("sigmoid", "sft", "aot", "kto", "vision")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Same loss, metrics and weights: the loss is over the examples of the optimizer step, on all ranks."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "tests/helpers/two_ranks.py", tmp_path / "two", result, *NAMES],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=300,
    )
    for name, two in json.loads(result.read_text()).items():
        settings = two_ranks.RUNS[name]
        one = two_ranks.train(str(tmp_path / "one"), two_ranks.dataset(name), per_device_train_batch_size=8, **settings)
        weights = sorted(two_ranks.policy(two_ranks.dataset(name)).named_parameters())
        start = torch.cat([p.detach().double().flatten() for _, p in weights])
        moved = torch.tensor(one["weights"]) - start
        assert moved.norm() > 1e-3, name
        error = (torch.tensor(two["weights"]) - torch.tensor(one["weights"])).norm()
        assert error < 2e-5 * moved.norm() + 1e-6, name
        for ours, theirs in zip(two["log"], one["log"], strict=True):
            for metric in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens", "logits/chosen"):
                if metric in theirs:
                    assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), (name, metric)
        for metric in ("eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"):
            if metric in one["eval"] and name not in ("aot", "kto"):  # whose evaluation is by batches
                assert two["eval"][metric] == pytest.approx(one["eval"][metric], rel=1e-4), (name, metric)

"""Two processes under DDP, or FSDP2, compute what one does."""

from pathlib import Path

import pytest
import torch

from tests.helpers import two_ranks
from tests.helpers.forks import run_ranks

LOGGED = ("loss", "train_loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens", "logits/chosen")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Same loss, metrics and weights: the loss is over the examples of the optimizer step, on all ranks."""
    log = tmp_path / "log"
    assert run_ranks(two_ranks.main, tmp_path, log=log) == [0, 0], log.read_text()
    results = torch.load(tmp_path / "two.pt")
    for name, settings in two_ranks.RUNS.items():
        two = results[name]
        one = two_ranks.train(str(tmp_path / "one"), two_ranks.dataset(name), per_device_train_batch_size=8, **settings)
        weights = sorted(two_ranks.policy(two_ranks.dataset(name)).named_parameters())
        start = torch.cat([p.detach().double().flatten() for _, p in weights])
        moved = one["weights"] - start
        assert moved.norm() > 1e-3, name
        error = (two["weights"] - one["weights"]).norm()
        assert error <= 1e-5 * moved.norm(), f"{name}: {error / moved.norm():.1e}"
        for ours, theirs in zip(two["log"], one["log"], strict=True):
            for metric in LOGGED:
                if metric in theirs:
                    assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), (name, metric)
        for metric in ("eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"):
            if metric in one["eval"] and name not in ("aot", "kto"):  # whose evaluation is by batches
                assert two["eval"][metric] == pytest.approx(one["eval"][metric], rel=1e-4), (name, metric)

"""examples/frontier at toy size: the task's numbers are exact; fastdpo draws the same frontier as the plain loop."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.frontier import reference, run, task
from examples.frontier.draw import draw

TOY = run.Settings(betas=(2.0, 0.25), seeds=(0,), held_out=3, demonstrations=2048, pairs=768, batch=32, hidden_size=16)
PROMPTS = task.PROMPTS[4:8]


@pytest.fixture(scope="module")
def results(once: Any) -> dict[str, Any]:
    found: dict[str, Any] = once("frontier", lambda: run.reproduce(TOY))
    return found


@pytest.fixture(scope="module")
def sft() -> Any:
    return run.make_sft(TOY)


# The task


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        pytest.param([0, 1], [2, 3, 4, 5, 6], 5, id="rises"),
        pytest.param([0, 1, 6], [5, 4, 0], -2, id="falls"),
        pytest.param([0, 3], [3, 4, 4, 2, 0], 0, id="mixed"),
        pytest.param([0, 3], [0], 0, id="empty"),
    ],
)
def test_reward(prompt: list[int], response: list[int], expected: int) -> None:
    assert task.reward(prompt, response) == expected
    assert task.rewards([prompt])[0, task.RESPONSES.index(response)] == expected


def test_the_listed_responses_are_all_there_are(sft: Any) -> None:
    assert len(task.RESPONSES) == len(set(map(tuple, task.RESPONSES))) == 9331
    logps = task.response_logps(sft, PROMPTS)
    torch.testing.assert_close(logps.logsumexp(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    some = random.Random(0).sample(range(9331), 50)
    expected = reference.sequence_logps(sft, [PROMPTS[2]] * 50, [task.RESPONSES[y] for y in some])
    torch.testing.assert_close(logps[2, some], expected.double(), rtol=0, atol=1e-5)


def test_preferences_follow_the_bradley_terry_model() -> None:
    """The share of pairs won by the better response, by how much better it is."""
    same = torch.full((4, 9331), -math.log(9331), dtype=torch.float64)
    pairs = task.sample_pairs(20_000, PROMPTS, same, task.rewards(PROMPTS), seed=3)
    gaps = torch.tensor(
        [task.reward(p["prompt_ids"], p["chosen_ids"]) - task.reward(p["prompt_ids"], p["rejected_ids"]) for p in pairs]
    )
    for gap in (1, 2, 3):
        won, all_ = (gaps == gap).sum().item(), (gaps.abs() == gap).sum().item()
        chance = 1 / (1 + math.exp(-gap))
        assert abs(won / all_ - chance) < 4 * math.sqrt(chance * (1 - chance) / all_), gap
    assert all(p["chosen_ids"] != p["rejected_ids"] for p in pairs)


def random_policy(seed: int) -> torch.Tensor:
    return torch.randn(4, 9331, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(1)


def test_nothing_beats_the_optimum() -> None:
    """reward - beta KL is largest there, beta log Z; other policies fall short by beta KL(other || optimum)."""
    sft_logps, true_rewards = random_policy(0), task.rewards(PROMPTS)
    for beta in (0.5, 3.0):
        best = task.optimum(sft_logps, true_rewards, beta)
        log_z = (sft_logps + true_rewards / beta).logsumexp(1).mean().item()
        assert best.reward - beta * best.kl == pytest.approx(beta * log_z, rel=1e-12)
        for other in (random_policy(1), sft_logps, (sft_logps + true_rewards / (1.1 * beta)).log_softmax(1)):
            outcome = task.outcome(other, sft_logps, true_rewards)
            assert outcome.reward - beta * outcome.kl < best.reward - beta * best.kl


@pytest.mark.parametrize("n", [1, 2, 7])
def test_best_of_n(n: int) -> None:
    sft_logps, true_rewards = random_policy(0), task.rewards(PROMPTS)
    exact = task.best_of(n, sft_logps, true_rewards)
    assert -1e-12 < exact.kl <= math.log(n) - (n - 1) / n + 1e-12
    y = torch.multinomial(sft_logps.exp(), 20_000 * n, replacement=True)
    best = true_rewards.gather(1, y).view(4, 20_000, n).amax(2)
    assert abs(best.mean().item() - exact.reward) < 4 * (best.std() / math.sqrt(best.numel())).item()


# The frontier


def test_fastdpo_and_the_plain_loop_coincide(results: dict[str, Any]) -> None:
    largest = results["largest_difference"]
    assert largest["loss"] < 1e-5
    assert largest["weights"] < 1e-3  # of the distance trained
    assert largest["reward"] < 1e-4
    assert largest["kl"] < 1e-4


def test_the_frontier_has_its_shape(results: dict[str, Any]) -> None:
    """More reward than SFT, more of both with smaller beta, and never more than the optimum at that KL."""
    strong, weak = (run["fused"] for run in results["runs"])  # pull towards SFT
    assert results["sft"]["kl"] == 0
    assert results["sft"]["reward"] + 0.1 < strong["reward"] < weak["reward"]
    assert 0 < strong["kl"] < weak["kl"] / 2
    for point in (strong, weak):
        below, above = next(
            (a, b) for a, b in pairwise(results["optimum"]) if a["kl"] <= point["kl"] <= b["kl"]
        )  # beta falls, so both rise
        assert point["reward"] < above["reward"]
        assert below["reward"] <= above["reward"]


def test_what_the_model_says_agrees_with_the_listing(results: dict[str, Any]) -> None:
    """`generate()` on the trained model, through its patched forward."""
    for one in results["runs"]:
        for name in ("reward", "kl"):
            sampled, error = one["fused_sampled"][name], one["fused_sampled"][f"{name}_se"]
            assert 0 < error < 0.2
            assert abs(sampled - one["fused"][name]) < 4 * error, (one["beta"], name)


def test_a_wrong_beta_would_not_coincide(sft: Any) -> None:
    """The comparison can fail: 1 % of beta shows."""
    seen = task.PROMPTS[10:13]
    pairs = task.sample_pairs(256, seen, task.response_logps(sft, seen), task.rewards(seen), seed=0)
    losses = [run.train_plain(sft, pairs, beta, TOY)[1] for beta in (0.25, 0.2525)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) > 1e-4


def test_draws_and_saves(results: dict[str, Any], tmp_path: Path) -> None:
    draw(results, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_numbers_are_of_these_settings() -> None:
    folder = Path(run.__file__).parent
    results = json.loads((folder / "frontier.json").read_text())
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(run.Settings()).items()}
    assert results["settings"] == settings
    assert len(results["runs"]) == len(settings["betas"]) * len(settings["seeds"])
    for number in results["largest_difference"].values():
        assert f"{number:.1g}" in (folder / "README.md").read_text()

"""A task whose true reward is known and whose every response can be listed, so that nothing needs estimating.

A prompt is one or two of the letters a to f. A response continues it with zero to five letters; shorter ones end with
<eos>, the longest ones at their fifth letter. Its reward is the number of its rising steps (b after a) less that of its
falling ones, from the prompt's last letter on. Tokens are <eos> = 0, which also begins every prompt, and the letters 1
to 6; so the 9331 responses are all that a model can say.

Everything here is exact: a policy's reward and KL, and the trade-offs to compare them with.
Shapes: Q prompts, Y = 9331 responses.
"""

import random
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

EOS, LETTERS, MAX_LETTERS = 0, range(1, 7), 5
VOCAB = 1 + len(LETTERS)

PROMPTS = [[EOS, *word] for length in (1, 2) for word in product(LETTERS, repeat=length)]
"""All 42: lists of token ids."""

RESPONSES = [[*word, EOS] for length in range(MAX_LETTERS) for word in product(LETTERS, repeat=length)]
RESPONSES += [list(word) for word in product(LETTERS, repeat=MAX_LETTERS)]
"""All Y: lists of token ids, in the order of every [Y] below."""


class Outcome(NamedTuple):
    """What a policy amounts to, averaged over prompts."""

    reward: float
    """Expected true reward of its responses."""
    kl: float
    """KL(policy || SFT) of whole responses, in nats."""


def reward(prompt: list[int], response: list[int]) -> int:
    """The true reward: rising steps less falling ones, from the prompt's last letter on."""
    letters = [prompt[-1], *(token for token in response if token != EOS)]
    return sum((b > a) - (b < a) for a, b in pairwise(letters))


def rewards(prompts: list[list[int]]) -> Tensor:
    """`[Q, Y]` float64: the true reward of every response to each prompt."""
    by_letter = {
        letter: torch.tensor([reward([letter], response) for response in RESPONSES], dtype=torch.float64)
        for letter in LETTERS
    }
    return torch.stack([by_letter[prompt[-1]] for prompt in prompts])


def demonstrate(rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt and the response of a writer who rises a little more often than not."""
    prompt = rng.choice(PROMPTS)
    letters = [prompt[-1]]
    while len(letters) <= MAX_LETTERS and rng.random() < 0.85:
        above = range(letters[-1] + 1, LETTERS.stop)
        letters.append(rng.choice(above if above and rng.random() < 0.2 else LETTERS))
    return prompt, letters[1:] if len(letters) > MAX_LETTERS else [*letters[1:], EOS]


@torch.no_grad()
def response_logps(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """`[Q, Y]` float64: the model's log-probability of every response to each prompt, in nats."""
    words = torch.tensor(list(product(LETTERS, repeat=MAX_LETTERS - 1)))  # every prefix begins some of them
    rows = []
    for prompt in prompts:
        ids = torch.cat([torch.tensor(prompt).expand(len(words), -1), words], 1)
        logps = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 :].double().log_softmax(-1)
        ended, prefix = [], torch.zeros(1, dtype=torch.float64)  # prefix: of all words of n letters
        for n in range(MAX_LETTERS):
            following = logps[:: len(words) // len(prefix), n]  # [6^n, VOCAB]
            ended.append(prefix + following[:, EOS])
            prefix = (prefix[:, None] + following[:, 1:]).flatten()
        rows.append(torch.cat([*ended, prefix]))
    return torch.stack(rows)


def outcome(logps: Tensor, sft_logps: Tensor, true_rewards: Tensor) -> Outcome:
    """Reward and KL of a policy; all `[Q, Y]`."""
    p = logps.exp()
    return Outcome(*((p * x).sum(1).mean().item() for x in (true_rewards, logps - sft_logps)))


def optimum(sft_logps: Tensor, true_rewards: Tensor, beta: float) -> Outcome:
    """No policy has more reward at this KL: pi* = pi_sft exp(r / beta) / Z, Eq. 4 of https://arxiv.org/abs/2305.18290.

    It is also what DPO would reach with unlimited data from the Bradley-Terry model of r.
    """
    return outcome((sft_logps + true_rewards / beta).log_softmax(1), sft_logps, true_rewards)


def best_of(n: int, sft_logps: Tensor, true_rewards: Tensor) -> Outcome:
    """The best of n SFT responses, ties broken by chance; its KL is exact, log n - (n - 1) / n bounds it from above.

    The bound: https://arxiv.org/abs/2401.01879.
    """
    p, better = sft_logps.exp(), torch.zeros_like(sft_logps)
    for value in true_rewards.unique():
        below, same = ((p * mask).sum(1, keepdim=True) for mask in (true_rewards < value, true_rewards == value))
        chance = ((below + same).clamp(max=1) ** n - below**n) / same  # of a response with this reward, over p
        better += torch.where(true_rewards == value, sft_logps + chance.log(), 0.0)
    return outcome(better, sft_logps, true_rewards)


def sample_pairs(
    n: int, prompts: list[list[int]], sft_logps: Tensor, true_rewards: Tensor, seed: int
) -> list[dict[str, list[int]]]:
    """Preference pairs: two different SFT responses, labelled by the Bradley-Terry model of the true reward.

    p(chosen > rejected) = sigmoid(r(chosen) - r(rejected)), Eq. 1 of https://arxiv.org/abs/2305.18290.
    """
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(len(prompts), (2 * n,), generator=g)  # more than enough, for equal responses are left out
    uniform = torch.rand(2 * n, 2, generator=g, dtype=torch.float64)
    two = torch.empty(2 * n, 2, dtype=torch.int64)
    for q, logps in enumerate(sft_logps):
        cumulative = logps.exp().cumsum(0)
        two[which == q] = torch.searchsorted(cumulative / cumulative[-1], uniform[which == q])
    gap = true_rewards[which[:, None], two].diff(dim=1).squeeze(1)  # of the second over the first
    second_wins = torch.rand(2 * n, generator=g, dtype=torch.float64) < torch.sigmoid(gap)
    two = torch.where(second_wins[:, None], two.flip(1), two)
    different = (two[:, 0] != two[:, 1]).nonzero().squeeze(1)[:n]
    return [
        {"prompt_ids": prompts[q], "chosen_ids": RESPONSES[chosen], "rejected_ids": RESPONSES[rejected]}
        for q, (chosen, rejected) in zip(which[different].tolist(), two[different].tolist(), strict=True)
    ]

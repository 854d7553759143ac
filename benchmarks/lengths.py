"""Preference pairs of random words whose lengths are distributed like those of well-known datasets.

Medians are published: `PUBLISHED` holds the length of an example L = P + C + R (prompt, chosen, rejected) and the ratio
r = P / mean(C, R), from which the prompt has L r / (r + 2) tokens and a response L / (r + 2). Lengths are log-normal,
and those of the two responses independent. The standard deviations are assumptions, chosen so that means and the share
of padding come out as published statistics suggest. `shp`, posts with comments as in SHP, is an assumption altogether.
Real responses to one prompt sometimes begin alike; these do so only by chance, which puts prefix sharing at a
disadvantage.
"""

import math
import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

EOS, PAD = 2, 0
FIRST_WORD = 3


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: medians, and standard deviations of the logarithm."""

    prompt: float
    response: float
    prompt_spread: float
    response_spread: float


PUBLISHED = {
    "ultrafeedback": (409, 0.42),
    "hh": (186, 2.15),
    "tldr": (416, 11.14),
    "helpsteer": (775, 6.34),
    "metamath": (872, 3.91),
}
"""Medians of L, in tokens, and of r, by the README of https://github.com/frankxwang/dpo-prefix-sharing, the code of
Wang and Hegde (https://arxiv.org/abs/2410.20305). HelpSteer is the one in allenai/tulu-2.5-preference-data, MetaMath is
abacusai/MetaMath_DPO_FewShot."""

LENGTHS = {
    "ultrafeedback": Lengths(71, 169, 1.21, 0.96),
    "hh": Lengths(96, 45, 0.79, 0.9),
    "tldr": Lengths(353, 32, 0.35, 0.15),
    "helpsteer": Lengths(589, 93, 0.74, 0.77),
    "metamath": Lengths(577, 148, 0.3, 0.5),
    "shp": Lengths(180, 70, 0.8, 0.8),
    "toy": Lengths(8, 5, 0.5, 0.5),
}


def pairs(name: str, count: int, vocab: int, max_length: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of text in the standard format; a word is one token for the tokenizer that `tokenizer` returns.

    No prompt is longer than three quarters of `max_length`. Rows may exceed `max_length`; whoever tokenises cuts them.
    """
    return pairs_of_prompts(name, count, 1, 2, vocab, max_length, seed)


def pairs_of_prompts(
    name: str, count: int, per_prompt: int, responses: int, vocab: int, max_length: int, seed: int = 0
) -> list[dict[str, str]]:
    """Return rows like those of `pairs`, of which `per_prompt` neighbours have one prompt and its `responses`.

    The pairs are those of neighbours in the order of the responses, then of those two apart, and so on.

    Raises:
        ValueError: there are not so many pairs of the responses.
    """
    rng, lengths = random.Random(seed), LENGTHS[name]
    edges = sorted(combinations(range(responses), 2), key=lambda edge: (edge[1] - edge[0], edge))[:per_prompt]
    if len(edges) < per_prompt:
        raise ValueError(f"responses={responses} give {len(edges)} pairs, fewer than per_prompt={per_prompt}")

    def words(median: float, spread: float, most: int) -> str:
        length = round(rng.lognormvariate(math.log(median), spread))
        return " ".join(f"w{rng.randrange(FIRST_WORD, vocab)}" for _ in range(min(max(length, 1), most)))

    rows: list[dict[str, str]] = []
    while len(rows) < count:
        prompt = words(lengths.prompt, lengths.prompt_spread, 3 * max_length // 4)
        texts = [" " + words(lengths.response, lengths.response_spread, max_length) for _ in range(responses)]
        rows += [{"prompt": prompt, "chosen": texts[i], "rejected": texts[k]} for i, k in edges]
    return rows[:count]


def token_counts(rows: list[dict[str, str]], max_length: int) -> list[tuple[int, int, int]]:
    """Return the tokens (prompt, chosen, rejected) of each row; a response ends with EOS unless it is cut."""
    counts = []
    for row in rows:
        prompt, *responses = (len(row[field].split()) for field in ("prompt", "chosen", "rejected"))
        chosen, rejected = (min(response + 1, max_length - prompt) for response in responses)
        counts.append((prompt, chosen, rejected))
    return counts


def tokenizer(vocab: int) -> Any:
    """Return a fast tokenizer of transformers whose words are w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab)}
    names = {"<pad>": PAD, "<unk>": 1, "</s>": EOS}
    words = names | {word: i for word, i in words.items() if i >= FIRST_WORD}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=10**9
    )

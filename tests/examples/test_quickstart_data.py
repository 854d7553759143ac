"""examples/quickstart: the committed pairs are what the script writes, judged right, and free of short cuts."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.quickstart import make_data
from examples.quickstart.judge import DESCENDING, is_right

FOLDER = Path(make_data.__file__).parent
Pair = dict[str, str]


def read(split: str) -> list[Pair]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


TRAIN, TEST = read("train"), read("test")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


def digits(text: str) -> str:
    return "".join(c for c in text if c.isdigit())


# The pairs


def test_script_reproduces_the_committed_files(tmp_path: Path) -> None:
    make_data.write_all(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(written) == 6
    assert written == {path: (FOLDER / path).read_bytes() for path in written}


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_judge_agrees_with_every_pair(pairs: list[Pair]) -> None:
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected"}
        assert is_right(pair["prompt"], pair["chosen"]), pair
        assert not is_right(pair["prompt"], pair["rejected"]), pair


@pytest.mark.parametrize(
    ("request_", "response", "right"),
    [
        pytest.param("Sort the digits of 5213 from smallest to largest.", "1235", True, id="ascending"),
        pytest.param("Sort the digits of 5213 from smallest to largest.", "5321", False, id="other-order"),
        pytest.param("Write the digits of 5213 going down.", "The answer is 5321.", True, id="sentence"),
        pytest.param("Put the digits of 5213 in descending order.", "532", False, id="digit-missing"),
        pytest.param("Put the digits of 5213 in ascending order.", "12335", False, id="digit-twice"),
        pytest.param("Put the digits of 5213 in ascending order.", "1235 or 5321", False, id="two-answers"),
        pytest.param("Put the digits of 5213 in ascending order.", "", False, id="empty"),
    ],
)
def test_judge(request_: str, response: str, right: bool) -> None:
    assert is_right(request_, response) == right


@pytest.mark.parametrize(
    "prompt", ["Sort the digits of 5213.", "Sort 12 and 34 going up.", "Write 12 going up, going down."]
)
def test_judge_refuses_an_unclear_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="one number and one order"):
        is_right(prompt, "1235")


def test_no_number_comes_twice_not_even_rearranged() -> None:
    numbers = ["".join(sorted(digits(pair["prompt"]))) for pair in TRAIN + TEST]
    assert len(set(numbers)) == len(TRAIN) + len(TEST) == 576 + 160


def test_pairs_are_ragged_and_some_share_a_response_start() -> None:
    assert len({len(pair["prompt"]) for pair in TRAIN}) > 10
    assert len({len(pair["chosen"]) for pair in TRAIN}) == len({len(pair["rejected"]) for pair in TRAIN}) == 10
    shared = [pair for pair in TRAIN if pair["chosen"][:1] == pair["rejected"][:1]]
    assert 0.2 < len(shared) / len(TRAIN) < 0.8


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_half_the_mistakes_are_right_answers_to_the_other_order(pairs: list[Pair]) -> None:
    assert 2 * sum(digits(pair["rejected"]) == digits(pair["chosen"])[::-1] for pair in pairs) == len(pairs)


# Short cuts: linear scores of features of a response, fitted on the training pairs, judged on the held-out ones


def length(prompt: str, response: str) -> Counter[Any]:
    return Counter(length=len(response))


def characters(prompt: str, response: str) -> Counter[Any]:
    return Counter(response)


def characters_by_order(prompt: str, response: str) -> Counter[Any]:
    return Counter((asks_for_descending(prompt), character) for character in response)


def neighbours(prompt: str, response: str) -> Counter[Any]:
    return Counter(pairwise(response))


def neighbours_by_order(prompt: str, response: str) -> Counter[Any]:
    return Counter((asks_for_descending(prompt), *two) for two in pairwise(response))


def asks_for_descending(prompt: str) -> bool:
    return any(words in prompt for words in DESCENDING)


def held_out_accuracy(features: Callable[[str, str], Counter[Any]]) -> float:
    """Of the ridge regression of +1 on the difference of the features, chosen - rejected; a tie counts one half."""
    columns: dict[Any, int] = {}

    def differences(pairs: list[Pair]) -> torch.Tensor:
        X = torch.zeros(len(pairs), 4096, dtype=torch.float64)
        for row, pair in zip(X, pairs, strict=True):
            for response, sign in (("chosen", 1), ("rejected", -1)):
                for feature, count in features(pair["prompt"], pair[response]).items():
                    row[columns.setdefault(feature, len(columns))] += sign * count
        return X[:, : len(columns)]

    X = differences(TRAIN)
    weights = torch.linalg.solve(X.T @ X + torch.eye(X.shape[1], dtype=X.dtype), X.sum(0))
    scores = differences(TEST)[:, : len(weights)] @ weights
    return ((scores.sign() + 1) / 2).mean().item()


@pytest.mark.parametrize("features", [length, characters, characters_by_order], ids=lambda f: f.__name__)
def test_neither_length_nor_characters_beat_chance(features: Callable[[str, str], Counter[Any]]) -> None:
    assert abs(held_out_accuracy(features) - 0.5) <= 0.05


def test_the_order_of_digits_is_not_enough_without_the_prompt() -> None:
    assert held_out_accuracy(neighbours) <= 0.8  # right on swaps and shuffles, chance on reversals: 0.75


def test_the_order_of_digits_decides_with_the_prompt() -> None:
    """What the model has to learn; also shows that `held_out_accuracy` can find a rule where there is one."""
    assert held_out_accuracy(neighbours_by_order) >= 0.95


# The model's files


@pytest.mark.parametrize(
    "text",
    [
        "12358",
        "  two  spaces , and\n\nlines\t",
        "Zoë's naïve 日本語 \N{PARTY POPPER}\u200d",
        "\x00\x7f\ufffd\U0010ffff",
        "▁a <0x41>",
    ],
    ids=["digits", "whitespace", "languages", "odd-code-points", "look-alikes"],
)
def test_tokenizer_has_one_token_per_byte_and_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_follow_the_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_tokenizer_survives_saving(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a ë\n")["input_ids"] == tokenizer("a ë\n")["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_chat_prompt_is_a_prefix_of_the_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [{"role": "user", "content": "Sort 21."}]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "12"}])["input_ids"]
    assert asked[0] == tokenizer.bos_token_id
    assert whole == [*asked, *b"12", tokenizer.eos_token_id]


def test_config_builds_a_small_model_for_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(FOLDER / "model")
    model = AutoModelForCausalLM.from_config(config)
    assert 500_000 < model.num_parameters() < 700_000
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.max_position_embeddings == tokenizer.model_max_length > max(len(str(pair)) for pair in TRAIN + TEST)

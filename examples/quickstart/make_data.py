"""Writes the quickstart's preference pairs, and the tokenizer and configuration of its model, beside this file.

The prompt asks for the digits of a number in ascending or descending order. The chosen response has them in that
order, the rejected one has the same digits in another. Which order is right is said in words by the prompt, so half of
the rejected responses would be right answers to another prompt; and either response may be a bare number or a sentence,
in all combinations equally often, so neither the length nor the characters of a response give it away.

    python examples/quickstart/make_data.py

Always writes the same bytes; `judge.py` is an independent opinion on every row.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

REQUESTS = {
    "ascending": (
        "Sort the digits of {} from smallest to largest.\n",
        "Put the digits of {} in ascending order.\n",
        "Write the digits of {} going up.\n",
    ),
    "descending": (
        "Sort the digits of {} from largest to smallest.\n",
        "Put the digits of {} in descending order.\n",
        "Write the digits of {} going down.\n",
    ),
}
ANSWERS = ("{}", "The answer is {}.")
MISTAKES = ("reverse", "reverse", "swap", "shuffle")  # half of them can only be told by reading the prompt
TRAIN_REPEATS, TEST_REPEATS = 18, 5  # x 32 combinations of mistake, order and answers: 576 and 160 pairs
MIN_DIGITS, MAX_DIGITS = 3, 7

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"  # ids 256, 257, 258, after the 256 bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.05,  # 0.02 is for larger models: at this width 0.05 learns faster
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "dtype": "float32",
}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_pairs(repeats: int, rng: random.Random, used: set[str]) -> list[dict[str, str]]:
    """`repeats` pairs of every combination, in random order; no number is a rearrangement of one in `used`."""
    pairs = []
    for mistake, order, chosen, rejected in product(MISTAKES, REQUESTS, ANSWERS, ANSWERS):
        for _ in range(repeats):
            number = draw_number(rng, used)
            right = sorted(number, reverse=order == "descending")
            wrong = spoil(right, mistake, rng)
            pairs.append(
                {
                    "prompt": rng.choice(REQUESTS[order]).format(number),
                    "chosen": chosen.format("".join(right)),
                    "rejected": rejected.format("".join(wrong)),
                }
            )
    rng.shuffle(pairs)
    return pairs


def draw_number(rng: random.Random, used: set[str]) -> str:
    """A number with at least three different digits, none of them 0, whose digits are not yet in `used`."""
    while True:
        number = "".join(rng.choices("123456789", k=rng.randint(MIN_DIGITS, MAX_DIGITS)))
        digits = "".join(sorted(number))
        if len(set(number)) >= 3 and digits not in used:
            used.add(digits)
            return number


def spoil(right: list[str], mistake: str, rng: random.Random) -> list[str]:
    """The digits of `right` in a wrong order."""
    wrong = right.copy()
    if mistake == "reverse":
        wrong.reverse()
    elif mistake == "swap":  # of two neighbours that differ
        i = rng.choice([i for i in range(len(right) - 1) if right[i] != right[i + 1]])
        wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
    else:
        while wrong in (right, right[::-1]):
            rng.shuffle(wrong)
    return wrong


def tokenizer_files() -> dict[str, dict[str, Any]]:
    """A tokenizer with one token per byte of UTF-8, id = byte, which begins every text with <bos>."""
    special = {token: 256 + i for i, token in enumerate((BOS, EOS, PAD))}
    start = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [special[BOS]], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {  # byte-pair encoding without merges: every character falls back to its bytes
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {f"<0x{byte:02X}>": byte for byte in range(256)} | special,
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def write_all(folder: Path) -> None:
    """Write train.jsonl, test.jsonl and model/ into `folder`."""
    rng, used = random.Random(0), set[str]()
    for name, repeats in (("train.jsonl", TRAIN_REPEATS), ("test.jsonl", TEST_REPEATS)):
        write(folder / name, "".join(json.dumps(pair) + "\n" for pair in make_pairs(repeats, rng, used)))
    for name, content in {"config.json": CONFIG, **tokenizer_files()}.items():
        write(folder / "model" / name, json.dumps(content, indent=2) + "\n")
    write(folder / "model" / "chat_template.jinja", CHAT_TEMPLATE)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # the same bytes on every platform


if __name__ == "__main__":
    write_all(Path(__file__).parent)

"""One dataset row to token ids: the three kinds of rows, each as text or as messages, and what is wrong with a row.

| kind | columns |
|---|---|
| preference | `chosen`, `rejected`, with or without `prompt`: without, the common start of the two is the prompt |
| ranked | `prompt`, `responses`: a list of at least two, best first |
| unpaired | `prompt`, `completion`, `label`: true where the completion is desirable |

Prompts and responses are text (standard format) or lists of `{"role", "content"}` messages (conversational format).
`tools` and `chat_template_kwargs` columns go to the chat template.
"""

import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fastdpo")

RAW_COLUMNS = {
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
    "unpaired": ("prompt", "completion", "label"),
}
TOKEN_COLUMNS = {
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ranked": ("prompt_ids", "ranked_ids"),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
}


class BadRow(ValueError):
    """What is wrong with one dataset row."""


def tokenize(
    row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]], bool]:
    """Ids of the prompt and of each response, and whether the text spells out a special token.

    Responses end with EOS. Each starts where it and the prompt alone part company.

    Raises:
        BadRow: the row is malformed.
        ValueError: the tokenizer lacks an EOS token or a chat template.
    """
    prompt, responses, names = _prompt_and_responses(row, kind)
    named = list(zip(names, responses, strict=True))
    special = any(_has_special_token(each, name, tokenizer) for name, each in [("prompt", prompt), *named])
    if isinstance(responses[0], str):
        prompt_ids = _encode(prompt, tokenizer, "prompt")
        full_ids = [_end_with_eos(_encode(prompt + response, tokenizer, name), tokenizer) for name, response in named]
    else:
        tools = row.get("tools")
        options = {
            "tokenize": True,
            "return_dict": True,
            "tools": (json.loads(tools) if isinstance(tools, str) else tools) or None,
            **(row.get("chat_template_kwargs") or {}),
        }
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        full_ids = [tokenizer.apply_chat_template(prompt + each, **options)["input_ids"] for each in responses]
    start = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    if start < len(prompt_ids):
        _warn_merged_boundary(tokenizer.decode(prompt_ids[start:]))
    return prompt_ids[:start], [ids[start:] for ids in full_ids], special


def read_ids(row: dict[str, Any], kind: str) -> tuple[list[int], list[list[int]]]:
    """Prompt and responses of a row that is tokenised already.

    Raises:
        BadRow: they are not lists of ints.
    """
    ids = {column: row[column] for column in TOKEN_COLUMNS[kind] if column != "label"}
    if kind == "ranked":
        ranked = ids.pop("ranked_ids")
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise BadRow(f"`ranked_ids` must be a list of at least two lists of token ids, got {ranked!r:.80}")
        ids |= {f"ranked_ids[{k}]": each for k, each in enumerate(ranked)}
    for column, value in ids.items():
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise BadRow(f"`{column}` must be a list of token ids, got {value!r:.80}")
    prompt, *responses = ids.values()
    return prompt, responses


def response_names(kind: str, count: int) -> list[str]:
    """What errors call the responses of a row."""
    return [f"responses[{k}]" for k in range(count)] if kind == "ranked" else list(RAW_COLUMNS[kind][-2:])[:count]


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading elements that `a` and `b` have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _prompt_and_responses(row: dict[str, Any], kind: str) -> tuple[Any, list[Any], list[str]]:
    """Check types and emptiness, and split off an implicit prompt."""
    if kind == "ranked":
        responses = row["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise BadRow(f"`responses` must be a list of at least two responses, best first, got {responses!r:.80}")
    else:
        responses = [row[column] for column in RAW_COLUMNS[kind] if column not in ("prompt", "label")]
    names = response_names(kind, len(responses))
    prompt = row.get("prompt")
    if prompt is None and "prompt" in row:
        implicit = "; give it a value, or remove the column where prompts are implicit"
        raise BadRow("`prompt` is None" + (implicit if kind == "preference" else ""))

    formats = [_format(response, name) for name, response in zip(names, responses, strict=True)]
    for name, other in zip(names, formats, strict=True):
        if other != formats[0]:
            raise BadRow(f"`{names[0]}` is {formats[0]} but `{name}` is {other}; make them alike")
    if prompt is not None and (prompt_format := _format(prompt, "prompt")) != formats[0]:
        if kind != "preference" or prompt_format != "text":
            raise BadRow(f"`prompt` is {prompt_format} but `{names[0]}` is {formats[0]}; make them alike")
        prompt = None  # a text copy of a prompt that the messages hold too, as UltraFeedback has it
    if prompt is not None:
        return prompt, responses, names
    chosen, rejected = responses
    start = common_prefix_length(chosen, rejected)
    if formats[0] == "text" and 0 < start < min(len(chosen), len(rejected)) and chosen[start - 1] == " ":
        start -= 1  # the space belongs to the completions, as tokenizers see it
    for name, response in zip(names, responses, strict=True):
        if not response[start:]:
            raise BadRow(f"`{name}` is nothing but the start of the other response: no completion is left")
    return chosen[:start], [chosen[start:], rejected[start:]], names


def _format(value: Any, field: str) -> str:
    if isinstance(value, str):
        if not value and field != "prompt":
            raise BadRow(f"`{field}` is empty")
        return "text"
    if isinstance(value, list) and value:
        for message in value:
            if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
                raise BadRow(f"`{field}` must hold messages with `role` and `content`, found {message!r:.80}")
        if not value[-1]["content"] and not value[-1].get("tool_calls"):
            raise BadRow(f"`{field}` ends with an empty message")
        return "messages"
    raise BadRow(f"`{field}` must be text or a non-empty list of messages, got {value!r:.80}")


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, field: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{field}` is not valid Unicode: {error.reason} at character {error.start}") from None
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _end_with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so completions would have no end; set tokenizer.eos_token")
    return ids if ids[-1:] == [eos] else [*ids, eos]


# Special tokens spelt out in the data


def _has_special_token(value: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text holds a special token other than a BOS where a prompt begins or an EOS where a response ends."""
    if not isinstance(value, str):
        texts = [message["content"] for message in value if isinstance(message["content"], str)]
    elif name == "prompt":
        texts = [value.removeprefix(tokenizer.bos_token or "")]
    else:
        texts = [value.removesuffix(tokenizer.eos_token or "")]
    pattern = _special_tokens(tokenizer)
    return any(pattern.search(text) for text in texts)


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, filter(None, tokens))) or r"(?!)")


_warned_merged_boundary = False


def _warn_merged_boundary(end: str) -> None:
    global _warned_merged_boundary
    if not _warned_merged_boundary:
        _warned_merged_boundary = True
        logger.warning(
            "the prompt alone and prompt + completion are tokenised differently from %r on, so this end of the prompt "
            "counts as completion. End prompts on a token boundary, or use a chat template that renders both alike. "
            "Said once; other rows are likely the same.",
            end,
        )

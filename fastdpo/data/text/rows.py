"""Tokenise one dataset row of any kind, given as text or as messages, or say what is wrong with it.

| kind | columns |
|---|---|
| preference | `chosen`, `rejected` and, optionally, `prompt`: without it, the common start of the two is the prompt |
| ranked | `prompt`, `responses`: a list of at least two, best first |
| unpaired | `prompt`, `completion`, `label`: true where the completion is desirable |

Prompts and responses are text (standard format) or lists of `{"role", "content"}` messages (conversational format); a
text prompt beside messages is a user turn. A response that begins with the prompt is read without that copy. `tools`
and `chat_template_kwargs` columns go to the chat template. Rows may have images, see `fastdpo.data.vision.images`.
"""

import logging
import re
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastdpo.data.columns import RAW_COLUMNS, TOKEN_COLUMNS
from fastdpo.data.text.messages import (
    BadRow,
    Message,
    common_prefix_length,
    is_same,
    name_of,
    read_template_inputs,
    read_value,
    strings,
    text_of,
    without_prompt,
)
from fastdpo.data.text.templates import (
    end_of_turn,
    find_template,
    fit,
    has_unread_key,
    leaves_out_tools,
    left_out,
    render,
)
from fastdpo.data.vision import images

logger = logging.getLogger("fastdpo")

_A_COPY = 12
"""Bytes of a text prompt from which a response that begins with it repeats it."""


class Tokenised(NamedTuple):
    """What `tokenize` returns."""

    prompt: list[int]
    responses: list[list[int]]
    notes: list[str]
    """What is odd about the row."""
    seen: dict[str, str]
    """For a row with images, the values of the columns `images.ADDED`."""


def tokenize(row: dict[str, Any], kind: str, processing_class: Any) -> Tokenised:
    """Return the ids of the prompt and of each response, and notes on what is odd about the row.

    Responses end with EOS, or as the chat template ends a turn. They start at the first token in which the prompt alone
    and the prompt with one of the responses differ. Notes are "special" (text spells out a special token), "repeated"
    (responses repeated the prompt, and that copy was left out), "lost" (the chat template leaves out text of the
    prompt) and "unread" (a message has a key that the chat template does not read).

    Raises:
        BadRow: the row is malformed, or the chat template leaves out some of its text.
        ValueError: the tokenizer lacks an EOS token or a chat template.
    """
    tokenizer = images.text_tokenizer(processing_class)
    prompt, responses, names, notes = _prompt_and_responses(row, kind)
    named = list(zip(names, responses, strict=True))
    pictures = images.images_of(row)
    is_text = isinstance(prompt, str)
    # text has the tokens of its images spelt out
    looked_at = named if pictures and is_text else [("prompt", prompt), *named]
    if any(_has_special_token(each, name, tokenizer) for name, each in looked_at):
        notes.append("special")
    if is_text:
        prompt_ids, prompt_text = _encode(prompt, tokenizer, "prompt"), prompt
        full_ids = [_encode_to_end(prompt + response, tokenizer, name) for name, response in named]
    else:
        prompt = images.placed(prompt, named, len(pictures))
        prompt_ids, full_ids, prompt_text = _encode_messages(row, prompt, named, processing_class, notes)
    start = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    if start < len(prompt_ids):
        _warn_merged_boundary(tokenizer.decode(prompt_ids[start:]))
    responses_ids = [ids[start:] for ids in full_ids]
    if not pictures:
        images.check_text([("prompt", prompt_ids[:start]), *zip(names, responses_ids, strict=True)], processing_class)
        return Tokenised(prompt_ids[:start], responses_ids, notes, {})
    images.check_text(list(zip(names, responses_ids, strict=True)), processing_class)
    prompt_ids, start, key = images.expand(
        prompt_text, pictures, processing_class, prompt_ids, start, adds_special=is_text
    )
    return Tokenised(prompt_ids[:start], responses_ids, notes, dict(zip(images.ADDED, (prompt_text, key), strict=True)))


def _encode_messages(
    row: dict[str, Any],
    prompt: list[Message],
    named: list[tuple[str, list[Message]]],
    processing_class: Any,
    notes: list[str],
) -> tuple[list[int], list[list[int]], str]:
    """Return the ids of the prompt and of the prompt with each response, and the prompt as the template renders it."""
    tools, options = read_template_inputs(row)
    tokenizer = images.text_tokenizer(processing_class)
    is_processor = tokenizer is not processing_class
    template = find_template(tokenizer, tools, processing_class.chat_template if is_processor else None)
    if is_processor:
        prompt, named = images.in_parts(prompt), [(name, images.in_parts(each)) for name, each in named]
    options = {"tools": tools, **options}
    if template is None:  # the tokenizer goes straight to ids, without a text to check
        options |= {"tokenize": True, "return_dict": True}
        start = render(prompt, "prompt", tokenizer, template, add_generation_prompt=True, **options)
        whole = [render(prompt + each, name, tokenizer, template, **options) for name, each in named]
        return start["input_ids"], [each["input_ids"] for each in whole], tokenizer.decode(start["input_ids"])
    prompt = fit(prompt, tokenizer, template)
    named = [(name, fit(each, tokenizer, template)) for name, each in named]
    texts = [render(prompt, "prompt", tokenizer, template, add_generation_prompt=True, **options)]
    texts += [render(prompt + each, name, tokenizer, template, **options) for name, each in named]

    for tool in tools or ():
        called = name_of(tool)
        if called and (called not in texts[1] or leaves_out_tools(tokenizer, template, "tools")):
            raise BadRow(f"the chat template leaves out the tool {called!r}; use one that knows tools, or drop `tools`")
    if any(has_unread_key(each, template) for each in (prompt, *(each for _, each in named))):
        notes.append("unread")
    for lost in left_out(prompt, texts[1]):
        if lost.is_whole and lost.role != "assistant":
            raise _lost("prompt", lost.text)
        notes += ["lost"] if "lost" not in notes else []
    for (name, response), text in zip(named, texts[1:], strict=True):
        for lost in left_out(response, text):
            raise _lost(name, lost.text)
        end = end_of_turn(tokenizer, template)
        is_doubled = text.rstrip().removesuffix(end).rstrip().endswith(end)
        if end and is_doubled and text_of(response[-1]).rstrip().endswith(end):
            raise BadRow(f"`{name}` ends with {end!r}, which the chat template adds once more; take it out of the text")
        if any("tool_calls" in message for message in response) and leaves_out_tools(tokenizer, template, "calls"):
            raise BadRow(f"`{name}` has tool calls, which the chat template leaves out; use one that knows tool calls")
    fields = ["prompt", *(name for name, _ in named)]
    prompt_ids, *full_ids = (
        _encode(text, tokenizer, field, add_special_tokens=False) for field, text in zip(fields, texts, strict=True)
    )
    return prompt_ids, full_ids, texts[0]


def _lost(field: str, text: str) -> BadRow:
    return BadRow(
        f"`{field}` has text that the chat template leaves out: {text!r:.80}; set a tokenizer.chat_template that keeps "
        "it, or take it out of the row"
    )


def read_ids(row: dict[str, Any], kind: str) -> tuple[list[int], list[list[int]]]:
    """Return the prompt and the responses of a row that is tokenised already.

    Raises:
        BadRow: one of them is not a list of ints.
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
    """Return the names by which errors call the responses of a row."""
    return [f"responses[{k}]" for k in range(count)] if kind == "ranked" else list(RAW_COLUMNS[kind][-2:])[:count]


def _prompt_and_responses(row: dict[str, Any], kind: str) -> tuple[Any, list[Any], list[str], list[str]]:
    """Return prompt, responses, their names and notes; an implicit or repeated prompt is split off the responses."""
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
    responses = [read_value(response, name) for name, response in zip(names, responses, strict=True)]
    formats = [_format(response) for response in responses]
    for name, other in zip(names, formats, strict=True):
        if other != formats[0]:
            raise BadRow(f"`{names[0]}` is {formats[0]} but `{name}` is {other}; make them alike")
    if prompt is None:
        return *_split_implicit(responses, names), names, []
    prompt = read_value(prompt, "prompt")
    if isinstance(prompt, str):
        if formats[0] == "messages":
            return *_join_text_prompt(prompt, responses, names, kind), names, []
        # an answer may begin with the words of a short prompt, such as "Hi", without repeating it; bytes are counted,
        # because Chinese has no spaces between words
        if not all(response.startswith(prompt) for response in responses) or len(prompt.strip().encode()) < _A_COPY:
            return prompt, responses, names, []
        rest = [response[len(prompt) :] for response in responses]
    else:
        if formats[0] == "text":
            raise BadRow(f"`prompt` is messages but `{names[0]}` is text; make them alike")
        found = [without_prompt(prompt, response) or (prompt, response) for response in responses]
        if any(start != found[0][0] for start, _ in found):
            raise BadRow(f"`prompt` is repeated by {' and '.join(map('`{}`'.format, names))}, but not in the same way")
        prompt, rest = found[0][0], [response for _, response in found]
        if rest == responses:
            return prompt, responses, names, []
    for name, response in zip(names, rest, strict=True):
        if not response:
            raise BadRow(f"`{name}` is nothing but the prompt: no completion is left")
    return prompt, rest, names, ["repeated"]


def _format(value: str | list[Message]) -> str:
    return "text" if isinstance(value, str) else "messages"


def _split_implicit(responses: list[Any], names: list[str]) -> tuple[Any, list[Any]]:
    """Split a pair into its common start, which is the implicit prompt, and the rest of each response."""
    chosen, rejected = responses
    start = common_prefix_length(chosen, rejected)
    if isinstance(chosen, str) and 0 < start < min(len(chosen), len(rejected)) and chosen[start - 1] == " ":
        start -= 1  # the space belongs to the completions, as tokenizers see it
    if not start:
        raise BadRow(
            f"there is no `prompt`, and `{names[0]}` and `{names[1]}` have no common start to use as one; add a "
            "column `prompt` (with empty text, if the prompts are empty)"
        )
    for name, response in zip(names, responses, strict=True):
        if not response[start:]:
            raise BadRow(f"`{name}` is nothing but the start of the other response: no completion is left")
    return chosen[:start], [chosen[start:], rejected[start:]]


def _join_text_prompt(
    text: str, responses: list[list[Message]], names: list[str], kind: str
) -> tuple[list[Message], list[list[Message]]]:
    """Make a text prompt the first user turn of messages, unless their own user turns already repeat it.

    UltraFeedback repeats the user turn like this; in other datasets the text is the whole conversation so far.
    """
    turn: Message = {"role": "user", "content": text}
    if all(response[0]["role"] == "assistant" for response in responses) and text.strip():
        return [turn], responses
    start = common_prefix_length(responses[0], responses[-1])
    is_copy = any(is_same(turn, message) for message in responses[0][:start])
    is_copy = is_copy or (start > 0 and all(text_of(message).strip() in text for message in responses[0][:start]))
    if kind == "preference" and (is_copy or not text.strip()):
        return _split_implicit(responses, names)
    found = [split for response in responses if (split := without_prompt([turn], response))]
    if len(found) < len(responses) or any(start != found[0][0] or not rest for start, rest in found):
        raise BadRow(
            f"`prompt` is text that the user's turns in `{names[0]}` don't repeat; write it as messages, or leave the "
            f"turns before the answer out of `{names[0]}`"
        )
    return found[0][0], [rest for _, rest in found]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, field: str, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{field}` is not valid Unicode: {error.reason} at character {error.start}") from None
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def _encode_to_end(text: str, tokenizer: PreTrainedTokenizerBase, field: str) -> list[int]:
    """Return ids that end with EOS, unless the text already ends with it or as the chat template ends a turn."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so completions would have no end; set tokenizer.eos_token")
    ids = _encode(text, tokenizer, field)
    template: Any = getattr(tokenizer, "chat_template", None)  # a user's own tokenizer may lack the attribute
    template = template.get("default") if isinstance(template, dict) else template
    ends = {tokenizer.eos_token, end_of_turn(tokenizer, template) if template else ""} - {""}
    return ids if ids[-1:] == [eos] or text.rstrip().endswith(tuple(ends)) else [*ids, eos]


# Special tokens spelt out in the data


def _has_special_token(value: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text holds a special token other than a BOS where a prompt begins or an EOS where a response ends."""
    if not isinstance(value, str):
        texts = list(strings(value))
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
            "This warning appears once; other rows are likely the same.",
            end,
        )

"""Render messages by a chat template, fit them to it, and find what it left out.

A template is untrusted code with gaps of its own: it may raise anything, take text but no lists of parts, or leave a
message out. What a template takes is tried once, on a short conversation; what it left out is searched for in the
rendered text of every row.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastdpo.data.text.messages import BadRow, Message, text_of
from fastdpo.untrusted import chat_template


def find_template(tokenizer: PreTrainedTokenizerBase, tools: Any, own: Any = None) -> str | None:
    """Return the chat template, or None for a tokenizer that renders messages by code of its own.

    `own` is the template of the processor around the tokenizer, or a dict of several; it comes first.

    Raises:
        ValueError: the tokenizer needs a template and has none.
    """
    if isinstance(own, dict):
        own = own.get("tool_use" if tools and "tool_use" in own else "default")
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template and not own:
        return None
    if not own and not tokenizer.chat_template:
        raise ValueError(
            "the dataset holds messages, but the tokenizer has no chat template to render them; set "
            "tokenizer.chat_template, or give prompts and responses as text"
        )
    template: str = own or tokenizer.get_chat_template(tools=tools)
    if len(template) > chat_template.MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template):,} characters, more than the {chat_template.MAX_TEMPLATE:,} that a "
            "template may have; set tokenizer.chat_template"
        )
    return template


def render(
    messages: list[Message], field: str, tokenizer: PreTrainedTokenizerBase, template: str | None, **options: Any
) -> Any:
    """Render messages by `apply_chat_template`, to text unless `options` ask for ids.

    `field` is the field of the row whose messages come last; an error names it.

    Raises:
        BadRow: the template raised an error, which the message repeats in one line.
        ValueError: the template takes too much time or memory; other rows would fare no better.
    """
    options = ({"chat_template": template} if template else {}) | {"tokenize": False} | options
    try:
        with chat_template.bounded():
            rendered = tokenizer.apply_chat_template(messages, **options)
        if isinstance(rendered, str):
            chat_template.check_length(rendered, messages, options.get("tools"))
        return rendered
    except (chat_template.TooMuch, MemoryError) as error:
        why = str(error) if isinstance(error, chat_template.TooMuch) else "it takes too much memory"
        raise ValueError(
            f"the chat template is refused: to render `{field}`, {why}; set tokenizer.chat_template"
        ) from None
    except Exception as error:  # a template, or a filter in it, may raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"the chat template can't render `{field}`: {told:.200}") from None


MARK = "Vega7"
"""The content of a message that tries out a template; no template writes this text by itself."""
_WRITTEN_PART = re.compile(rf"""["']text["']: ["']{MARK}""")


@lru_cache(maxsize=64)
def content_forms(tokenizer: PreTrainedTokenizerBase, template: str, role: str) -> frozenset[str]:
    """Return the forms of content, "text" and "parts", that the template renders for a role; it may be neither."""
    forms = set()
    for form, write in (("text", str), ("parts", lambda text: [{"type": "text", "text": text}])):
        user = {"role": "user", "content": write("Hi")}
        before = {"user": [], "assistant": [user], "tool": [user, _probe_call({})]}.get(role, [])
        after = [user] if role in ("system", "developer") else []
        text = _try(tokenizer, template, [*before, {"role": role, "content": write(MARK)}, *after])
        if MARK in text and not _WRITTEN_PART.search(text):
            forms.add(form)
    return frozenset(forms)


@lru_cache(maxsize=64)
def takes_arguments_as_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template needs the arguments of a tool call as JSON text, because it cannot render an object."""
    user = {"role": "user", "content": "Hi"}
    as_object, as_text = ({"name": MARK}, json.dumps({"name": MARK}))
    if MARK in _try(tokenizer, template, [user, _probe_call(as_object)]):
        return False
    return MARK in _try(tokenizer, template, [user, _probe_call(as_text)])


@lru_cache(maxsize=64)
def leaves_out_tools(tokenizer: PreTrainedTokenizerBase, template: str, what: str) -> bool:
    """Whether the template renders without a word of the "tools" it is given, or of the "calls" in a message.

    A row's own text can't tell: a tool called `weather` has the name of what is asked for.
    """
    user = {"role": "user", "content": "Hi"}
    if what == "tools":
        tool = {"type": "function", "function": {"name": MARK, "description": MARK, "parameters": {}}}
        texts = [_try(tokenizer, template, fit([user], tokenizer, template), tools=[tool])]
    else:
        forms = ({"name": MARK}, json.dumps({"name": MARK}))
        texts = [_try(tokenizer, template, [user, _probe_call(form)]) for form in forms]
    return any(texts) and not any(MARK in text for text in texts)


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return what the template writes after the last answer of a conversation, stripped of white space."""
    chat: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    _, found, end = _try(tokenizer, template, fit(chat, tokenizer, template)).rpartition(MARK)
    return end.strip() if found else ""


def _probe_call(arguments: Any) -> Message:
    function = {"name": "get", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _try(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message], **options: Any) -> str:
    try:
        text: str = render(messages, "probe", tokenizer, template, **options)
        return text
    except BadRow:
        return ""


def fit(messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str) -> list[Message]:
    """Return the messages with contents and arguments in a form that the template takes."""
    fitted = []
    for message in messages:
        content = message.get("content")
        if content is not None:
            forms = content_forms(tokenizer, template, message["role"])
            if isinstance(content, list) and "parts" not in forms:
                message = message | {"content": text_of(message)}
            elif isinstance(content, str) and forms == {"parts"}:
                message = message | {"content": [{"type": "text", "text": content}]}
        if "tool_calls" in message and takes_arguments_as_text(tokenizer, template):
            message = message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        fitted.append(message)
    return fitted


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function.get("arguments"), dict):
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"function": function} if "function" in call else function


# What the template left out


_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
_SENTENCE_END = re.compile(r"[.!?\n]")


class Lost(NamedTuple):
    """A text of a message that is not, or not completely, in the rendered conversation."""

    text: str
    is_whole: bool
    """Whether the rendered conversation has none of its lines and sentences."""
    role: str


def left_out(messages: list[Message], rendered: str) -> Iterator[Lost]:
    """Yield the texts of messages that are not completely in the rendered conversation.

    White space and the tags around reasoning are ignored, since templates write their own.
    """
    squeezed = ""
    for message in messages:
        for text in _texts(message):
            if (stripped := text.strip()) in rendered:
                continue
            squeezed = squeezed or _squeeze(rendered)
            for piece in _TAGS.split(stripped):
                if _squeeze(piece) in squeezed or _squeeze(json.dumps(piece, ensure_ascii=False)[1:-1]) in squeezed:
                    continue
                parts = filter(None, map(_squeeze, _SENTENCE_END.split(piece)))
                yield Lost(piece.strip(), not any(part in squeezed for part in parts), message["role"])


def _squeeze(text: str) -> str:
    return "".join(text.split())


_READ_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")


def has_unread_key(messages: list[Message], template: str) -> bool:
    """Whether a message has a key of its own that the template's text does not mention, so that it can't be read."""
    return any(key not in _READ_KEYS and key not in template for message in messages for key in message)


def _texts(message: Message) -> Iterator[str]:
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [{"text": content}]
    for is_text, run in groupby(parts, key=lambda part: "text" in part):  # an image parts what is before and after it
        yield "".join(part["text"] for part in run) if is_text else ""
    for field in ("reasoning_content", "thinking", "reasoning"):
        if isinstance(value := message.get(field), str):
            yield value
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield str(function.get("name", ""))
        if isinstance(arguments := function.get("arguments"), dict):
            yield from (value for value in arguments.values() if isinstance(value, str))

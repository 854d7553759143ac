"""Read the messages, tools and options of a row, and split off a prompt that its responses repeat."""

import ast
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


class BadRow(ValueError):
    """Raised for a dataset row that cannot be used; the message says what is wrong with it."""


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of leading elements that `a` and `b` have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# Reading


_ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {role: role for role in _ROLES} | {
    **{"gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant"},
    **{"model": "assistant", "human": "user", "prompter": "user"},
}
"""What other data sets call a role, by the name that chat templates know."""
_LIKE_JSON = re.compile(r"\s*\[?\s*\{")
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:\s*["']""")


def read_value(value: Any, field: str) -> str | list[Message]:
    """Return a prompt or response as text, or as messages without the keys that Arrow has filled with None.

    Messages may also come as JSON, or as the text of Python literals, which is how CSV files hold them.

    Raises:
        BadRow: the value is neither text nor messages, or a message is malformed.
    """
    if isinstance(value, str):
        parsed = _messages_in(value, field) if _LIKE_JSON.match(value) else None
        if parsed is None:
            if not value and field != "prompt":
                raise BadRow(f"`{field}` is empty")
            return value
        value = parsed
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{field}` must be text or a non-empty list of messages, got {value!r:.80}")
    messages = [_read_message(message, field) for message in value]
    if not messages[-1].get("content") and "tool_calls" not in messages[-1]:
        raise BadRow(f"`{field}` ends with an empty message")
    return messages


def _messages_in(text: str, field: str) -> list[Any] | None:
    """Return the messages that a text spells out, or None if it is plain text."""
    for parse in (json.loads, ast.literal_eval) if _LIKE_MESSAGES.match(text) else (json.loads,):
        try:
            found = parse(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict) and (found.get("role") not in _ROLES or isinstance(found.get("messages"), list)):
            if isinstance(found.get("messages"), list):
                raise BadRow(f"`{field}` is JSON of an object with `messages`; give the list of messages itself")
            return None  # an answer may well be an object with a `role` of its own
        items = found if isinstance(found, list) else [found]
        is_chat = all(isinstance(m, dict) and "role" in m and {"content", "tool_calls"} & m.keys() for m in items)
        if items and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in items):
            is_chat = True  # refused where messages are read, with the names to use instead
        return items if items and is_chat else None
    if _LIKE_MESSAGES.match(text):
        raise BadRow(f"`{field}` is a list of messages written as text, but it is not valid JSON: {text!r:.80}")
    return None


def _read_message(given: Any, field: str) -> Message:
    message = without_none(given)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        hint = "; rename `from` to `role`, `value` to `content`" if isinstance(given, dict) and "from" in given else ""
        raise BadRow(f"`{field}` must hold messages with `role` and `content`, found {given!r:.80}{hint}")
    if (better := _OTHER_ROLES.get(message["role"].lower())) and message["role"] not in _ROLES:
        raise BadRow(f"`{field}` has a message of role {message['role']!r}, which chat templates call {better!r}")
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if "tool_calls" in message:
        calls = _json_list(message["tool_calls"], f"{field}: tool_calls")
        message["tool_calls"] = [_read_call(call, field) for call in calls]
    if "function_call" in message:
        raise BadRow(f"`{field}` has a message with `function_call`, which no chat template reads; use `tool_calls`")
    content = message.get("content")
    if content is None and "tool_calls" not in message:
        raise BadRow(f"`{field}` must hold messages with `role` and `content`, found {given!r:.80}")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "image" and (kind != "text" or not isinstance(part.get("text"), str)):
                raise BadRow(
                    f"`{field}` has a message with a part that is neither text nor an image, which is not supported: "
                    f"{part!r:.80}"
                )
    elif content is not None and not isinstance(content, str):
        raise BadRow(f"`{field}` has a message whose content is neither text nor a list of parts: {content!r:.80}")
    return message


def _read_call(given: Any, field: str) -> dict[str, Any]:
    function = call = dict(given)
    if "function" in call:
        function = call["function"] = dict(read_json(call["function"], f"{field}: function of a tool call", dict))
    if not isinstance(function.get("name", ""), str):
        raise BadRow(f"`{field}` has a tool call whose name is no text: {function['name']!r:.80}")
    if isinstance(arguments := function.get("arguments"), str):
        function["arguments"] = read_json(arguments, f"{field}: arguments of a tool call", dict) if arguments else {}
    return call


def read_json(value: Any, field: str, wanted: type) -> Any:
    """Return a list or dict, which may be given as JSON text.

    Raises:
        BadRow: the text is not valid JSON, or the value is not of the wanted type.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"`{field}` is not valid JSON ({error}): {value!r:.80}") from None
    if not isinstance(value, wanted):
        name = "a list" if wanted is list else "an object"
        raise BadRow(f"`{field}` must be {name}, or JSON of one, got {value!r:.80}")
    return value


def _json_list(value: Any, field: str) -> list[dict[str, Any]]:
    items = read_json(value, field, list)
    return [read_json(item, field, dict) for item in items]


def without_none(value: Any) -> Any:
    """Copy a value without keys that are None: Arrow gives each struct of a column the keys of all its structs."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def read_template_inputs(row: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Return the `tools` and `chat_template_kwargs` of a row.

    Raises:
        BadRow: a chat template cannot take one of them.
    """
    tools = row.get("tools") or None
    if tools is not None:
        tools = _json_list(tools if isinstance(tools, str) else without_none(tools), "tools") or None
    for tool in tools or ():
        if not isinstance(tool.get("function", tool), dict) or not isinstance(name_of(tool), str):
            raise BadRow(f"`tools` must hold functions with a `name`, found {tool!r:.80}")
    options = row.get("chat_template_kwargs") or {}
    options = read_json(options if isinstance(options, str) else without_none(options), "chat_template_kwargs", dict)
    if "chat_template" in options:
        raise BadRow(
            "`chat_template_kwargs` brings a chat template of the row's own, but all rows are rendered by the "
            "tokenizer's; set tokenizer.chat_template"
        )
    if taken := _OF_TOKENIZER & options.keys():
        raise BadRow(f"`chat_template_kwargs` holds {min(taken)!r}, which is no variable of a chat template; remove it")
    return tools, options


def name_of(tool: dict[str, Any]) -> Any:
    """Return the name of a tool; "" if it has none."""
    return tool.get("function", tool).get("name", "")


_OF_TOKENIZER = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents",
    "kwargs",
}


def strings(value: Any) -> Iterator[str]:
    """Yield all text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


# A prompt that responses repeat


def text_of(message: Message) -> str:
    """Return the content of a message as one text."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def is_same(a: Message, b: Message) -> bool:
    """Whether two messages are equal, apart from white space around their content."""
    rest = (a.keys() | b.keys()) - {"content"}
    return all(a.get(key) == b.get(key) for key in rest) and text_of(a).strip() == text_of(b).strip()


def without_prompt(prompt: list[Message], response: list[Message]) -> tuple[list[Message], list[Message]] | None:
    """Split a response that repeats the prompt into the prompt and what follows; None if it does not repeat it.

    The response may repeat only the end of the prompt (for example, leave out its system message). It may also begin
    with messages before those of the prompt, which then belong to the prompt.
    """
    if response[0]["role"] not in ("system", "developer", "user"):
        return None
    for shared in range(min(len(prompt), len(response)), 0, -1):
        if all(map(is_same, prompt[-shared:], response)):
            return prompt, response[shared:]
    for start in range(1, len(response) - len(prompt) + 1):
        if all(map(is_same, prompt, response[start:])):
            return response[: start + len(prompt)], response[start + len(prompt) :]
    return None

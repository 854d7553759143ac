"""Rows that are malformed, useless or not what they seem: each is named with its number, or counted in a warning."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset

from fastdpo.data.prepare import prepare_dataset
from tests.helpers.byte_tokenizer import byte_tokenizer, messages

Case = tuple[str, Callable[[Path], bool]]
GOOD = {"prompt": "Name a colour. ", "chosen": "Teal.", "rejected": "Seven."}
CHAT: dict[str, Any] = {
    "prompt": messages(("user", "Name a colour.")),
    "chosen": messages(("assistant", "Teal.")),
    "rejected": messages(("assistant", "Seven.")),
}
BAD = 2
"""The number of the row that is changed, of four."""


@contextmanager
def listening() -> Iterator[list[str]]:
    """Inside the block, collect the warnings of fastdpo."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    logger, handler, disabled = logging.getLogger("fastdpo"), Listener(), logging.root.manager.disable
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logging.disable(disabled)


def _prepare(rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Any:
    settings = {"max_length": None, "vocab_size": 300, "show_example": False} | options
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(data, tokenizer or byte_tokenizer(), **settings)


def _named(change: dict[str, Any], words: str, row: dict[str, Any] = GOOD, **options: Any) -> Callable[[Path], bool]:
    """The changed row is refused by its number, with a reason."""

    def case(folder: Path) -> bool:
        try:
            _prepare([row, row, row | change, row] if "columns" not in change else change["columns"], **options)
        except ValueError as error:
            return f"row {BAD}" in str(error) and words in str(error) and "\n" not in str(error)
        return False

    return case


def _said(
    change: dict[str, Any], words: str, kept: int, row: dict[str, Any] = GOOD, **options: Any
) -> Callable[[Path], bool]:
    """The changed row is named in a warning."""

    def case(folder: Path) -> bool:
        with listening() as lines:
            rows = _prepare([row, row, row | change, row], **options)
        named = any(words in line and (f"row {BAD}" in line or f"rows {BAD}" in line) for line in lines)
        return named and len(rows) == kept

    return case


def _refused(rows: Any, words: str, **options: Any) -> Callable[[Path], bool]:
    """The dataset is refused as a whole."""

    def case(folder: Path) -> bool:
        try:
            _prepare(rows() if callable(rows) else rows, **options)
        except ValueError as error:
            return words in str(error)
        return False

    return case


def _adds_eos() -> Any:
    """A tokenizer that ends every text with EOS."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    special = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=special
    )
    return tokenizer


def _one_eos(folder: Path) -> bool:
    row = _prepare([GOOD], _adds_eos())[0]
    return all(row[name].count(1) == 1 and row[name][-1] == 1 for name in ("chosen_ids", "rejected_ids"))


def cases() -> list[Case]:
    """Return the names of the cases, and functions that return whether the row was named."""
    long = "x" * 80
    tool = '[{"type": "function", "function": {"name": "get"}}]'
    return [
        ("a column is missing", _refused([{"prompt": "a", "chosen": "b"}], "no column 'rejected'")),
        ("a value is None", _named({"chosen": None}, "`chosen`")),
        ("a value is a number", _refused([GOOD | {"chosen": 7}], "row 0: `chosen`")),
        ("a value is a list", _refused([GOOD | {"chosen": ["a"]}], "row 0: `chosen`")),
        ("no rows", _refused(lambda: Dataset.from_dict({name: [] for name in GOOD}), "is empty")),
        ("all prompts fill max_length", _refused([GOOD, GOOD | {"chosen": "Red."}], "no usable row", max_length=8)),
        ("a lone surrogate", _named_in_stream({"chosen": "\ud800"}, "not valid Unicode")),
        ("a prompt fills max_length", _said({"prompt": long}, "fills max_length=60", 3, max_length=60)),
        (
            "cutting makes both responses equal",
            _said({"chosen": long + "a", "rejected": long + "b"}, "are the same tokens", 3, max_length=60),
        ),
        ("both responses are equal", _said({"rejected": GOOD["chosen"]}, "are the same tokens", 3)),
        ("both responses are empty", _named({"chosen": "", "rejected": ""}, "is empty")),
        ("a response is empty", _named({"chosen": ""}, "`chosen` is empty")),
        ("an empty prompt without BOS", _empty_prompt),
        ("EOS in the text", _said({"chosen": "Teal.<eos> And more."}, "spell out a special token", 4)),
        ("BOS in the text of a tokenizer that adds it", _named({"prompt": "<bos>Name one. "}, "two BOS tokens")),
        ("a tokenizer that adds EOS itself", _one_eos),
        ("a token id beyond the vocabulary", _named({"chosen": "\x7f"}, "vocabulary has 224 entries", vocab_size=224)),
        ("tools that are no JSON", _named({"tools": "get"}, "`tools` is not valid JSON", CHAT | {"tools": tool})),
        (
            "tools that are no functions",
            _named({"tools": '[{"function": "get"}]'}, "`tools` must hold functions", CHAT | {"tools": tool}),
        ),
        (
            "tools nested deeply",
            _named({"tools": "[" * 9000}, "`tools` is not valid JSON", CHAT | {"tools": tool}),
        ),
        (
            "options of the template that are no object",
            _named({"chat_template_kwargs": "[1]"}, "must be an object", CHAT | {"chat_template_kwargs": "{}"}),
        ),
        (
            "an option of the tokenizer",
            _named(
                {"chat_template_kwargs": '{"tokenize": true}'}, "no variable", CHAT | {"chat_template_kwargs": "{}"}
            ),
        ),
        (
            "a template of the row's own",
            _named(
                {"chat_template_kwargs": '{"chat_template": "x"}'}, "row's own", CHAT | {"chat_template_kwargs": "{}"}
            ),
        ),
        (
            "an end of turn that the template adds too",
            _named({"chosen": messages(("assistant", "Teal.<eos>"))}, "adds once more", CHAT),
        ),
        ("a special token in a message", _said({"prompt": messages(("user", "a<eos>b"))}, "special token", 4, CHAT)),
        ("a special token in a role", _said({"prompt": messages(("<pad>", "a"))}, "special token", 4, CHAT)),
        (
            "a key that the template does not read",
            _said({"prompt": [{"role": "user", "content": "Name one.", "train": "no"}]}, "does not read", 4, CHAT),
        ),
    ]


def _named_in_stream(change: dict[str, Any], words: str) -> Callable[[Path], bool]:
    """A text that Arrow can't hold comes from a generator."""

    def case(folder: Path) -> bool:
        from fastdpo.data.prepare import tokenize_row

        row = tokenize_row(GOOD | change, BAD, byte_tokenizer(), max_length=None, vocab_size=300)
        return words in row["problem"] and row["pair_index"] == BAD

    return case


def _empty_prompt(folder: Path) -> bool:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return _named({"prompt": ""}, "nothing predicts the first token", tokenizer=tokenizer)(folder)

"""Log what became of a dataset: a summary with one example, the rows that are dropped, and the rows that are changed.

Counts come from Arrow's columns, not from a loop over the rows.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data.columns import describe_columns
from fastdpo.data.packing import responses_of
from fastdpo.untrusted.text import printable

logger = logging.getLogger("fastdpo")

MAX_NAMED_ROWS = 5
NOTES = {
    "prompt": "have a prompt that is too long and cut at its start",
    "completion": "have a completion that is too long and cut at its end",
    "special": "spell out a special token, which is read as that token; fine if a chat template made the text",
    "repeated": "repeat the prompt at the start of their responses; that copy is left out",
    "lost": "have text in their prompt that the chat template leaves out, such as the reasoning of an earlier answer",
    "unread": "have messages with keys that the chat template does not read, so that their values are ignored",
}
CUTS = ("prompt", "completion")
_SHOWN = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected", "completion_ids": "completion"}
_REPEATED = re.compile(r"([<\[][^\s<>\[\]]{1,40}[>\]])\1{3,}")
_ENDS_LOOKED_AT = 20
"""Number of rows whose responses are looked at for their ends."""
_HEAD, _TAIL = 240, 120
"""Numbers of characters that are shown from the start and from the end of a longer text."""


@dataclass(frozen=True)
class Reporter:
    """Writes to the log what became of a dataset."""

    name: str
    """What the log calls the dataset."""
    columns: list[str]
    """Names of the columns it was given with."""
    kind: str
    """Kind of its rows."""
    is_chat: bool
    """Whether its rows hold messages, which a chat template renders."""
    limits: Mapping[str, int | str | None]
    """Lengths that rows are cut to, by name of the setting."""
    tokenizer: PreTrainedTokenizerBase
    on_bad_row: str
    show_example: bool | None
    """Whether the summary has an example. None: there is no summary, and cut rows get warnings of their own."""
    is_silent: bool
    """Whether another process writes the log."""

    def report(self, rows: Dataset) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Log what `tokenize_row` says of all rows, and return the numbers of the rows to keep.

        Raises:
            ValueError: no row is left, or (on_bad_row="error") rows are malformed; the message names the rows.
        """
        problems = rows.data.column("problem")
        kept = np.flatnonzero(pc.equal(problems, ""))
        self._report_problems(problems)
        if not len(kept):
            why = f"; row 0: {str(problems[0]).removeprefix('dropped: ')}" if len(rows) else ""
            raise ValueError(f"{self.name} dataset has no usable row left out of {len(rows)}{why}")
        if self.is_silent:
            return kept
        notes = _rows_by_note(rows.data.column("notes"))
        if "prompt_ids" in self.columns:
            self._warn_of_no_end(rows.select(kept[:_ENDS_LOOKED_AT]))
        for key, found in notes.items():
            if key not in CUTS or self.show_example is None:
                limits = f"; {self._limits()}" if key in CUTS else ""
                logger.warning(
                    *("%s dataset: %d of %d rows %s (%s%s)", self.name, len(found), len(rows), NOTES[key]),
                    *(_numbers(found), limits),
                )
        if self.show_example is not None:
            cuts = {key: found for key, found in notes.items() if key in CUTS}
            lines = [self._counts(len(rows), len(kept), cuts), *self._lengths(rows, kept), *self._columns()]
            level = logging.WARNING if cuts else logging.INFO
            logger.log(level, "%s", "\n".join([*lines, *self._example(rows[int(kept[0])])]))
        return kept

    def report_stream(self, first: Mapping[str, Any]) -> None:
        """Log what the first row of a stream, as `tokenize_row` returns it, tells about the stream."""
        if self.show_example is not None and not self.is_silent:
            lines = [f"{self.name} dataset: a stream, so its rows are not counted", *self._columns()]
            logger.info("%s", "\n".join([*lines, *([] if first["problem"] else self._example(first))]))

    def _warn_of_no_end(self, rows: Dataset) -> None:
        """Warn if no response of rows that came as token ids ends as an answer does, although none was cut here."""
        ends = {*getattr(self.tokenizer, "all_special_ids", ())}
        added = getattr(self.tokenizer, "added_tokens_decoder", {})  # <|eot_id|> and the like end a turn too
        ends |= {i for i, token in added.items() if str(token).strip()}
        responses = [ids for row in rows if "completion" not in row["notes"] for ids in responses_of(row)]
        if ends and responses and not any(ends & {*ids[-2:]} for ids in responses):  # a line break may follow
            logger.warning(
                "%s dataset: no response of the first rows ends with EOS (%s) or another special token; with responses "
                "that have no end, the model may learn to go on and on",
                *(self.name, self.tokenizer.eos_token_id),
            )

    def _report_problems(self, problems: pa.ChunkedArray) -> None:
        rows = np.flatnonzero(pc.not_equal(problems, ""))
        found = list(zip(rows.tolist(), problems.take(pa.array(rows)).to_pylist(), strict=True))
        bad = [(i, p) for i, p in found if not p.startswith("dropped: ")]
        dropped = [(i, p.removeprefix("dropped: ")) for i, p in found if p.startswith("dropped: ")]
        if bad and self.on_bad_row == "error":
            raise ValueError(
                f"{self.name} dataset: {len(bad)} of {len(problems)} rows are malformed. {_name_rows(bad)}. "
                "Mend them, or set on_bad_row='drop' to leave them out."
            )
        for what, named in (("malformed", bad), ("useless", dropped)):
            if named and not self.is_silent:
                logger.warning(
                    *("%s dataset: dropped %d %s rows of %d. %s.", self.name, len(named), what, len(problems)),
                    _name_rows(named),
                )

    # The lines of the summary

    def _counts(self, given: int, kept: int, cuts: Mapping[str, Any]) -> str:
        parts = [f"{given:,} rows" if given > 1 else "1 row"]
        if kept < given:
            parts.append(f"{_share(given - kept, given)} dropped")
        for key, found in cuts.items():
            parts.append(f"{_share(len(found), given)} with a {key} cut ({_numbers(found)})")
        return f"{self.name} dataset: {', '.join(parts)}" + (f"; {self._limits()}" if cuts else "")

    def _lengths(self, rows: Dataset, kept: Any) -> list[str]:
        lines = []
        for column, name in [*_SHOWN.items(), ("ranked_ids", "response")]:
            if column in rows.column_names:
                ids = rows.data.column(column)
                lengths = pc.list_value_length(pc.list_flatten(ids) if column == "ranked_ids" else ids).to_numpy()
                lengths = lengths if column == "ranked_ids" else lengths[kept]  # rows that are left out have no tokens
                lines.append(f"  {name:10} {lengths.mean():,.1f} tokens on average, {lengths.max():,} at most")
        return lines

    def _columns(self) -> list[str]:
        return [f"  columns    {describe_columns(self.columns, self.kind, is_chat=self.is_chat)}"]

    def _example(self, row: Mapping[str, Any]) -> list[str]:
        """Return the lines that show one row, decoded from its token ids."""
        decode = getattr(self.tokenizer, "decode", None)  # for rows that come as ids, a tokenizer need not decode
        if not self.show_example or decode is None:
            return []
        responses = {name: row[column] for column, name in _SHOWN.items() if column in row and name != "prompt"}
        responses |= {f"response {k}": ids for k, ids in enumerate(row.get("ranked_ids", ()))}
        prompt = decode(row["prompt_ids"])
        lines = [f"  example    row {row['pair_index']}; the tokens between ⟦ and ⟧ are scored"]
        lines.append(f"    {'prompt':10} {_shown(prompt)}")
        for name, ids in responses.items():
            whole = decode([*row["prompt_ids"], *ids])
            # some tokenizers drop the space at the start of a response that is decoded alone
            text = whole[len(prompt) :] if whole.startswith(prompt) else decode(ids)
            lines.append(f"    {name:10} ⟦{_shown(text)}⟧")
        return lines

    def _limits(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.limits.items() if value not in (None, "keep_start"))


def report_streamed(row: Mapping[str, Any], name: str, on_bad_row: str, said: set[str]) -> bool:
    """Log what `tokenize_row` says of one row of a stream when it is read, and return whether to keep the row."""
    problem, index = row["problem"], row["pair_index"]
    if problem and not problem.startswith("dropped: ") and on_bad_row == "error":
        raise ValueError(f"{name} dataset: row {index}: {problem}. Mend it, or set on_bad_row='drop'.")
    if problem:
        logger.warning("%s dataset: dropped row %d: %s", name, index, problem.removeprefix("dropped: "))
    for key in set(row["notes"]) - said:
        said.add(key)
        logger.warning("%s dataset: rows %s; row %d is the first, others are not named", name, NOTES[key], index)
    return not problem


def _rows_by_note(notes: pa.ChunkedArray) -> dict[str, "np.ndarray[Any, np.dtype[np.int64]]"]:
    """Return the numbers of the rows with each note."""
    rows = np.repeat(np.arange(len(notes)), pc.list_value_length(notes).to_numpy())
    keys = pc.list_flatten(notes)
    found = {key: rows[pc.equal(keys, key).to_numpy()] for key in NOTES}
    return {key: numbers for key, numbers in found.items() if len(numbers)}


def _numbers(rows: Any) -> str:
    return "rows " + ", ".join(map(str, rows[:MAX_NAMED_ROWS])) + (", ..." if len(rows) > MAX_NAMED_ROWS else "")


def _name_rows(rows: list[tuple[int, str]]) -> str:
    shown: dict[str, list[str]] = {}
    for i, problem in rows[:MAX_NAMED_ROWS]:
        shown.setdefault(problem, []).append(str(i))
    named = "; ".join(f"row{'s' * (len(at) > 1)} {', '.join(at)}: {problem}" for problem, at in shown.items())
    return named + (f"; and {len(rows) - MAX_NAMED_ROWS} more" if len(rows) > MAX_NAMED_ROWS else "")


def _share(part: int, whole: int) -> str:
    share = part / whole
    return f"{part:,} ({'under 0.1%' if share < 0.0005 else f'{share:.1%}'})"


def _shown(text: str) -> str:
    """Return text on one line, shortened in the middle if it is long, with control characters escaped.

    A special token that comes many times in a row, as those of an image do, is shown once, with its count.
    """
    text = _REPEATED.sub(lambda found: f"{found[1]}*{len(found[0]) // len(found[1])} ", text)
    if (rest := len(text) - _HEAD - _TAIL) > 0:
        head, tail = printable(text[:_HEAD], ""), printable(text[-_TAIL:], "")
        return f"{head} [{rest:,} characters left out] {tail}"
    return printable(text, "")

"""What the log says of a dataset before training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AddedToken

import fastdpo
from fastdpo.data import prepare as prepare_module
from fastdpo.data.summary import _shown
from tests.helpers.byte_tokenizer import byte_tokenizer, messages
from tests.helpers.tiny import make_model

TOKENIZER = byte_tokenizer()
PAIR = {"prompt": "Name:", "chosen": " Ida", "rejected": " Bo"}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[..., list[tuple[str, str]]]:
    """Levels and messages of preparing rows."""

    def prepare(rows: Any, **options: Any) -> list[tuple[str, str]]:
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        caplog.clear()
        options = {"max_length": None, "vocab_size": 259, "show_example": True} | options
        with caplog.at_level(logging.INFO, logger="fastdpo"):
            prepare_module.prepare_dataset(dataset, TOKENIZER, **options)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return prepare


@pytest.mark.parametrize("end", [[], [1], [1, 10]], ids=["none", "eos", "eos-and-line-break"])
def test_responses_without_an_end_are_said(end: list[int], logged: Callable[..., list[tuple[str, str]]]) -> None:
    assert TOKENIZER.eos_token_id == 1
    row = {"prompt_ids": [70, 71], "chosen_ids": [80, 81, *end], "rejected_ids": [82, 83, 84]}
    warned = [message for level, message in logged([row] * 30, max_length=64) if level == "WARNING"]
    cut = [message for level, message in logged([row] * 30, max_length=4) if "has no end" in message]
    assert [("EOS (1)" in message and "may learn to go on" in message) for message in warned] == [True] * (not end)
    assert not cut, "of what is cut, nobody knows the end"


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_may_end_with_a_token_that_was_added(
    special: bool, logged: Callable[..., list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=special)], special_tokens=special)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end not in tokenizer.all_special_ids
    monkeypatch.setitem(globals(), "TOKENIZER", tokenizer)
    row = {"prompt_ids": [70, 71], "chosen_ids": [80, 81, end], "rejected_ids": [82, end]}
    assert "WARNING" not in {level for level, _ in logged([row] * 3, vocab_size=end + 1)}


def test_the_whole_summary(logged: Callable[..., list[tuple[str, str]]]) -> None:
    rows = [
        PAIR | {"chosen": " Bo"},
        PAIR | {"chosen": " Ida Maria\n\x1b[2J"},
        *[PAIR] * 6,
    ]
    rows = [row | {"weight": 2.0, "margin": 0.5, "origin": "here", "stars": 3} for row in rows]
    dropped, (level, summary) = logged(rows, max_length=16)
    assert dropped == (
        "WARNING",
        "train dataset: dropped 1 useless rows of 8. row 0: chosen and rejected are the same tokens.",
    )
    assert level == "WARNING"
    assert summary.splitlines() == [
        "train dataset: 8 rows, 1 (12.5%) dropped, 1 (12.5%) with a completion cut (rows 1); max_length=16",
        "  prompt     6.0 tokens on average, 6 at most",
        "  chosen     5.7 tokens on average, 10 at most",
        "  rejected   4.0 tokens on average, 4 at most",
        "  columns    prompt, chosen, rejected, weight (factor of the row's loss), margin (what the row's reward "
        "margin must exceed); not used: origin, stars",
        "  example    row 1; the tokens between ⟦ and ⟧ are scored",
        "    prompt     <bos>Name:",
        "    chosen     ⟦ Ida Maria⟧",
        "    rejected   ⟦ Bo<eos>⟧",
    ]
    ((level, summary),) = logged([PAIR], name="eval")
    assert level == "INFO"
    assert summary.startswith("eval dataset: 1 row\n")


def test_the_example_is_left_out_and_the_summary_with_it(logged: Callable[..., list[tuple[str, str]]]) -> None:
    ((_, summary),) = logged([PAIR], show_example=False)
    assert summary.splitlines()[-1] == "  columns    prompt, chosen, rejected; not used: none"
    assert logged([PAIR], show_example=None) == []


def test_every_kind_has_its_lines(logged: Callable[..., list[tuple[str, str]]]) -> None:
    ask = messages(("user", "Name?"))
    ranked = {"prompt": ask, "responses": [messages(("assistant", name)) for name in ("Ida", "Bo", "Charlotte")]}
    ((_, summary),) = logged([ranked | {"tools": "[]"}], kind="ranked")
    assert "  response   5.7 tokens on average, 10 at most" in summary
    assert "prompt, responses, tools (for the chat template); not used: none" in summary
    assert "    response 2 ⟦Charlotte<eos>⟧" in summary
    ((_, summary),) = logged(
        [{"prompt": ask, "completion": messages(("assistant", "Ida")), "label": True}], kind="unpaired"
    )
    assert "    completion ⟦Ida<eos>⟧" in summary
    assert "prompt, completion, label; not used: none" in summary
    ((_, summary),) = logged([PAIR], kind="unpaired")
    assert "    rejected   ⟦ Bo<eos>⟧" in summary
    ids = {"prompt_ids": [0, 70], "chosen_ids": [71], "rejected_ids": [72, 73], "pair_index": 4, "prompt": "unread"}
    *_, (_, summary) = logged([ids | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}])
    assert "prompt_ids, chosen_ids, rejected_ids, pair_index (the row's number), ref_chosen_logps (" in summary
    assert "not used: prompt" in summary


def test_a_stream_has_no_counts(logged: Callable[..., list[tuple[str, str]]]) -> None:
    ((level, summary),) = logged(IterableDataset.from_generator(lambda: iter([PAIR | {"id": 3}] * 2)))
    assert (level, summary.splitlines()) == (
        "INFO",
        [
            "train dataset: a stream, so its rows are not counted",
            "  columns    prompt, chosen, rejected; not used: id",
            "  example    row 0; the tokens between ⟦ and ⟧ are scored",
            "    prompt     <bos>Name:",
            "    chosen     ⟦ Ida<eos>⟧",
            "    rejected   ⟦ Bo<eos>⟧",
        ],
    )


def test_rows_with_one_reason_are_named_together(logged: Callable[..., list[tuple[str, str]]]) -> None:
    good: dict[str, Any] = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [4]}
    bad = good | {"chosen_ids": []}
    (_, said), *_ = logged([bad, good, bad, good | {"prompt_ids": []}, bad, bad, bad], on_bad_row="drop", max_length=5)
    assert "row 0, 2, 4, 5" not in said
    assert "rows 0, 2, 4, 5: `chosen` has no tokens; row 3: `prompt` has no tokens" in said
    assert said.endswith("; and 1 more.")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_are_counted_over_arrows_chunks(
    num_proc: int | None, logged: Callable[..., list[tuple[str, str]]]
) -> None:
    rows: list[Any] = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]} for _ in range(2300)]
    rows[3]["chosen_ids"] = []
    rows[1100]["prompt_ids"] = [1, 2, 3, 4]
    rows[2250]["rejected_ids"] = [5] * 9
    rows[2299]["rejected_ids"] = [5] * 4
    dropped, (_, summary) = logged(rows, on_bad_row="drop", max_prompt_length=2, max_length=5, num_proc=num_proc)
    assert dropped[1] == "train dataset: dropped 1 malformed rows of 2300. row 3: `chosen` has no tokens."
    assert summary.splitlines()[:4] == [
        "train dataset: 2,300 rows, 1 (under 0.1%) dropped, 1 (under 0.1%) with a prompt cut (rows 1100), 1 (under "
        "0.1%) with a completion cut (rows 2250); max_length=5, max_prompt_length=2",
        "  prompt     1.0 tokens on average, 2 at most",
        "  chosen     2.0 tokens on average, 2 at most",
        "  rejected   1.0 tokens on average, 4 at most",
    ]


def test_text_is_shown_on_one_harmless_line() -> None:
    assert _shown("ä 日本 \u202e\x1b[2J\r\n\ttab\ud800") == r"ä 日本 \u202e\x1b[2J\r\n\ttab\ud800"
    long = _shown("a" * 300 + "b" * 200)
    assert long == f"{'a' * 240} [140 characters left out] {'b' * 120}"


def test_one_process_writes_the_log(
    logged: Callable[..., list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    rows = [PAIR | {"system": "Be curt."}, PAIR | {"chosen": ""}]
    for rank, count in ((0, 3), (1, 0)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert len(logged(rows, on_bad_row="drop")) == count
        with pytest.raises(ValueError, match="row 1: `chosen` is empty"):
            logged(rows)


def test_the_summary_leaves_the_cache_alone(tmp_path: Path) -> None:
    Dataset.from_list([PAIR]).save_to_disk(tmp_path)
    options: dict[str, Any] = {"max_length": None, "vocab_size": 259}
    shown, hidden, none = (
        prepare_module.prepare_dataset(Dataset.load_from_disk(tmp_path), TOKENIZER, show_example=show, **options)
        for show in (True, False, None)
    )
    assert shown._fingerprint == hidden._fingerprint == none._fingerprint


@pytest.mark.parametrize("show", [True, False])
def test_the_trainer_logs_it_for_every_dataset(show: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        fastdpo.DPOTrainer(
            model=make_model("llama", vocab_size=259),
            args=fastdpo.DPOConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to="none",
                **({} if show else {"show_example": False}),
            ),
            train_dataset=Dataset.from_list([PAIR]),
            eval_dataset={"held": Dataset.from_list([PAIR] * 2)},
            processing_class=TOKENIZER,
        )
    summaries = [message for message in caplog.messages if "tokens on average" in message]
    assert [message.splitlines()[0] for message in summaries] == ["train dataset: 1 row", "held dataset: 2 rows"]
    assert ["chosen     ⟦ Ida<eos>⟧" in message for message in summaries] == [show, show]


def test_tools_beside_text_are_not_used(logged: Callable[..., list[tuple[str, str]]]) -> None:
    ((_, summary),) = logged([PAIR | {"tools": "[]"}])
    assert summary.splitlines()[4] == "  columns    prompt, chosen, rejected; not used: tools"

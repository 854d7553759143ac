"""Dataset rows to token ids: every format, against TRL; every malformed row, by number."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdpo.data import prepare as prepare_module
from fastdpo.data.columns import with_raw_columns
from fastdpo.data.text import rows as rows_module
from tests.helpers.byte_tokenizer import VOCAB, byte_tokenizer, messages


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    def prepare(rows: list[dict[str, Any]], **options: Any) -> Any:
        options = {"max_length": None, "vocab_size": VOCAB} | options
        return prepare_module.prepare_dataset(Dataset.from_list(rows), tokenizer, **options)

    return prepare


ASK = ("user", "What colour is the sky?")
FORMATS = {
    "standard": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    ],
    "standard-implicit": [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Grün ist gut", "rejected": "Grün war gut"},
    ],
    "conversational": [
        {
            "prompt": messages(ASK),
            "chosen": messages(("assistant", "It is blue.")),
            "rejected": messages(("assistant", "It is green.")),
        }
    ],
    "conversational-implicit": [
        {
            "chosen": messages(ASK, ("assistant", "Guess."), ("user", "Blue?"), ("assistant", "Yes.")),
            "rejected": messages(ASK, ("assistant", "Guess."), ("user", "Blue?"), ("assistant", "No.")),
        }
    ],
    "system": [
        {
            "prompt": messages(("system", "Be brief."), ASK),
            "chosen": messages(("assistant", "Blue.")),
            "rejected": messages(("assistant", "Blue, of course; why do you ask?")),
        }
    ],
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_same_ids_as_trl(name: str, prepare: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    trl = pytest.importorskip("trl")
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    args = trl.DPOConfig(output_dir="unused", max_length=None, bf16=False, report_to="none")
    theirs = trainer._prepare_dataset(Dataset.from_list(FORMATS[name]), tokenizer, args, "train")
    ours = prepare(FORMATS[name])
    for column in prepare_module.TOKEN_COLUMNS["preference"]:
        assert list(ours[column]) == list(theirs[column]), column


def test_completions_end_with_exactly_one_eos(prepare: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "chosen": "b<eos>", "rejected": "c"}]
    for column in ("chosen_ids", "rejected_ids"):
        ids = prepare(rows)[column][0]
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id


def test_the_prompt_starts_with_bos_and_round_trips(
    prepare: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = prepare([{"prompt": "Grüße 😀", "chosen": "x", "rejected": "y"}])[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<bos>Grüße 😀"


def test_a_text_prompt_beside_messages_that_hold_it_too(prepare: Callable[..., Any]) -> None:
    row = FORMATS["conversational-implicit"][0]
    with_copy = prepare([{"prompt": ASK[1], **row}])
    assert with_copy[0] == prepare([row])[0]


def test_max_length_cuts_the_end_of_completions(prepare: Callable[..., Any]) -> None:
    rows = [{"prompt": "abc", "chosen": "defghi", "rejected": "z"}]
    whole, cut = prepare(rows)[0], prepare(rows, max_length=6)[0]
    assert cut["prompt_ids"] == whole["prompt_ids"]
    assert cut["chosen_ids"] == whole["chosen_ids"][:2]
    assert cut["rejected_ids"] == whole["rejected_ids"]


def test_keep_end_cuts_the_start_of_prompts_and_never_a_completion(prepare: Callable[..., Any]) -> None:
    rows = [{"prompt": "abc", "chosen": "defghi", "rejected": "z"}]
    whole = prepare(rows)[0]
    bos, *_, last_but_one, last = whole["prompt_ids"]
    cut = prepare(rows, max_length=9, truncation_mode="keep_end")[0]
    assert cut == whole | {"prompt_ids": [bos, last]}
    short = prepare(rows, max_length=5, max_completion_length=2, truncation_mode="keep_end")[0]
    assert short["prompt_ids"] == [bos, last_but_one, last]
    assert short["chosen_ids"] == whole["chosen_ids"][:2]
    assert prepare(rows, max_length=11, truncation_mode="keep_end")[0] == whole
    with pytest.raises(ValueError, match="row 0: its completion of 7 tokens fills max_length, so 'keep_end' would cut"):
        prepare(rows, max_length=7, truncation_mode="keep_end")


def test_rows_with_nothing_to_learn_are_dropped_and_counted(
    prepare: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "a prompt that is too long", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        kept = prepare(rows, max_length=10)
    assert kept["pair_index"] == [2]
    assert "dropped 2 useless rows of 3" in caplog.text
    assert "row 0: its prompt of 26 tokens fills max_length=10" in caplog.text
    assert "row 1: chosen and rejected are the same tokens" in caplog.text


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_ROWS = {
    "none": ({**GOOD, "chosen": None}, "`chosen` must be text or a non-empty list of messages, got None"),
    "empty-chosen": ({**GOOD, "chosen": ""}, "`chosen` is empty"),
    "empty-rejected": ({**GOOD, "rejected": ""}, "`rejected` is empty"),
    "no-prompt": ({**GOOD, "prompt": None}, "`prompt` is None"),
    "surrogate": ({**GOOD, "rejected": "\ud800"}, "`rejected` is not valid Unicode"),
    "double-bos": ({**GOOD, "prompt": "<bos>a"}, "begins with two BOS tokens"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_malformed_row_is_named(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    row, message = BAD_ROWS[name]
    result = prepare_module.tokenize_row(row, 7, tokenizer, None, VOCAB)
    assert message in result["problem"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chosen", [], "`chosen` must be text or a non-empty list of messages"),
        ("chosen", 3, "`chosen` must be text or a non-empty list of messages, got 3"),
        ("chosen", [{"content": "no role"}], "must hold messages with `role` and `content`"),
        ("rejected", messages(("assistant", "")), "`rejected` ends with an empty message"),
        ("rejected", "text", "`chosen` is messages but `rejected` is text"),
    ],
    ids=["empty-list", "int", "no-role", "empty-message", "mixed"],
)
def test_a_malformed_conversation_is_named(
    field: str, value: Any, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {**FORMATS["conversational"][0], field: value}
    assert message in prepare_module.tokenize_row(row, 7, tokenizer, None, VOCAB)["problem"]


def test_an_implicit_prompt_that_is_a_whole_response_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    problem = prepare_module.tokenize_row({"chosen": "abc", "rejected": "ab"}, 0, tokenizer, None, VOCAB)["problem"]
    assert "`rejected` is nothing but the start of the other response" in problem


def test_errors_name_the_rows_and_the_way_out(prepare: Callable[..., Any]) -> None:
    rows = [GOOD, {**GOOD, "chosen": ""}, GOOD, *[{**GOOD, "rejected": ""}] * 6]
    with pytest.raises(ValueError, match=r"7 of 9 rows are malformed\. row 1: `chosen` is empty; rows 3, 4, 5, 6: "):
        prepare(rows)
    assert prepare(rows, on_bad_row="drop")["pair_index"] == [0, 2]


def test_nothing_left_is_an_error(prepare: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no usable row left out of 1; row 0: `chosen` is empty"):
        prepare([{**GOOD, "chosen": ""}], on_bad_row="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "rename 'reject'"),
        ({**GOOD, "images": ["x"]}, "'images', but processing_class has no image processor; pass the"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "no column 'rejected_ids'"),
    ],
    ids=["missing", "misspelt", "images", "half-tokenised"],
)
def test_wrong_columns_are_named(row: dict[str, Any], message: str, prepare: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([row])


def test_not_a_dataset_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TypeError, match=r"train dataset must be a datasets\.Dataset .* got list"):
        prepare_module.prepare_dataset([GOOD], tokenizer, max_length=None, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="train dataset is empty"):
        prepare_module.prepare_dataset(Dataset.from_list([]), tokenizer, max_length=None, vocab_size=VOCAB)


def test_a_token_id_outside_the_vocabulary_is_named(prepare: Callable[..., Any]) -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 300], "rejected_ids": [3]}]
    with pytest.raises(ValueError, match="row 0: `chosen` holds token id 300, but the model's vocabulary has 259"):
        prepare(rows)


def test_tokenised_rows_pass_through_with_their_index(prepare: Callable[..., Any]) -> None:
    once = prepare([{**GOOD, "chosen": ""}, GOOD], on_bad_row="drop")
    again = prepare(once.to_list())
    assert again[0] == once[0]
    assert again["pair_index"] == [1]


def test_streamed_rows_are_the_same_and_errors_come_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    def stream(rows: list[dict[str, Any]]) -> Any:
        dataset = IterableDataset.from_generator(lambda: iter(rows))
        return prepare_module.prepare_dataset(dataset, tokenizer, max_length=None, vocab_size=VOCAB)

    mapped = prepare_module.prepare_dataset(
        Dataset.from_list(FORMATS["standard"]), tokenizer, max_length=None, vocab_size=VOCAB
    )
    assert list(stream(FORMATS["standard"])) == mapped.to_list()
    with pytest.raises(ValueError, match="train dataset: row 1: `chosen` is empty"):
        list(stream([GOOD, {**GOOD, "chosen": ""}]))


def test_merged_boundary_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = {t: i for i, t in enumerate(["<eos>", "a", "b", "ab", "c"])}
    tok = Tokenizer(models.BPE(vocab, [("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")
    monkeypatch.setattr(rows_module, "_warned_merged_boundary", False)
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        row = prepare_module.tokenize_row({"prompt": "ca", "chosen": "b", "rejected": "c"}, 0, merging, None, 5)
        prepare_module.tokenize_row({"prompt": "ca", "chosen": "b", "rejected": "c"}, 1, merging, None, 5)
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([4], [3, 0], [1, 4, 0])
    assert caplog.text.count("tokenised differently from 'a' on") == 1


@pytest.mark.parametrize("source", ["whole", "stream", "transform"])
def test_columns_that_cannot_be_kept_are_said(
    source: str, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """With `remove_unused_columns=False`, which keeps them where the dataset is loaded whole."""
    whole = Dataset.from_list([{"chosen": "aye aye", "rejected": "aye no", "source": "a ship"}])
    made = {"stream": whole.to_iterable_dataset, "transform": lambda: whole.with_transform(lambda batch: batch)}
    raw = made.get(source, lambda: whole)()
    rows = prepare_module.prepare_dataset(raw, tokenizer, max_length=None, vocab_size=VOCAB)
    kept = with_raw_columns(rows, raw, wanted=True)
    assert ("source" in kept.column_names) is (source == "whole")
    assert ("remove_unused_columns=False has no effect" in caplog.text) is (source != "whole")

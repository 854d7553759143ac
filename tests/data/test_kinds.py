"""Ranked and unpaired rows, truncation, and what goes with a row."""

import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from fastdpo.data import prepare as prepare_module
from tests.helpers.byte_tokenizer import VOCAB, byte_tokenizer, messages


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    def prepare(rows: list[dict[str, Any]], stream: bool = False, **options: Any) -> Any:
        options = {"max_length": None, "vocab_size": VOCAB} | options
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
        return prepare_module.prepare_dataset(dataset, tokenizer, **options)

    return prepare


ASK = messages(("user", "What colour is the sky?"))
ANSWERS = [messages(("assistant", text)) for text in ("Blue.", "Grey, often.", "Green.")]
FORMATS = {
    "text": ("The sky is", [" blue.", " grey, often.", " green."]),
    "messages": (ASK, ANSWERS),
}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "cd"}
RANKED = {"prompt": "a", "responses": ["b", "c"]}
UNPAIRED = {"prompt": "a", "completion": "b", "label": True}
IDS = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7]}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_ranked_rows_have_the_ids_of_pairs(name: str, stream: bool, prepare: Callable[..., Any]) -> None:
    prompt, responses = FORMATS[name]
    row = next(iter(prepare([{"prompt": prompt, "responses": responses}], kind="ranked", stream=stream)))
    pairs = prepare([{"prompt": prompt, "chosen": responses[0], "rejected": other} for other in responses[1:]])
    assert row["prompt_ids"] == pairs[0]["prompt_ids"]
    assert row["ranked_ids"] == [pairs[0]["chosen_ids"], *pairs["rejected_ids"]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_unpaired_rows_have_the_ids_of_pairs(name: str, stream: bool, prepare: Callable[..., Any]) -> None:
    prompt, (good, bad, _) = FORMATS[name]
    rows = [
        {"prompt": prompt, "completion": good, "label": True},
        {"prompt": prompt, "completion": bad, "label": False},
    ]
    pair = prepare([{"prompt": prompt, "chosen": good, "rejected": bad}])[0]
    ours = list(prepare(rows, kind="unpaired", stream=stream))
    assert [row["prompt_ids"] for row in ours] == [pair["prompt_ids"]] * 2
    assert [row["completion_ids"] for row in ours] == [pair["chosen_ids"], pair["rejected_ids"]]
    assert [row["label"] for row in ours] == [True, False]
    assert [row["pair_index"] for row in ours] == [0, 1]


def test_tokenised_rows_of_every_kind_pass_through(prepare: Callable[..., Any]) -> None:
    ranked = {"prompt_ids": [1], "ranked_ids": [[2], [3, 4], [5]], "pair_index": 7}
    unpaired = {"prompt_ids": [1], "completion_ids": [2], "label": False, "kl_ids": [3], "pair_index": 7}
    assert prepare([ranked], kind="ranked")[0] == ranked
    assert prepare([unpaired], kind="unpaired", with_kl=True)[0] == unpaired


def test_a_preference_is_a_ranking_of_two(prepare: Callable[..., Any]) -> None:
    pair = prepare([PAIR | {"weight": 2.0}])[0]
    ranked = prepare([PAIR | {"weight": 2.0}], kind="ranked")[0]
    assert ranked.pop("ranked_ids") == [pair.pop("chosen_ids"), pair.pop("rejected_ids")]
    assert ranked == pair


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_a_preference_is_two_unpaired_rows(stream: bool, prepare: Callable[..., Any]) -> None:
    references = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [PAIR | references | {"weight": weight} for weight in (2.0, 1.0)]
    pair = prepare([PAIR])[0]
    ours = list(prepare(rows, kind="unpaired", stream=stream))
    assert [row["completion_ids"] for row in ours] == [pair["chosen_ids"]] * 2 + [pair["rejected_ids"]] * 2
    assert [row["label"] for row in ours] == [True, True, False, False]
    assert [row["pair_index"] for row in ours] == [0, 1, 0, 1]
    assert [row["weight"] for row in ours] == [2.0, 1.0, 2.0, 1.0]
    assert not prepare_module.REFERENCES.keys() & ours[0].keys()


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (RANKED, "preference", "holds ranked rows .* needs preference rows .columns 'chosen' and 'rejected'"),
        (RANKED, "unpaired", "holds ranked rows .* needs unpaired rows .columns 'prompt' and 'completion' and 'label'"),
        (UNPAIRED, "ranked", "holds unpaired rows .* needs ranked rows .columns 'prompt' and 'responses'"),
        (PAIR, "nonsense", "kind must be one of preference, ranked, unpaired, got 'nonsense'"),
        (
            {"prompt": "a", "response": ["b"]},
            "ranked",
            "no column 'responses', which ranked rows .*; rename 'response'",
        ),
        ({"prompt": "a", "completion": "b"}, "unpaired", "no column 'label', which unpaired rows need; it has"),
        ({"prompt": "a", "completion": "b"}, "preference", "no column 'chosen', which preference rows need; it has"),
        ({"chosen": "a", "rejected": "b", "image": "c"}, "ranked", "'image', but processing_class has no image"),
    ],
)
def test_names_columns_that_do_not_fit(
    row: dict[str, Any], kind: str, message: str, prepare: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([row], kind=kind)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RANKED | {"responses": ["b"]}, "`responses` must be a list of at least two responses, best first, got ['b']"),
        (RANKED | {"responses": "bc"}, "`responses` must be a list of at least two responses, best first, got 'bc'"),
        (RANKED | {"responses": ["b", ""]}, "`responses[1]` is empty"),
        (RANKED | {"responses": ["b", ANSWERS[0]]}, "`responses[0]` is text but `responses[1]` is messages"),
        (RANKED | {"prompt": ASK}, "`prompt` is messages but `responses[0]` is text; make them alike"),
        (RANKED | {"prompt": None}, "`prompt` is None"),
        (RANKED | {"responses": ["b", "b", "b"]}, "dropped: all responses are the same tokens"),
        (UNPAIRED | {"completion": ""}, "`completion` is empty"),
        (UNPAIRED | {"label": 1}, "`label` must be true (desirable) or false, got 1"),
        (UNPAIRED | {"label": None}, "`label` must be true (desirable) or false, got None"),
        (PAIR | {"weight": -1}, "`weight` must be at least 0, got -1"),
        (PAIR | {"weight": None}, "`weight` must be a finite number, got None"),
        (PAIR | {"margin": float("nan")}, "`margin` must be a finite number, got nan"),
        (PAIR | {"margin": "large"}, "`margin` must be a finite number, got 'large'"),
        (PAIR | {"beta": 0}, "`beta` must be above 0, got 0"),
        (PAIR | {"beta": True}, "`beta` must be a finite number, got True"),
        (PAIR | {"pair_index": "7"}, "`pair_index` must be an int, got '7'; rename or remove the column"),
        ({"prompt_ids": [1], "ranked_ids": [[2]]}, "`ranked_ids` must be a list of at least two lists"),
        ({"prompt_ids": [1], "ranked_ids": [[2], [300]]}, "`responses[1]` holds token id 300"),
        ({"prompt_ids": [1], "ranked_ids": [[2], "x"]}, "`ranked_ids[1]` must be a list of token ids, got 'x'"),
        ({"prompt_ids": [1], "completion_ids": [], "label": True}, "`completion` has no tokens"),
    ],
)
def test_a_malformed_row_is_named(row: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    kind = "ranked" if {"responses", "ranked_ids"} & row.keys() else "unpaired" if "label" in row else "preference"
    result = prepare_module.tokenize_row(row, 3, tokenizer, None, VOCAB, kind=kind)
    assert message in result["problem"]
    Dataset.from_list([result], features=prepare_module._features(kind, row))  # Arrow takes it all the same


def test_types_do_not_hang_on_the_first_rows(prepare: Callable[..., Any]) -> None:
    """`map` fixes types by its first thousand rows, and these hold nothing."""
    bad = {"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}
    assert prepare([bad] * 1001 + [IDS], on_bad_row="drop")[0] == IDS | {"pair_index": 1001}


def test_numbers_and_references_come_along(prepare: Callable[..., Any]) -> None:
    extra = {
        **{"weight": 0, "margin": -1.5, "beta": 0.3, "ref_chosen_logps": -4.0, "ref_rejected_logps": -5.0},
        "ref_token_logps": [[-1.0, -1.5], [-2.0, -0.5, -2.5]],
    }
    row = prepare([PAIR | extra | {"source": "somewhere"}])[0]
    assert row | extra == row
    assert set(row) <= set(prepare_module.COLUMNS)


@pytest.mark.parametrize("limit", [{"max_length": 5}, {"max_prompt_length": 2}, {"max_completion_length": 2}])
def test_references_of_a_row_that_is_cut_are_refused(limit: dict[str, int], prepare: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="row 0: `ref_chosen_logps` belongs to the whole row, which is too long"):
        prepare([IDS | {"ref_chosen_logps": -4.0, "ref_rejected_logps": -5.0}], **limit)


REFERENCES = {"ref_chosen_logps": -4.0, "ref_rejected_logps": -5.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (REFERENCES | {"ref_chosen_logps": math.nan}, "`ref_chosen_logps` must be a finite number, got nan"),
        (REFERENCES | {"ref_rejected_logps": None}, "`ref_rejected_logps` must be a finite number, got None"),
        ({"ref_token_logps": [[-1.0] * 3, [math.inf]]}, "`ref_token_logps` must hold finite numbers, got inf"),
        ({"ref_token_logps": [[-1.0] * 3, [None]]}, "`ref_token_logps` must hold finite numbers, got None"),
        ({"ref_token_logps": [[-1.0] * 3]}, r"lists of \[3\] numbers, but the responses have \[3, 1\] tokens"),
        ({"ref_token_logps": [[-1.0], [-1.0] * 3]}, r"lists of \[1, 3\] numbers, but the responses have \[3, 1\]"),
        ({"ref_token_logps": [[-1.0] * 3, None]}, "`ref_token_logps` must be a list of numbers for each response"),
    ],
    ids=str,
)
def test_a_bad_reference_value_is_named(
    given: dict[str, Any], message: str, prepare: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = IDS | {name: [[-1.0] * 3, [-2.0]] if "token" in name else -3.0 for name in given}
    with pytest.raises(ValueError, match=f"1 of 2 rows are malformed. row 1: .*{message}"):
        prepare([good, IDS | given])
    assert prepare([good, IDS | given], on_bad_row="drop").to_list() == [good | {"pair_index": 0}]


def test_a_reference_value_that_is_no_number_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    row = IDS | {"ref_chosen_logps": "much", "ref_rejected_logps": -1.0}
    result = prepare_module.tokenize_row(row, 0, tokenizer, None, VOCAB)
    assert "`ref_chosen_logps` must be a finite number, got 'much'" in result["problem"]
    Dataset.from_list([result], features=prepare_module._features("preference", row))


@pytest.mark.parametrize(
    ("columns", "kind", "ld_alpha", "message"),
    [
        (["ref_chosen_logps"], "preference", None, "'ref_chosen_logps' without its counterpart"),
        (["ref_rejected_logps"], "preference", None, "'ref_rejected_logps' without its counterpart"),
        ([*REFERENCES], "ranked", None, "'ref_chosen_logps' is for preferences, but the objective takes ranked rows"),
        ([*REFERENCES], "unpaired", None, "'ref_chosen_logps' is for preferences, but the objective takes unpaired"),
        ([*REFERENCES], "preference", 0.5, "ld_alpha=0.5 needs the reference's log-probs per token"),
    ],
)
def test_reference_columns_of_no_use_are_refused(
    columns: list[str], kind: str, ld_alpha: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_module.check_reference_columns(columns, kind, ld_alpha)


def test_reference_columns_of_use_are_taken() -> None:
    prepare_module.check_reference_columns([*REFERENCES, "ref_token_logps"], "preference", None)
    prepare_module.check_reference_columns(["ref_token_logps"], "ranked", None)
    prepare_module.check_reference_columns(["ref_token_logps"], "preference", 0.5)
    prepare_module.check_reference_columns(["prompt_ids"], "unpaired", None)


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_nothing_at_all_is_named(stream: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    empty: Any = IterableDataset.from_generator(lambda: iter([])) if stream else Dataset.from_list([PAIR]).select([])
    with pytest.raises(ValueError, match="train dataset is empty"):
        prepare_module.prepare_dataset(empty, tokenizer, max_length=9, vocab_size=VOCAB)


# Truncation


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen"),
    [
        ({}, "<bos>abcdef", "uvwxyz<eos>"),
        ({"max_prompt_length": 4}, "<bos>def", "uvwxyz<eos>"),
        ({"max_prompt_length": 1}, "f", "uvwxyz<eos>"),
        ({"max_prompt_length": 7}, "<bos>abcdef", "uvwxyz<eos>"),
        ({"max_completion_length": 2}, "<bos>abcdef", "uv"),
        ({"max_completion_length": 7}, "<bos>abcdef", "uvwxyz<eos>"),
        ({"max_length": 9}, "<bos>abcdef", "uv"),
        ({"max_length": 9, "max_prompt_length": 4}, "<bos>def", "uvwxy"),
        ({"max_length": 9, "max_prompt_length": 4, "max_completion_length": 3}, "<bos>def", "uvw"),
    ],
)
def test_what_is_cut(
    limits: dict[str, int], prompt: str, chosen: str, prepare: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The start of a prompt but for BOS, the end of a completion."""
    rows = [{"prompt": "abcdef", "chosen": "uvwxyz", "rejected": "t"}]
    row = prepare(rows, **{"max_length": None} | limits)[0]
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    assert tokenizer.decode(row["chosen_ids"]) == chosen
    assert tokenizer.decode(row["rejected_ids"]) == "t<eos>"


def test_a_prompt_without_bos_keeps_its_end(prepare: Callable[..., Any]) -> None:
    assert prepare([IDS], max_prompt_length=2)[0]["prompt_ids"] == [2, 3]


def test_every_ranked_response_is_cut(prepare: Callable[..., Any]) -> None:
    rows = [{"prompt_ids": [1], "ranked_ids": [[2, 3, 4], [5], [6, 7, 8, 9]]}]
    assert prepare(rows, kind="ranked", max_length=3)[0]["ranked_ids"] == [[2, 3], [5], [6, 7]]


def test_cut_rows_are_counted_and_named(prepare: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    rows = [IDS, {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, *[IDS] * 6]
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        prepare(rows, max_prompt_length=2, max_length=4)
        assert caplog.messages == [
            "train dataset: 7 of 8 rows have a prompt that is too long and cut at its start "
            "(rows 0, 2, 3, 4, 5, ...; max_length=4, max_prompt_length=2)",
            "train dataset: 7 of 8 rows have a completion that is too long and cut at its end "
            "(rows 0, 2, 3, 4, 5, ...; max_length=4, max_prompt_length=2)",
        ]
        caplog.clear()
        prepare(rows, max_length=100)
        assert not caplog.messages
        list(prepare(rows, max_length=5, stream=True))
    assert len(caplog.messages) == 1
    assert "a completion that is too long and cut at its end; row 0 is the first" in caplog.text


# Special tokens in text


@pytest.mark.parametrize(
    ("row", "spelt"),
    [
        (PAIR, False),
        (PAIR | {"prompt": "say <eos>"}, True),
        (PAIR | {"chosen": "b<eos>"}, False),
        (PAIR | {"chosen": "b<eos>b"}, True),
        (PAIR | {"rejected": "<pad>"}, True),
        ({"prompt": messages(("user", "Print <eos>")), "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, True),
        ({"prompt": ASK, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, False),
    ],
    ids=["none", "prompt", "eos-at-the-end", "inside", "pad", "messages", "template"],
)
def test_special_tokens_in_text_are_noticed(row: dict[str, Any], spelt: bool, prepare: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        prepare([PAIR if isinstance(row["prompt"], str) else row, row])
    rows = "1 of 2 rows" if isinstance(row["prompt"], str) else "2 of 2 rows"
    assert (f"{rows} spell out a special token, which is read as that token" in caplog.text) == spelt
    assert bool(caplog.messages) == spelt


# Completions for the KL term


def test_kl_completions_are_those_of_the_next_other_prompt(prepare: Callable[..., Any]) -> None:
    prompts = [5, 1, 1, 2, 3, 3, 5]
    rows = [{"prompt_ids": [p], "completion_ids": [10 + i], "label": True} for i, p in enumerate(prompts)]
    rows.insert(2, {"prompt_ids": [9], "completion_ids": [], "label": True})  # of no use to another row either
    kept = prepare(rows, kind="unpaired", with_kl=True, on_bad_row="drop")
    assert [ids for [ids] in kept["kl_ids"]] == [11, 13, 13, 14, 16, 16, 11]


def test_kl_completions_are_cut_to_the_room_they_have(prepare: Callable[..., Any]) -> None:
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [4], "label": True},
        {"prompt_ids": [1], "completion_ids": [5, 6, 7], "label": False},
    ]
    assert list(prepare(rows, kind="unpaired", with_kl=True, max_length=4)["kl_ids"]) == [[5], [4]]


def test_kl_completions_need_other_prompts(prepare: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="one prompt only; the KL term needs completions of other prompts"):
        prepare([UNPAIRED, UNPAIRED], kind="unpaired", with_kl=True)
    with pytest.raises(ValueError, match="is a stream; the KL term needs completions of other rows"):
        prepare([UNPAIRED, UNPAIRED], kind="unpaired", with_kl=True, stream=True)


# Caching


def test_the_tokenised_dataset_is_found_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    assert pickle.loads(pickle.dumps(prepare_module.tokenize_row)) is prepare_module.tokenize_row
    assert Hasher.hash(prepare_module.tokenize_row) == Hasher.hash(prepare_module.tokenize_row)
    Dataset.from_list([PAIR]).save_to_disk(tmp_path)
    options: dict[str, Any] = {"max_length": None, "vocab_size": VOCAB}
    first, again, other = (
        prepare_module.prepare_dataset(Dataset.load_from_disk(tmp_path), tokenizer, **options | {"max_length": length})
        for length in (None, None, 9)
    )
    assert first._fingerprint == again._fingerprint != other._fingerprint

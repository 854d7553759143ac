"""The script that runs TRL's tests tells a refusal from an error of our own."""

from collections.abc import Callable
from typing import Any

import pytest

from fastdpo import DPOConfig
from tests.reliability.trl_dpo_suite import load_dataset, outcome


def refuse() -> None:
    DPOConfig(use_cpu=True, head_impl="cuda")


def expect_other_words() -> None:
    with pytest.raises(ValueError, match="xyzzy"):
        refuse()


def expect_nothing_to_work() -> None:
    with pytest.raises(ValueError, match="xyzzy"):
        DPOConfig(use_cpu=True)


def expect_other_numbers() -> None:
    assert DPOConfig(use_cpu=True).beta == 7, "beta"


@pytest.mark.parametrize(
    ("test", "result", "words"),
    [
        (refuse, "refused", "ValueError: head_impl must be one of auto, eager"),
        (expect_other_words, "refused", "head_impl must be one of auto, eager"),
        (expect_nothing_to_work, "accepted", "DID NOT RAISE"),
        (expect_other_numbers, "differs", "beta"),
        (lambda: pytest.skip("no GPU"), "skipped", "no GPU"),
        (lambda: DPOConfig(use_cpu=True).xyzzy, "raw error", "AttributeError: 'DPOConfig' object has no attribute"),
        (lambda: int("x"), "raw error", "ValueError: invalid literal for int()"),
    ],
)
def test_how_a_test_ended(test: Callable[[], Any], result: str, words: str) -> None:
    with pytest.raises(BaseException) as found:  # noqa: PT011 - each kind that a test may raise
        test()
    assert outcome(found)[0] == result
    assert outcome(found)[1].startswith(words)


@pytest.mark.parametrize(
    ("name", "config", "columns"),
    [
        ("zen", "standard_preference", {"prompt", "chosen", "rejected"}),
        ("zen", "conversational_implicit_prompt_preference", {"chosen", "rejected"}),
        ("zen", "standard_unpaired_preference", {"prompt", "completion", "label"}),
        ("toolcall", "preference", {"prompt", "chosen", "rejected", "tools"}),
    ],
)
def test_rows_have_the_shape_that_their_name_says(name: str, config: str, columns: set[str]) -> None:
    rows = load_dataset(f"trl-internal-testing/{name}", config, split="train")
    assert set(rows.column_names) == columns
    assert len(rows) == 17
    assert (columns & {"label"}) or rows[0]["chosen"] != rows[0]["rejected"]

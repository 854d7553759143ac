"""Rows as users bring them: messages in every form, under real models' chat templates, and against TRL."""

import importlib.util
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from fastdpo.data import prepare
from tests.helpers.byte_tokenizer import byte_tokenizer, messages

VOCAB = 300
Row = dict[str, Any]


@cache
def tokenizer_of(name: str | None = None, eos: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, the chat template of a model, and an EOS token of its own."""
    tokenizer = byte_tokenizer()
    if name:
        trl = importlib.util.find_spec("trl")
        if trl is None or not trl.origin:
            pytest.skip("needs the chat templates that come with TRL")
        tokenizer.chat_template = (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    if eos:
        tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


def texts(row: Row, name: str | None = None, kind: str = "preference") -> list[str]:
    """Prompt and responses of a row, decoded from the ids it gets."""
    tokenizer = tokenizer_of(name)
    result = prepare.tokenize_row(row, 0, tokenizer, None, VOCAB, kind=kind)
    assert not result["problem"]
    ids = {column: value for column, value in result.items() if column.endswith("_ids")}
    ids |= {str(k): value for k, value in enumerate(ids.pop("ranked_ids", ()))}
    return [tokenizer.decode(value) for value in ids.values()]


def problem(row: Row, name: str | None = None, kind: str = "preference") -> str:
    return str(prepare.tokenize_row(row, 0, tokenizer_of(name), None, VOCAB, kind=kind)["problem"])


def user(content: Any) -> list[Row]:
    return [{"role": "user", "content": content}]


def answer(content: Any, **more: Any) -> list[Row]:
    return [{"role": "assistant", "content": content, **more}]


def call(name: str, arguments: Any, **content: Any) -> list[Row]:
    function = {"name": name, "arguments": arguments}
    return [{"role": "assistant", **content, "tool_calls": [{"type": "function", "function": function}]}]


def tool(name: str, **parameters: str) -> Row:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {
        "type": "function",
        "function": {"name": name, "description": "d", "parameters": {"type": "object", "properties": properties}},
    }


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


ASK, YES, NO = "Is the kettle on?", answer("It is."), answer("No.")


# A text prompt beside messages


KINDS = {
    "preference": lambda prompt, one, other: pair(prompt, one, other),
    "ranked": lambda prompt, one, other: {"prompt": prompt, "responses": [one, other]},
    "unpaired": lambda prompt, one, other: {"prompt": prompt, "completion": one, "label": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeated", [False, True], ids=["beside", "repeated"])
def test_a_text_prompt_is_the_user_turn(kind: str, repeated: bool) -> None:
    copy = user(ASK) if repeated else []
    row = KINDS[kind](ASK, copy + YES, copy + NO)
    assert texts(row, kind=kind) == texts(KINDS[kind](user(ASK), YES, NO), kind=kind)


def test_a_text_copy_of_a_whole_conversation_is_a_copy() -> None:
    before = user("Tea?") + answer("Please.") + user(ASK)
    implicit = {"chosen": before + YES, "rejected": before + NO}
    row = implicit | {"prompt": f"Human: Tea?\n\nAI: Please.\n\nHuman: {ASK}"}
    assert texts(row) == texts(implicit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_prompt_that_no_turn_repeats_is_named(kind: str) -> None:
    row = KINDS[kind]("Something else?", user(ASK) + YES, user(ASK) + NO)
    assert "`prompt` is text that the user's turns in" in problem(row, kind=kind)


# What a template leaves out


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_reasoning_that_a_template_drops_from_a_response_is_named(field: str) -> None:
    row = pair(user("7 + 8?"), answer("15"), answer("14")) | {field: answer("<think>\n7 + 8 = 15\n</think>\n\n15")}
    assert f"`{field}` has text that the chat template leaves out: '7 + 8 = 15'" in problem(row, "deepseek_r1_distill")
    assert any("<think>\n7 + 8 = 15\n</think>\n\n15" in text for text in texts(row, "qwen3"))


def test_reasoning_in_a_field_of_its_own_trains_or_is_named() -> None:
    row = pair(user("7 + 8?"), answer("15", reasoning_content="Eight and seven."), answer("14"))
    assert "<think>\nEight and seven.\n</think>\n\n15" in texts(row, "qwen3")[1]
    assert "leaves out: 'Eight and seven.'" in problem(row, "qwen2_5")


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill"])
def test_reasoning_of_an_earlier_answer_is_noted(name: str) -> None:
    """These models never see it at inference either."""
    before = user("7 + 8?") + answer("<think>\nEasy.\n</think>\n\n15") + user(ASK)
    result = prepare.tokenize_row(pair(before, YES, NO), 0, tokenizer_of(name), None, VOCAB)
    assert (result["problem"], result["notes"]) == ("", ["lost"])


def test_a_message_that_a_template_drops_is_named() -> None:
    row = pair([*user(ASK), {"role": "tool", "content": "kettle: on"}], YES, NO)
    assert "`prompt` has text that the chat template leaves out: 'kettle: on'" in problem(row, "phi3")
    assert "leaves out the tool 'boil'" in problem(pair(user(ASK), YES, NO, tools=[tool("boil")]), "phi3")


def test_tools_that_a_template_drops_are_named_though_the_text_holds_their_words() -> None:
    asked = user("Please boil 2 litres.")
    assert "leaves out the tool 'boil'" in problem(pair(asked, YES, NO, tools=[tool("boil")]), "llama3")
    row = pair(asked, call("boil", {"litres": 2}, content="At once."), NO)
    assert "`chosen` has tool calls, which the chat template leaves out" in problem(row, "llama3")
    assert '"boil"' in texts(row | {"tools": [tool("boil")]}, "qwen2_5")[1]


def test_a_transform_may_make_the_columns() -> None:
    def columns(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"prompt": batch["q"], "chosen": batch["a"], "rejected": batch["b"]}

    rows = Dataset.from_list([{"q": ASK, "a": "Yes", "b": "No"}]).with_transform(columns)
    made = prepare.prepare_dataset(rows, tokenizer_of(), max_length=None, vocab_size=VOCAB)
    assert tokenizer_of().decode(made[0]["chosen_ids"]) == "Yes<eos>"


def test_a_function_call_is_named() -> None:
    row = pair(user(ASK), answer("Let me see.", function_call={"name": "look", "arguments": "{}"}), NO)
    assert "`chosen` has a message with `function_call`" in problem(row, "qwen2_5")


def test_another_layout_of_messages_is_no_text() -> None:
    told = [json.dumps([{"from": "human", "value": ASK}, {"from": "gpt", "value": value}]) for value in ("Yes", "No")]
    assert "rename `from` to `role`, `value` to `content`" in problem(pair(ASK, *told), "qwen2_5")


@pytest.mark.parametrize("name", ["gemma", "llama3", "llama3_1", "qwen3", "phi3", "qwen2_5"])
def test_white_space_that_a_template_trims_is_no_loss(name: str) -> None:
    row = pair(user(f"  {ASK}\n\n"), answer("\n It is.  "), answer(" No."))
    assert "It is." in texts(row, name)[1]
    packed = pair(user("Sum?"), answer("<think>Well.</think>Two."), NO)
    assert "Well.\n</think>\n\nTwo." in texts(packed, "qwen3")[1]


def test_text_that_a_template_writes_as_json_is_no_loss() -> None:
    result = [{"role": "tool", "content": 'said "on"\nthen “off”'}]
    assert '"said \\"on\\"\\nthen “off”"' in texts(pair(user(ASK) + result, YES, NO), "llama3_1")[0]


# Contents as parts


def parts(*values: str) -> list[Row]:
    return [{"type": "text", "text": value} for value in values]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "phi3", "gemma", "qwen3", "gptoss", "qwen2_5_vl", "gemma3"])
def test_parts_are_their_text(name: str) -> None:
    row = pair(user(parts("Which star?")), answer(parts("Den", "eb")), answer(parts("Mars")))
    assert texts(row, name) == texts(pair(user("Which star?"), answer("Deneb"), answer("Mars")), name)


def test_a_template_that_knows_parts_alone_gets_parts() -> None:
    row = pair(user("Which star?"), answer("Deneb"), answer("Mars"))
    as_parts = pair(user(parts("Which star?")), answer(parts("Deneb")), answer(parts("Mars")))
    assert texts(row, "idefics3") == texts(as_parts, "idefics3")
    assert "Deneb" in texts(row, "idefics3")[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "url": "x.png"}], "an image inside a message ('url'); put it into a column `images`"),
        ([{"type": "image"}], "`prompt` has places for 1 image ({'type': 'image'}), but the row has 0"),
        ([{"type": "audio"}], "neither text nor an image, which is not supported: {'type': 'audio'}"),
        (["Deneb"], "neither text nor an image, which is not supported: 'Deneb'"),
        (7, "a message whose content is neither text nor a list of parts: 7"),
        (None, "must hold messages with `role` and `content`, found"),
    ],
    ids=["image", "place", "audio", "no-dict", "number", "none"],
)
def test_a_content_that_is_no_text_is_named(content: Any, message: str) -> None:
    assert message in problem(pair(user(content) + user(ASK), YES, NO))


# A prompt that stands twice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [user(ASK), user(f"{ASK}\n")], ids=["same", "white-space"])
def test_a_repeated_prompt_stands_once(kind: str, repeats: list[Row]) -> None:
    prompt = messages(("system", "Be curt.")) + user(ASK)
    once = KINDS[kind](prompt, YES, NO)
    for copy in (prompt[:1] + repeats, repeats):
        row = KINDS[kind](prompt, copy + YES, copy + NO)
        assert texts(row, kind=kind) == texts(once, kind=kind)
    assert texts(KINDS[kind](user(ASK), prompt[:1] + repeats + YES, prompt[:1] + repeats + NO), kind=kind) == texts(
        KINDS[kind](prompt[:1] + repeats, YES, NO), kind=kind
    )
    assert texts(KINDS["ranked"](prompt, prompt + YES, NO), kind="ranked") == texts(
        KINDS["ranked"](prompt, YES, NO), kind="ranked"
    )


@pytest.mark.parametrize("ask", [ASK, "Explain boiling.", "水壶开着吗"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_repeated_as_text_stands_once(kind: str, ask: str) -> None:
    row = KINDS[kind](ask, f"{ask} It is.", f"{ask} No.")
    result = prepare.tokenize_row(row, 0, tokenizer_of(), None, VOCAB, kind=kind)
    assert result["notes"] == ["repeated"]
    assert texts(row, kind=kind) == texts(KINDS[kind](ask, " It is.", " No."), kind=kind)


def test_an_answer_may_begin_like_a_short_prompt() -> None:
    assert texts(pair("Hello", "Hello there!", "Hello."))[1:] == ["Hello there!<eos>", "Hello.<eos>"]
    assert texts(pair(ASK, f"{ASK} Yes.", "No."))[1] == f"{ASK} Yes.<eos>"


def test_a_turn_that_is_no_copy_stays() -> None:
    row = pair(user("Tea?") + answer("Yes."), user(ASK) + YES, user(ASK) + NO)
    assert f"user: {ASK}" in texts(row)[1]


def test_responses_that_repeat_different_prompts_are_named() -> None:
    row = pair(user(ASK), messages(("system", "Be curt.")) + user(ASK) + YES, user(ASK) + NO)
    assert "`prompt` is repeated by `chosen` and `rejected`, but not in the same way" in problem(row)
    assert "`chosen` is nothing but the prompt" in problem(pair(user(ASK), user(ASK), user(ASK) + NO))


@pytest.mark.parametrize("row", [{"chosen": "Yes", "rejected": "No"}, {"chosen": YES, "rejected": NO}])
def test_a_pair_without_any_prompt_is_named(row: Row) -> None:
    assert "there is no `prompt`, and `chosen` and `rejected` have no common start" in problem(row)


# Tools, and the keys that Arrow fills up


TOOLS = [tool("locate", host="string", rack="string"), tool("total", numbers="array")]
CALLS = [call("locate", {"host": "web7", "rack": "b"}), call("total", {"numbers": [3, 4]})]


def tool_rows() -> list[Row]:
    more: list[Row] = [{"enable_thinking": False}, {"greeting": "Hi"}]
    return [
        pair(user("Go."), CALLS[k], NO, tools=TOOLS[k : k + 1], chat_template_kwargs=more[k]) for k in range(len(TOOLS))
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1"])
def test_rows_of_a_dataset_are_the_rows_as_written(name: str, tmp_path: Path) -> None:
    written = [texts(row, name) for row in tool_rows()]
    assert "web7" in written[0][1]
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(tool_rows(), on_mixed_types=None).to_parquet(path)
    tokenizer = tokenizer_of(name)
    for dataset in (Dataset.from_list(tool_rows()), Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))):
        rows = prepare.prepare_dataset(dataset, tokenizer, max_length=None, vocab_size=VOCAB)
        assert [[tokenizer.decode(row[c]) for c in prepare.TOKEN_COLUMNS["preference"]] for row in rows] == written


def test_tools_may_be_json() -> None:
    row = tool_rows()[0]
    for tools in (json.dumps(row["tools"]), [json.dumps(each) for each in row["tools"]]):
        assert texts(row | {"tools": tools}, "qwen2_5") == texts(row, "qwen2_5")
    options = json.dumps({"enable_thinking": False})
    row = pair(user(ASK), YES, NO, chat_template_kwargs=options)
    assert texts(row, "qwen3")[0].endswith("</think>\n\n")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1"])
def test_arguments_may_be_json(name: str) -> None:
    row = pair(user("Go."), call("locate", {"host": "web7", "rack": "b"}), NO)
    as_json = pair(user("Go."), call("locate", '{"host": "web7", "rack": "b"}'), NO)
    assert texts(as_json, name) == texts(row, name)
    with_null = pair(user("Go."), call("locate", '{"host": null}'), NO)
    assert '{"host": null}' in texts(with_null, name)[1]


@pytest.mark.parametrize("arguments", [{"host": "web7"}, '{"host": "web7"}'], ids=["object", "json"])
def test_a_template_that_wants_arguments_as_text_gets_text(arguments: Any) -> None:
    row = pair(user("Go."), call("locate", arguments, content=""), NO)
    assert 'locate\n```json\n{"host": "web7"}\n```' in texts(row, "deepseekv3")[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe"])
def test_same_ids_as_trl(name: str) -> None:
    trl = pytest.importorskip("trl")
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer = tokenizer_of(name)
    rows = [
        pair(user("Go."), call("locate", {"host": "web7"}), NO, tools=TOOLS[:1]),
        pair(user("Go.") + YES + user(ASK), call("locate", {"host": "web9"}, content=None), YES, tools=TOOLS[:1]),
    ]
    args = trl.DPOConfig(output_dir="unused", max_length=None, bf16=False, report_to="none")
    alone = [Dataset.from_list([row | {"tools": json.dumps(row["tools"])}]) for row in rows]
    for dataset in alone:
        theirs = trainer._prepare_dataset(dataset, tokenizer, args, "train")[0]
        ours = prepare.prepare_dataset(dataset, tokenizer, max_length=None, vocab_size=VOCAB)[0]
        assert ours == {column: theirs[column] for column in prepare.TOKEN_COLUMNS["preference"]} | {"pair_index": 0}


# Messages written as text


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
@pytest.mark.parametrize("kind", KINDS)
def test_messages_written_as_text_are_messages(write: Callable[[Any], str], kind: str) -> None:
    one, other = answer('It "is"\nindeed.'), answer("It isn't.")
    expected = texts(KINDS[kind](user(ASK), one, other), kind=kind)
    assert texts(KINDS[kind](write(user(ASK)), write(one), write(other)), kind=kind) == expected


def test_messages_written_as_broken_text_are_named() -> None:
    row = pair(user(ASK), json.dumps(YES)[:-4], json.dumps(NO))
    assert "`chosen` is a list of messages written as text, but it is not valid JSON" in problem(row)


@pytest.mark.parametrize("text", ['{"role": "engineer", "name": "Ada"}', "[1, 2]", "[INST] {x}", "{'\\d': {[]}}"])
def test_other_text_with_brackets_is_text(text: str) -> None:
    assert texts(pair("List one:", text, "[]"))[1] == f"{text}<eos>"


# Text that a template made


@pytest.mark.parametrize(
    ("name", "eos", "end"),
    [
        ("qwen2_5", "<|im_end|>", "<|im_end|>\n"),
        ("qwen2_5", "<|endoftext|>", "<|im_end|>\n"),
        ("llama3", "<|end_of_text|>", "<|eot_id|>"),
        ("gemma", "<eos>", "<end_of_turn>\n"),
        (None, "<eos>", "<eos> "),
    ],
)
def test_rendered_text_ends_its_turn_once(name: str | None, eos: str, end: str) -> None:
    tokenizer = tokenizer_of(name, eos)
    row = pair("Kettle:", f" on{end}", " off")
    result = prepare.tokenize_row(row, 0, tokenizer, None, VOCAB)
    assert tokenizer.decode(result["chosen_ids"]) == f" on{end}"
    assert tokenizer.decode(result["rejected_ids"]) == f" off{eos}"


# What templates and JSON raise


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        (pair(messages(("system", "Be curt.")) + user(ASK), YES, NO), "gemma", "`prompt`: System role not supported"),
        (pair(user("Tea?") + user(ASK), YES, NO), "gemma", "render `prompt`: Conversation roles must alternate"),
        (pair(user(ASK), YES + YES, NO), "gemma", "render `chosen`: Conversation roles must alternate"),
        (pair(user(ASK), call("locate", {}), NO), "cohere", "render `chosen`: 'dict object' has no attribute"),
        (pair(user(ASK), call("locate", {}, content=""), NO), "llama3", "`chosen` has text that the chat template"),
        (pair(user(ASK), YES, NO, tools="[{"), None, "`tools` is not valid JSON"),
        (pair(user(ASK), YES, NO, tools='{"name": "locate"}'), None, "`tools` must be a list, or JSON of one"),
        (pair(user(ASK), YES, NO, tools=["locate"]), None, "`tools` is not valid JSON"),
        (pair(user(ASK), call("locate", "{host"), NO), None, "arguments of a tool call` is not valid JSON"),
        (pair(user(ASK), YES, NO, chat_template_kwargs="fast"), None, "`chat_template_kwargs` is not valid JSON"),
        (pair(user(ASK), YES, NO, chat_template_kwargs=[1]), None, "`chat_template_kwargs` must be an object"),
        (pair(user(ASK), YES, NO, chat_template_kwargs={"chat_template": "x"}), None, "a chat template of the row's"),
        (pair(user(ASK), YES, NO, chat_template_kwargs={"tokenize": False}), None, "holds 'tokenize', which is no"),
        (pair([{"from": "human", "value": ASK}], YES, NO), None, "rename `from` to `role`, `value` to `content`"),
        (pair(user("\ud800"), YES, NO), None, "`prompt` is not valid Unicode"),
        (pair(user(ASK), answer("\ud800"), NO), None, "`chosen` is not valid Unicode"),
    ],
)
def test_what_a_row_makes_others_raise_is_named(row: Row, name: str | None, message: str) -> None:
    found = problem(row, name)
    assert message in found
    assert "\n" not in found


def test_rows_that_a_template_refuses_can_be_dropped(caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair(messages(("system", "Be curt.")) + user(ASK), YES, NO), pair(user(ASK), YES, NO)]
    options: dict[str, Any] = {"max_length": None, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match=r"1 of 2 rows are malformed\. row 0: the chat template can't render `prompt`"):
        prepare.prepare_dataset(Dataset.from_list(rows), tokenizer_of("gemma"), **options)
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        kept = prepare.prepare_dataset(Dataset.from_list(rows), tokenizer_of("gemma"), on_bad_row="drop", **options)
    assert kept["pair_index"] == [1]
    assert "dropped 1 malformed rows of 2. row 0: the chat template can't render `prompt`: System role" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "weight": 1.0}, "it has no `rejected`"),
        ({"chosen": "ab", "rejected": "ac", "weight": 1.0}, "it has no `prompt`, unlike the first row"),
        (pair("a", "b", "c"), "it has no `weight`, unlike the first row"),
        (pair("a", "b", "c", weight=1.0, margin=2.0), "it has a `margin`, unlike the first row"),
    ],
)
def test_a_row_of_a_stream_that_lacks_a_column_is_named(row: Row, message: str) -> None:
    rows = [pair("a", "b", "c", weight=1.0), row, pair("d", "e", "f", weight=2.0)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    options: dict[str, Any] = {"max_length": None, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        list(prepare.prepare_dataset(stream, tokenizer_of(), **options))
    kept = list(prepare.prepare_dataset(stream, tokenizer_of(), on_bad_row="drop", **options))
    assert [each["weight"] for each in kept] == [1.0, 2.0]


def test_a_tokenizer_without_a_template_or_eos_is_named() -> None:
    options: dict[str, Any] = {"max_length": None, "vocab_size": VOCAB}
    plain = byte_tokenizer()
    plain.chat_template, plain.eos_token = None, None
    with pytest.raises(ValueError, match="the tokenizer has no chat template to render them"):
        prepare.prepare_dataset(Dataset.from_list([pair(user(ASK), YES, NO)]), plain, **options)
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        prepare.prepare_dataset(Dataset.from_list([pair("a", "b", "c")]), plain, **options)


# Datasets with a format


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", None])
def test_formatted_datasets_are_read(kind: str | None) -> None:
    rows = [pair(user(ASK), YES, NO, weight=2.0, beta=0.3), pair(user("Tea?"), NO, YES, weight=1.0, beta=0.3)]
    plain = Dataset.from_list(rows)
    options: dict[str, Any] = {"max_length": None, "vocab_size": VOCAB}
    expected = prepare.prepare_dataset(plain, tokenizer_of(), **options).to_list()
    assert prepare.prepare_dataset(plain.with_format(kind), tokenizer_of(), **options).to_list() == expected
    hidden = plain.with_format(kind, columns=["prompt", "chosen", "rejected", "weight"])
    for row in expected:
        del row["beta"]
    assert prepare.prepare_dataset(hidden, tokenizer_of(), **options).to_list() == expected
    if kind != "pandas":
        stream = plain.remove_columns("beta").to_iterable_dataset().with_format(kind)
        assert list(prepare.prepare_dataset(stream, tokenizer_of(), **options)) == expected


# Columns that nobody reads


OPTIONS: dict[str, Any] = {"tokenizer": tokenizer_of(), "max_length": None, "vocab_size": VOCAB}
REST = {"chosen": "The one.", "rejected": "The other."}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "Which?"}, "repeat the text of 'question'; rename 'question' to 'prompt'"),
        ({"Prompts": "Which?"}, "repeat the text of 'Prompts'; rename 'Prompts' to 'prompt'"),
        ({"instruction": "Pick.", "input": "1, 2"}, "make a column 'prompt' of 'instruction' and 'input'"),
        ({"system": "Be curt.", "question": "Which?"}, "make a column 'prompt' of 'question' and 'system'"),
        ({"system": "Be curt."}, "make a column 'prompt' of 'system'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_a_prompt_by_another_name_is_named(columns: Row, message: str, stream: bool) -> None:
    dataset: Any = Dataset.from_list([columns | REST])
    with pytest.raises(ValueError, match="train dataset: there is no column 'prompt'") as error:
        prepare.prepare_dataset(dataset.to_iterable_dataset() if stream else dataset, **OPTIONS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "The", **REST},
        {"question": ASK, "chosen": user(ASK) + YES, "rejected": user(ASK) + NO},
        {"input": "", **REST},
        {"prompt": "Which?", "source": "somewhere", "prompt_id": "12ab", "score_chosen": 3.0, **REST},
    ],
    ids=["text-copy", "message-copy", "empty", "others"],
)
def test_columns_that_lose_nothing_are_no_matter(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        prepare.prepare_dataset(Dataset.from_list([row]), **OPTIONS)
    assert not caplog.messages


def test_a_system_prompt_in_a_column_of_its_own_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Though the first row's is empty."""
    rows = [{"prompt": "Which?", "system": system, **REST} for system in ("", "Be curt.")]
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        prepare.prepare_dataset(Dataset.from_list(rows), **OPTIONS)
    assert caplog.messages == [
        "train dataset: the text of 'system' is not read, only prompt, chosen, rejected are; write it into "
        "'prompt', a system prompt as its first message"
    ]


def test_a_missing_prompt_by_another_name_is_named() -> None:
    with pytest.raises(ValueError, match=r"has no column 'prompt', which unpaired rows need.*; rename 'question'"):
        prepare.prepare_dataset(
            Dataset.from_list([{"question": "a", "completion": "b", "label": True}]), kind="unpaired", **OPTIONS
        )


@pytest.mark.parametrize(("role", "better"), [("gpt", "assistant"), ("Assistant", "assistant"), ("human", "user")])
def test_a_role_of_another_data_set_is_named(role: str, better: str) -> None:
    turn = [{"role": role, "content": "It is off."}]
    row = pair(turn if better == "user" else user(ASK), NO if better == "user" else turn, NO)
    assert f"has a message of role '{role}', which chat templates call '{better}'" in problem(row)


def test_an_answer_may_be_an_object_with_a_role() -> None:
    row = {"prompt": "Ada as JSON:", "chosen": '{"role": "engineer", "content": "steam"}', "rejected": "Ada"}
    assert texts(row)[1].startswith('{"role": "engineer"')


def test_a_whole_conversation_as_json_is_named() -> None:
    row = {"prompt": "Hi there, you.", "chosen": '{"messages": [{"role": "user", "content": "Hi"}]}', "rejected": "b"}
    assert "`chosen` is JSON of an object with `messages`" in problem(row)

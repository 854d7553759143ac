"""fastdpo.untrusted.yaml_file: small plain data is read, and what would cost minutes is refused at once."""

from pathlib import Path

import pytest
import yaml

from fastdpo.untrusted.yaml_file import MAX_BYTES, MAX_DEPTH, parse, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-007", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("2024_01", "2024_01"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("3e-5", 3e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("1e", "1e"),
        ("e5", "e5"),
        ("+", "+"),
        ("yes", True),
        ("~", None),
        ("'010'", "010"),
    ],
)
def test_a_plain_value_is_read_as_in_yaml_1_2(text: str, value: object) -> None:
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2 * MAX_DEPTH))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "with its aliases it has more than 100,000 values"),
        (MERGES, "with its aliases it has more than 100,000 values"),
        (CHAIN, f"with its aliases it has more than {MAX_DEPTH} levels"),
        ("a: &a [*a]", "an alias repeats what it is part of"),
        ("[" * 50_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("- " * 50_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("{a: 1, b: 2, a: 3}", "a is set twice, in line 1 and in line 1"),
        ("a: {b: 1}\nc:\n  b: 1\n  b: 2\n", "b is set twice, in line 3 and in line 4"),
    ],
    ids=["bomb", "merges", "chain", "cycle", "deep", "deep blocks", "digits", "twice in a line", "twice below"],
)
def test_what_grows_or_repeats_is_refused(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text", ["!!python/name:os.getcwd", "!!python/object/apply:os.getcwd []", "!!python/tuple [1]"]
)
def test_a_tag_builds_no_object(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        parse(f"a: {text}")


def test_a_few_aliases_are_read() -> None:
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: *a}\n") == {"a": {"x": 1}, "b": {"x": 1, "y": {"x": 1}}}


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"run.yaml is larger than 1,048,576 bytes"):
        read_yaml(path)


def test_values_of_text_settings_stay_as_they_were_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: 1e3\nother: 1e3\nnone: null\nlist: [007]\n")
    assert read_yaml(path, {"name", "none", "list"}) == {"name": "1e3", "other": 1000.0, "none": None, "list": [7]}

"""The pages that people read: links lead somewhere, commands exist, and rows that a page shows can be trained on."""

import json
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fastdpo.benchmarks.command import BENCHMARKS
from fastdpo.benchmarks.head.compare import parse
from fastdpo.cli import COMMANDS, OPTIONS, _config_of
from fastdpo.commands.tools import TOOLS
from fastdpo.data.columns import find_kind
from fastdpo.data.prepare import prepare_dataset
from fastdpo.settings.fields import settings
from fastdpo.settings.flags import overrides_of

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `fastdpo` command in a page's shell blocks."""
    found = []
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line):
                words = shlex.split(part, comments=True)
                names = [i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?fastdpo", word)]
                if names and (names[0] == 0 or words[names[0] - 1] in ("-m", "exec") or "/" in words[names[0]]):
                    found.append(words[names[0] + 1 :])
    return found


@each_page
def test_commands_exist(page: Path) -> None:
    """Each command has a name, a config and settings that exist; what they do is other tests' subject."""
    for command, *rest in commands_of(page):
        if command == "bench":
            assert rest[0] in BENCHMARKS
            if rest[0] == "head":
                parse(rest[1:])
        elif command in TOOLS:
            words = rest if not rest or rest[0].startswith("-") else rest[1:]
            overrides_of(words, TOOLS[command].options, {})
        elif not command.startswith("-"):
            assert command in COMMANDS, command
            config, flags = _config_of(rest)
            assert config is None or config.parts[0] != "examples" or (ROOT / config).is_file(), config
            assert set(overrides_of(flags, OPTIONS.get(command, {}))) <= {*settings(), *OPTIONS.get(command, {})}


def test_the_readme_has_commands() -> None:
    assert ["train", "examples/quickstart.yaml"] in commands_of(ROOT / "README.md")


ROWS = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", ROWS)
def test_the_rows_of_the_page_on_data_can_be_trained_on(text: str) -> None:
    row = json.loads(text)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/model")
    kinds = {"responses": "ranked", "completion": "unpaired"}
    wanted = next((kind for column, kind in kinds.items() if column in row), "preference")
    assert find_kind(list(row), wanted, "train") == wanted
    prepared = prepare_dataset(
        Dataset.from_list([row]), tokenizer, max_length=512, vocab_size=len(tokenizer), kind=wanted
    )
    assert len(prepared) == 1


def test_the_page_shows_every_kind_of_row() -> None:
    keys = [set(json.loads(text)) for text in ROWS]
    assert len(keys) == 5
    assert {"responses", "completion", "prompt_ids", "chosen"} <= set().union(*keys)

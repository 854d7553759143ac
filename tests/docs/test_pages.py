"""The pages that people read: links, commands, rows and errors on them are those of the code."""

import ast
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
from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.report import console
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


def modules_of(page: Path) -> list[tuple[str, list[str]]]:
    """The module and the other words of every `python -m` command on a page that runs a module of this repository."""
    command = r"python -m ((?:benchmarks|docs|examples|tests)[\w.]*)([^&|;#`\n]*)"
    return [(module, words.split()) for module, words in re.findall(command, page.read_text().replace("\\\n", " "))]


@each_page
def test_modules_that_commands_run_exist_and_know_their_options(page: Path) -> None:
    for module, words in modules_of(page):
        path = ROOT.joinpath(*module.split("."))
        files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
        assert files, f"there is no module {module}"
        for word in words:
            if re.fullmatch(r"--\w[\w-]*", word):
                assert f'"{word}"' in files[0].read_text(), f"{module} has no option {word}"


@each_page
def test_files_that_commands_name_exist(page: Path) -> None:
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for name in re.findall(r"(?<![\w/.-])(?:benchmarks|docs|examples|tests)/[\w./-]+", block):
            assert (ROOT / name).exists(), name


def test_each_option_of_a_script_has_a_sentence() -> None:
    scripts = [path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.py")]
    calls = [node for path in scripts for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    options = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    assert len(options) > 50
    for call in options:
        said = [ast.unparse(keyword.value).rstrip("'\"") for keyword in call.keywords if keyword.arg == "help"]
        assert said == ["OUT"] or said[0].endswith("."), ast.unparse(call)


def test_pages_have_modules() -> None:
    assert len([module for page in PAGES for module, _ in modules_of(page)]) > 30


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


def test_the_page_on_objectives_has_each_with_its_paper() -> None:
    papers = dict(
        re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", (ROOT / "docs" / "objectives.md").read_text(), re.MULTILINE)
    )
    for name, objective in OBJECTIVES.items():
        of_code = re.findall(r"arxiv.org/abs/([\d.]+\d)", objective.__doc__)[:1]
        assert re.findall(r"\[([\d.]+)\]", papers[name]) == of_code, name


def test_the_first_sentences_on_scaling_have_the_numbers_of_its_table() -> None:
    said, _, rest = (ROOT / "docs" / "scaling.md").read_text().partition("\n## ")
    rows = [("8B", "ZeRO-2", "{} of a step computing"), ("70B", "FSDP2", "and {} with 70B and FSDP2")]
    for model, strategy, words in rows:
        (share,) = re.findall(
            rf"^\| {model} \| full \| a copy \| {strategy} \|.*\| (\d+% to \d+%) \([^|]*\|$", rest, re.M
        )
        assert words.format(share) in " ".join(said.split()), (model, strategy)


def test_the_page_on_metrics_names_each() -> None:
    sources = [ROOT / "fastdpo" / name for name in ("report/metrics.py", "trainer/balance.py", "reference/share.py")]
    text = "".join(path.read_text() for path in sources)
    names = set(re.findall(r'"((?:balance|count|head|logits|logps|reference|rewards)/\w+)"', text))
    names |= {"grad_norm", "epoch", "train_loss", "train_runtime", "total_flos"} | {*console._PARTS}
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert len(names) > 12
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def messages() -> list[str]:
    """Every text in the package, with what a format puts into it left out."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"

    trees = [ast.parse(path.read_text()) for path in (ROOT / "fastdpo").rglob("*.py")]
    found = [text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]
    return [re.sub(r"%[sdr]|%\.?\d*[efg]", "\0", each) for each in found if " " in each]


def test_the_errors_of_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "faq.md").read_text().partition("## Errors")[2]
    lines = [line for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for line in re.findall("`(.+?)`", row)]
    assert len(lines) > 40
    known = messages()

    def says(message: str, line: str) -> bool:
        """Return whether a message has the parts of a line between its dots, in this order."""
        at = 0
        for part in filter(None, map(str.strip, line.split("..."))):
            if (found := message.find(part, at)) < 0:
                return False
            at = found + len(part)
        return True

    assert [line for line in lines if not any(says(message, line) for message in known)] == []

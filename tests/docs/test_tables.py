"""The tables of docs/ that a command writes say what the code does, and what the results in the repository say."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.studies import sparse_report
from docs import kernels_table, tables

PAGES = [pytest.param(name, id=Path(name).stem) for name in tables.PAGES]
STUDIES = ("balance", "cluster", "growth", "one_pass", "scaling", "two_processes")
"""The studies that write into their pages themselves."""


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_up_to_date(page: str) -> None:
    if page == "migrating.md":
        pytest.importorskip("trl")
    text = (tables.DOCS / page).read_text()
    made = tables.PAGES[page]()
    assert {*re.findall(r"<!-- python -m docs.tables writes (.*?)(?:, up to here)? -->", text)} == {*made}
    for name, table in made.items():
        assert tables.MARK.format(name) + table + tables.MARK.format(f"{name}, up to here") in text, (
            f"the table of {name} in docs/{page} is out of date; run python -m docs.tables"
        )


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_of_studies_are_up_to_date(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing them from the numbers in the repository changes nothing."""
    if name == "one_pass":
        pytest.importorskip("peft")
    study = import_module(f"benchmarks.studies.{name}")
    page, copy = study.PAGE.read_text(), tmp_path / "page.md"
    copy.write_text(page)
    monkeypatch.setattr(study, "PAGE", copy)
    if name == "growth":
        monkeypatch.setattr(study, "PICTURE", tmp_path / "growth.png")
    monkeypatch.setattr("sys.argv", [name, "--table"])
    study.main()
    assert copy.read_text() == page, f"run python -m benchmarks.studies.{name} --table"


def test_every_mark_has_a_test() -> None:
    """The other tables are compared in tests/kernels/test_aot.py and tests/benchmarks/test_sparse_study.py."""
    for page in (path for path in tables.DOCS.parent.rglob("*.md") if "/." not in str(path)):
        for mark in re.findall(r"<!-- .* -->\n", page.read_text()):
            if mark.startswith("<!-- python -m docs.tables "):
                assert any((tables.DOCS / name).resolve() == page for name in tables.PAGES), mark
            elif study := re.match(r"<!-- python -m benchmarks.studies.(\w+) ", mark):
                assert study[1] in STUDIES, mark
            elif page.name == "kernels.md":
                assert mark in (kernels_table.START, kernels_table.END)
            else:
                assert page.name == "sparse_backward.md", f"{mark} in {page}"
                assert mark.removeprefix("<!-- ").removesuffix(" -->\n") in {*sparse_report.TABLES, "end"}

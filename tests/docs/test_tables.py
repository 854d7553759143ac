"""The tables of docs/ that a command writes say what the code does."""

import pytest

from docs import tables

PAGES = [pytest.param(name, id=name.removesuffix(".md")) for name in tables.PAGES]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_up_to_date(page: str) -> None:
    if page == "migrating.md":
        pytest.importorskip("trl")
    text = (tables.DOCS / page).read_text()
    for name, table in tables.PAGES[page]().items():
        assert tables.MARK.format(name) + table + tables.MARK.format(f"{name}, up to here") in text, (
            f"the table of {name} in docs/{page} is out of date; run python -m docs.tables"
        )

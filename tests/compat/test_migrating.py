"""The tables of docs/migrating.md say what TRL has and what the code does."""

import pytest

pytest.importorskip("trl")

from docs.migrating_table import MARK, PAGE, tables


def test_the_tables_are_up_to_date() -> None:
    page = PAGE.read_text()
    for name, table in tables().items():
        assert MARK.format(name) + table + MARK.format(f"{name}, up to here") in page, (
            f"the table of {name} is out of date; run python docs/migrating_table.py"
        )

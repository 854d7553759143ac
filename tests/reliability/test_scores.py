"""A part of what `python -m tests.reliability` counts, small enough for every run of the tests."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import changed_settings, checkpoint_faults, disk_full, kills, not_finite
from tests.reliability.__main__ import MODULES

CASES = [
    *checkpoint_faults.cases(),
    *itertools.islice(changed_settings.cases(), 0, None, 3),
    *itertools.islice(not_finite.cases(), 1, None, 4),
    *itertools.islice(disk_full.cases(), 1, len(disk_full.WRITES), 2),
]


@pytest.mark.parametrize(("name", "handles"), CASES, ids=[name for name, _ in CASES])
def test_a_fault_is_handled_right(name: str, handles: Callable[[Path], bool], tmp_path: Path) -> None:
    assert handles(tmp_path), name


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(2))
def test_a_killed_run_resumes_bitwise(kill: int, tmp_path: Path) -> None:
    _, handles = kills.cases(2, large=False)[kill]
    assert handles(tmp_path)


def test_the_documentation_has_a_full_score_of_each_module() -> None:
    table = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for name, what in MODULES.items():
        score = re.search(rf"\| {re.escape(what)} \| `python -m tests.reliability {name}` \| (\d+) of (\d+) \|", table)
        assert score, name
        assert score[1] == score[2]

"""A part of what `python -m tests.reliability` counts, small enough for every run of the tests."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import changed_settings, checkpoint_faults, disk_full, kills, not_finite

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

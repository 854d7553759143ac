"""The tests of the head catch planted faults.

Only a sample of them is planted here; `python -m tests.mutants` plants all, and counts those that are caught.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent
SAMPLE = ("tile-target", "rest-squared")


@pytest.mark.parametrize(("file", "faults"), FAULTS.items(), ids=FAULTS)
def test_every_line_to_be_changed_is_there_once(file: str, faults: list[Fault]) -> None:
    text = (ROOT / file).read_text()
    assert [fault.name for fault in faults if text.count(fault.old) != 1 or fault.new == fault.old] == []


def test_names_are_unique() -> None:
    names = [fault.name for faults in FAULTS.values() for fault in faults]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_sample_is_caught() -> None:
    """And the same tests pass without it."""
    command = [sys.executable, "-m", "tests.mutants", "--only", *SAMPLE]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2 of 2 caught" in process.stdout

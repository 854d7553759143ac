"""Two processes, of which one gets a signal."""

from pathlib import Path

import pytest

from tests.helpers import preempted_ranks
from tests.helpers.forks import run_ranks


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    """And the next training goes on as if there had been none."""
    log = tmp_path / "log"
    assert run_ranks(preempted_ranks.main, tmp_path, log=log) == [143, 143], log.read_text()
    assert log.read_text().count("checkpoint-3 is saved, and resume_from_checkpoint=auto continues from it") == 1
    assert (tmp_path / "left").read_text() == "checkpoint-3"
    for rank in (0, 1):
        ends = [(tmp_path / name / f"end-{rank}").read_text() for name in ("stopped", "through")]
        assert ends[0] == ends[1]

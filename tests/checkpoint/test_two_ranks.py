"""Two processes under torchrun, of which one gets a signal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    """And the next training goes on as if there had been none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += ["tests/helpers/preempted_ranks.py", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "exitcode: 143" in done.stderr, done.stderr
    assert done.stderr.count("checkpoint-3 is saved, and resume_from_checkpoint=auto continues from it") == 1
    assert (tmp_path / "left").read_text() == "checkpoint-3"
    for rank in (0, 1):
        ends = [(tmp_path / name / f"end-{rank}").read_text() for name in ("stopped", "through")]
        assert ends[0] == ends[1]

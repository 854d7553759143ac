"""Whatever runs the model, its gradients are the same: DDP, FSDP2, LoRA, checkpointing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parallel_ranks import CASES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def errors(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of all cases, by two processes that run them one after the other."""
    return once("parallel", lambda: run_cases(tmp_path_factory.mktemp("parallel") / "errors.json"))


def run_cases(result: Path) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "tests/helpers/parallel_ranks.py", result], cwd=ROOT, env=environment, check=True, timeout=300
    )
    return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_have_the_gradients_of_one(case: str, errors: Any) -> None:
    assert errors[case]
    assert max(errors[case].values()) <= 1e-5, errors[case]

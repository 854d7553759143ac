"""Whatever runs the model, its gradients are the same: DDP, FSDP2, LoRA, checkpointing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import parallel_ranks
from tests.helpers.forks import run_ranks
from tests.helpers.parallel_ranks import CASES


@pytest.fixture(scope="module")
def errors(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of all cases, by two processes that run them one after the other."""
    return once("parallel", lambda: run_cases(tmp_path_factory.mktemp("parallel")))


def run_cases(folder: Path) -> Any:
    log = folder / "log"
    assert run_ranks(parallel_ranks.main, folder / "errors.json", log=log) == [0, 0], log.read_text()
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_have_the_gradients_of_one(case: str, errors: Any) -> None:
    assert errors[case]
    assert max(errors[case].values()) <= 1e-5, errors[case]

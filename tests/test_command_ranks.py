"""Commands on two processes: the work is divided, written once and said once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers import command_ranks

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples/quickstart/model"


def make_inputs(folder: Path) -> None:
    """Two models, and 23 pairs of ragged lengths, the last of which is the first again."""
    torch.manual_seed(4)
    for name in ("reference", "policy"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / name)
    digits = [str(7919 * (i % 22 + 3) ** 3) for i in range(23)]
    rows = [
        {"prompt": f"{d[:4]}=", "chosen": d[: 2 + i % 22 % 6] * 2, "rejected": d[::-1]} for i, d in enumerate(digits)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run all commands, and the last of them has failed."""
    return Path(once("commands", lambda: run_all(tmp_path_factory.mktemp("commands"))))


def run_all(folder: Path) -> str:
    make_inputs(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "tests/helpers/command_ranks.py", str(folder)],
        cwd=ROOT,
        env=environment | {"HF_HOME": str(folder / "home")},
        timeout=300,
        capture_output=True,
        text=True,
    )
    (folder / "stderr").write_text(done.stderr)
    return str(folder)


def ranks(folder: Path, command: str) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"rank{rank}.json").read_text())[command] for rank in range(2)]
    assert [each["code"] for each in found] == [0, 0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "plan", "precompute"])
def test_a_command_prints_once(command: str, folder: Path) -> None:
    first, second = ranks(folder, command)
    assert first["out"]
    assert not second["out"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "precompute"])
def test_processes_divide_the_responses_by_tokens(command: str, folder: Path) -> None:
    first, second = ([tuple(each) for each in rank["scored"]] for rank in ranks(folder, command))
    assert len({*first, *second}) == len(first) + len(second), "a response was scored twice"
    names = {name for name, _ in first}
    assert len(first) + len(second) == 2 * 22 * len(names)
    assert abs(len(first) - len(second)) <= 2 * len(names)
    assert [rank["maps"] for rank in ranks(folder, command)] == [int(command == "score"), 0]


@pytest.mark.slow
def test_scores_are_those_of_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dataset's order, and to the last digit."""
    data = ("--dataset_name", folder / "data.jsonl", "--model_name_or_path", folder / "policy", "--use_cpu")
    reference = ("--ref_model_name_or_path", folder / "reference", "--tokens_per_batch", 300)
    one = command_ranks.run("score", *data, *reference, "--output_dir", tmp_path)
    assert one["code"] == 0
    assert (folder / "scores" / "scores.jsonl").read_bytes() == (tmp_path / "scores.jsonl").read_bytes()
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 23
    assert ranks(folder, "score")[0]["out"].splitlines()[:-1] == one["out"].splitlines()[:-1]


@pytest.mark.slow
def test_a_failing_process_ends_the_command_with_its_message(folder: Path) -> None:
    said = (folder / "stderr").read_text()
    assert "process 1 failed: FloatingPointError: row 3 of this process is not finite; this process ends too" in said
    assert not (folder / "failed" / "scores.jsonl").exists()

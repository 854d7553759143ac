"""Two processes divide the work of commands, the rows of a stream and the weights; they write and say things once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdpo.model.adapters import with_adapter
from fastdpo.plan.resident import Job, resident, units_of
from tests.helpers import command_ranks
from tests.helpers.forks import run_ranks
from tests.helpers.trainers import lora, tiny_llama

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
    run_ranks(command_ranks.main, folder, log=folder / "log")
    return str(folder)


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    """What both processes found under a name."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in range(2)]


def ranks(folder: Path, command: str) -> list[dict[str, Any]]:
    """What both processes found of a command that succeeded."""
    results = found(folder, command)
    assert [each["code"] for each in results] == [0, 0]
    return results


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
def test_processes_divide_a_stream_without_an_end(folder: Path) -> None:
    """Each row is used once, only rows that are needed soon are read, and a resumed run reads on where it stopped."""
    whole, resumed = ([rank[part] for rank in found(folder, "stream")] for part in ("whole", "resumed"))
    used = [[row for batch, _ in rank["seen"] for row in batch] for rank in whole]
    assert [len(rows) for rows in used] == [16, 16]
    assert sorted(used[0] + used[1]) == list(range(32))
    assert max(rank["pulled"] for rank in whole) < 64
    assert [rank["seen"] for rank in resumed] == [rank["seen"][4:] for rank in whole]


@pytest.mark.slow
def test_the_balance_of_processes_is_logged(folder: Path) -> None:
    ranks = [rank["whole"] for rank in found(folder, "stream")]
    for step in range(4):
        first, second = ([tokens for _, tokens in rank["seen"][2 * step : 2 * step + 2]] for rank in ranks)
        longest = sum(map(max, first, second))
        entry = ranks[0]["log"][step]
        assert entry["balance/lost"] == pytest.approx(1 - (sum(first) + sum(second)) / 2 / longest)
        spread = 2 * abs(sum(first) - sum(second)) / (sum(first) + sum(second))
        assert entry["balance/step_spread"] == pytest.approx(spread)
        assert entry["balance/lost"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_fsdp_keeps_the_bytes_that_a_plan_computes(tuning: str, folder: Path) -> None:
    """Of an odd vocabulary, so that shards are rounded up."""
    counted = found(folder, "fsdp2")[0][tuning]
    model = tiny_llama()
    others = units_of(tiny_llama().requires_grad_(False)) if tuning == "full" else []
    if tuning == "lora":
        model = with_adapter(model, lora())
    planned = resident(
        units_of(model), others, job=Job("fsdp2", 2), optimizer="adamw_torch", compute=torch.float32, upcasts=False
    )
    assert counted.items() <= planned._asdict().items()
    assert counted["weights"] < 0.6 * sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_a_failing_process_ends_the_command_with_its_message(folder: Path) -> None:
    said = (folder / "log").read_text()
    assert "process 1 failed: FloatingPointError: row 3 of this process is not finite; this process ends too" in said
    assert not (folder / "failed" / "scores.jsonl").exists()

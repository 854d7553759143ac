"""The command line as a user meets it: `fastdpo train`, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
QUICKSTART = "examples/quickstart.yaml"
DATA = {"config_name": str(ROOT / "examples/quickstart/model"), "dataset_name": str(ROOT / "examples/quickstart")}


def fastdpo(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fastdpo.cli import main; main()", *map(str, words)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # as a user has it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_quickstart_learns_what_it_promises(tmp_path: Path) -> None:
    """Held-out reward accuracy from 0.5 to 0.9 and more, a picture, a table, and a model that loads."""
    done = fastdpo("train", QUICKSTART, "--output_dir", tmp_path)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    accuracy = [e["eval_rewards/accuracies"] for e in state["log_history"] if "eval_rewards/accuracies" in e]
    assert accuracy[0] == 0.5  # the policy is its own reference
    assert accuracy[-1] >= 0.9
    assert f"{accuracy[-1]:.3f}" in done.stdout
    for words in ("held out", "reward accuracy", "tokens per second", "padding avoided", "tokens shared"):
        assert words in done.stdout
    assert "step 216/216  epoch 6.00  eval   loss" in done.stderr
    assert "\r" not in done.stderr  # which is no terminal
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a prompt", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


SHORT = ("--max_steps", 2, "--logging_steps", 1)


def test_any_field_can_be_overridden(tmp_path: Path) -> None:
    done = fastdpo("train", QUICKSTART, *SHORT, "--output_dir", tmp_path, "--use-peft", "true", "--lora_r=4")
    assert (tmp_path / "adapter_config.json").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    assert "reward accuracy" in done.stdout


def test_a_single_file_trains_without_a_held_out_split(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}+1=", "chosen": "{i + 1}", "rejected": "{i}"}}\n' for i in range(8)))
    done = fastdpo("train", QUICKSTART, *SHORT, "--output_dir", tmp_path / "out", "--dataset_name", data)
    assert "has no split 'test': nothing is held out" in done.stderr
    assert "held out" not in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    common = ("--output_dir", tmp_path / "none", "--dataset_name", data, "--reference_cache_dir", tmp_path / "cache")
    fastdpo("precompute", QUICKSTART, *common)
    assert sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_plan_tells_what_will_happen_without_doing_it(tmp_path: Path) -> None:
    done = fastdpo("plan", QUICKSTART, "--output_dir", tmp_path, "--gpu_memory", 80)
    for words in ("padding avoided", "rows of the dataset", "576", "computed, not measured", "tokens_per_batch in 80"):
        assert words in done.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.slow
def test_precompute_then_train_then_score(tmp_path: Path) -> None:
    """What precompute kept, training finds; what was trained is scored against its start."""
    common = ("--reference_cache_dir", tmp_path / "cache")
    fastdpo("precompute", QUICKSTART, *common, "--output_dir", tmp_path / "none")
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert shards
    trained = (*SHORT, *common, "--precompute_ref_log_probs", "true", "--output_dir", tmp_path / "out")
    done = fastdpo("train", QUICKSTART, *trained)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == shards, "training computed what was there"
    assert "Reference log-probs" not in done.stderr
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "precompute_ref_log_probs" in page

    # its start, made again: random weights of the same seed
    fastdpo("train", QUICKSTART, "--num_train_epochs", 0, "--output_dir", tmp_path / "start")
    models = ("--config_name", "null", "--model_name_or_path", tmp_path / "out")
    reference = ("--ref_model_name_or_path", tmp_path / "start")
    done = fastdpo("score", QUICKSTART, *models, *reference, "--output_dir", tmp_path / "scores")
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(160))
    last = next(entry for entry in reversed(history) if "eval_loss" in entry)
    margin = sum(chosen - rejected for chosen, rejected in (row["rewards"] for row in rows)) / len(rows)
    assert margin == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert f"{last['eval_rewards/accuracies']:.3f}" in done.stdout


def test_score_cuts_and_rounds_as_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastdpo import cli, scoring

    given: dict[str, Any] = {}

    def capture(*_: Any, **options: Any) -> Any:
        given.update(options)
        return scoring.Scores([], None)

    monkeypatch.setattr(scoring, "score", capture)
    settings = {"max_length": 30, "max_prompt_length": 20, "max_completion_length": 10, "on_bad_row": "drop"}
    settings |= {"tokens_per_batch": 20000, "beta": 0.3}
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    cli.score(ROOT / QUICKSTART, common | settings | {"ref_adapter_name": "frozen", "bf16": True} | DATA)
    assert given.items() >= settings.items()
    assert given["ref_adapter_name"] == "frozen"
    assert given["autocast"] == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lerning_rate", "1"), "fastdpo: unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        (("--beta", "-1"), "fastdpo: beta must be a positive number, got -1.0"),
        (("--beta",), "fastdpo: --beta needs a value"),
        (("beta", "1"), "fastdpo: expected --field value, got 'beta'"),
        (("--dataset_train_split", "trian"), "has no split 'trian'; it has ['train', 'test']"),
    ],
    ids=["unknown", "range", "no-value", "no-dashes", "split"],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str) -> None:
    done = fastdpo("train", QUICKSTART, *words, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_row_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "", "rejected": "c"}\n')
    done = fastdpo("train", QUICKSTART, "--dataset_name", data, "--output_dir", tmp_path, check=False)
    assert done.returncode == 1
    assert "fastdpo: train dataset: 1 of 2 rows are malformed. row 1: `chosen` is empty." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_one_line() -> None:
    done = fastdpo("train", "no_such.yaml", check=False)
    assert done.returncode == 1
    assert "fastdpo: [Errno 2] No such file or directory: 'no_such.yaml'" in done.stderr

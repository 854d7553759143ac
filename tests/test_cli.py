"""The command line as a user meets it: whole runs in a process of their own, all else in this one."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo import __main__ as start
from fastdpo import cli
from fastdpo.settings.config_file import MANIFEST
from tests.helpers import forks
from tests.helpers.command import Run, command

ROOT = Path(__file__).parent.parent
QUICKSTART = "examples/quickstart.yaml"
DATA = {"config_name": str(ROOT / "examples/quickstart/model"), "dataset_name": str(ROOT / "examples/quickstart")}


def fastdpo(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdpo", *map(str, words)]
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
    training = ("tokens per second", "padding avoided", "tokens shared", "reference, share")
    for words in ("held out", "reward accuracy", *training):
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


def test_any_field_can_be_overridden(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("train", QUICKSTART, *SHORT, "--output_dir", tmp_path, "--use-peft", "true", "--lora_r=4")
    assert done.code == 0
    assert (tmp_path / "adapter_config.json").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    assert "reward accuracy" in done.out


def test_a_single_file_trains_without_a_held_out_split(
    run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}+1=", "chosen": "{i + 1}", "rejected": "{i}"}}\n' for i in range(8)))
    done = run("train", QUICKSTART, *SHORT, "--output_dir", tmp_path / "out", "--dataset_name", data)
    assert done.code == 0
    assert "has no split 'test', so nothing is evaluated" in caplog.text
    assert "held out" not in done.out
    assert (tmp_path / "out" / "model.safetensors").exists()
    common = ("--output_dir", tmp_path / "none", "--dataset_name", data, "--reference_cache_dir", tmp_path / "cache")
    assert run("precompute", QUICKSTART, *common).code == 0
    caplog.clear()
    models = ("--config_name", "null", "--model_name_or_path", tmp_path / "out", "--ref_model_name_or_path")
    assert run("score", QUICKSTART, *common, *models, tmp_path / "out").code == 0
    assert "has no split 'test', so the split 'train' is scored" in caplog.text
    assert sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_plan_tells_what_will_happen_without_doing_it(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("plan", QUICKSTART, "--output_dir", tmp_path, "--gpu_memory", 80)
    for words in ("padding avoided", "rows of the dataset", "576", "computed, not measured", "tokens_per_batch in 80"):
        assert words in done.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_what_is_to_be_known_or_cached_leaves_nothing_in_the_current_folder(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`precompute` says how many rows were cached."""
    quickstart = Path(QUICKSTART).resolve().with_suffix("")
    rows = (quickstart / "train.jsonl").read_text().splitlines()[7:16]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:7]))
    (tmp_path / "more.jsonl").write_text("\n".join(rows))
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    model = ("--config_name", quickstart / "model", "--reference_cache_dir", tmp_path / "cache")
    assert "picture: none, because no output_dir is set" in run("plan", *model, "--dataset_name", "../rows.jsonl").out
    for name, cached, computed in (("rows", "0 of 7", 7), ("more", "7 of 9", 2), ("more", "9 of 9", 0)):
        assert run("precompute", *model, "--dataset_name", f"../{name}.jsonl").code == 0
        assert f"{cached} rows are cached in {tmp_path / 'cache'}, and {computed} are computed now" in caplog.text
    assert not [*Path().iterdir()]
    refused = run("precompute", *model, "--dataset_name", "../rows.jsonl", "--loss_type", "orpo").err.splitlines()[-1]
    assert refused == "fastdpo: loss_type orpo uses no reference that could be precomputed"


@pytest.mark.slow
def test_precompute_then_train_then_score(run: Callable[..., Any], tmp_path: Path) -> None:
    """What precompute kept, training in another process finds; what was trained is scored against its start."""
    common = ("--reference_cache_dir", tmp_path / "cache")
    assert run("precompute", QUICKSTART, *common, "--output_dir", tmp_path / "none").code == 0
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert shards
    trained = (*SHORT, *common, "--precompute_ref_log_probs", "true", "--output_dir", tmp_path / "out")
    assert forks.python("-m", "fastdpo", "train", QUICKSTART, *map(str, trained), log=tmp_path / "log") == 0
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == shards, "training computed what was there"
    said = (tmp_path / "log").read_text()
    assert "reward accuracy" in said
    assert "Log-probs of" not in said
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "precompute_ref_log_probs" in page

    # its start, made again: random weights of the same seed
    assert run("train", QUICKSTART, "--num_train_epochs", 0, "--output_dir", tmp_path / "start").code == 0
    models = ("--config_name", "null", "--model_name_or_path", tmp_path / "out")
    reference = ("--ref_model_name_or_path", tmp_path / "start")
    scored = run("score", QUICKSTART, *models, *reference, "--output_dir", tmp_path / "scores")
    assert scored.code == 0
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(160))
    last = next(entry for entry in reversed(history) if "eval_loss" in entry)
    margin = sum(chosen - rejected for chosen, rejected in (row["rewards"] for row in rows)) / len(rows)
    assert margin == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert f"{last['eval_rewards/accuracies']:.3f}" in scored.out


def test_score_cuts_and_rounds_as_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastdpo import scoring

    given: dict[str, Any] = {}

    def capture(*_: Any, **options: Any) -> Any:
        given.update(options)
        return scoring.Scores([], None)

    monkeypatch.setattr(scoring, "score", capture)
    monkeypatch.setattr("fastdpo.commands.score.load_reference", lambda *_: None)
    settings = {"max_length": 30, "max_prompt_length": 20, "max_completion_length": 10, "on_bad_row": "drop"}
    settings |= {"tokens_per_batch": 20000, "beta": 0.3}
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    common["ref_model_name_or_path"] = DATA["config_name"]
    cli.score(ROOT / QUICKSTART, common | settings | {"ref_adapter_name": "frozen", "bf16": True} | DATA)
    assert given.items() >= settings.items()
    assert given["ref_adapter_name"] == "frozen"
    assert given["autocast"] == torch.bfloat16


# Failures, in this process


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, from the repository's root: its exit code and what it printed."""
    monkeypatch.chdir(ROOT)

    return command(capsys)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("trian", QUICKSTART), 2, "unknown command 'trian'; did you mean 'train'?"),
        (("zzzz", QUICKSTART), 2, "unknown command 'zzzz'; see fastdpo --help"),
        (("train",), 2, "give a config file, settings or both: fastdpo train CONFIG.yaml --any_setting value"),
        (("train", "--beta", 1, QUICKSTART), 2, "--beta takes one value, got 1 examples/quickstart.yaml"),
        (
            ("train", QUICKSTART, "--lerning_rate", 1),
            2,
            "unknown setting --lerning_rate; did you mean 'learning_rate'?",
        ),
        (("score", QUICKSTART, "--beta"), 2, "--beta needs a value"),
        (("plan", QUICKSTART, "--gpu_memory", "big"), 1, "gpu_memory must be float, got 'big'"),
        (("train", QUICKSTART, "--beta", -1), 1, "beta must not be negative, got -1.0"),
        (
            ("train", QUICKSTART, "--optim", "adan"),
            1,
            "optim must be one of adamw_torch, adamw_torch_fused,",
        ),
        (("train", QUICKSTART, "--lr_scheduler_type", "cosin"), 1, "'cosin' is unknown; did you mean 'cosine'?"),
        (("train", QUICKSTART, "--dtype", "float32", "--model_init_kwargs", "{dtype: bfloat16}"), 1, "leave one out"),
        (
            ("score", QUICKSTART),
            1,
            "with a reference: set ref_model_name_or_path to the model from which its training",
        ),
        (("train", "examples/quickstat.yaml"), 1, "did you mean 'examples/quickstart.yaml'?"),
        (
            ("train", QUICKSTART, "--dataset_train_split", "trian"),
            1,
            "split 'trian'; it has train, test; did you mean 'train'?",
        ),
        (("train", QUICKSTART, "--dataset_name", "nobody/has-this"), 1, "dataset_name: 'nobody/has-this' is neither a"),
        (("train", QUICKSTART, "--config_name", "nobody/has-this"), 1, "config_name: 'nobody/has-this' is neither a"),
        (
            ("train", QUICKSTART, "--ref_model_name_or_path", "nobody/has-this"),
            1,
            "ref_model_name_or_path: 'nobody/",
        ),
    ],
    ids=range(17),
)
def test_mistakes_are_one_line(run: Run, tmp_path: Path, words: tuple[object, ...], code: int, message: str) -> None:
    output = ("--output_dir", tmp_path) if len(words) > 1 and words[1] == QUICKSTART and code == 1 else ()
    ended = run(*words, *output)
    assert ended.code == code
    last = ended.err.splitlines()[-1]
    assert last.startswith("fastdpo: ")
    assert message in last
    assert "Traceback" not in ended.err


def test_mistakes_are_answered_before_the_slow_imports() -> None:
    """And so are help and version."""
    mistakes = [
        [],
        ["--version"],
        ["train", "--help"],
        ["trian"],
        ["train", QUICKSTART, "--lerning_rate", "1"],
        ["train", QUICKSTART, "--beta", "high"],
        ["train", QUICKSTART, "--dtype", "float31"],
        ["train", QUICKSTART, "--report_to", "nowhere"],
        ["train", QUICKSTART, "--optim", "adamw_toch", "--loss_type", "sigmod"],
        *(
            ["train", QUICKSTART, f"--{name}", "no/such/path"]
            for name in ("config_name", "dataset_name", "ref_model_name_or_path", "resume_from_checkpoint")
        ),
        ["train", QUICKSTART, "--config_name", "null", "--model_name_or_path", "no/such/path"],
    ]
    code = f"""
import sys
from fastdpo.cli import main
for words in {mistakes!r}:
    try:
        main(words)
    except SystemExit as end:
        assert end.code in (1, 2), words
    else:
        assert not words or words[-1] in ("--version", "--help"), words
slow = {{"torch", "transformers", "datasets", "numpy", "pyarrow"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(mistakes) - 3


def test_without_a_command_there_is_help_with_the_exit_codes(run: Run) -> None:
    ended = run()
    assert ended.code == 0
    for words in ("usage: fastdpo", "train", "precompute", "score", "plan", "--debug", "exit codes", "130", "143"):
        assert words in ended.out
    assert run("--help").out == ended.out


def test_a_tool_runs_in_the_first_process_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setitem(cli.TOOLS, "doctor", cli.TOOLS["doctor"]._replace(run=lambda *_: ran.append("doctor")))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run("doctor") == (0, "", "")
    assert ran == ["doctor"]


def test_version(run: Run) -> None:
    import fastdpo

    assert run("--version").out == f"fastdpo {fastdpo.__version__}\n"


def test_help_of_a_command_lists_its_own_options_first(run: Run) -> None:
    text = run("plan", "--help").out
    assert "Count the tokens of a run" in text
    assert text.index("The plan:\n  --gpu_memory float") < text.index("The run:\n  --dataset_name str")
    assert "--gpu_memory" not in run("train", "--help").out


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("expected", [True, False], ids=["expected", "bug"])
def test_tracebacks_are_for_bugs_and_for_debug(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: bool, debug: bool
) -> None:
    def fail(*_: Any) -> None:
        if expected:
            raise ValueError("rows are malformed")
        _, _ = (1, 2, 3)  # also a ValueError

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    ended = run("train", QUICKSTART, *["--debug"] * debug)
    assert ended.code == 1
    assert ("Traceback" in ended.err) is (debug or not expected)
    last = ended.err.splitlines()[-1]
    if expected:
        assert last == "fastdpo: rows are malformed"
    else:
        assert last == "fastdpo: this ValueError was not expected; please report it with the lines above"


def test_a_bad_row_is_one_line(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "", "rejected": "c"}\n')
    ended = run("train", QUICKSTART, "--dataset_name", data, "--output_dir", tmp_path / "out")
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("fastdpo: train dataset: 1 of 2 rows are malformed. row 1: `chosen` is empty.")
    assert "Traceback" not in ended.err


# What stops in the middle

SMALL = ["--max_steps=4", "--save_strategy=steps", "--save_steps=2", "--logging_steps=1", "--use_cpu", "--disable_tqdm"]
SMALL += ["--per_device_train_batch_size=2", "--dataset_test_split=none"]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures would take longer than the few steps."""
    monkeypatch.setattr(cli, "_report", lambda *_: Path("report.html"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], Any]) -> None:
    """Do something in the middle of an optimizer step."""
    from fastdpo.trainer import DPOTrainer

    compute_loss = DPOTrainer.compute_loss

    def compute_or_stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            stop()
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "compute_loss", compute_or_stop)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("signum", "code", "name", "step"),
    [(signal.SIGINT, 130, "Ctrl-C", 2), (signal.SIGTERM, 143, "SIGTERM", 3), (signal.SIGUSR1, 143, "SIGUSR1", 3)],
    ids=["ctrl-c", "term", "usr1"],
)
def test_a_signal_says_what_was_saved_and_the_command_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int, name: str, step: int
) -> None:
    """Ctrl-C stops at once, and the others save at the end of the step; none of them leaves a final model."""
    words = ("train", QUICKSTART, *SMALL, "--output_dir", tmp_path / "a folder")
    with monkeypatch.context() as patched:
        stop_at(patched, 2, lambda: os.kill(os.getpid(), signum))
        ended = run(*words)
    assert ended.code == code
    assert "Traceback" not in ended.err
    saved = tmp_path / "a folder" / f"checkpoint-{step}"
    assert not (tmp_path / "a folder" / "model.safetensors").exists()
    line = ended.err.splitlines()[-1]
    assert line.startswith(f"fastdpo: stopped by {name}; saved: {saved}; continue with: fastdpo train {QUICKSTART} ")
    _, *command = shlex.split(line.partition("continue with: ")[2])
    assert command[-1] == f"--resume_from_checkpoint={saved}"

    assert run(*command).code == 0
    history = json.loads((tmp_path / "a folder" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


def test_a_report_that_cannot_be_written_is_a_failure(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_report", lambda *_: None)
    ended = run("train", QUICKSTART, *SMALL, "--max_steps=1", "--save_strategy=no", "--output_dir", tmp_path)
    assert ended.code == 1
    line = f"fastdpo: the model in {tmp_path} is complete, but its report could not be written; see above"
    assert ended.err.splitlines()[-1] == line
    assert (tmp_path / "model.safetensors").exists()
    assert "has the results of an earlier run" in run("train", QUICKSTART, "--output_dir", tmp_path).err


def test_a_signal_before_anything_is_saved_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    for name in ("trainer_state.json", MANIFEST):
        (tmp_path / "checkpoint-7" / name).write_text("{}")
        os.utime(tmp_path / "checkpoint-7" / name, (1, 1))  # of an earlier run
    monkeypatch.setitem(cli.COMMANDS, "train", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    ended = run("train", QUICKSTART, "--output_dir", tmp_path)
    assert ended.code == 130
    why = "save_strategy is 'no'"
    expected = f"stopped by Ctrl-C; nothing was saved, because {why}; the same command starts from the beginning"
    assert ended.err == f"fastdpo: {expected}\n"
    newest = tmp_path / "checkpoint-7"
    expected = f"nothing was saved after {newest}; the same command continues from that checkpoint"
    assert expected in run("train", QUICKSTART, "--output_dir", tmp_path, "--resume_from_checkpoint", newest).err
    monkeypatch.setitem(cli.COMMANDS, "train", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    ended = run("train", QUICKSTART, "--output_dir", tmp_path)
    assert ended.code == 143
    assert ended.err.startswith("fastdpo: stopped by SIGUSR1; nothing was saved, because")
    monkeypatch.setitem(cli.COMMANDS, "precompute", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ended = run("precompute", QUICKSTART)
    assert ended.code == 143
    expected = "stopped by SIGTERM; what was scored so far is kept, and the same command continues from there"
    assert ended.err == f"fastdpo: {expected}\n"


def test_a_signal_after_training_says_that_the_model_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: Any) -> None:
        (tmp_path / "trainer_state.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(cli.COMMANDS, "train", ends)
    ended = run("train", QUICKSTART, "--save_strategy=no", "--output_dir", tmp_path)
    assert ended.code == 143
    assert ended.err == f"fastdpo: stopped by SIGTERM after training; the model in {tmp_path} is complete\n"
    os.utime(tmp_path / "trainer_state.json", (1, 1))  # of an earlier run
    monkeypatch.setitem(cli.COMMANDS, "train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert "nothing was saved" in run("train", QUICKSTART, "--output_dir", tmp_path).err


def test_a_signal_that_became_another_exception_is_still_a_signal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a worker died") from None

    monkeypatch.setitem(cli.COMMANDS, "score", swallow)
    ended = run("score", QUICKSTART)
    assert (ended.code, ended.err) == (130, "fastdpo: stopped by Ctrl-C; nothing was saved\n")


def test_ctrl_c_before_the_command_is_imported_shows_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fastdpo.cli", Slow())  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="130"):
        start.run()
    assert capsys.readouterr().err == "fastdpo: stopped by Ctrl-C; nothing was saved\n"
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["fastdpo"]
    assert script == f"{start.run.__module__}:{start.run.__name__}"


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def out_of_memory() -> None:
    torch.empty(2**52)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("stop", "message"),
    [(full, "the disk is full"), (out_of_memory, "out of memory: lower per_device_train_batch_size")],
    ids=["disk", "memory"],
)
def test_what_stops_a_training_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None], message: str
) -> None:
    stop_at(monkeypatch, 1, stop)
    ended = run("train", QUICKSTART, *SMALL, "--output_dir", tmp_path)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith(f"fastdpo: {message}")
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("no_report")
def test_a_loss_that_is_not_finite_is_one_line(run: Run, tmp_path: Path) -> None:
    diverging = ("--learning_rate", 1e38, "--lr_scheduler_type", "constant", "--warmup_steps", 0)
    ended = run("train", QUICKSTART, *SMALL, "--output_dir", tmp_path, *diverging)
    assert ended.code == 1
    assert "finite" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err

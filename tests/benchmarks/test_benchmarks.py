"""Every benchmark runs at toy size and says what it must. Nothing here asserts a time."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.benchmarks import head, lengths, peers, training
from fastdpo.head.impl import sparsity

ROOT = Path(__file__).parents[2]
PROVENANCE = {"machine", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "commit", "date"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--frozen"], ["--flat", "--dtype", "bfloat16"]], ids=" ".join)
def test_head(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "head.jsonl"
    head.main(["--smoke", "--out", str(out), *flags])

    printed = capsys.readouterr().out.splitlines()
    titles = next(i for i, line in enumerate(printed) if "vs TRL" in line)
    rows = lines_of(out)
    names = [row["impl"] for row in rows]
    backwards = ["exact", "auto", "sparse"] if "bfloat16" in flags else ["exact", "sparse"]
    assert {*(f"fastdpo torch, {b}" for b in backwards), "TRL", "TRL, all statistics", "PyTorch"} <= set(names)
    assert len(names) == len(set(names))
    assert [line.strip().split("  ")[0] for line in printed[titles + 1 :]] == names
    assert ("flat rows" in printed[titles - 1], "frozen head" in printed[titles - 1]) == (
        "--flat" in flags,
        "--frozen" in flags,
    )

    for row in rows:
        assert len(row["times_ms"]) == len(row["forward"]["times_ms"]) == 2
        assert row["peak_mib"] >= 0
        assert set(row["provenance"]) == PROVENANCE
        assert row["errors"]["logps"] < 0.1
        assert row["errors"]["dhidden"] < 0.05
        assert (row["errors"]["dweight"] is None) == ("--frozen" in flags)
        assert (row["density"] is None) == (row["backward"] in (None, "exact"))
        assert row["forward"]["tflops"] == pytest.approx(2e-9 * 32 * 16 * 500 / row["forward"]["ms"])
    trl = next(row for row in rows if row["impl"] == "TRL")
    assert trl["ratio_to_trl"] == trl["forward"]["ratio_to_trl"] == 1


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let importing them fail, whether they are installed or not, and whatever of them was imported before."""
    for package in packages:
        for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, package, None)


def test_head_without_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide(monkeypatch, "trl.kernels.chunked_logprob", "liger_kernel", "cut_cross_entropy")
    head.main(["--smoke"])
    printed = capsys.readouterr().out
    assert all(f"left out: {name}: ModuleNotFoundError" in printed for name in peers.PEERS)
    assert "fastdpo torch, exact" in printed


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("0 active drivers\nand more")

    monkeypatch.setattr(peers, "PEERS", peers.PEERS | {"Liger": lambda: fails})
    head.main(["--smoke"])
    printed = capsys.readouterr().out
    assert "left out: Liger: RuntimeError: 0 active drivers\n" in printed
    assert "TRL, all statistics" in printed


def test_our_own_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, backward: str, **__: Any) -> Any:
        assert backward == "exact"
        return torch.zeros(32, requires_grad=True)  # not a function of hidden

    monkeypatch.setattr(head, "linear_logprobs", fails)
    with pytest.raises(SystemExit, match="4"):
        head.main(["--smoke"])


def test_a_case_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head.jsonl"
    call = ["--cases", "smoke", "--repetitions", "1", "--out", str(out)]
    first, second = head.CASES["smoke"]
    monkeypatch.setitem(head.CASES, "smoke", [first])
    head.main(call)
    before = out.read_text()

    monkeypatch.setitem(head.CASES, "smoke", [first, second])
    head.main(call)
    assert f"{first}: measured before" in capsys.readouterr().out
    assert out.read_text().startswith(before)
    added = [json.loads(line) for line in out.read_text()[len(before) :].splitlines()]
    assert added
    assert all(second.key.items() <= row.items() for row in added)

    out.write_text(before.replace('"machine": "', '"machine": "another '))
    monkeypatch.setitem(head.CASES, "smoke", [first])
    head.main(call)
    assert len(lines_of(out)) == 2 * len(before.splitlines())


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ticks = itertools.count()  # a clock that no other process can slow
    monkeypatch.setattr(training, "time", SimpleNamespace(**vars(time) | {"perf_counter": lambda: float(next(ticks))}))
    out = tmp_path / "results" / "training.jsonl"
    call = ["--cases", "smoke", "--repetitions", "2", "--out", str(out)]
    training.main(call)
    rows = lines_of(out)
    case = training.CASES["smoke"][0]
    assert [row["impl"] for row in rows] == list(training.VARIANTS)
    assert rows[-1]["ratio_to_trl"] == 1
    printed = capsys.readouterr().out
    assert all(f"│ {name} " in printed for name in training.VARIANTS)
    for row in rows:
        assert case.key.items() <= row.items()
        assert set(row["provenance"]) == PROVENANCE
        assert len(row["times_ms"]) == 2
        assert row["pairs_per_second"] == pytest.approx(1e3 * case.pairs * case.steps / row["ms"])
        assert set(row["split_ms"]) == set(training.PHASES)
        assert all(row["split_ms"][phase] > 0 for phase in ("body", "head", "reference", "rest"))
        assert sum(row["split_ms"].values()) * case.steps == pytest.approx(row["ms"])
        # all of them compute the same: on the first step's rows, with two models that differ
        assert row["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
    assert abs(rows[0]["loss"] - 0.6931) > 1e-3

    before = out.read_text()
    training.main(call)
    assert f"{case}: measured before" in capsys.readouterr().out
    assert out.read_text() == before


def test_training_without_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide(monkeypatch, "trl")
    call = ["--model", "toy", "--lengths", "toy", "--pairs", "1", "--steps", "1", "--max-length", "32"]
    training.main([*call, "--repetitions", "1", "--variants", "fastdpo", "TRL"])
    printed = capsys.readouterr().out
    assert "left out: TRL: ModuleNotFoundError" in printed
    assert "│ fastdpo " in printed


def test_our_own_failure_in_training_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such layout")

    monkeypatch.setitem(training.VARIANTS, "fastdpo, no sharing", fails)
    with pytest.raises(SystemExit, match="4"):
        training.main(["--model", "toy", "--lengths", "toy", "--repetitions", "1", "--variants", "fastdpo, no sharing"])


def test_lengths_are_those_of_the_tokenizer() -> None:
    rows, tokenizer = lengths.pairs("toy", 50, 100, 16), lengths.tokenizer(100)
    for row, (prompt, chosen, rejected) in zip(rows, lengths.token_counts(rows, 16), strict=True):
        ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"]
        assert prompt == len(tokenizer(row["prompt"])["input_ids"])
        assert prompt + chosen == min(16, len(ids) + 1)
        assert tokenizer.unk_token_id not in ids
        assert 1 <= rejected <= 16 - prompt
    sizes = [len(row["prompt"].split()) for row in lengths.pairs("hh", 4001, 100, 10**6)]
    assert sorted(sizes)[2000] == pytest.approx(lengths.LENGTHS["hh"].prompt, rel=0.1)


HANG = """
import os, sys
from threading import Timer
from time import sleep
from fastdpo.benchmarks import head, lengths, peers, training
head.Timer = lambda seconds, fatal, args: Timer(0.5 if args[0] == "CCE" else seconds, fatal, args)
peers.PEERS = {"CCE": lambda: lambda *_: sleep(60)}
for _ in range(2):  # each in a fork, for the first ends its process
    pid = os.fork()
    if not pid:
        head.main(["--smoke", "--out", sys.argv[1]])
        sys.exit()
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_what_never_returns_is_left_out_the_next_time(tmp_path: Path) -> None:
    out = tmp_path / "head.jsonl"
    both = subprocess.run([sys.executable, "-c", HANG, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    hung, code, again = both.stdout.partition("exit code 3\n")
    assert code, both.stdout + both.stderr
    assert "left out from now on: CCE: did not return within 180 s" in hung
    assert again.endswith("exit code 0\n"), again + both.stderr
    assert [row["impl"] for row in lines_of(out)] == ["CCE", "fastdpo torch, exact", "fastdpo torch, sparse", "PyTorch"]


def test_variants_do_not_see_each_others_densities() -> None:
    def remembers(*_: Any) -> Any:
        sparsity._densities["key"] = []  # type: ignore[index]
        return len(sparsity._densities)

    one, other = head.remembering(remembers), head.remembering(lambda *_: len(sparsity._densities))  # type: ignore[arg-type]
    calls: list[Any] = [fn(*[torch.zeros(1)] * 3) for fn in (one, other, one, other)]
    assert calls == [1, 0, 1, 0]


def test_matmul_is_timed_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MATMUL_ROWS", 5)
    head.matmul(head.make_inputs(head.Case(12, 16, 50)))


@pytest.mark.slow
def test_gpu_suite(tmp_path: Path) -> None:
    environment = os.environ | {"SUITE_SIZE": "smoke", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"BUDGET": "5000"}  # a busy machine is no reason to leave a part out
    call = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), "out"]
    first = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("status", "probe.log", "tests.log", "head.log", "head.jsonl", "training.log", "training.jsonl")
    }
    assert " passed" in (tmp_path / "out" / "tests.log").read_text()
    assert [line.split()[:2] for line in (tmp_path / "out" / "status").read_text().splitlines()] == [
        ["probe", "0"],
        ["head", "0"],
        ["training", "0"],
        ["accuracy", "0"],
    ]
    assert f"torch {torch.__version__}" in (tmp_path / "out" / "probe.log").read_text()

    (tmp_path / "out" / "status").write_text("probe 0 5\nhead 0 5\ntraining 0 5\naccuracy 124 5\n")
    spent = subprocess.run(call, cwd=tmp_path, env=environment | {"BUDGET": "0"}, capture_output=True, text=True)
    assert spent.returncode == 1
    assert "== head" not in spent.stdout, "a part that came to its end is not repeated"
    assert (tmp_path / "out" / "status").read_text().splitlines()[4:] == ["accuracy 124 0"]


def test_the_gpu_suite_finds_the_tests_of_all_folders() -> None:
    """By the two patterns that its script greps for."""
    script = (ROOT / "benchmarks" / "gpu_suite.sh").read_text()
    for pattern, least in ((r"mark\.gpu", 4), (r"device: torch\.device", 8)):
        assert f'"{pattern}" tests' in script
        found = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(pattern, path.read_text())]
        assert len({path for path in found if path.parent.name != "tests"}) >= least


def test_the_time_model_marks_goals_that_are_missed() -> None:
    """On made-up kernels: everything is marked as computed, a faster kernel is faster, and dense is an upper bound."""
    from benchmarks.studies import head_time_model as model

    fast = model.Kernel((128, 256, 64), 8, 200, 150_000, [80, 100, 500], 1)
    slow = fast._replace(loops=[80, 2000, 20_000])
    shape = model.Shape(2048, 1024, 16384)
    kernels, slow_kernels = dict.fromkeys(model.JOBS, fast), dict.fromkeys(model.JOBS, slow)
    assert model.forward(fast, shape) < model.forward(slow, shape)
    assert model.kept_share(shape, 2**20) == 0
    assert model.kept_share(shape, 2**30) == 1
    for made in (kernels, slow_kernels):
        times = model.chip(made, model.HEADLINE)
        found = [model.steps(made, model.HEADLINE, times, d, 0.7 * d, 0.3 * d) for d in (0.02, 0.2, 0.4, 1.0)]
        for name, dense in found[-1].items():
            assert [step[name] for step in found] == sorted(step[name] for step in found)
            assert found[0][name] < dense or made is slow_kernels
    text = model.report(slow_kernels, model.HEADLINE, (700, (128, 256, 64, 4, 4)))
    assert "computed, not measured" in text
    assert "(goal 15, missed)" in text
    assert "goal 15" not in model.report(kernels, shape), "goals are for the headline shape"


def test_consumers_that_take_turns_hide_their_epilogues() -> None:
    """A tile takes its matmuls alone, as long as an epilogue is shorter than the other consumer's matmuls."""
    from benchmarks.studies.head_time_model import clocks_of_turns

    steps, tiles = 16, 50
    matmuls = 2 * 500 * steps * tiles
    assert clocks_of_turns(tiles, steps, 4, 500, 1400) == pytest.approx(matmuls, rel=0.03)
    assert clocks_of_turns(tiles, steps, 4, 500, 40_000) > 2 * matmuls
    assert clocks_of_turns(tiles, steps, 2, 500, 6000) > clocks_of_turns(tiles, steps, 6, 500, 6000)

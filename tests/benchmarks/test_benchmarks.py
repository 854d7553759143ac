"""Every benchmark runs at toy size and says what it must. Nothing here asserts a time."""

import functools
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

from fastdpo.benchmarks import harness, lengths, peers, training
from fastdpo.benchmarks.head import cases, rows
from fastdpo.benchmarks.head import compare as head
from fastdpo.cli import main as command
from fastdpo.head.impl import sparsity
from tests.helpers import forks

ROOT = Path(__file__).parents[2]
PROVENANCE = {"machine", "fastdpo", "torch", "transformers", "triton", "trl", "liger-kernel", "cut-cross-entropy"}
PROVENANCE |= {"commit", "date"}
QUICK = ["--smoke", "--peers", "PyTorch", "PyTorch, chunked", "TRL", "TRL, all statistics"]
"""The peers that need no compiler."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where results go that have no --out


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--frozen"], ["--inputs", "flat", "--dtype=bfloat16"]], ids=" ".join)
def test_head(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "head.jsonl"
    head.main([*QUICK, "--out", str(out), *flags])

    printed = capsys.readouterr().out.splitlines()
    titles = next(i for i, line in enumerate(printed) if "vs TRL" in line)
    found = lines_of(out)
    names = [row["impl"] for row in found]
    backwards = ["exact", "auto", "sparse"] if "--dtype=bfloat16" in flags else ["exact", "sparse"]
    assert names == [*(f"fastdpo torch, {b}" for b in backwards), *QUICK[2:]]
    assert [line.strip().split("  ")[0] for line in printed[titles + 1 :]] == names
    assert ("flat rows" in printed[titles - 1], "frozen head" in printed[titles - 1]) == (
        "flat" in flags,
        "--frozen" in flags,
    )

    for row in found:
        assert len(row["times_ms"]) == len(row["forward"]["times_ms"]) == 2
        assert row["peak_mib"] >= 0
        assert set(row["provenance"]) == PROVENANCE
        assert row["spread"] == pytest.approx((max(row["times_ms"]) - min(row["times_ms"])) / row["ms"])
        assert row["errors"]["logps"] < 0.1
        assert row["errors"]["responses"] < 16 * 0.1
        assert row["errors"]["dhidden"] < 0.05
        assert (row["errors"]["dweight"] is None) == ("--frozen" in flags)
        assert (row["density"] is None) == (row["backward"] in (None, "exact"))
        assert row["forward"]["tflops"] == pytest.approx(2e-9 * 32 * 16 * 500 / row["forward"]["ms"])
    trl = next(row for row in found if row["impl"] == "TRL")
    assert trl["ratio_to_trl"] == trl["forward"]["ratio_to_trl"] == 1


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let importing them fail, whether they are installed or not, and whatever of them was imported before."""
    for package in packages:
        for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, package, None)


def test_head_without_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide(monkeypatch, "trl", "liger_kernel", "cut_cross_entropy")
    theirs = [name for name in peers.PEERS if "PyTorch" not in name]
    head.main(["--smoke", "--peers", *theirs])
    printed = capsys.readouterr().out
    for name in theirs:
        assert (
            f"left out: {name}: {peers.PEERS[name].package} is not installed: pip install 'fastdpo[bench]'" in printed
        )
    assert "fastdpo torch, exact" in printed


@pytest.mark.parametrize("which", ["head", "training"])
def test_without_trl_an_error_comes_first(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "trl")
    with pytest.raises(SystemExit, match="1"):
        command(["bench", which])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastdpo: fastdpo bench {which} compares with TRL, which is not installed: pip install")
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("0 active drivers\nand more")

    monkeypatch.setitem(peers.PEERS, "CCE", peers.Peer(lambda: fails))
    monkeypatch.setitem(peers.PEERS, "PyTorch, compiled", peers.Peer(lambda: fails, whole_logits=True))
    monkeypatch.setattr(head, "free_bytes", lambda: 32 * 500 * 4 * 4 - 1)
    command(["bench", "head", "--smoke", "--out", "head.jsonl", "--peers", "CCE", "PyTorch, compiled", "TRL"])
    printed = capsys.readouterr().out
    assert "left out: CCE: RuntimeError: 0 active drivers\n" in printed
    left_out = {row["impl"]: row["left_out"] for row in lines_of(tmp_path / "head.jsonl") if "left_out" in row}
    assert left_out == {
        "CCE": "RuntimeError: 0 active drivers",
        "PyTorch, compiled": "its logits need 0.0 GiB, and 0.0 GiB are free",
    }
    assert {"TRL", "fastdpo torch, exact"} <= {row["impl"] for row in lines_of(tmp_path / "head.jsonl") if "ms" in row}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by torch.compile
def test_all_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one computes what float64 does, or says why it can't; Liger's loss of DPO has no log-probs of tokens."""
    pytest.importorskip("trl")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes a minute
    head.main(["--rows=34", "--hidden=24", "--vocab=300", "--repetitions=1", "--out", "head.jsonl"])
    found = {row["impl"]: row for row in lines_of(tmp_path / "head.jsonl")}
    assert set(peers.PEERS) <= set(found)
    eager = found["PyTorch"]["errors"]
    for name, row in found.items():
        if "left_out" not in row:
            assert (row["errors"]["logps"] is None) == (name == "Liger DPO")
            for gradient in ("dhidden", "dweight"):
                assert row["errors"][gradient] < 100 * eager[gradient]  # a wrong call is off by far more


def test_the_upstream_gradient_is_that_of_the_loss() -> None:
    case = cases.Case(24, 8, 40, "float32")
    inputs = rows.make_inputs(case)
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logps = (hidden @ weight.T).log_softmax(-1)[range(24), inputs.targets]
    half = logps.view(2, 12).sum(1)
    (wanted,) = torch.autograd.grad(-torch.sigmoid(0.1 * (half[0] - half[1])).log(), logps, retain_graph=True)
    assert case.pairs == 1
    torch.testing.assert_close(inputs.dlogps.double(), wanted, rtol=1e-6, atol=0)
    exact = rows.exact_results(inputs)
    torch.testing.assert_close(exact.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), inputs.dlogps.double())
    torch.testing.assert_close(exact.dhidden, dhidden[exact.rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact.dweight, dweight[exact.entries], rtol=1e-9, atol=1e-12)


def test_rows_of_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = training.make_model("toy", "float32", seed=5), str(tmp_path / "model")
    model.save_pretrained(folder)
    lengths.tokenizer(200).save_pretrained(folder)
    case = head.one_case(head.parse(["--inputs", folder]))
    assert (case.D, case.V, case.inputs) == (32, 200, folder)
    hidden, weight, targets = rows.model_rows(folder, 300)
    assert (hidden.shape, weight.shape, targets.shape) == ((300, 32), (200, 32), (300,))
    text = torch.cat([targets.new_tensor([1]), targets])[:128]  # row i predicts target i; the text begins unknown
    logits = model(text.unsqueeze(0)).logits[0]
    torch.testing.assert_close((hidden @ weight.T)[:128], logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="1"):
        command(["bench", "head", "--peers", "PyTorch", "--inputs", str(tmp_path / "none")])
    line = capsys.readouterr().err.splitlines()[-1]  # below the progress bars of saving
    assert line.startswith(f"fastdpo: --inputs: '{tmp_path / 'none'}'")


def test_variants_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    found = harness.measure({name: lambda name=name: calls.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"  # a warm-up and the memory come before the times
    assert {name: len(measured.times) for name, measured in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_shapes_are_divided_until_they_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for D, V in cases.MODELS.values():
        by = cases.divisor(D, V)
        assert cases.ROWS * D * V / by**3 <= 2 * cases.WORK < cases.ROWS * D * V / (by / 2) ** 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**9)
    monkeypatch.setattr(cases.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}.get)
    D, V = cases.MODELS["qwen3-0.6b"]
    by = cases.divisor(D, V)
    assert cases.BYTES * D * V / by**2 <= 2**29 < cases.BYTES * D * V / (by / 2) ** 2
    assert cases.shape_of("qwen3-0.6b") == (cases.ROWS // by, D // by, V // by)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["head", "--rows", "33"], "--rows 33: half of the rows are those of chosen responses"),
        (["head", "--vocab", "0"], "--hidden, --vocab and --repetitions must be positive, got 0"),
        (["head", "--model", "llama-9"], "got 'llama-9'; did you mean 'llama-3-8b'?"),
        (["head", "128"], "bench head: expected an option, got '128'"),
        (["head", "--repetition=3"], "unknown option --repetition; did you mean '--repetitions'?"),
        (["head", "--cases=models", "--dtype=float32"], "--cases has its own settings in place of --dtype; leave out"),
        (
            ["head", "--model", "gpt2", "--rows", "64", "--vocab", "9"],
            "--model has its own settings in place of --rows",
        ),
        (["head", "--inputs", "small-lm", "--model", "gpt2"], "--inputs has its own settings in place of --model;"),
        (["training", "--max_length", "long"], "argument --max-length: invalid int value: 'long'"),
        (["head", "--vocab", "1"], "--vocab must be at least 2, got 1"),
        (["head", "--seconds", "nan"], "argument --seconds: must be at least 0, got nan"),
        (["training", "--repetitions", "0"], "--repetitions must be at least 1, got 0"),
        (["training", "--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["training", "--lora-r=-8"], "--lora-r must be at least 0, got -8"),
        (["training", "--seconds=-1"], "argument --seconds: must be at least 0, got -1"),
        (["training", "--cases=cpu", "--steps=9", "--lora-r=4"], "settings in place of --lora-r, --steps; leave out"),
        (["training", "--pairs=9", "--per-prompt=2"], "--pairs 9 must be a multiple of --per-prompt 2"),
        (["training", "--pairs=8", "--per-prompt=4", "--responses=3"], "--responses 3 of a prompt give 3 pairs, fewer"),
        (["training", "--model", ".", "--pairs-file", "none.jsonl"], "--pairs-file: there is no file 'none.jsonl'"),
        (["haed"], "no benchmark 'haed'; did you mean 'head'?: fastdpo bench head|training|report"),
        ([], "name a benchmark: fastdpo bench head|training|report"),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(["bench", *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdpo: ")
    assert "fastdpo" not in line.removeprefix("fastdpo: ").partition(": ")[0]
    assert message in line


@pytest.mark.parametrize(
    "words", [["head", "--peers"], ["training", "--model", "toy", "--variants", "fastdpo"]], ids=str
)
def test_results_that_cannot_be_written_show_before_measuring(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="1"):
        command(["bench", *words, "--out", str(tmp_path / "file" / "rows.jsonl")])
    ended = capsys.readouterr()
    assert str(tmp_path / "file") in ended.err
    assert "results:" not in ended.out


def test_our_own_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, backward: str, **__: Any) -> Any:
        assert backward == "exact"
        return torch.zeros(32, requires_grad=True)  # not a function of hidden

    monkeypatch.setattr(head, "linear_logprobs", fails)
    with pytest.raises(SystemExit, match="4"):
        head.main(["--smoke", "--peers"])


def test_a_case_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head.jsonl"
    call = ["--cases", "smoke", "--repetitions", "1", "--out", str(out), "--peers", "PyTorch"]
    first, second = cases.case_lists()["smoke"]
    listed = [first]
    monkeypatch.setattr(head, "case_lists", lambda: {"smoke": listed})
    head.main(call)
    before = out.read_text()

    listed.append(second)
    with pytest.raises(SystemExit, match="5"):
        head.main([*call, "--seconds", "0"])
    assert out.read_text() == before
    head.main(call)
    assert f"{first}: measured before" in capsys.readouterr().out
    assert out.read_text().startswith(before)
    added = [json.loads(line) for line in out.read_text()[len(before) :].splitlines()]
    assert added
    assert all(second.key.items() <= row.items() for row in added)

    out.write_text(before.replace('"machine": "', '"machine": "another '))
    listed.remove(second)
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
        assert all(row["split_ms"][phase] > 0 for phase in ("body", "head", "rest"))
        assert (row["split_ms"]["reference"] > 0) == ("cached reference" not in row["impl"])
        assert sum(row["split_ms"].values()) * case.steps == pytest.approx(row["ms"])
        # all of them compute the same: on the first step's rows, with two models that differ
        assert row["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
    assert abs(rows[0]["loss"] - 0.6931) > 1e-3

    before = out.read_text()
    training.main(call)
    assert f"{case}: measured before" in capsys.readouterr().out
    assert out.read_text() == before


def test_a_token_budget_is_compared_by_pairs() -> None:
    """fastdpo's batches hold other pairs than TRL's, and both go once over the same rows."""
    case = training.Case("toy", "toy", pairs=2, steps=4, max_length=32, tokens=160)
    ours, trl = (training.turn(case, training.VARIANTS[name]) for name in ("fastdpo, no graphs", "TRL"))
    assert (trl.steps, trl.pairs) == (4, 8)
    assert 1 <= ours.steps < trl.steps
    assert 2 <= ours.pairs <= 10 - 2  # the first batch does not count, and holds more than TRL's
    [row, _] = training.run(case, {name: training.VARIANTS[name] for name in ("fastdpo, no graphs", "TRL")}, 1)
    assert row["pairs_per_second"] == pytest.approx(1e3 * ours.pairs / row["ms"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its tokenizer, and a file of pairs."""
    made = tmp_path_factory.mktemp("model")
    training.make_model("toy", "float32", 0).save_pretrained(made)
    lengths.tokenizer(200).save_pretrained(made)
    rows = lengths.pairs("toy", 7, 200, 32)
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.parametrize("options", [[], ["--lora-r", "2"]], ids=["full", "LoRA"])
def test_training_a_real_model(options: list[str], folder: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out.jsonl", ["fastdpo", "fastdpo, cached reference, checkpointing auto", "TRL"]
    call = ["--model", str(folder), "--pairs-file", str(folder / "pairs.jsonl"), "--pairs", "2", "--steps", "2"]
    training.main(
        [*call, "--max-length", "32", "--repetitions", "1", "--variants", *names, "--out", str(out), *options]
    )
    rows = lines_of(out)
    assert [row["impl"] for row in rows] == names
    for row in rows:
        assert (row["model"], row["lengths"]) == (folder.name, "pairs")
        assert ("lora_r" in row) == bool(options)
        # of the second step, because a policy that is its own reference begins with ln 2
        assert row["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-3)
    assert rows[0]["loss"] != pytest.approx(0.693147, abs=1e-6)
    with pytest.raises(ValueError, match="has 7 rows, and 8 are needed: choose fewer --steps or --pairs"):
        training.rows(training.Case(str(folder), str(folder / "pairs.jsonl"), pairs=2, steps=3))


@pytest.mark.parametrize(
    "call", [["--model", "lama-20m"], ["--model", "{folder}"], ["--pairs-file", "{folder}/pairs.jsonl"]], ids=" ".join
)
def test_a_model_and_its_data_go_together(call: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(["bench", "training", *(word.format(folder=folder) for word in call)])
    assert "--model must be one of toy, llama-20m" in capsys.readouterr().err


def test_training_without_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide(monkeypatch, "trl")
    call = ["--model", "toy", "--lengths", "toy", "--pairs", "1", "--steps", "1", "--max-length", "32"]
    training.main([*call, "--repetitions", "1", "--variants", "fastdpo", "TRL"])
    printed = capsys.readouterr().out
    assert "left out: TRL: ModuleNotFoundError" in printed
    assert "│ fastdpo " in printed


def test_our_own_failure_in_training_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such layout")

    monkeypatch.setitem(training.VARIANTS, "fastdpo, no sharing", fails)
    with pytest.raises(SystemExit, match="4"):
        training.main(["--model", "toy", "--lengths", "toy", "--repetitions", "1", "--variants", "fastdpo, no sharing"])
    assert capsys.readouterr().out.splitlines()[-1] == "no variant could be measured"


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


@pytest.mark.parametrize("name", lengths.PUBLISHED)
def test_lengths_have_the_published_medians(name: str) -> None:
    whole, ratio = lengths.PUBLISHED[name]
    assert lengths.LENGTHS[name].prompt == pytest.approx(whole * ratio / (ratio + 2), abs=1)
    assert lengths.LENGTHS[name].response == pytest.approx(whole / (ratio + 2), abs=1)


HANG = """
import os, sys
from threading import Timer
from time import sleep
from fastdpo.benchmarks import peers
from fastdpo.benchmarks.head import compare as head
head.Timer = lambda seconds, fatal, args: Timer(0.5 if args[0] == "CCE" else seconds, fatal, args)
peers.PEERS["CCE"] = peers.Peer(lambda: lambda *_: sleep(60))
for _ in range(2):  # each in a fork, for the first ends its process
    pid = os.fork()
    if not pid:
        head.main(["--smoke", "--out", sys.argv[1], "--peers", "PyTorch", "CCE"])
        sys.exit()
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_what_never_returns_is_left_out_the_next_time(tmp_path: Path) -> None:
    out = tmp_path / "head.jsonl"
    exit_code = forks.python("-c", HANG, str(out), log=tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert exit_code == 0, said
    hung, code, again = said.partition("exit code 3\n")
    assert code, said
    assert "left out from now on: CCE: did not return within 180 s" in hung
    assert again.endswith("exit code 0\n"), said
    measured = ["fastdpo torch, exact", "fastdpo torch, sparse", "PyTorch"]
    assert [row["impl"] for row in lines_of(out)] == ["CCE", *measured, "CCE"]
    assert lines_of(out)[-1]["left_out"] == "did not return within 180 s"


def test_variants_do_not_see_each_others_densities() -> None:
    def remembers(*_: Any) -> Any:
        sparsity._densities["key"] = []  # type: ignore[index]
        return len(sparsity._densities)

    one, other = head.remembering(remembers), head.remembering(lambda *_: len(sparsity._densities))  # type: ignore[arg-type]
    calls: list[Any] = [fn(*[torch.zeros(1)] * 3) for fn in (one, other, one, other)]
    assert calls == [1, 0, 1, 0]


def test_matmul_is_timed_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, made, own = rows.make_inputs(cases.Case(12, 16, 50)), [], torch.mm
    monkeypatch.setattr(head, "MATMUL_ROWS", 5)
    monkeypatch.setattr(head.torch, "mm", lambda *given, out: made.append(own(*given, out=out).clone()))
    head.matmul(inputs)
    assert [len(block) for block in made] == [5, 5, 2]
    torch.testing.assert_close(torch.cat(made), inputs.hidden @ inputs.weight.T)


NOTING = """#!/usr/bin/env bash
printf '%s\\0' "$@" $'\\1' >>"$CALLS"
echo Python was called
"""


@pytest.mark.slow
def test_gpu_suite(tmp_path: Path) -> None:
    """The script runs with a Python that only notes its calls; these are then made in processes that cost less."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(NOTING)
    python.chmod(0o755)
    environment = os.environ | {"SUITE_SIZE": "smoke", "PYTHON": str(python), "CALLS": str(calls)}
    environment |= {"BUDGET": "5000"}  # a busy machine is no reason to leave a part out
    call = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), "out"]
    first = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    logs = [tmp_path / "out" / f"{name}.log" for name in ("probe", "head", "training", "tests")]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"status", *(log.name for log in logs)}
    assert {log.read_text() for log in logs} == {"Python was called\n"}
    commands = [each.split("\0")[:-1] for each in calls.read_text().split("\1\0")[:-1]]
    for words, log in zip(commands, logs, strict=True):
        assert forks.python(*words, log=log) == 0, log.read_text()
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl")} == {"head.jsonl", "training.jsonl"}
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

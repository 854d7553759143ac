"""`fastdpo bench report`, on made-up measurements."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdpo.benchmarks import report
from fastdpo.cli import main

WHERE = {"machine": "a machine, 3 threads", "torch": "2.99", "trl": "9.1", "date": "2030-01-02"}


def head_row(impl: str, ms: float, **more: Any) -> dict[str, Any]:
    shape = {"N": 64, "D": 32, "V": 1000}
    errors = {"logps": 3e-5, "responses": 1e-4, "dhidden": 2e-3, "dweight": None}
    return {
        "op": "linear_logprobs", "impl": impl, "backward": None, "model": "gpt2", "shape": shape, "dtype": "float32",
        "frozen": True, "inputs": "peaked", "ms": ms, "spread": 0.25, "ratio_to_trl": ms / 40, "peak_mib": 17.4,
        "errors": errors, "provenance": WHERE,
    } | more  # fmt: skip


def step_row(impl: str, ms: float, loss: float) -> dict[str, Any]:
    return {
        "impl": impl, "lengths": "tldr", "ms": ms, "steps": 2, "ratio_to_trl": ms / 900, "peak_mib": 100 + ms,
        "pairs_per_second": 1e3 * 8 / ms, "loss": loss, "provenance": WHERE,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    heads = [
        head_row("fastdpo torch, exact", 99, backward="exact"),
        head_row("fastdpo torch, exact", 12, backward="exact"),  # the newest row of a variant is shown
        head_row("fastdpo torch, sparse", 4, backward="sparse"),  # no default, so it is not what the table compares
        head_row("TRL", 40),
        {"op": "linear_logprobs", "impl": "CCE", "fatal": "did not return", "provenance": WHERE},
        {key: value for key, value in head_row("CCE", 1).items() if key not in ("ms", "errors", "peak_mib")}
        | {"left_out": "did not return"},
    ]
    (tmp_path / "head.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heads))
    steps = [step_row("fastdpo", 300, 0.5), step_row("TRL", 900, 0.5002)]
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return tmp_path


def test_a_report_without_trl_has_times(tmp_path: Path) -> None:
    alone = {"ratio_to_trl": None, "provenance": WHERE | {"trl": "none"}}
    row = head_row("fastdpo torch, exact", 12.345, backward="exact") | alone
    (tmp_path / "head.jsonl").write_text(json.dumps(row) + "\n")
    main(["bench", "report", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| **fastdpo torch, exact** | 12.3 ms | 25% | 17 |" in text
    assert "with PyTorch 2.99, 2030-01-02." in text


def test_a_report_of_own_results(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "report", str(results)])
    text = (results / "report.md").read_text()
    assert text in capsys.readouterr().out
    shape = "gpt2: N=64 D=32 V=1000"
    assert f"| {shape} | peaked | float32 | frozen | 0.30 / 1.00 / - | 25% | 17 / 17 / - | 3e-5 / 3e-5 / - |" in text
    assert "| **fastdpo torch, sparse** | 0.10 | 25% | 17 | - | - | - | 3e-5 | 2.0e-3 |" in text
    assert "are those of fastdpo / TRL / plain PyTorch.\n\n| shape |" in text
    assert "| CCE | did not return |" in text
    assert "| TL;DR | 26.67 | 8.89 | **3.0** | 400 | 1000 | 2e-4 |" in text
    assert "Measured on a machine, 3 threads, with PyTorch 2.99, TRL 9.1, 2030-01-02." in text
    assert {"head.png", "step.png"} <= {path.name for path in results.iterdir()}
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)


def test_a_report_of_nothing_is_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results)
    for words, message in (
        ([], "bench-results"),
        (["nowhere"], "'nowhere' has no results; measure first: fastdpo bench head"),
        ([str(results), "--docs"], "--docs renews the pages of a clone"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["bench", "report", *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_the_committed_results_fill_every_table() -> None:
    for _, tables, _ in report.PARTS.values():
        for table in tables.values():
            assert "Measured on" in table(report.RESULTS) or "\n| fastdpo, no packing | " in table(report.RESULTS)


def test_cases_and_machines_are_kept_apart(results: Path) -> None:
    """Rows of TRL that another case or machine has measured are not what fastdpo's are compared with."""
    other = {"provenance": WHERE | {"machine": "another"}}
    steps = [
        step_row("fastdpo", 300, 0.5) | {"max_length": 512},
        step_row("fastdpo", 100, 0.4) | {"max_length": 64, "ratio_to_trl": None},
        step_row("TRL", 900, 0.5002) | {"max_length": 512},
        step_row("fastdpo", 50, 0.5) | {"max_length": 512, "lengths": "helpsteer"} | other,
    ]
    (results / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    with (results / "head.jsonl").open("a") as file:
        file.write(json.dumps(head_row("TRL", 7) | other) + "\n")
    lines = report.steps(results).splitlines()
    assert lines[2:5] == [
        "| TL;DR, at most 512 tokens, a machine, 3 threads | 26.67 | 8.89 | **3.0** | 400 | 1000 | 2e-4 |",
        "| TL;DR, at most 64 tokens, a machine, 3 threads | 80.00 | - | - | 200 | - | - |",
        "| HelpSteer, at most 512 tokens, another | 160.00 | - | - | 150 | - | - |",
    ]
    text = report.report(results, results)
    assert "Lengths like TL;DR, at most 512 tokens, a machine, 3 threads.\n\n| variant " in text
    assert "| gpt2: N=64 D=32 V=1000, a machine, 3 threads | peaked | float32 | frozen | 0.30 / 1.00 / - |" in text


def test_a_cut_row_and_an_empty_file_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "head.jsonl").unlink()
    file = results / "training.jsonl"
    with file.open("a") as opened:
        opened.write('{"impl": "fastd')
    for message in (f"line 3 of {file} is not a row of results; remove it: ", f"'{results}' has no results"):
        with pytest.raises(SystemExit, match="1"):
            main(["bench", "report", str(results)])
        assert message in capsys.readouterr().err.splitlines()[0]
        file.write_text("")

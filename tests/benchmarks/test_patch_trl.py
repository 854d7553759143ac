"""The benchmark of patch_trl() runs at toy size and says what it must. Nothing here asserts a time."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import patch_trl

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")


def test_both_sides_compute_the_same_and_become_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "patch_trl.jsonl"
    call = ["--vocab", "60", "--max-length", "16", "--repetitions", "2", "--trainers", "DPO", "SFT"]
    patch_trl.main([*call, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["trainer"], row["variant"]) for row in rows] == [
        (trainer, variant) for trainer in ("DPO", "SFT") for variant in ("TRL", "TRL with patch_trl")
    ]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert theirs["ratio"] == 1
        assert len(ours["times_ms"]) == len(theirs["times_ms"]) == 2
        assert theirs["grad_norm"] > 1e-3
    capsys.readouterr()
    patch_trl.main(["--table", str(out)])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.count("|") == header.count("|") for line in lines)


def test_sides_that_disagree_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter((torch.tensor(1.0), torch.tensor(1.5)))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: next(norms))
    with pytest.raises(SystemExit, match=r"SFT: the gradient's norm is 1.0 without patch_trl and 1.5 with it"):
        patch_trl.compare("SFT", 60, 16, 1)

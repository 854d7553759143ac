"""Every benchmark runs at toy size and says what it must. Nothing here asserts a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import head


@pytest.mark.parametrize("flags", [[], ["--frozen"], ["--flat", "--dtype", "bfloat16"]], ids=" ".join)
def test_head(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "head.jsonl"
    head.main(["--smoke", "--out", str(out), *flags])

    _, titles, *lines = capsys.readouterr().out.splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    names = [row["impl"] for row in rows]
    assert {"fastdpo torch", "TRL", "TRL, all statistics", "PyTorch"} <= set(names)
    assert "vs TRL" in titles
    assert [line.strip().split("  ")[0] for line in lines] == names

    for row in rows:
        assert len(row["times_ms"]) == 2
        assert row["peak_mib"] >= 0
        assert {"machine", "torch", "triton", "trl", "commit", "date"} == set(row["provenance"])
        assert row["errors"]["logps"] < 0.1
        assert row["errors"]["dhidden"] < 0.05
        assert (row["errors"]["dweight"] is None) == ("--frozen" in flags)
    assert next(row for row in rows if row["impl"] == "TRL")["ratio_to_trl"] == 1

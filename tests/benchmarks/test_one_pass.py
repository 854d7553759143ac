"""benchmarks.studies.one_pass: all ways compute the same, and the page has the table of the numbers."""

import pytest

pytest.importorskip("peft")

from benchmarks.studies import one_pass


def test_all_ways_compute_the_same() -> None:
    """Which `measure` checks; one pass has fewer operations, and the reference's matmuls cost what they cost."""
    rows = {row["way"]: row for row in one_pass.measure("tiny", 12, rounds=1)}
    assert list(rows) == ["two passes", "masked", "joint", "precomputed"]
    operations, flops = ({way: row[key] for way, row in rows.items()} for key in ("operations", "flops"))
    assert operations["precomputed"] < operations["masked"] < operations["joint"] < operations["two passes"]
    assert flops["precomputed"] < flops["two passes"] < flops["masked"]
    assert flops["joint"] == pytest.approx(flops["two passes"], rel=0.05)

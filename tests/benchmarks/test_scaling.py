"""The tables of docs/scaling.md are what the commands beside them compute."""

import json

import pytest

from benchmarks.studies import balance, scaling


@pytest.mark.slow
def test_the_traces_in_the_repository_are_those_of_the_code() -> None:
    kept = json.loads(scaling.TRACES.read_text())["8B"]["LoRA"]["sharded"]
    assert scaling.traced("8B", "LoRA", sharded=True) == pytest.approx(kept, rel=1e-3), (
        "run python -m benchmarks.studies.scaling"
    )


def test_shares_lost_are_those_of_the_batches() -> None:
    sizes = balance.sizes_of("tldr", pairs=640)
    kept = json.loads(balance.NUMBERS.read_text())["tldr"]
    for way in balance.WAYS:
        rows = balance.rows_of(way, sizes, 2)
        waits = sum(max(each) - sum(each) / 2 for each in rows.tolist()) / sum(max(each) for each in rows.tolist())
        assert balance.lost(rows) == pytest.approx(waits)
        assert balance.lost(rows) < 0.15
    for n in map(str, balance.PROCESSES):
        assert kept["budget"][n]["micro_batches"] < 0.1 * kept["random"][n]["micro_batches"]

"""The soak's verdict, and a soak too short for one."""

import importlib

import pytest

soak = importlib.import_module("tests.soak.__main__")


def rounds(mib: list[float], files: list[int]) -> list[object]:
    return [soak.Round("dataset", 20.0 * i, *each) for i, each in enumerate(zip(mib, files, strict=True))]


def test_a_leak_is_told_from_a_peak() -> None:
    flat = [500.0, 700, 800, 810, 800, 900, 800, 805, 800, 804]
    memory, files = soak.growth(rounds(flat, [9] * 10))
    assert memory < soak.ALLOWED
    assert files == 0
    leak = [800.0 + 3 * i for i in range(40)]
    memory, files = soak.growth(rounds(leak, [9 + i // 20 for i in range(40)]))
    assert memory > soak.ALLOWED
    assert files == 1


@pytest.mark.slow
def test_every_kind_of_round_runs_and_closes_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = soak.soak(0.0) + soak.soak(0.0)
    assert [each.kind for each in found] == [*soak.KINDS, *soak.KINDS]
    assert found[-1].files <= found[len(soak.KINDS) - 1].files
    assert "| 3 | adapter |" in capsys.readouterr().out

"""The device check of the Gluon forward: what it finds, with the interpreter's forward in the place of both kernels."""

from typing import Any

import pytest
import torch

from benchmarks.studies import gluon_forward
from fastdpo.kernels.linear_logprobs_forward import linear_logprobs_forward
from fastdpo.kernels.row_lists import TILE

CASE = gluon_forward.Case(5, 16, 150, softcap=5.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_hopper_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert gluon_forward.main([]) == 0
    assert "compute capability 9.0" in capsys.readouterr().out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_right_results_pass(softcap: float | None) -> None:
    case = CASE._replace(softcap=softcap, scale=-0.7)
    assert gluon_forward.problem(linear_logprobs_forward, linear_logprobs_forward, case, TILE) == ""


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("others", lambda x, call: x + 1e-4, "others: off by"),
        ("tile_masses", lambda x, call: x.flip(1), "masses: off by"),
        ("target_logits", lambda x, call: x.nan_to_num(neginf=0.0), "-inf in wrong places"),
        ("others", lambda x, call: x + call * 1e-6, "bits differ"),
    ],
)
def test_wrong_results_are_found(field: str, change: Any, message: str) -> None:
    calls: list[None] = []

    def launch(*args: Any, **options: Any) -> Any:
        calls.append(None)
        result = linear_logprobs_forward(*args, **options)
        return result._replace(**{field: change(getattr(result, field), len(calls))})

    assert message in gluon_forward.problem(launch, linear_logprobs_forward, CASE, TILE)


def test_a_deadlock_ends_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Never:
        def query(self) -> bool:
            return False

    def exit_(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(gluon_forward, "PATIENCE", 0)
    monkeypatch.setattr(gluon_forward.os, "_exit", exit_)
    with pytest.raises(SystemExit, match="4"):
        gluon_forward.wait(Never(), CASE)
    assert "probably a deadlock" in capsys.readouterr().out

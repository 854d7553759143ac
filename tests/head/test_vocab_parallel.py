"""A vocabulary shared by ranks: as one process computes it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.head.linear_logprobs import linear_logprobs
from tests.helpers import forks, vocab_ranks
from tests.helpers.vocab_ranks import D, N, R, V, bounds

CASES: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "transform": {"dtype": torch.float64, "logit_scale": 1.7, "softcap": 5.0, "temperature": 0.6},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "frozen": {"dtype": torch.float64, "frozen": True},
    "sparse": {"dtype": torch.float64, "backward": "sparse"},
}


def make_inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "hidden": 2 * torch.randn(N, D),
        "weight": torch.randn(V, D) / 4,
        "targets": torch.randint(V, (N,)),
        "bias": torch.randn(V),
        "hidden2": torch.randn(N, R),
        "weight2": torch.randn(V, R),
        "dlogps": torch.randn(N),
    }


RANKS = 3  # the first, one in between, the last


@pytest.fixture(scope="module")
def ranks(once: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank computed."""
    out = Path(once("vocab-ranks", lambda: str(run_ranks(tmp_path_factory.mktemp("ranks")))))
    return [torch.load(out / f"{rank}.pt") for rank in range(RANKS)]


def run_ranks(out: Path) -> Path:
    torch.save({**make_inputs(), "cases": CASES}, out / "inputs.pt")
    log = out / "log"
    assert forks.run_ranks(vocab_ranks.main, out, log=log, processes=RANKS) == [0] * RANKS, log.read_text()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_process_does(case: str, ranks: list[dict[str, Any]]) -> None:
    inputs, options = make_inputs(), dict(CASES[case])
    dtype, frozen = options.pop("dtype"), options.pop("frozen", False)
    leaves = [inputs[k].to(dtype).requires_grad_() for k in ("hidden", "weight", "bias", "hidden2", "weight2")]
    hidden, weight, bias, hidden2, weight2 = leaves
    options |= {"backward": "exact"}
    logps = linear_logprobs(hidden, weight, inputs["targets"], bias, low_rank=(hidden2, weight2), **options)
    grads = torch.autograd.grad(logps, leaves, inputs["dlogps"].to(logps.dtype))
    tolerance = {"sparse": 1e-2}.get(case, {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype])
    for rank, (theirs, dhidden, dweight, dbias, dhidden2, dweight2) in enumerate(r[case] for r in ranks):
        part = slice(*bounds(rank, len(ranks)))
        torch.testing.assert_close(theirs, logps.detach(), rtol=min(tolerance, 2e-5), atol=1e-6)
        expected = [grads[0], grads[1][part], grads[2][part], grads[3], grads[4][part]]
        for actual, true in zip((dhidden, dweight, dbias, dhidden2, dweight2), expected, strict=True):
            assert actual is not None or frozen
            assert actual is None or (actual - true).norm() <= tolerance * true.norm()
            assert case != "sparse" or (actual - true).norm() > 1e-6 * true.norm(), "no cell was skipped"
        assert torch.equal(dhidden, ranks[0][case][1]), "hidden's gradient differs between ranks"


@pytest.mark.slow
def test_the_whole_vocabulary_bounds_the_targets(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "targets must be in [0, V) = [0, 203)" in results["refusal"]


def test_a_shard_has_room_for_its_weight() -> None:
    with pytest.raises(ValueError, match="shard must leave room for the 203 rows of weight, got start 1 of 203"):
        linear_logprobs(torch.zeros(N, D), torch.zeros(V, D), torch.zeros(N).long(), shard=(None, 1, V))  # type: ignore[arg-type]

"""Whatever runs the model, its gradients are the same: DDP, FSDP2, LoRA, checkpointing, torch.compile."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.scoring_forward import patch_forward
from tests.helpers import parallel_ranks
from tests.helpers.forks import run_ranks
from tests.helpers.parallel_ranks import CASES
from tests.helpers.tiny import PAIRS, assert_same_gradients, gradients, make_model, make_pairs, stock, stock_logps


@pytest.fixture(scope="module")
def errors(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of all cases, by two processes that run them one after the other."""
    return once("parallel", lambda: run_cases(tmp_path_factory.mktemp("parallel")))


def run_cases(folder: Path) -> Any:
    log = folder / "log"
    assert run_ranks(parallel_ranks.main, folder / "errors.json", log=log) == [0, 0], log.read_text()
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_have_the_gradients_of_one(case: str, errors: Any) -> None:
    assert errors[case]
    assert max(errors[case].values()) <= 1e-5, errors[case]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, to trace one
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # after a break
@pytest.mark.parametrize(
    ("family", "options", "fullgraph", "backend"),
    [
        ("gemma3-window", {}, True, "aot_eager"),
        ("gemma2", {"attn_logit_softcapping": 2.0, "num_hidden_layers": 1}, False, "eager"),
    ],
    ids=["gemma3-window", "gemma2-softcap"],
)
def test_a_compiled_decoder_has_the_same_gradients(
    family: str, options: dict[str, Any], fullgraph: bool, backend: str
) -> None:
    """Without a break, but for soft-caps, whose blocks are as many as the lengths want."""
    torch._dynamo.reset()
    model = make_model(family, **options)
    reference = stock(model)
    patch_forward(model)
    model.model.compile(backend=backend, fullgraph=fullgraph)
    for pairs in (PAIRS, make_pairs([(30, 0, 9, 5), (3, 0, 4, 5)], seed=1)):
        logps, expected = model(**shared_prefix_batch(pairs)).logps, stock_logps(reference, pairs)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, logps), gradients(reference, expected))

"""The head's promises on the tiles that sm_90 runs, in Triton's interpreter: other tests shrink every tile to 16."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies.rows import make_rows
from fastdpo import linear_logprobs
from fastdpo.head import eager
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import linear_logprobs_forward as forward_kernel
from fastdpo.kernels import sparse_dhidden, sparse_dlogits, sparse_dweight
from fastdpo.kernels.linear_logprobs_forward_tma import aligned
from fastdpo.kernels.logits_tile import FALLBACK
from tests.helpers.head_inputs import relative_error

SHAPES = [
    pytest.param((130, 72, 705), id="ragged"),
    pytest.param((65, 128, 1025), id="one-past-the-tiles"),
]


@pytest.fixture(autouse=True)
def tiles_of_sm_90(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cuda":
        return  # its own

    def default_config(x: Tensor, configs: Any, fallback: Any = FALLBACK) -> Any:
        return configs.get(((9, 0), x.element_size()), fallback[x.element_size()])

    for module in (forward_kernel, backward_kernel, sparse_dhidden, sparse_dlogits, sparse_dweight):
        monkeypatch.setattr(module, "default_config", default_config)
        monkeypatch.setattr(module, "loads_vectors", lambda x: True)
    monkeypatch.setattr(forward_kernel, "fits_tma", lambda hidden, weight: aligned(hidden) and aligned(weight))
    monkeypatch.setattr(forward_kernel, "processors", lambda x: 3)


def results(rows: Any, backward: Any, workspace: int) -> tuple[Tensor, ...]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (rows.hidden, rows.weight))
    options: Any = {"impl": "triton", "backward": backward, "workspace_bytes": workspace}
    logps = linear_logprobs(hidden, weight, rows.targets, **options)
    return (logps.detach(), *torch.autograd.grad(logps, (hidden, weight), rows.dlogps))


def reference(rows: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (rows.hidden, rows.weight))
    logps, _, _ = eager.linear_logprobs(hidden, weight, rows.targets)
    return (logps.detach(), *torch.autograd.grad(logps, (hidden, weight), rows.dlogps.to(dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_promises(shape: tuple[int, int, int], device: torch.device) -> None:
    """Recomputed, kept and sparse: log-probs, gradients and bits."""
    N, D, V = shape
    rows = make_rows("sharp", N, D, V, torch.bfloat16, device)
    exact, rounded = (reference(rows, dtype) for dtype in (torch.float64, torch.bfloat16))
    for backward, workspace in (("exact", 2**20), ("exact", 2**28), ("auto", 2**28), ("sparse", 2**28)):
        logps, dhidden, dweight = first = results(rows, backward, workspace)
        error = logps.double() - exact[0]
        assert error.abs().max() <= 2e-3, backward
        assert error.square().mean().sqrt() <= 5e-4, backward
        assert (logps <= 0).all()
        assert relative_error(dhidden, exact[1]) <= (
            2.5e-3 if backward == "exact" else relative_error(rounded[1], exact[1])
        ), backward
        assert relative_error(dweight, exact[2]) <= (5e-3 if backward == "sparse" else 2.5e-3), backward
        assert all(torch.equal(a, b) for a, b in zip(first, results(rows, backward, workspace), strict=True)), backward

"""How many operations a device is given in a step at a large shape: each costs it 2 to 5 microseconds, however small.

The tensors are on PyTorch's meta device, so nothing is computed: operations are counted as PyTorch dispatches them,
except views and allocations, and launches of kernels are counted where they would happen.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.head.impl import cells
from fastdpo.head.impl import triton as impl
from fastdpo.head.impl.interface import Forward, Grads, Kept, LinearHead, Needs
from fastdpo.head.impl.sparsity import Selection
from fastdpo.kernels import linear_logprobs_backward as backward_kernel
from fastdpo.kernels import row_lists, select_cells, sparse_dhidden, sparse_dlogits, sparse_dweight

N, D, V = 8192, 4096, 128256
FREE = {"empty", "new_empty", "empty_like", "detach", "alias"}
KERNELS = {
    select_cells: ("_mean_square_root_kernel", "_select_cells_kernel", "_density_kernel"),
    row_lists: (
        "_row_lists_kernel",
        "_dense_tiles_kernel",
        "_count_cells_kernel",
        "_skipped_mass_kernel",
        "_cell_means_kernel",
    ),
    sparse_dhidden: ("_sparse_dhidden_kernel", "_sparse_dhidden_blocks_kernel"),
    sparse_dlogits: ("_sparse_dlogits_kernel",),
    sparse_dweight: ("_sparse_dweight_kernel",),
    backward_kernel: ("_linear_logprobs_backward_kernel",),
}


class CountOperations(TorchDispatchMode):
    """Counts what would reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CountOperations:
    counter = CountOperations()

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: counter.counts.update([self.name])

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Launch(name))
        if hasattr(module, "interpreted"):
            monkeypatch.setattr(module, "interpreted", lambda kernel: False)

    def addmm(out: Tensor, *_: Any, **__: Any) -> None:
        counter.counts["addmm"] += 1

    for module in (impl, cells):
        monkeypatch.setattr(module, "addmm", addmm)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    return counter


@pytest.mark.parametrize(
    ("needs", "exact_weight", "most"),
    [
        pytest.param(Needs(hidden=True), True, 50, id="frozen"),
        pytest.param(Needs(hidden=True, weight=True), False, 60, id="sparse"),
    ],
)
def test_a_sparse_step_is_few_operations(needs: Needs, exact_weight: bool, most: int, counter: CountOperations) -> None:
    with torch.device("meta"):
        hidden, weight = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16)
        targets, dtarget = torch.empty(N, dtype=torch.int64), torch.empty(N)
        shares = torch.empty(N, -(-V // impl.TILE), dtype=torch.bfloat16)
        result = Forward(torch.empty(N), torch.empty(N), None, Kept(shares=shares))
    with counter:
        selection = Selection(*select_cells.select_cells(shares, dtarget, 0.005, 2.0**-12), torch.zeros(3))
        impl.backward(
            Grads(dtarget, dtarget), hidden, None, targets, LinearHead(weight), result, needs, selection, exact_weight
        )
        select_cells.mean_density(selection.active, selection.found)
        selection.found.clone()  # as `sparsity.remember` does, which copies to the host
    assert counter.counts["_row_lists_kernel"] == 1
    assert counter.counts["_sparse_dlogits_kernel"] >= 8
    assert counter.counts.total() <= most, counter.counts

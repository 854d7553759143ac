"""The kernels of the sparse backward, one by one, against plain loops over the active cells in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.head.impl.interface import Transform
from fastdpo.kernels import row_lists as row_lists_module
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.logits_tile import Config
from fastdpo.kernels.row_lists import row_lists
from fastdpo.kernels.sparse_dhidden import sparse_dhidden
from fastdpo.kernels.sparse_dlogits import sparse_dlogits
from fastdpo.kernels.sparse_dweight import sparse_dweight
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import LAYOUTS, far_apart

N, D, V, R, TILE = 50, 40, 85, 3, 16  # several tiles of each, the last one smaller
J = -(-V // TILE)
CONFIG = Config(BLOCK_N=16, BLOCK_V=TILE, BLOCK_D=16, num_warps=4, num_stages=2)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_active(rows: int, tiles: int, device: torch.device) -> Tensor:
    """Half of the cells, and a tile with none, one with all, and one with a single row, the last."""
    active = torch.rand(rows, tiles, device=device) < 0.5
    active[:, 0], active[:, 1], active[:, 2] = False, True, False
    active[-1, 2] = True
    return active


def make_lists(active: Tensor) -> tuple[Tensor, Tensor]:
    """The lists, with rows after their ends that are none of theirs."""
    rows, counts = row_lists(active)
    beyond = torch.arange(len(active), device=rows.device) >= counts[:, None]
    return rows.masked_fill(beyond, 0), counts


def cells(active: Tensor, columns: int) -> Tensor:
    """The mask by column."""
    return active.repeat_interleave(TILE, 1)[:, :columns]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(actual: Tensor, same_dtype: Tensor, exact: Tensor, name: str) -> None:
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-13)
    else:
        assert_as_accurate(actual, same_dtype, exact, name)


MASKS = {
    "ragged": lambda x: x,
    "empty": torch.zeros_like,
    "full": torch.ones_like,
    "rows-apart": LAYOUTS["transposed"],
    "part-of-a-larger": lambda x: torch.cat([~x, x, ~x], 1)[:, x.shape[1] : 2 * x.shape[1]],
}


@pytest.mark.parametrize("block", [16, 64], ids=["several-blocks", "one-block"])
@pytest.mark.parametrize("mask", MASKS)
def test_row_lists(mask: str, block: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(row_lists_module, "BLOCK_N", block)
    active = MASKS[mask](make_active(N, J, device))
    rows, counts = row_lists(active)
    assert rows.shape == (J, N)
    assert rows.dtype == counts.dtype == torch.int32
    for j in range(J):
        expected = [n for n in range(N) if active[n, j]]
        assert rows[j, : int(counts[j])].tolist() == expected


@pytest.mark.parametrize("rows", [0, 1])
def test_row_lists_of_few_rows(rows: int, device: torch.device) -> None:
    lists, counts = row_lists(torch.ones(rows, J, dtype=torch.bool, device=device))
    assert lists.tolist() == [list(range(rows))] * J
    assert counts.tolist() == [rows] * J


def dlogits_arguments(dtype: torch.dtype, device: torch.device) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    low_rank = torch.randn(N, R).to(device, dtype), torch.randn(V, R).to(device, dtype)
    hidden, weight, bias = (x.to(device, dtype) for x in (hidden, weight, bias))
    targets = torch.randint(-V, 2 * V, (N,), device=device)
    targets[::2] %= V
    others, dtarget, dothers = torch.randn(3, N, device=device).to(accumulator(dtype))
    return (hidden, weight, targets, bias, others + 4, dtarget, dothers, *Transform.of(0.7, 8.0, 1.3)), low_rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dlogits_has_the_bits_of_the_dense_kernel(dtype: torch.dtype, device: torch.device) -> None:
    """Of all cells with full lists; with others, inactive cells stay as they are."""
    arguments, low_rank = dlogits_arguments(dtype, device)
    dense, full = torch.empty(2, N, V, dtype=dtype, device=device)
    linear_logprobs_backward(dense, *arguments, low_rank=low_rank, config=CONFIG)
    lists = row_lists(torch.ones(N, J, dtype=torch.bool, device=device))
    sparse_dlogits(full, *lists, *arguments, low_rank=low_rank, config=CONFIG)
    assert torch.equal(full, dense)

    active = make_active(N, J, device)
    some = torch.full_like(dense, 7.0)
    sparse_dlogits(some, *make_lists(active), *arguments, low_rank=low_rank, config=CONFIG)
    assert torch.equal(some, dense.where(cells(active, V), 7.0))


def make_products(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Active cells; dlogits with NaN in all others, and with 0; hidden; weight."""
    active = make_active(N, J, device)
    dlogits, hidden, weight = (torch.randn(*shape).to(device, dtype) for shape in ((N, V), (N, D), (V, D)))
    mask = cells(active, V)
    return active, dlogits.where(mask, torch.nan), dlogits.where(mask, 0.0), hidden, weight


@pytest.mark.parametrize("ranges", [None, 1, 7, 12, 60])  # of 50, 8, 5 and 1 rows: 7 x 8 and 12 x 5 pass the end
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dhidden(dtype: torch.dtype, ranges: int | None, device: torch.device) -> None:
    active, poisoned, dlogits, _, weight = make_products(dtype, device)
    acc = accumulator(dtype)
    before = torch.randn(N, D, device=device).to(acc)
    actual = before.clone()
    sparse_dhidden(actual, poisoned, *make_lists(active), weight, CONFIG, ranges)
    exact = before.double() + dlogits.double() @ weight.double()
    check(actual, before + dlogits.to(acc) @ weight.to(acc), exact, "dhidden")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dweight(dtype: torch.dtype, accumulate: bool, device: torch.device) -> None:
    active, poisoned, dlogits, hidden, _ = make_products(dtype, device)
    acc = accumulator(dtype)
    before, bias_before = torch.randn(V, D, device=device).to(acc), torch.randn(V, device=device).to(acc)
    actual, dbias = (x.clone() if accumulate else torch.full_like(x, torch.nan) for x in (before, bias_before))
    sparse_dweight(actual, poisoned, *make_lists(active), hidden, accumulate, CONFIG, dbias)
    start = float(accumulate)
    exact = start * before.double() + dlogits.double().T @ hidden.double()
    check(actual, start * before + dlogits.to(acc).T @ hidden.to(acc), exact, "dweight")
    exact = start * bias_before.double() + dlogits.double().sum(0)
    check(dbias, start * bias_before + dlogits.to(acc).sum(0), exact, "dbias")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_strides_of_the_dense_operand(layout: str, device: torch.device) -> None:
    active, poisoned, dlogits, hidden, weight = make_products(torch.float64, device)
    dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(weight)
    sparse_dhidden(dhidden, poisoned, *make_lists(active), LAYOUTS[layout](weight), CONFIG, 2)
    sparse_dweight(dweight, poisoned, *make_lists(active), LAYOUTS[layout](hidden), False, CONFIG)
    torch.testing.assert_close(dhidden, dlogits @ weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dweight, dlogits.T @ hidden, rtol=1e-12, atol=1e-13)


def test_offsets_past_2_to_the_31(device: torch.device) -> None:
    """In every [N, *] and [V, *] tensor of the three kernels."""
    rows, columns, size = 6, 5, 3
    dlogits, hidden, weight = torch.randn(rows, columns), torch.randn(rows, size), torch.randn(columns, size)
    dlogits, hidden, weight = (x.to(device) for x in (dlogits, hidden, weight))
    active = torch.ones(rows, 1, dtype=torch.bool, device=device)
    active[1] = False
    lists = make_lists(active)
    exact = dlogits.double().where(active, 0.0)

    dhidden = far_apart(torch.zeros(rows, size, device=device))
    sparse_dhidden(dhidden, far_apart(dlogits), *lists, far_apart(weight), CONFIG, 2)
    assert_as_accurate(dhidden, dlogits.where(active, 0.0) @ weight, exact @ weight.double(), "dhidden")
    dweight = far_apart(torch.zeros(columns, size, device=device))
    sparse_dweight(dweight, far_apart(dlogits), *lists, far_apart(hidden), False, CONFIG)
    assert_as_accurate(dweight, dlogits.where(active, 0.0).T @ hidden, exact.T @ hidden.double(), "dweight")

    near = torch.zeros(rows, columns, device=device)
    far = far_apart(near)
    rest = torch.arange(rows, device=device) % columns, None, *torch.randn(3, rows, device=device), *Transform()
    sparse_dlogits(near, *lists, hidden, weight, *rest, config=CONFIG)
    sparse_dlogits(far, *lists, far_apart(hidden), far_apart(weight), *rest, config=CONFIG)
    assert near[0].all()
    assert torch.equal(far, near)

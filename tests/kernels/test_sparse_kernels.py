"""The kernels of the sparse backward, one by one, against plain loops over the active cells in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastdpo.head.impl import sparsity
from fastdpo.head.impl.interface import Transform
from fastdpo.head.impl.tiles import cell_means as cell_means_in_pytorch
from fastdpo.kernels import row_lists as row_lists_module
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.logits_tile import Config
from fastdpo.kernels.row_lists import Lists, cell_means, row_lists, skipped_mass
from fastdpo.kernels.select_cells import mean_density, select_cells
from fastdpo.kernels.sparse_dhidden import sparse_dhidden
from fastdpo.kernels.sparse_dlogits import sparse_dlogits
from fastdpo.kernels.sparse_dweight import Sum, sparse_dweight
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.head_inputs import LAYOUTS, far_apart

N, D, V, R, TILE = 50, 40, 85, 3, 16  # several tiles of each, the last one smaller
J = -(-V // TILE)
CONFIG = Config(BLOCK_N=16, BLOCK_V=TILE, BLOCK_D=16, num_warps=4, num_stages=2)
BLOCK, LEAST = 8, 5  # rows of a block, and active ones that make it dense
BLOCK_CONFIG = Config(BLOCK_N=4, BLOCK_V=8, BLOCK_D=16, num_warps=4, num_stages=2)  # two programs, two steps
if torch.cuda.is_available():
    BLOCK = 16
    BLOCK_CONFIG = BLOCK_CONFIG._replace(BLOCK_N=16, BLOCK_V=16)  # the least that a tensor core takes
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 columns, and several blocks of rows."""
    monkeypatch.setattr(row_lists_module, "TILE", TILE)
    monkeypatch.setattr(row_lists_module, "BLOCK_N", BLOCK)
    monkeypatch.setattr(row_lists_module, "BLOCK_D", 16)


def make_active(rows: int, tiles: int, device: torch.device) -> Tensor:
    """Half of the cells, a tile with none but three, one with all, one with few; and in three rows all cells."""
    active = torch.rand(rows, tiles, device=device) < 0.5
    active[:, 0], active[:, 1], active[:, 2] = False, True, False
    active[-1, 2] = True
    active[[3, 17, rows - 2]] = True
    return active


def by_activity(active: Tensor) -> Tensor:
    return active.float().mean(1).argsort(descending=True, stable=True).int()


def make_lists(active: Tensor) -> Lists:
    """The lists; after the ends of lists are rows that are none of theirs."""
    N = len(active)
    nowhere, ones = torch.full((N,), -1, device=active.device), torch.ones(N, device=active.device)
    lists = row_lists(active.float(), 0.5 * ones, nowhere, ones, ones, order=by_activity(active), least=LEAST)
    beyond = torch.arange(N, device=active.device) >= lists.counts[:, None]
    return lists._replace(rows=lists.rows.masked_fill(beyond, 0))


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


class Choice(NamedTuple):
    """Arguments of `row_lists`, and the cells that are active."""

    shares: Tensor
    threshold: Tensor
    targets: Tensor
    dtarget: Tensor
    dothers: Tensor


def make_choice(dtype: torch.dtype, device: torch.device) -> tuple[Choice, Tensor]:
    """Full rows, rows without an upstream gradient or with NaN, targets outside; the mask is that of PyTorch."""
    shares = torch.rand(N, J, device=device).to(dtype)
    threshold = torch.rand(N, device=device)
    threshold[::7] = -torch.inf
    threshold[1] = shares[1, 2]  # a share at the threshold is skipped
    targets = torch.randint(-V, 2 * V, (N,), device=device)
    targets[::2] %= V
    targets[3] = -1
    dtarget, dothers = torch.randn(2, N, device=device).to(accumulator(dtype))
    dtarget[::5], dothers[::5] = 0, 0
    dtarget[10], dothers[11], dothers[12] = 1, 0, torch.nan
    upstream = (dtarget != 0) | (dothers != 0)
    active = sparsity.active_cells(shares, threshold, targets // TILE, upstream)
    return Choice(shares, threshold, targets, dtarget, dothers), active


CHOICES = {
    "ragged": lambda c: c,
    "no-row": lambda c: c._replace(dtarget=torch.zeros_like(c.dtarget), dothers=torch.zeros_like(c.dothers)),
    "all-full": lambda c: c._replace(threshold=torch.full_like(c.threshold, -torch.inf)),
    "rows-apart": lambda c: c._replace(shares=torch.cat([c.shares, c.shares], 1)[:, J:]),
}


@pytest.mark.parametrize("block", [8, 64], ids=["several-blocks", "one-block"])
@pytest.mark.parametrize("which", CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_row_lists(
    which: str, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The lists, the dense tiles of each block, and what is counted, tile by tile and block by block."""
    monkeypatch.setattr(row_lists_module, "BLOCK_N", block)
    monkeypatch.setattr(row_lists_module, "BLOCK_J", 4)
    choice: Choice = CHOICES[which](make_choice(dtype, device)[0])
    upstream = (choice.dtarget != 0) | (choice.dothers != 0)
    active = sparsity.active_cells(choice.shares, choice.threshold, choice.targets // TILE, upstream)
    order, least = by_activity(active), LEAST if block == 8 else 24
    found = torch.tensor([7.0, 0.25, 0.5], device=device)
    lists = row_lists(*choice, order=order, least=least, found=(found, 2 * N * J))
    blocks = [order[start : start + block].tolist() for start in range(0, N, block)]
    assert lists.rows.shape == lists.active.shape == (J, N)
    assert lists.bounds.shape == (J, len(blocks) + 1)
    assert {t.dtype for t in (lists.rows, lists.counts, lists.bounds, lists.starts)} == {torch.int32}
    assert torch.equal(lists.active.bool(), active[order.long()].T)
    dense = [[int(active[some, j].sum()) >= least for some in blocks] for j in range(J)]
    for j in range(J):
        parts: dict[bool, list[list[int]]] = {
            d: [[n for n in some if active[n, j]] if dense[j][b] == d else [] for b, some in enumerate(blocks)]
            for d in (True, False)
        }
        first, rest = ([n for some in parts[d] for n in some] for d in (True, False))
        assert lists.rows[j, : int(lists.counts[j])].tolist() == first + rest
        ends = [len(first) + sum(map(len, parts[False][:b])) for b in range(len(blocks) + 1)]
        assert lists.bounds[j].tolist() == ends
    for b in range(len(blocks)):
        tiles = [j for j in range(J) if dense[j][b]]
        assert lists.starts[:, b].tolist() == [sum(t < j for t in tiles) for j in range(J + 1)]
        assert lists.tiles[b, : len(tiles)].tolist() == tiles
    in_blocks, others = block * sum(map(sum, dense)), int((lists.counts - lists.bounds[:, 0]).sum())
    assert (in_blocks > 0) == (which != "no-row")
    assert (others > 0) == (which not in ("no-row", "all-full") or (which == "all-full" and block == 8))
    expected = [7.0, 0.25 + in_blocks / (2 * N * J), 0.5 + others / (2 * N * J)]
    torch.testing.assert_close(found, torch.tensor(expected, device=device))


def test_row_lists_of_some_tiles(device: torch.device) -> None:
    """Their targets are found although the shares begin in the middle of the vocabulary."""
    choice, active = make_choice(torch.float32, device)
    options: Any = {"order": by_activity(active), "least": LEAST}
    whole = row_lists(*choice, **options).of(2, J)
    some = row_lists(choice.shares[:, 2:], *choice[1:], 2, **options)
    assert torch.equal(some.active, whole.active[2:])
    for a, b in zip(some[1:3], whole[1:3], strict=True):
        assert torch.equal(a, b)
    for a, b, count in zip(some.rows, whole.rows, whole.counts, strict=True):
        assert torch.equal(a[:count], b[:count])


@pytest.mark.parametrize("rows", [0, 1])
def test_row_lists_of_few_rows(rows: int, device: torch.device) -> None:
    lists = make_lists(torch.ones(rows, J, dtype=torch.bool, device=device))
    assert lists.rows.tolist() == [list(range(rows))] * J
    assert lists.counts.tolist() == [rows] * J


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_mass(dtype: torch.dtype, device: torch.device) -> None:
    choice, active = make_choice(torch.float32 if dtype == torch.float16 else dtype, device)
    actual = skipped_mass(*choice, -1.5, dtype)
    mass = choice.shares.to(choice.dothers) * (choice.dothers * -1.5)[:, None]
    torch.testing.assert_close(actual, mass.masked_fill(active, 0).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert actual.stride(0) % 64 == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_cell_means(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    weight = LAYOUTS[layout](torch.randn(V, D, device=device).to(dtype))
    expected = cell_means_in_pytorch(weight.double(), TILE, torch.float64)
    actual = cell_means(weight)
    assert actual.dtype == dtype
    assert_as_accurate(actual.double(), expected.to(dtype).double(), expected, "means")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_select_chooses_what_pytorch_does(dtype: torch.dtype, device: torch.device) -> None:
    rows, tiles = 61, 205
    shares = torch.rand(rows, tiles) ** torch.randint(1, 12, (rows, 1))
    shares = (shares / shares.sum(1, keepdim=True)).to(device, dtype)
    weight = torch.randn(rows, device=device).to(accumulator(dtype))
    weight[3], weight[4] = 0, torch.nan
    expected = sparsity.select(shares.cpu(), weight.cpu(), 0.05, 2.0**-9)
    threshold, bound, active = select_cells(shares, weight, 0.05, 2.0**-9)
    assert torch.equal(active.cpu(), expected.active)
    finite = ~weight.isnan().cpu()
    torch.testing.assert_close(threshold.cpu()[finite], expected.threshold[finite], rtol=1e-6, atol=0)
    torch.testing.assert_close(bound.cpu()[finite], expected.bound[finite], rtol=1e-5, atol=1e-9)
    again = select_cells(shares, weight, 0.05, 2.0**-9)
    assert torch.equal(again[0][finite], threshold[finite])
    found = torch.tensor([3.0, 0.5, 0.25], device=device)
    mean_density(active, found)
    torch.testing.assert_close(found, torch.stack([active.mean(), *found[1:]]))


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
    lists = make_lists(torch.ones(N, J, dtype=torch.bool, device=device))
    sparse_dlogits(full, *lists[:2], *arguments, low_rank=low_rank, config=CONFIG)
    assert torch.equal(full, dense)

    active = make_active(N, J, device)
    some = torch.full_like(dense, 7.0)
    sparse_dlogits(some, *make_lists(active)[:2], *arguments, low_rank=low_rank, config=CONFIG)
    assert torch.equal(some, dense.where(cells(active, V), 7.0))


def make_products(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Active cells; dlogits with NaN in all others, and with 0; hidden; weight."""
    active = make_active(N, J, device)
    dlogits, hidden, weight = (torch.randn(*shape).to(device, dtype) for shape in ((N, V), (N, D), (V, D)))
    mask = cells(active, V)
    return active, dlogits.where(mask, torch.nan), dlogits.where(mask, 0.0), hidden, weight


@pytest.mark.parametrize("ranges", [None, 1, 3, 5, 60])  # of 7 blocks of rows: 3 x 3 and 4 x 2 pass the end
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dhidden(dtype: torch.dtype, ranges: int | None, device: torch.device) -> None:
    active, poisoned, dlogits, _, weight = make_products(dtype, device)
    acc = accumulator(dtype)
    before = torch.randn(N, D, device=device).to(acc)
    actual = before.clone()
    sparse_dhidden(actual, poisoned, make_lists(active), weight, CONFIG, BLOCK_CONFIG, ranges)
    exact = before.double() + dlogits.double() @ weight.double()
    check(actual, before + dlogits.to(acc) @ weight.to(acc), exact, "dhidden")


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "with-all-it-adds"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dweight(dtype: torch.dtype, adds: bool, device: torch.device) -> None:
    """Of one block of rows in the sums' dtype; and the last of several, with spread and boost, in that of inputs."""
    active, poisoned, dlogits, hidden, _ = make_products(dtype, device)
    acc = accumulator(dtype)
    made = [torch.randn(*shape, device=device).to(acc) for shape in ((V, D), (V,), (J, D), (J,))]
    before, bias_before, spread, bias_spread = made
    out_dtype, boost = (dtype, torch.tensor(4.0, dtype=acc, device=device)) if adds else (acc, None)
    actual, dbias = (torch.full_like(x, torch.nan, dtype=out_dtype) for x in (before, bias_before))
    sums = Sum(actual, before, spread) if adds else Sum(actual)
    bias_sums = Sum(dbias, bias_before, bias_spread) if adds else Sum(dbias)
    sparse_dweight(sums, poisoned, *make_lists(active)[:2], hidden, CONFIG, dbias=bias_sums, boost=boost)
    sizes = torch.tensor([TILE] * (J - 1) + [V - (J - 1) * TILE], device=device)

    def expected(wide: torch.dtype) -> tuple[Tensor, Tensor]:
        dweight, dbias = dlogits.to(wide).T @ hidden.to(wide), dlogits.to(wide).sum(0)
        if not adds:
            return dweight, dbias
        every = (spread.to(wide) / sizes[:, None]).repeat_interleave(TILE, 0)[:V]
        every_bias = (bias_spread.to(wide) / sizes).repeat_interleave(TILE)[:V]
        return (before.to(wide) + dweight + every) / 4, (bias_before.to(wide) + dbias + every_bias) / 4

    for name, ours, same_dtype, exact in zip(
        ("dweight", "dbias"), (actual, dbias), expected(acc), expected(torch.float64), strict=True
    ):
        check(ours, same_dtype.to(out_dtype), exact, name)


def test_dweight_of_a_block_is_added_to_the_one_before(device: torch.device) -> None:
    active, poisoned, dlogits, hidden, weight = make_products(torch.float64, device)
    sums = torch.randn_like(weight)
    expected = sums + dlogits.T @ hidden
    sparse_dweight(Sum(sums, sums), poisoned, *make_lists(active)[:2], hidden, CONFIG)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_strides_of_the_dense_operand(layout: str, device: torch.device) -> None:
    active, poisoned, dlogits, hidden, weight = make_products(torch.float64, device)
    dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(weight)
    sparse_dhidden(dhidden, poisoned, make_lists(active), LAYOUTS[layout](weight), CONFIG, BLOCK_CONFIG, 2)
    sparse_dweight(Sum(dweight), poisoned, *make_lists(active)[:2], LAYOUTS[layout](hidden), CONFIG)
    torch.testing.assert_close(dhidden, dlogits @ weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dweight, dlogits.T @ hidden, rtol=1e-12, atol=1e-13)


def test_offsets_past_2_to_the_31(device: torch.device) -> None:
    """In every [N, *] and [V, *] tensor of the three kernels."""
    rows, columns, size = 6, 5, 3
    dlogits, hidden, weight = torch.randn(rows, columns), torch.randn(rows, size), torch.randn(columns, size)
    dlogits, hidden, weight = (x.to(device) for x in (dlogits, hidden, weight))
    active = torch.ones(rows, 1, dtype=torch.bool, device=device)
    active[1] = False
    full = make_lists(active)
    ones = torch.ones(rows, device=device)
    lists = row_lists(
        active.float(), 0.5 * ones, torch.full((rows,), -1, device=device), ones, ones,
        order=by_activity(active), least=BLOCK + 1,
    )  # fmt: skip
    exact = dlogits.double().where(active, 0.0)

    for some in (full, lists):
        dhidden = far_apart(torch.zeros(rows, size, device=device))
        sparse_dhidden(dhidden, far_apart(dlogits), some, far_apart(weight), CONFIG, BLOCK_CONFIG, 2)
        assert_as_accurate(dhidden, dlogits.where(active, 0.0) @ weight, exact @ weight.double(), "dhidden")
    dweight = far_apart(torch.zeros(columns, size, device=device))
    sparse_dweight(Sum(dweight), far_apart(dlogits), *lists[:2], far_apart(hidden), CONFIG)
    assert_as_accurate(dweight, dlogits.where(active, 0.0).T @ hidden, exact.T @ hidden.double(), "dweight")

    near = torch.zeros(rows, columns, device=device)
    far = far_apart(near)
    rest = torch.arange(rows, device=device) % columns, None, *torch.randn(3, rows, device=device), *Transform()
    sparse_dlogits(near, *lists[:2], hidden, weight, *rest, config=CONFIG)
    sparse_dlogits(far, *lists[:2], far_apart(hidden), far_apart(weight), *rest, config=CONFIG)
    assert near[0].all()
    assert torch.equal(far, near)

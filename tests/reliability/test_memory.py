"""Every kernel, in Triton's interpreter, between inaccessible pages and with its programs in random order."""

import ctypes
import dataclasses
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.head.impl.interface import Transform
from fastdpo.kernels import dlogits_rows, fold_logits, linear_logprobs_forward, row_lists, select_cells
from fastdpo.kernels.linear_logprobs_backward import linear_logprobs_backward
from fastdpo.kernels.logits_tile import Config
from fastdpo.kernels.sparse_dhidden import sparse_dhidden
from fastdpo.kernels.sparse_dlogits import sparse_dlogits
from fastdpo.kernels.sparse_dweight import Sum, sparse_dweight

ROOT = Path(__file__).parent.parent.parent
N, V, D, R = 37, 69, 21, 3  # several tiles of each, the last one smaller, and an odd number of cells
TILE = 16
CONFIG = Config(16, TILE, 16, 4, 2)
TRANSFORM = Transform.of(0.7, 8.0, 1.3)
GUARD = 256 << 20  # a wrong offset may be far away

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


def small_blocks(set_attribute: Callable[[Any, str, Any], None]) -> None:
    for module, name, value in (
        (linear_logprobs_forward, "TILE", TILE),
        (linear_logprobs_forward, "processors", lambda _: 5),  # programs of the kernel with one per multiprocessor
        (linear_logprobs_forward, "GROUP_N", 2),
        (row_lists, "TILE", TILE),
        (row_lists, "BLOCK_N", 16),
        (row_lists, "BLOCK_D", 16),
        (fold_logits, "BLOCK", 2 * TILE),
        (dlogits_rows, "BLOCK", 16),
    ):
        set_attribute(module, name, value)


def tensors() -> tuple[Tensor, ...]:
    """hidden, weight, targets, bias, hidden2, weight2 and four vectors of N; targets outside [0, V) too."""
    torch.manual_seed(0)
    hidden, weight, targets, bias = torch.randn(N, D), torch.randn(V, D), torch.randint(-5, V + 5, (N,)), torch.randn(V)
    return hidden, weight, targets, bias, torch.randn(N, R), torch.randn(V, R), *torch.randn(4, N)


def choice() -> tuple[Tensor, ...]:
    """Shares, thresholds of which some are -inf, targets and two gradients."""
    _, _, targets, *_, dtarget, dothers = tensors()
    shares, threshold = torch.rand(N, -(-V // TILE)), torch.full((N,), 0.5)
    shares[:, 1], shares[:, 3] = 0, 1
    threshold[::6] = -torch.inf
    return shares, threshold, targets, dtarget, dothers


def lists() -> row_lists.Lists:
    order = torch.arange(N - 1, -1, -1, dtype=torch.int32)
    return row_lists.row_lists(*choice(), order=order, least=3, found=(torch.zeros(3), N * -(-V // TILE)))


def run_row_lists() -> tuple[Tensor, ...]:
    made = lists()
    rows = (row[:count] for row, count in zip(made.rows, made.counts, strict=True))
    tiles = (row[:count] for row, count in zip(made.tiles, made.starts[-1], strict=True))
    return *rows, *tiles, made.counts, made.bounds, made.active, made.starts


def run_select_cells() -> tuple[Tensor, ...]:
    shares, _, _, weight, _ = choice()
    selected, density = select_cells.select_cells(shares, weight, 0.5, 0.1), torch.zeros(3)
    select_cells.mean_density(selected[2], density)
    return *selected, density


def run_skipped_mass() -> tuple[Tensor, ...]:
    return (row_lists.skipped_mass(*choice(), 2.0, torch.float32),)


def run_cell_means() -> tuple[Tensor, ...]:
    return (row_lists.cell_means(tensors()[1]),)


def run_forward(use_tma: bool) -> tuple[Tensor, ...]:
    hidden, weight, targets, bias, hidden2, weight2, *_ = tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logprobs_forward, "fits_tma", lambda *_: use_tma)
        if use_tma:
            hidden, weight = (torch.nn.functional.pad(x, (0, 3)) for x in (hidden, weight))  # 16-byte rows
        result = linear_logprobs_forward.linear_logprobs_forward(
            hidden, weight, targets, bias, *TRANSFORM, True,
            tile_masses=True, low_rank=(hidden2, weight2), config=CONFIG._replace(BLOCK_V=2 * TILE), splits=2,
        )  # fmt: skip
    assert result.stats is not None
    assert result.tile_masses is not None
    return result.target_logits, result.others, *result.stats, result.tile_masses


def run_backward() -> tuple[Tensor, ...]:
    hidden, weight, targets, bias, hidden2, weight2, others, dtarget, dothers, entropy = tensors()
    dlogits = torch.zeros(N, V)
    linear_logprobs_backward(
        dlogits, hidden, weight, targets, bias, others, dtarget, dothers, *TRANSFORM,
        low_rank=(hidden2, weight2), entropy=(entropy, entropy), config=CONFIG,
    )  # fmt: skip
    return (dlogits,)


def run_sparse_dlogits() -> tuple[Tensor, ...]:
    hidden, weight, targets, bias, hidden2, weight2, others, dtarget, dothers, _ = tensors()
    dlogits = torch.zeros(N, V)
    sparse_dlogits(
        dlogits, *lists()[:2], hidden, weight, targets, bias, others, dtarget, dothers, *TRANSFORM,
        low_rank=(hidden2, weight2), config=CONFIG,
    )  # fmt: skip
    return (dlogits,)


def run_sparse_dhidden() -> tuple[Tensor, ...]:
    _, weight, *_ = tensors()
    dhidden = torch.ones(N, D)
    sparse_dhidden(dhidden, torch.randn(N, V), lists(), weight, CONFIG, CONFIG, ranges=3)
    return (dhidden,)


def run_sparse_dweight() -> tuple[Tensor, ...]:
    hidden, *_ = tensors()
    dweight, dbias, spread = torch.ones(V, D), torch.ones(V), torch.ones(-(-V // TILE), D)
    sums = Sum(dweight, torch.ones(V, D), spread), Sum(dbias, torch.ones(V), spread[:, 0].contiguous())
    sparse_dweight(sums[0], torch.randn(N, V), *lists()[:2], hidden, CONFIG, dbias=sums[1], boost=torch.tensor(2.0))
    return dweight, dbias


def run_fold_logits() -> tuple[Tensor, ...]:
    _, _, targets, *_ = tensors()
    state = tuple(torch.rand(N) for _ in range(7))
    e = torch.zeros(N, V)
    return e, *fold_logits.fold_logits(e, torch.randn(N, V), targets, state, 2.0, TILE), *state


def run_dlogits_rows() -> tuple[Tensor, ...]:
    _, _, targets, *_, others, dtarget, dothers, entropy = tensors()
    dlogits = torch.zeros(N, V)
    dlogits_rows.dlogits_rows(dlogits, torch.randn(N, V), targets, others, dtarget, dothers, entropy, entropy, 2.0)
    return (dlogits,)


@triton.jit
def _stray_kernel(out_ptr, x_ptr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    inside = tl.load(x_ptr + offs, mask=offs < 3, other=0.0)
    stray = tl.load(x_ptr + offs - 1, mask=(offs < BEFORE) | ((offs == 4) & (AFTER > 0)), other=0.0)
    tl.store(out_ptr + offs, inside + stray)


def run_stray(before: int, after: int) -> tuple[Tensor, ...]:
    """One element before the first, or one after the last: x has 3."""
    out = torch.zeros(8)
    _stray_kernel[(1,)](out, torch.ones(3), BEFORE=before, AFTER=after, SIZE=8)
    return (out,)


@triton.jit
def _ordered_kernel(x_ptr):
    tl.store(x_ptr, 2 * tl.load(x_ptr) + tl.program_id(0))


def run_ordered() -> tuple[Tensor, ...]:
    x = torch.ones(1)
    _ordered_kernel[(10,)](x)
    return (x,)


KERNELS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "row_lists": run_row_lists,
    "select_cells": run_select_cells,
    "skipped_mass": run_skipped_mass,
    "cell_means": run_cell_means,
    "forward": lambda: run_forward(False),
    "forward_tma": lambda: run_forward(True),
    "backward": run_backward,
    "sparse_dlogits": run_sparse_dlogits,
    "sparse_dhidden": run_sparse_dhidden,
    "sparse_dweight": run_sparse_dweight,
    "fold_logits": run_fold_logits,
    "dlogits_rows": run_dlogits_rows,
}
PLANTED = {"before": lambda: run_stray(1, 0), "after": lambda: run_stray(0, 1), "none": lambda: run_stray(0, 0)}


def guarded(x: Any, side: str) -> Any:
    """The same values in memory that ends at an inaccessible page, or starts right after one."""
    if isinstance(x, TensorDescriptor):
        return dataclasses.replace(x, base=guarded(x.base, side))
    if not isinstance(x, Tensor) or x.numel() == 0:
        return x
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = elements * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    base = libc.mmap(None, pages + 2 * GUARD, 0, flags, -1, 0)
    assert libc.mprotect(base + GUARD, pages, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    start = base + GUARD + (pages - size if side == "end" else 0)
    buffer = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=x.dtype, count=elements)
    return buffer.as_strided(x.shape, x.stride()).copy_(x)


def run_guarded(names: list[str], side: str, expected: dict[str, Any]) -> None:
    """Run with every tensor that a kernel is given, the launcher's own too, next to a guard."""
    from triton.runtime.interpreter import GridExecutor

    def copy_back(self: Any, args: Any, guarded_args: Any, kwargs: Any, guarded_kwargs: Any) -> None:
        for x, y in zip([*args, *kwargs.values()], [*guarded_args, *guarded_kwargs.values()], strict=True):
            if isinstance(x, Tensor):
                x.copy_(y)

    GridExecutor._init_args_hst = lambda self, args, kwargs: (
        [guarded(x, side) for x in args],
        {name: guarded(x, side) for name, x in kwargs.items()},
    )
    GridExecutor._restore_args_dev = copy_back
    for name in names:
        actual = (KERNELS | PLANTED)[name]()
        assert all(torch.equal(x, y) for x, y in zip(actual, expected.get(name, actual), strict=True)), name


GUARDED = {
    "start": ([*KERNELS, "none"], "start"),
    "end": ([*KERNELS, "none"], "end"),
    "stray before": (["before"], "start"),
    "stray after": (["after"], "end"),
}


def run_each_in_a_fork() -> None:
    """Print the exit codes of all of `GUARDED`: one process imports everything, and its forks may die."""
    small_blocks(setattr)
    codes, expected = {}, {name: run() for name, run in KERNELS.items()}
    for name, arguments in GUARDED.items():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_guarded(*arguments, expected)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    json.dump(codes, sys.stdout)


@pytest.fixture(scope="module")
def exit_codes(once: Any) -> dict[str, int]:
    def run() -> Any:
        code = "from tests.reliability.test_memory import run_each_in_a_fork as run; run()"
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        return json.loads(subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    codes: dict[str, int] = once("guarded-kernels", run)
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("side", ["start", "end"])
def test_no_kernel_leaves_its_tensors(side: str, exit_codes: dict[str, int]) -> None:
    assert exit_codes[side] == 0


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["before", "after"])
def test_guards_catch_one_stray_element(planted: str, exit_codes: dict[str, int]) -> None:
    assert exit_codes[f"stray {planted}"] == -signal.SIGSEGV


@pytest.fixture
def shuffle(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the interpreter run the programs of a grid in the random order of a seed."""
    from triton.runtime.interpreter import interpreter_builder

    small_blocks(monkeypatch.setattr)
    set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def shuffle(seed: int) -> None:
        order: list[tuple[int, ...]] = []
        generator = random.Random(seed)

        def set_shuffled_dim(*grid: int) -> None:
            order[:] = itertools.product(*map(range, grid))
            generator.shuffle(order)
            set_grid_dim(*grid)

        monkeypatch.setattr(interpreter_builder, "set_grid_dim", set_shuffled_dim)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_grid_idx(*order.pop()))

    return shuffle


@pytest.mark.parametrize("name", KERNELS)
def test_order_of_programs_does_not_matter(name: str, shuffle: Callable[[int], None]) -> None:
    in_order = KERNELS[name]()
    for seed in range(2):
        shuffle(seed)
        for a, b in zip(KERNELS[name](), in_order, strict=True):
            assert torch.equal(a, b)


def test_shuffling_finds_a_kernel_that_depends_on_the_order(shuffle: Callable[[int], None]) -> None:
    (in_order,) = run_ordered()
    shuffle(0)
    assert not torch.equal(run_ordered()[0], in_order)

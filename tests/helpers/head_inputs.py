"""Inputs of the head for tests: hidden states, weights, targets and the transform."""

import math
import mmap
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

N, V, D = 37, 53, 37  # three tiles of 16 rows, four of the vocabulary, three of the hidden size; all ragged


class Inputs(NamedTuple):
    """The tensors, as both functions take them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None


class Options(NamedTuple):
    """The transform."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


PLAIN = Options()
OPTIONS = [
    pytest.param(PLAIN, False, id="plain"),
    pytest.param(PLAIN, True, id="bias"),
    pytest.param(Options(logit_scale=-0.3), False, id="scale"),
    pytest.param(Options(softcap=3.0), False, id="softcap"),
    pytest.param(Options(temperature=0.7), False, id="temperature"),
    pytest.param(Options(1.7, 5.0, 1.3), True, id="all-options"),
]


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    shape: tuple[int, int, int] = (N, V, D),
    std: float = 2.0,
) -> Inputs:
    """Logits of this standard deviation; the target of every other row is its first maximum."""
    rows, columns, size = shape
    hidden = std * torch.randn(rows, size, device=device)
    weight = torch.randn(columns, size, device=device) / math.sqrt(size)
    targets = torch.randint(columns, (rows,), device=device)
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    return Inputs(
        hidden.to(dtype), weight.to(dtype), targets, torch.randn(columns, device=device).to(dtype) if bias else None
    )


def spread(x: Tensor) -> Tensor:
    """The same values, in every third place of a larger storage."""
    out = x.new_full((x.shape[0], 3 * x.shape[1]), torch.nan)[:, 1::3]
    return out.copy_(x)


LAYOUTS = {
    "rows-apart": lambda x: spread(x.T).T,
    "columns-apart": spread,
    "transposed": lambda x: x.T.contiguous().T,
    "expanded": lambda x: x[:1].expand_as(x),
}


def far_apart(x: Tensor) -> Tensor:
    """The same values in rows 2^30 elements apart: a 32-bit offset of row 2 would be negative, of row 4 it would be 0.

    The storage goes on for 2^31 elements on both sides, so that a wrong offset finds a NaN or a 0, not the end of the
    process. On the CPU it takes no memory but the pages that are touched.
    """
    rows, columns = x.shape
    elements = 2**32 + rows * 2**30
    if x.is_cuda:
        if torch.cuda.mem_get_info()[0] < x.element_size() * elements:
            pytest.skip("needs 20 GB of GPU memory")
        buffer = torch.empty(elements, dtype=x.dtype, device=x.device)
    else:
        no_reserve = 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        buffer = torch.frombuffer(mmap.mmap(-1, x.element_size() * elements, flags), dtype=x.dtype)
    return buffer.as_strided((rows, columns), (2**30, 1), 2**31).copy_(x)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())

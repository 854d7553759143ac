"""Compare the fused head with plain PyTorch on this device: errors against float64, time and memory.

Shapes: N rows, D hidden size, V vocabulary.
"""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.head.autotune import has_triton
from fastdpo.head.eager import linear_logprobs as plain_logprobs
from fastdpo.head.linear_logprobs import linear_logprobs

SHAPES = {"cuda": (2039, 1021, 32003)}
"""N, D and V for a type of device; none is a multiple of a tile."""
SMALL = (251, 253, 4099)
"""N, D and V for all other devices."""
REPEATS = 3
MIB = 2**20


class Row(NamedTuple):
    """One implementation of the head in one dtype, forward and backward."""

    dtype: torch.dtype
    impl: str
    """An `impl` of `linear_logprobs`, or "eager" for plain PyTorch."""
    logps_error: float
    """Norm of the error of the log-probs, relative to the norm of the log-probs; infinity if `failure` says why."""
    gradients_error: float
    """The larger one of the two gradients' errors, in the same measure."""
    milliseconds: float
    """Of one forward and backward, the median of a few."""
    peak_mib: float | None
    """Memory at the worst moment, above the inputs; None if it can't be measured here."""
    failure: str = ""
    """Why there are no numbers; empty if there are."""


def impls(device: torch.device) -> tuple[str, ...]:
    """Return the implementations among which `linear_logprobs` chooses on a device."""
    return ("triton", "blas") if device.type == "cuda" and has_triton() else ("torch",)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which a model can be trained on a device."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, torch.float16
    if device.type == "cuda":
        return torch.float32, torch.bfloat16, torch.float16
    return torch.float32, torch.bfloat16


def check_head(
    device: torch.device, names: tuple[str, ...], shape: tuple[int, int, int] | None = None
) -> Iterator[Row]:
    """Yield the rows of each dtype that the device has, plain PyTorch last.

    Args:
        device: the device to check.
        names: implementations, as of `impls`.
        shape: N, D and V; None: that of the device's type.
    """
    N, D, V = shape or SHAPES.get(device.type, SMALL)
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) / math.sqrt(D)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    upstream = torch.randn(N, generator=generator).to(device)
    for dtype in dtypes(device):
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        where = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # others may lack float64
        wide = [x.detach().to(where, torch.float64).requires_grad_() for x in inputs]
        exact = _run(lambda h, w, t: plain_logprobs(h, w, t)[0], wide, targets.to(where), upstream.to(where))
        for impl in (*names, "eager"):
            yield _measured(impl, dtype, inputs, targets, upstream, exact)
        del exact, wide


def is_accurate(row: Row, plain: Row) -> bool:
    """Whether errors are at most twice those of plain PyTorch in the same dtype, or of rounding."""
    eps = 1e-6 if row.dtype == torch.float32 else torch.finfo(row.dtype).eps  # exp() turns ulps of x into |x| ulps
    bounds = (2 * (plain.logps_error + eps), 2 * (plain.gradients_error + eps))
    return not row.failure and row.logps_error <= bounds[0] and row.gradients_error <= bounds[1]


def _measured(
    impl: str, dtype: torch.dtype, inputs: list[Tensor], targets: Tensor, upstream: Tensor, exact: list[Tensor]
) -> Row:
    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if impl == "eager":
            return plain_logprobs(hidden, weight, targets)[0]
        return linear_logprobs(hidden, weight, targets, impl=impl)  # type: ignore[arg-type]

    def call() -> list[Tensor]:
        return _run(logps, inputs, targets, upstream)

    try:
        errors = [_error(one, other) for one, other in zip(call(), exact, strict=True)]
        times = sorted(_milliseconds(call, targets.device) for _ in range(REPEATS))
        peak = peak_memory(call, targets.device)
    except Exception as error:  # a compiler or driver may fail in any way, and the other rows are wanted all the same
        failure = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(dtype, impl, math.inf, math.inf, math.nan, None, failure)
    return Row(dtype, impl, errors[0], max(errors[1:]), times[len(times) // 2], peak)


def _run(logps: Callable[..., Tensor], inputs: list[Tensor], targets: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the log-probs and the gradients of hidden states and weight."""
    result = logps(*inputs, targets)
    return [result.detach(), *torch.autograd.grad(result, inputs, upstream.to(result.dtype))]


def _error(actual: Tensor, exact: Tensor) -> float:
    actual = actual.to(exact.device, torch.float64)
    return float((actual - exact).norm() / exact.norm())


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the MiB that a call needs at its worst moment, above what was in use before it.

    On CUDA this is the memory that PyTorch's allocator handed out. On the CPU it is the physical memory of the whole
    process, whose high-water mark is reset just before the call: buffers of matmul libraries count, and memory that is
    allocated but never touched does not. None where neither can be measured, as on the CPU outside Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if device.type != "cpu":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory the C library keeps for reuse would hide what the call uses
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status_kib("VmRSS")
    except (OSError, AttributeError, TypeError, StopIteration):
        return None
    call()
    return (_status_kib("VmHWM") - resident) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

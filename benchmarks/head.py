"""linear_logprobs, forward and backward, against TRL and naive PyTorch: time, memory and error on the same tensors.

    python -m benchmarks.head --rows 2048 --hidden 1024 --vocab 64000 --dtype float32
    python -m benchmarks.head --frozen --out benchmarks/results/head.jsonl

Time and memory are for one forward and backward; memory includes the gradients. Errors are against float64 on the same
rounded inputs: the largest of logps, the relative Frobenius norm of dhidden and dweight, the latter two over a sample
of rows and of vocabulary entries (half of them targets). Needs fastdpo[bench].
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

from benchmarks.harness import DEVICE, measure, provenance, record
from fastdpo import linear_logprobs

SAMPLE = 256  # rows and vocabulary entries whose gradients are compared
TRL_CHUNK = 32768  # as its DPOTrainer asks


Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An implementation: hidden, weight, targets -> logps."""


class Inputs(NamedTuple):
    """Leaves with gradients where trained; dlogps is the upstream gradient."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    dlogps: Tensor  # [N] float32


def make_inputs(N: int, D: int, V: int, dtype: torch.dtype, *, flat: bool, frozen: bool) -> Inputs:
    """Rows like a language model's: a power-law rank curve over Zipf-distributed candidates, targets drawn from them.

    `flat` rows are random instead: no token has more than a few thousandths of the probability.
    """
    torch.manual_seed(0)
    weight = torch.randn(V, D, device=DEVICE) / math.sqrt(D)
    hidden = torch.randn(N, D, device=DEVICE)
    if flat:
        targets = torch.randint(V, (N,), device=DEVICE)
    else:
        zipf = 1 / (torch.arange(V, device=DEVICE) + 10.0)
        candidates = torch.multinomial(zipf, N * 24, replacement=True).view(N, 24)
        height = 15 + torch.randn(N, 1, device=DEVICE)
        slope = 2 + 4 * torch.rand(N, 1, device=DEVICE)
        for rank in range(24):
            hidden += (height - slope * math.log(rank + 1)) * weight[candidates[:, rank]]
        drawn = [torch.multinomial((rows @ weight.T).softmax(-1), 1) for rows in hidden.split(128)]
        targets = torch.cat(drawn).squeeze(1)
    dlogps = torch.randn(N, device=DEVICE)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen), targets, dlogps)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def trl(outputs: tuple[str, ...]) -> Logps:
    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, outputs
        )[0]
        return result

    return logps


def implementations(inputs: Inputs) -> dict[str, Logps]:
    """Name everything that can run here; ratios are to "TRL"."""
    impls = {"fastdpo torch": lambda h, w, t: linear_logprobs(h, w, t, impl="torch")}
    if DEVICE == "cuda":
        impls["fastdpo triton"] = lambda h, w, t: linear_logprobs(h, w, t, impl="triton")
    impls |= {"TRL": trl(("log_probs",)), "TRL, all statistics": trl(OPTIONAL_OUTPUTS)}
    N, V = inputs.hidden.shape[0], inputs.weight.shape[0]
    if 4 * N * V * inputs.hidden.element_size() < free_bytes():  # logits, log-probabilities and both gradients
        impls["PyTorch"] = naive
    return impls


def free_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1])


class Exact(NamedTuple):
    """The float64 truth; gradients for the sampled rows and vocabulary entries only."""

    logps: Tensor
    rows: Tensor
    dhidden: Tensor
    entries: Tensor
    dweight: Tensor


def exact_results(inputs: Inputs) -> Exact:
    """Compute everything in float64, in blocks of rows."""
    hidden, weight, dlogps = (t.detach().double() for t in (inputs.hidden, inputs.weight, inputs.dlogps))
    N, V = hidden.shape[0], weight.shape[0]
    rows = torch.linspace(0, N - 1, min(N, SAMPLE), device=DEVICE).long()
    entries = torch.cat([torch.linspace(0, V - 1, SAMPLE // 2, device=DEVICE).long(), inputs.targets[: SAMPLE // 2]])
    entries = entries.unique()
    dweight = weight.new_zeros(len(entries), weight.shape[1])
    logps, dhidden = [], []
    for block in torch.arange(N, device=DEVICE).split(128):
        log_probs = (hidden[block] @ weight.T).log_softmax(-1)
        targets = inputs.targets[block].unsqueeze(1)
        logps.append(log_probs.gather(1, targets).squeeze(1))
        dlogits = log_probs.exp_().mul_(-dlogps[block].unsqueeze(1))
        dlogits.scatter_add_(1, targets, dlogps[block].unsqueeze(1))
        dweight += dlogits[:, entries].T @ hidden[block]
        dhidden.append(dlogits[torch.isin(block, rows)] @ weight)
    return Exact(torch.cat(logps), rows, torch.cat(dhidden), entries, dweight)


def step(fn: Logps, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward and backward; logps, dhidden and dweight (None when frozen)."""
    hidden, weight, targets, dlogps = inputs
    wrt = [t for t in (hidden, weight) if t.requires_grad]
    logps = fn(hidden, weight, targets)
    dhidden, *dweight = torch.autograd.grad(logps, wrt, dlogps.to(logps.dtype))
    return logps.detach(), dhidden, dweight[0] if dweight else None


def errors(fn: Logps, inputs: Inputs, exact: Exact) -> dict[str, float | None]:
    logps, dhidden, dweight = step(fn, inputs)
    return {
        "logps": (logps.double() - exact.logps).abs().max().item(),
        "dhidden": relative(dhidden[exact.rows], exact.dhidden),
        "dweight": None if dweight is None else relative(dweight[exact.entries], exact.dweight),
    }


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "impl": [row["impl"] for row in rows],
        "ms": [f"{row['ms']:.1f}" for row in rows],
        "min ms": [f"{row['min_ms']:.1f}" for row in rows],
        "vs TRL": [f"{row['ratio_to_trl']:.2f}" for row in rows],
        "peak MiB": [f"{row['peak_mib']:.0f}" for row in rows],
    } | {
        f"{name} error": ["-" if row["errors"][name] is None else f"{row['errors'][name]:.1e}" for row in rows]
        for name in ("logps", "dhidden", "dweight")
    }
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    lines = [columns, *zip(*columns.values(), strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="N, completion tokens")
    parser.add_argument("--hidden", type=int, default=1024, help="D")
    parser.add_argument("--vocab", type=int, default=64000, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained")
    parser.add_argument("--flat", action="store_true", help="random rows instead of peaked ones")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="append one JSON line per implementation to this file")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rows, args.hidden, args.vocab, args.repetitions = 32, 16, 500, 2

    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(args.rows, args.hidden, args.vocab, dtype, flat=args.flat, frozen=args.frozen)
    impls = implementations(inputs)
    exact = exact_results(inputs)
    error = {name: errors(fn, inputs, exact) for name, fn in impls.items()}
    measured = measure({name: partial(step, fn, inputs) for name, fn in impls.items()}, args.repetitions)

    where = provenance()
    shape = {"N": args.rows, "D": args.hidden, "V": args.vocab}
    rows = [
        {
            "op": "linear_logprobs",
            "impl": name,
            "shape": shape,
            "dtype": args.dtype,
            "frozen": args.frozen,
            "flat": args.flat,
            "ms": m.ms,
            "min_ms": m.min_ms,
            "times_ms": m.times,
            "ratio_to_trl": m.ratio_to(measured["TRL"]),
            "peak_mib": m.peak_mib,
            "errors": error[name],
            "provenance": where,
        }
        for name, m in measured.items()
    ]
    print(f"{shape} {args.dtype}{', frozen head' * args.frozen}{', flat rows' * args.flat}; {where}")
    print(table(rows))
    if args.out:
        record(args.out, rows)


if __name__ == "__main__":
    main()

"""One rank of a vocabulary-parallel head; run by test_vocab_parallel.py."""

from pathlib import Path

import torch
import torch.distributed as dist

from fastdpo.head.impl import sparsity
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.linear_logprobs import linear_logprobs

N, D, V, R = 37, 16, 203, 3  # V divides by neither 2 nor 3


def bounds(rank: int, ranks: int) -> tuple[int, int]:
    return V * rank // ranks, V * (rank + 1) // ranks


def main(out: Path) -> None:
    torch_impl.CELL, sparsity.DENSE = 4, 1.0  # so few tokens would be too dense to skip any
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start, stop = bounds(rank, ranks)
    inputs = torch.load(out / "inputs.pt")
    results = {}
    for name, options in inputs.pop("cases").items():
        dtype, trained = options.pop("dtype"), not options.pop("frozen", False)
        hidden, hidden2 = (inputs[k].to(dtype).requires_grad_() for k in ("hidden", "hidden2"))
        weight, bias, weight2 = (
            inputs[k][start:stop].to(dtype).requires_grad_(trained) for k in ("weight", "bias", "weight2")
        )
        logps = linear_logprobs(
            hidden, weight, inputs["targets"], bias, low_rank=(hidden2, weight2), shard=(dist.group.WORLD, start, V),
            **options,
        )  # fmt: skip
        leaves = [hidden, weight, bias, hidden2, weight2]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(logps, wanted, inputs["dlogps"].to(logps.dtype)))
        results[name] = [logps.detach(), *(next(grads) if leaf.requires_grad else None for leaf in leaves)]
    try:
        linear_logprobs(hidden, weight, inputs["targets"] + V, shard=(dist.group.WORLD, start, V))
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()

"""Compare the formulas of `benchmarks.studies.cluster` with runs, and write the table of checks of docs/scaling.md.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.two_processes            # run (a minute), and write both files
    OMP_NUM_THREADS=1 python -m benchmarks.studies.two_processes --table    # write the table from the numbers

Two processes on this machine train a small Llama in float32 with gloo, with DDP and with FSDP2. The bytes that a step
sends are those that the process hands to the kernel. A step is predicted from what one process computes (while the
other one computes too), from the time of one large collective of each kind, and from the sizes of the collectives.
"""

import argparse
import functools
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.studies import cluster
from benchmarks.studies.growth import Flops
from fastdpo import shared_prefix_batch
from fastdpo.benchmarks.harness import provenance
from fastdpo.benchmarks.report import replace
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.plan.resident import Job, resident, units_of

ROOT = Path(__file__).parents[2]
PAGE, NUMBERS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/cpu-2-cores/two_processes.json"
MARK = "<!-- python -m benchmarks.studies.two_processes {} the table of checks -->\n"

PROCESSES = 2
LARGE = 2**24
"""Numbers of the collective that is timed."""
PAIRS, PROMPT, RESPONSE = 4, 64, 32

# https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3:
# Llama 3.1 8B on H100 with FSDP2, 16,384 tokens on each GPU, tokens per second and GPU
TORCHTITAN = {"torchtitan": {8: 5762, 128: 5605}, "torchtitan, compiled": {8: 6667, 128: 6514}}


def make_model(layers: int = 4, D: int = 512, V: int = 8192) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=layers, num_attention_heads=D // 64,
        num_key_value_heads=D // 128, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    patch_forward(model)
    return model


def make_batch(V: int, seed: int = 0) -> dict[str, Any]:
    """Return a packed batch of random pairs, no two tokens of which are shared but the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (PAIRS, PROMPT + 2 * RESPONSE), generator=generator)
    ids[:, PROMPT], ids[:, PROMPT + RESPONSE] = 1, 2
    parts = ids.split([PROMPT, RESPONSE, RESPONSE], 1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: part[i].tolist() for name, part in zip(names, parts, strict=True)} for i in range(PAIRS)]
    batch: dict[str, Any] = shared_prefix_batch(rows)
    return batch


def step(model: Any, batch: dict[str, Any]) -> None:
    """Compute the gradients of a step against a reference whose log-probs are in the dataset."""
    chosen, rejected = torch.segment_reduce(model(**batch).logps, "sum", offsets=batch["cu_target"]).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    for parameter in model.parameters():
        parameter.grad = None


def shard(model: Any) -> Any:
    """Shard a model in the units of accelerate: the embedding, each layer, the last norm with the head."""
    for unit in (model.model.embed_tokens, *model.model.layers):
        fully_shard(unit)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {"ddp": DistributedDataParallel, "fsdp2": shard}


def sent() -> int:
    """Return the bytes that this process has handed to the kernel so far."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))
    return int(line.split()[1])


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call which all processes begin together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def collectives() -> dict[str, Callable[[], object]]:
    """Return one large collective of each kind, and a small one."""
    whole, part = torch.zeros(LARGE), torch.zeros(LARGE // PROCESSES)
    # the names that torch 2.13 gives them, or those before
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: scatter(part, whole),
        "small": lambda: dist.all_reduce(part[:1]),
    }


def run(rounds: int, make: Callable[[], Any] = make_model) -> dict[str, Any]:
    """Return the least seconds of everything, which takes turns, and the bytes of a step, of one process."""
    model = make()
    batch = make_batch(model.config.vocab_size, dist.get_rank())
    models = {"alone": model} | {name: wrap(make()) for name, wrap in WRAPPERS.items()}
    calls = {name: functools.partial(step, each, batch) for name, each in models.items()} | collectives()
    bytes_sent = {}
    for name, call in calls.items():
        for _ in range(2):  # DDP arranges its buckets after the first step
            call()
        dist.barrier()
        before = sent()
        call()
        bytes_sent[name] = sent() - before
    least = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], seconds(call))
    return {"seconds": least, "sent": {name: bytes_sent[name] for name in WRAPPERS}}


def in_two_processes(rounds: int, make: Callable[[], Any] = make_model) -> dict[str, Any]:
    """Fork the processes, and return what the first one measures."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result, children = Path(folder) / "found.json", []
        for rank in range(PROCESSES):
            if (child := os.fork()) == 0:
                os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
                code = 1
                try:
                    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
                    found = run(rounds, make)
                    if rank == 0:
                        result.write_text(json.dumps(found))
                    dist.barrier()
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            raise RuntimeError(f"the processes ended with the codes {codes}")
        found = json.loads(result.read_text())
    return dict(found)


def predicted(found: dict[str, Any], make: Callable[[], Any] = make_model) -> dict[str, Any]:
    """Return what the formulas say about each strategy: bytes, and the shortest and longest step."""
    units = units_of(make())
    numels, took, result = cluster.numels(units), found["seconds"], {}

    def ring(kind: str, numel: int) -> float:  # the time of a large collective, in proportion
        return float(took["small"] + (took[kind] - took["small"]) * numel / LARGE)

    for name in WRAPPERS:
        options: dict[str, Any] = {"optimizer": "sgd", "compute": torch.float32, "upcasts": False}
        parts = resident(units, [], job=Job(name, PROCESSES), runs_reference=False, **options)
        if name == "ddp":
            waits, more = ring("all_reduce", sum(numels)), 0
        else:
            waits = sum(ring("all_gather", numel) for numel in (*numels, *numels[:-1]))
            waits += sum(ring("reduce_scatter", numel) for numel in numels)
            # gloo reduces and scatters by an all-reduce, which sends twice as much
            more = 4 * sum(numels) * (PROCESSES - 1) // PROCESSES
        alone = took["alone"]
        result[name] = {"sent": parts.sent + more, "seconds": [max(alone, waits), alone + waits]}
    return result


def counted(make: Callable[[], Any] = make_model) -> dict[str, float]:
    """Return the operations of a step's matrix products, as counted and as `cluster.operations` says."""
    model = make()
    batch = make_batch(model.config.vocab_size)
    with Flops() as flops:
        step(model, batch)
    tokens, targets = PAIRS * (PROMPT + 2 * RESPONSE), PAIRS * 2 * RESPONSE
    work = cluster.Work(tokens, targets, keys=0)  # attention is not a matrix product here
    of = cluster.operations(model.config, work, trained=True, runs_reference=False, recomputes=False, kept=1.0)
    return {"counted": flops.products, "computed": of.total}


def torchtitan() -> dict[str, Any]:
    """Return the loss of speed from 8 to 128 GPUs: published, and as the formulas bound it."""
    from benchmarks.studies import scaling

    policy, _ = scaling.units("8B", "full")
    all_of_them = cluster.collectives("fsdp2", policy, [], runs_reference=False)
    few, many = (cluster.communicating("fsdp2", all_of_them, gpus) for gpus in (8, 128))
    result = {}
    for name, speeds in TORCHTITAN.items():
        seconds = 16384 / speeds[8]
        result[name] = {"published": 1 - speeds[128] / speeds[8], "most": (many - few) / (seconds + many - few)}
    return result


def table(found: dict[str, Any]) -> str:
    """Return the table of checks, in Markdown."""
    flops = found["operations"]
    lines = ["| what | computed | found |", "|---|---|---|"]
    lines.append(
        f"| operations of matrix products in a step, GFLOP | {flops['computed'] / 1e9:.2f} "
        f"| {flops['counted'] / 1e9:.2f}, counted |"
    )
    for name in WRAPPERS:
        said, (low, high) = found["predicted"][name], found["predicted"][name]["seconds"]
        sent_mb, took = found["measured"]["sent"][name] / 1e6, found["measured"]["seconds"][name]
        title = cluster.STRATEGIES[name]
        lines += [
            f"| MB that a process sends in a step, {title} with gloo | {said['sent'] / 1e6:.2f} | {sent_mb:.2f} |",
            f"| seconds of a step on two processes, {title} | {low:.2f} to {high:.2f} | {took:.2f} |",
        ]
    for name, each in found["torchtitan"].items():
        lines.append(
            f"| speed lost from 8 to 128 H100s, 8B with FSDP2, {name} | 0.0% to {each['most']:.1%} "
            f"| {each['published']:.1%}, published |"
        )
    facts = found["provenance"]
    where = f"The first rows are of {facts['machine']}, with PyTorch {facts['torch']}, {facts['date']}."
    return "\n".join([*lines, "", where, ""])


def write(found: dict[str, Any]) -> None:
    """Replace the table in the page."""
    replace(PAGE, MARK.format("writes"), MARK.format("has written"), f"\n{table(found)}\n")


def main() -> None:
    """Run and compute, or read the numbers, and write the page."""
    parser = argparse.ArgumentParser(description="Write the table of checks in docs/scaling.md.")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="Timed rounds, of which the fastest counts (default: 15)."
    )
    args = parser.parse_args()
    if not args.table:
        if torch.get_num_threads() > 1:
            parser.error("set OMP_NUM_THREADS=1: each process takes one core")
        measured = in_two_processes(args.rounds)
        found = {
            "provenance": provenance(),
            "measured": measured,
            "predicted": predicted(measured),
            "operations": counted(),
            "torchtitan": torchtitan(),
        }
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    write(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    main()

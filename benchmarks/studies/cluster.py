"""Compute how a training scales to 1024 GPUs, and write the tables of docs/scaling.md.

    python -m benchmarks.studies.cluster            # compute (a minute), and write both files
    python -m benchmarks.studies.cluster --table    # write the tables from the numbers in the repository

Nothing is measured. Machines have 8 GPUs each. Of one step, in which every GPU has one micro-batch of `scaling.ROWS`
tokens:

    computing      = floating-point operations / (utilisation x peak of the GPU)
    a collective   = latency of its hops + (n - 1) / n x bytes / bandwidth       (a ring over n GPUs)
    communicating  = the sum over the collectives of the step
    step           = max(computing, communicating) to computing + communicating, / (1 - share lost by imbalance)

Memory and bytes are those of `fastdpo.plan`, and imbalance is that of the sampler's own batches.
`benchmarks.studies.two_processes` compares the same formulas with runs.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies import balance, scaling
from fastdpo.benchmarks.report import replace
from fastdpo.plan.resident import BUCKET, Units

ROOT = Path(__file__).parents[2]
PAGE, NUMBERS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/computed/cluster.json"
MARK = "<!-- python -m benchmarks.studies.cluster {} -->\n"
COST, SHARE = "the table of cost", "the table of shares"

# A machine with 8 GPUs like H100 or H200
PEAK = 989e12
"""Operations per second in bfloat16, dense, by NVIDIA's data sheet."""
UTILISATION = (0.30, 0.45)
"""Assumption: the share of the peak that a step reaches. torchtitan reports 33 % to 39 % for Llama 3 8B with FSDP2."""
NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that a GPU sends to the others of its machine, and to other machines (400 Gb/s)."""
REACHED = 0.8
"""Assumption: the share of these bandwidths that a collective reaches."""
START, HOP, FAR_HOP = 8.4e-6, 3.4e-6, 9.6e-6
"""Seconds of a ring's start, and of a hop in and between machines, of the protocol Simple in NCCL's `tuning.cc`."""
MACHINE = 8
MEMORY = 80.0
"""GiB of a GPU, of which 1 GiB is the device's context, and of whose rest 5 % are lost between allocations."""

GPUS = (8, 64, 256, 1024)
LENGTHS = "ultrafeedback"
STRATEGIES = scaling.STRATEGIES | {"hsdp": "HSDP, a copy on each machine"}


class Work(NamedTuple):
    """The tokens of a batch, as far as they matter for operations."""

    tokens: float
    targets: float
    """Tokens that are scored, M."""
    keys: float
    """Sum over the tokens of the keys that each attends to, itself included."""


class Operations(NamedTuple):
    """Floating-point operations of a step."""

    body: float
    head: float
    reference: float
    """The reference's body and head, or those of the policy with its adapter off."""

    @property
    def total(self) -> float:
        return sum(self)


class Collective(NamedTuple):
    """An all-gather or reduce-scatter over neighbours, or (`across`) of equal shards between machines."""

    size: float
    """Bytes of the whole tensor."""
    across: bool = False


def work_per_pair(pairs: int = balance.PAIRS) -> Work:
    """Return the mean work of a pair with lengths like UltraFeedback's."""
    prompt, chosen, rejected = (x.astype(float) for x in balance.lengths_of(LENGTHS, pairs))
    keys = prompt * (prompt + 1) / 2
    for response in (chosen, rejected):
        keys = keys + response * prompt + response * (response + 1) / 2
    return Work(float((prompt + chosen + rejected).mean()), float((chosen + rejected).mean()), float(keys.mean()))


def operations(
    config: Any, work: Work, *, trained: bool, runs_reference: bool, recomputes: bool = True, kept: float = 0.0
) -> Operations:
    """Return the operations of a step of a Llama: twice the multiplications of its matrix products.

    The forward of the body is multiplied by 4 if all weights are trained: forward, again before the backward
    (`recomputes`), and two for the backward, one of which frozen weights don't need. The head costs 4 (or 2, if frozen)
    times its forward, see docs/how_it_works.md. Adapters are left out; of rank 16 they are about 1 %.

    Args:
        config: the model's config.
        work: the tokens of the step.
        trained: all weights are trained; otherwise an adapter is.
        runs_reference: a reference runs in the step.
        recomputes: gradient checkpointing is on.
        kept: share of the probabilities that fit into a trained head's workspace; it saves this share of a product.
    """
    D, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    width = config.num_attention_heads * config.head_dim
    weights = 2 * D * width + 2 * D * config.num_key_value_heads * config.head_dim + 3 * D * config.intermediate_size
    linears, attention = 2.0 * layers * weights * work.tokens, 4.0 * layers * width * work.keys
    head = 2.0 * work.targets * D * V
    runs = 1 + recomputes
    return Operations(
        body=linears * (runs + (2 if trained else 1)) + attention * (runs + 2),
        head=head * (4 - kept if trained else 2),
        reference=(linears + attention + head) if runs_reference else 0.0,
    )


def numels(units: Units, *, trained: bool = False) -> list[int]:
    """Return the number of weights, or of trained weights, of each unit."""
    return [sum(w.numel for w in unit if w.trained or not trained) for unit in units]


def collectives(strategy: str, policy: Units, reference: Units, *, runs_reference: bool) -> list[Collective]:
    """Return the collectives of a step with one micro-batch, in bfloat16; see `fastdpo.plan.resident`."""
    whole, others, trained = numels(policy), numels(reference), numels(policy, trained=True)

    def in_buckets(numel: int, itemsize: int, bucket: int) -> Iterator[Collective]:
        for start in range(0, numel, bucket):
            yield Collective(itemsize * min(bucket, numel - start))

    weight = 4 if sum(trained) == sum(whole) else 2  # bytes of a trained weight without sharding: an adapter has 2
    if strategy == "ddp":
        return 2 * list(in_buckets(sum(trained), weight, 25 * 2**20 // weight))
    again = whole if runs_reference and not others else []  # the policy with its adapter off
    if strategy == "zero2":
        return 2 * list(in_buckets(sum(trained), 2, BUCKET))
    if strategy == "zero3":
        gathered = [Collective(2 * numel) for numel in (*whole, *whole, *again, *others)]
        return [*gathered, *in_buckets(sum(trained), 2, BUCKET)]
    gathered = [Collective(2 * numel) for numel in (*whole, *whole[:-1], *again, *others[:-1])]
    reduced = [Collective(4 * numel) for numel in trained if numel]
    if strategy == "hsdp":
        reduced += 2 * [Collective(4 * numel / MACHINE, across=True) for numel in trained if numel]
    return gathered + reduced


def seconds(each: Collective, gpus: int) -> float:
    """Return the time of a ring over all GPUs, or over one GPU of each machine."""
    machines = -(-gpus // MACHINE)
    if each.across:
        ring, near, far, bandwidth = machines, 0, machines - 1, NETWORK
    else:  # the ring leaves a machine once, over the network cards of all its GPUs
        ring, near, far = gpus, gpus - machines, machines - 1
        bandwidth = NVLINK if machines == 1 else min(NVLINK, MACHINE * NETWORK)
    if ring == 1:
        return 0.0
    return START + near * HOP + far * FAR_HOP + (ring - 1) / ring * each.size / (REACHED * bandwidth)


def communicating(strategy: str, all_of_them: Iterable[Collective], gpus: int) -> float:
    """Return the seconds of the collectives of a step."""
    inside = MACHINE if strategy == "hsdp" else gpus
    return sum(seconds(each, gpus if each.across else min(inside, gpus)) for each in all_of_them)


def variants() -> Iterator[tuple[str, str, bool, str]]:
    """Yield model, tuning, whether the reference is precomputed, and strategy."""
    for model in scaling.SHAPES:
        for tuning in scaling.TUNINGS:
            for precomputed in (False, True) if tuning == "full" else (False,):
                for strategy in STRATEGIES:
                    yield model, tuning, precomputed, strategy


def numbers() -> dict[str, Any]:
    """Return the operations of a pair and, by variant and number of GPUs, memory and seconds of communication."""
    traces, pair = json.loads(scaling.TRACES.read_text()), work_per_pair()
    sizes = balance.sizes_of(LENGTHS, balance.PAIRS)
    lost = {str(gpus): balance.lost(balance.rows_of("budget", sizes, gpus)) for gpus in GPUS}
    rows = []
    for model, tuning, precomputed, strategy in variants():
        policy, reference = scaling.units(model, tuning)
        if precomputed:
            reference = []
        full = tuning == "full"
        work = operations(scaling.config_of(model), pair, trained=full, runs_reference=not precomputed)
        each = collectives(strategy, policy, reference, runs_reference=not precomputed)
        needed = traces[model][tuning]["whole" if strategy == "ddp" else "sharded"]
        by_gpus = {}
        for gpus in GPUS:
            of, shards = ("fsdp2", MACHINE) if strategy == "hsdp" else (strategy, gpus)
            parts = scaling.resident_of(model, tuning, of, shards, precomputed=precomputed)
            total = parts.weights + parts.reference + parts.gradients + parts.optimizer + parts.buffers
            by_gpus[str(gpus)] = {
                "memory_gib": (total + needed) / scaling.GIB,
                "communicating": communicating(strategy, each, gpus),
            }
        rows.append(
            {"model": model, "tuning": tuning, "precomputed": precomputed, "strategy": strategy}
            | {"operations_per_pair": work._asdict(), "gpus": by_gpus}
        )
    return {"pair": pair._asdict(), "tokens_per_gpu": scaling.ROWS, "lost": lost, "rows": rows}


def label(row: dict[str, Any]) -> str:
    return "precomputed" if row["precomputed"] else "a copy" if row["tuning"] == "full" else "adapter off"


def cost(found: dict[str, Any]) -> str:
    """Return the table of operations and GPU-hours, in Markdown."""
    lines = [
        "| model | tuning | reference | TFLOP of a pair | body | head | reference's | GPU-hours for 60,000 pairs |"
    ]
    lines.append("|---" * 8 + "|")
    for row in found["rows"]:
        if row["strategy"] == "ddp":
            parts = row["operations_per_pair"]
            total = sum(parts.values())
            hours = [60_000 * total / (PEAK * share) / 3600 for share in reversed(UTILISATION)]
            shares = " | ".join(f"{parts[name] / total:.0%}" for name in ("body", "head", "reference"))
            lines.append(
                f"| {row['model']} | {row['tuning']} | {label(row)} | {total / 1e12:.0f} | {shares} "
                f"| {_round(hours[0])} to {_round(hours[1])} |"
            )
    return "\n".join(lines) + "\n"


def share(row: dict[str, Any], found: dict[str, Any], gpus: int) -> tuple[float, float, float]:
    """Return the least and the largest share of a step in which GPUs compute, and the pairs that hide communication."""
    a_pair = sum(row["operations_per_pair"].values())
    pairs, lost = found["tokens_per_gpu"] / found["pair"]["tokens"], found["lost"][str(gpus)]
    slow, fast = (pairs * a_pair / (PEAK * utilisation) for utilisation in UTILISATION)
    waits = row["gpus"][str(gpus)]["communicating"]
    least, most = fast / (fast + waits), slow / max(slow, waits)
    return (1 - lost) * least, (1 - lost) * most, gpus * pairs * waits / fast


def shares(found: dict[str, Any]) -> str:
    """Return the table of the shares of a step in which GPUs compute, in Markdown."""
    lines = ["| model | tuning | reference | strategy | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |"]
    lines.append("|---" * (4 + len(GPUS)) + "|")
    for row in found["rows"]:
        cells = []
        for gpus in GPUS:
            if 1.05 * row["gpus"][str(gpus)]["memory_gib"] + 1 > MEMORY:
                cells.append("too large")
            elif row["strategy"] == "hsdp" and gpus == MACHINE:
                cells.append("as FSDP2")
            else:
                least, most, pairs = share(row, found, gpus)
                cells.append(f"{least:.0%} to {most:.0%} ({_round(pairs)})")
        if set(cells) != {"too large"}:
            names = (row["model"], row["tuning"], label(row), STRATEGIES[row["strategy"]])
            lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _round(number: float) -> str:
    """Return a number with two digits that count."""
    rounded = float(f"{number:.1e}")
    return f"{rounded:,.{int(rounded < 10)}f}"


def write(found: dict[str, Any]) -> None:
    """Replace the tables in the page."""
    for title, text in ((COST, cost(found)), (SHARE, shares(found))):
        replace(PAGE, MARK.format(f"writes {title}"), MARK.format(f"has written {title}"), f"\n{text}\n")


def main() -> None:
    """Compute the numbers, or read them, and write the page."""
    parser = argparse.ArgumentParser(description="Write the tables of clusters in docs/scaling.md.")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    if not parser.parse_args().table:
        NUMBERS.write_text(json.dumps(numbers(), indent=1) + "\n")
    write(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    main()

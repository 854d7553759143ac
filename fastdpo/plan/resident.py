"""Compute what each device holds whatever the batch, and what it sends in a step, for one way to divide the work.

The sizes are those of the shards that FSDP2, as accelerate sets it up, and DeepSpeed, by its defaults, make:

| strategy | weights | gradients | optimizer |
|---|---|---|---|
| `ddp` | whole | whole, and again in the buckets that are sent | whole |
| `fsdp2` | sharded along each first dimension, in float32 if trained | sharded, but whole while they add up | sharded |
| `zero1` | whole, in the dtype of the computation | whole | sharded, with a float32 copy of the trained weights |
| `zero2` | whole, in the dtype of the computation | sharded | as zero1 |
| `zero3` | sharded, in the dtype of the computation | sharded | as zero1 |

With mixed precision, FSDP2 adds gradients up, and sends them, in float32; DeepSpeed does so in the dtype of the
computation. A unit is a layer, the embedding, or the final norm with the head; FSDP2 gathers the weights of a unit at a
time, and of the next one beside it. n processes send (n - 1) / n of what they gather or reduce, by a ring.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.settings.names import check_name

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
"""How many numbers an optimizer keeps for each parameter; Adafactor's are too few to count."""

# DeepSpeed's defaults, in parameters
BUCKET = 5 * 10**8
"""`reduce_bucket_size`: gradients that are sent at a time."""
LIVE = 10**9
"""`stage3_max_live_parameters`: weights that a process has gathered at most."""


@dataclass(frozen=True)
class Job:
    """How the work is divided over devices."""

    strategy: str = "ddp"
    processes: int = 1
    micro_batches: int = 1
    """Micro-batches of an optimizer step on each process."""
    syncs_each: bool = False
    """Whether gradients are sent after each micro-batch (`sync_each_batch`), instead of after the last one."""

    def __post_init__(self) -> None:
        check_name("strategy", self.strategy, STRATEGIES)
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")

    @property
    def shards(self) -> bool:
        """Whether something is sharded, so that accelerate and DeepSpeed cast the weights and autocast is not used."""
        return self.strategy != "ddp"


class Weight(NamedTuple):
    """A parameter."""

    shape: tuple[int, ...]
    itemsize: float
    """Bytes that a number takes; less than one if it is quantised."""
    trained: bool
    stays_whole: bool = False
    """Whether FSDP2 and ZeRO-3 leave it whole, as quantised weights that are stored as integers."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of_rows(self, processes: int) -> int:
        """Return how many numbers FSDP2 keeps on each device: a share of the first dimension, rounded up."""
        if self.stays_whole or not self.shape:
            return self.numel
        return -(-self.shape[0] // processes) * math.prod(self.shape[1:])


class Resident(NamedTuple):
    """Bytes on each device that do not depend on the batch, and what it sends."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    buffers: int
    """Gathered weights, and gradients on their way to other processes, at their largest."""
    sent: int
    """Bytes that a device sends in an optimizer step."""


Units = Sequence[Sequence[Weight]]
"""The weights of a model by units; the last unit holds the head."""


def resident(
    policy: Units,
    reference: Units,
    *,
    job: Job,
    optimizer: str,
    compute: torch.dtype,
    upcasts: bool,
    runs_reference: bool = True,
) -> Resident:
    """Compute the resident bytes of a training; buffers of modules, such as RoPE's frequencies, are not in them.

    Args:
        policy: the weights of the policy, see `units_of`.
        reference: the frozen weights of the reference; empty if it has none of its own.
        job: how the work is divided.
        optimizer: `TrainingArguments.optim`; an unknown name counts as Adam.
        compute: dtype of the computation.
        upcasts: mixed precision is on, so FSDP2 keeps trained weights and sums of gradients in float32.
        runs_reference: the reference, or the policy in its place, runs in each step.
    """
    n, c = job.processes, compute.itemsize
    states = next((count for name, count in STATES.items() if name in optimizer), STATES["adamw"])
    of_8_bits = "8bit" in optimizer
    trained = [w for unit in policy for w in unit if w.trained]
    frozen = [w for unit in policy for w in unit if not w.trained]
    others = [w for unit in reference for w in unit]
    numel, share = sum(w.numel for w in trained), (n - 1) / n

    def total(sizes: Iterable[float]) -> int:
        return math.ceil(sum(sizes))

    if job.strategy == "ddp":
        gradients = total(w.numel * w.itemsize for w in trained)
        return Resident(
            weights=total(w.numel * w.itemsize for w in [*trained, *frozen]),
            reference=total(w.numel * w.itemsize for w in others),
            gradients=gradients,
            optimizer=total(states * w.numel * (1 if of_8_bits else w.itemsize) for w in trained),
            buffers=gradients if n > 1 else 0,
            sent=round(2 * share * gradients * (job.micro_batches if job.syncs_each else 1)),
        )
    runs = 1 + bool(runs_reference and not reference)  # forwards of the policy
    if job.strategy == "fsdp2":
        reduced = 4 if upcasts else c  # `fastdpo.sharding.shard_policy` chooses it
        reductions = job.micro_batches if job.syncs_each else 1

        def kept(w: Weight) -> float:
            return w.of_rows(n) * (4 if w.trained and upcasts else w.itemsize)

        gradients = total(map(kept, trained))
        if job.micro_batches > 1 and not job.syncs_each:  # they are added up whole, and sharded by the last backward
            gradients = max(gradients, numel * reduced)
        gathered = _gathered(policy) * runs + _gathered(policy[:-1]) + (_gathered(reference[:-1]) if reference else 0)
        return Resident(
            weights=total(map(kept, [*trained, *frozen])),
            reference=total(map(kept, others)),
            gradients=gradients,
            optimizer=total(states * (w.of_rows(n) if of_8_bits else kept(w)) for w in trained),
            buffers=_fsdp_buffers(policy, reference, c, reduced) if n > 1 else 0,
            sent=round(share * (c * job.micro_batches * gathered + reduced * numel * reductions)),
        )
    stage = int(job.strategy[-1])
    over = n if stage == 3 else 1

    def stored(w: Weight) -> float:
        return w.numel * w.itemsize if w.stays_whole or w.itemsize < 1 else -(-w.numel // over) * c

    bucket, live = min(BUCKET, numel), min(LIVE, max(_gathered(policy), _gathered(reference)))
    gathered = _gathered(policy) * (runs + 1) + _gathered(reference) if stage == 3 else 0
    reduced = numel * (job.micro_batches if stage > 1 else 1)
    updated = numel if stage < 3 else 0
    return Resident(
        weights=total(map(stored, [*trained, *frozen])),
        reference=total(map(stored, others)),
        gradients=(numel if stage == 1 else -(-numel // n)) * c,
        optimizer=-(-numel // n) * (4 + states * (1 if of_8_bits else 4)),
        buffers=0 if n == 1 else bucket * c if stage < 3 else (2 * bucket + live) * c,
        sent=round(share * c * (job.micro_batches * gathered + reduced + updated)),
    )


def _gathered(units: Units) -> int:
    """Return how many numbers the units gather."""
    return sum(w.numel for unit in units for w in unit if not w.stays_whole)


def _fsdp_buffers(policy: Units, reference: Units, itemsize: int, reduced: int) -> int:
    """Return the most bytes of gathered weights, and of whole gradients, at any moment of a step under FSDP2.

    Args:
        policy: as in `resident`.
        reference: as in `resident`.
        itemsize: bytes of a gathered weight, and of its gradient.
        reduced: bytes of a number of the copy of gradients that is sent.
    """

    def two(units: Units) -> int:  # one that computes, and one that is gathered meanwhile
        return itemsize * max((_gathered(pair) for pair in pairwise(units)), default=_gathered(units))

    def whole_gradients(units: Units) -> int:  # of one unit, and its copy that is sent
        return (itemsize + reduced) * max((sum(w.numel for w in unit if w.trained) for unit in units), default=0)

    tail = itemsize * _gathered(policy[-1:])  # it stays gathered from its forward to its backward
    kept = itemsize * _gathered(reference[-1:])  # without a backward it stays so
    forward = tail + max(two(policy[:-1]), two(reference[:-1]))
    backward = max(tail + whole_gradients(policy[-1:]), two(policy[:-1]) + whole_gradients(policy[:-1]))
    return kept + max(forward, backward)


def units_of(model: Any, stored: dict[Tensor, float] | None = None, *, shards_quantised: bool = False) -> Units:
    """Return the weights of a causal LM, or of a PEFT model, in the units that FSDP2 gathers.

    Args:
        model: its parameters may be on the meta device.
        stored: bytes of a number of each weight that is quantised, see `quantised`.
        shards_quantised: quantised weights are stored in a dtype that can be sharded.
    """
    stored = stored or {}
    wrapped = set(getattr(model, "_no_split_modules", None) or ())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [module for module in model.modules() if type(module).__name__ in wrapped]
    groups: list[list[nn.Module]] = [[embedding], *([layer] for layer in layers), [head]]
    if embedding.weight is head.weight:
        del groups[0]
    taken: set[Tensor] = set()
    units: list[list[Weight]] = []
    for group in groups:
        units.append([])
        for p in (p for module in group for p in module.parameters()):
            if p not in taken:
                taken.add(p)
                units[-1].append(_weight(p, stored, shards_quantised))
    rest = [_weight(p, stored, shards_quantised) for p in model.parameters() if p not in taken]
    units[-1] += rest  # the final norm and what else the root holds stay gathered too
    return [unit for unit in units if unit]


def _weight(p: Tensor, stored: dict[Tensor, float], shards_quantised: bool) -> Weight:
    is_quantised = p in stored
    return Weight(
        tuple(p.shape), stored.get(p, p.element_size()), p.requires_grad, is_quantised and not shards_quantised
    )


def quantised(model: Any, config: Any) -> dict[Tensor, float]:
    """Return the bytes of a number of each weight that bitsandbytes quantises: those of linear layers below the head.

    Args:
        model: a causal LM, before adapters are added.
        config: transformers' quantization config, or its entries; None: nothing is quantised.
    """
    options = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
    if options.get("load_in_4bit"):  # a scale for 64 numbers, in float32 or again in 8 bits
        size = 0.5 + (1 / 64 + 4 / (64 * 256) if options.get("bnb_4bit_use_double_quant") else 4 / 64)
    elif options.get("load_in_8bit"):
        size = 1.0  # and a scale for each row, which are too few to count
    else:
        return {}
    kept = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in kept]
    return {m.weight: size for m in linears}

"""Metrics of how evenly an optimizer step's tokens are divided over processes, which wait for each other.

- `balance/lost`: share of the time in which processes wait for the one whose micro-batch has most tokens, if time is in
  proportion to tokens: 1 - mean / max. It is what is lost if processes wait after each micro-batch, as with FSDP2 and
  ZeRO-3; with DDP they wait after each step.
- `balance/step_spread`: tokens of the step on the process with most, less those on the process with fewest, as a share
  of their mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastdpo.report.metrics import RunningSums

NAMES = ("balance/lost", "balance/step_spread")


def own_tokens(batches: Sequence[Mapping[str, Any]], args: TrainingArguments) -> Tensor:
    """Return `[processes, micro-batches]` float32, 0 but for this process's row; the sum over processes has all rows.

    Args:
        batches: this process's micro-batches of a step, from `fastdpo.shared_prefix_batch`.
        args: settings of the run, which say how many micro-batches a step has at most.
    """
    table = torch.zeros(args.world_size, args.gradient_accumulation_steps)
    table[args.process_index, : len(batches)] = torch.tensor([float(batch["num_packed_tokens"]) for batch in batches])
    return table.to(args.device, non_blocking=True)


def add_balance(sums: RunningSums, tokens: Tensor) -> None:
    """Add the tokens of a step's micro-batches, `[processes, micro-batches]`, to the sums, without waiting for them."""
    longest, steps = tokens.amax(0).sum(), tokens.sum(1)
    lost = torch.stack((longest - tokens.mean(0).sum(), longest))
    spread = torch.stack((steps.max() - steps.min(), steps.mean()))
    sums.add(NAMES, torch.stack((lost, spread)))

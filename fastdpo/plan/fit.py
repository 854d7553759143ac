"""How a run's training steps fit into its device's memory, with any number of decoder layers recomputed.

With L layers, the first k are recomputed in the backward pass, and the others keep their activations. The memory model
gives the peak of a step for k = 0 and k = L. Let s(k) be the share of what recomputing all layers saves that the first
k layers save: k / L where layers are alike, and less where the first ones are smaller than the others, such as the
dense layers below a mixture of experts. At each moment of a step memory is linear in s, so the peak, a maximum of such
lines, is convex in s, and lies below its chord:

    peak(k) <= (1 - s(k)) * peak(0) + s(k) * peak(L)
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from fastdpo import sharding
from fastdpo.config.auto import AUTO
from fastdpo.config.checks import in_bytes
from fastdpo.data.columns import REFERENCES
from fastdpo.data.grouping import arrays, groups_of
from fastdpo.data.packing import responses_of, rows_of, shared_prefix_batch
from fastdpo.data.sampler import example_sizes
from fastdpo.data.vision.images import has_images
from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.attention.backends import usable
from fastdpo.plan.memory import Memory, memory_model
from fastdpo.plan.resident import Job
from fastdpo.plan.tracing.trace import Precision, Ratios

ENOUGH_TOKENS = 8192
"""Tokens with which a device is busy; for more of them, no further layer is recomputed."""
MOST_TOKENS = 32768
"""Larger batches train no faster, and change how many pairs an optimizer step has."""
_SAMPLE = 2048
"""Examples whose lengths the memory model sees."""


@dataclass(frozen=True)
class Fit:
    """What the memory model says of a run, and the memory that there is."""

    none: Memory
    """A step in which no layer is recomputed."""
    full: Memory
    """A step in which all layers are."""
    layers: int
    examples: np.ndarray[Any, Any]
    """`[N]` int64: rows of each example, the largest first."""
    usable: int
    """Bytes that a step may take."""

    def peak(self, checkpointed: int, rows: int) -> float:
        """Return the bytes of a step with so many layers recomputed, which are never fewer than it will take."""
        share = float(self._saved[checkpointed])
        return (1 - share) * float(self.none.peak(rows)) + share * float(self.full.peak(rows))

    @cached_property
    def _saved(self) -> np.ndarray[Any, Any]:
        """`[layers + 1]`: the share of what recomputing saves that the first layers save."""
        saved = np.ones(self.layers)
        if len(self.none.kept_by_layer) == len(self.full.kept_by_layer) == self.layers:
            saved = np.maximum(np.subtract(self.none.kept_by_layer, self.full.kept_by_layer), 1)
        return np.concatenate(([0.0], np.cumsum(saved) / saved.sum()))

    def fewest(self, rows: int, scale: float = 1.0) -> int:
        """Return the fewest layers to recompute; all, if even that does not fit.

        Args:
            rows: rows of the largest batch.
            scale: measured by computed memory of what a batch takes.
        """
        fixed = self.full.persistent
        for k in range(self.layers):
            if fixed + scale * (self.peak(k, rows) - fixed) <= self.usable:
                return k
        return self.layers

    def tokens(self, checkpointing: bool | str) -> int:
        """Return the largest budget of tokens, a multiple of 64, for checkpointing that is on, off or "auto"."""
        none, full = (min(each.largest(self.usable), MOST_TOKENS) for each in (self.none, self.full))
        if checkpointing == AUTO:
            found = none if none >= ENOUGH_TOKENS else min(full, ENOUGH_TOKENS)
        else:
            found = full if checkpointing else none
        return max(64, found // 64 * 64)


def fit_of(trainer: Any, dataset: Any, layers: int, free: int | None) -> Fit:
    """Ask the memory model about a run.

    Args:
        trainer: a `fastdpo.trainer.packed_trainer.PackedTrainer`.
        dataset: its tokenised training data.
        layers: number of layers that can be recomputed.
        free: bytes that a step may take; None if nobody knows.

    Raises:
        ValueError: the memory of a step can't be computed; the message says why.
    """
    args, policy, reference = trainer.args, unwrap(trainer.model), trainer.ref_model
    if free is None:
        raise ValueError(f"the free memory of {args.device.type} can't be read")
    if not isinstance(dataset, Dataset):
        raise ValueError("the lengths of a stream are not known before")
    if layers == 0:
        raise ValueError(f"{type(policy).__name__} has no layers that transformers can recompute one by one")
    if trainer._layout == "padded":
        raise ValueError("batches are padded")
    if has_images(dataset) or "images_key" in dataset.column_names:
        raise ValueError("the model sees images, whose activations are not in the memory model")
    weights = next(p.dtype for p in policy.parameters() if p.is_floating_point())
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    other = None if reference is None else trainer.accelerator.unwrap_model(reference).config
    differs = other is not None and other.to_dict() != policy.config.to_dict()
    adapters = list(getattr(trainer.model, "peft_config", {}).values())
    stage = sharding.zero_stage(args)
    strategy = f"zero{stage}" if stage else "fsdp2" if trainer.is_fsdp_enabled else "ddp"
    ratios = _ratios(dataset, trainer._layout, args.group_by_prompt if args.tokens_per_batch else None)
    none, full = (
        memory_model(
            policy.config,
            ratios,
            precision=Precision(weights, autocast),
            checkpointing=on,
            has_reference=reference is not None,
            runs_reference=trainer._settings.needs_reference and REFERENCES.keys().isdisjoint(dataset.column_names),
            optimizer=str(getattr(args.optim, "value", args.optim)),
            peft_config=copy.deepcopy(adapters[0]) if adapters else None,
            reference_config=other if differs else None,
            backends=usable(args.attention_backend, args.device),
            trust_remote_code=args.trust_remote_code,
            job=Job(strategy, args.world_size, args.gradient_accumulation_steps),
            quantization=getattr(policy.config, "quantization_config", None),
            head_workspace=in_bytes("head_workspace", args.head_workspace),
        )
        for on in (False, True)
    )
    examples = -np.sort(-example_sizes(dataset, trainer._layout)[:, 0])
    return Fit(none, full, layers, examples, free)


def _ratios(dataset: Dataset, layout: str, group_by_prompt: int | None = None) -> Ratios:
    """Return what batches hold for each of their rows, by evenly spaced examples; the grid's share is its largest.

    Args:
        dataset: tokenised rows.
        layout: that of the batches.
        group_by_prompt: most examples of a group where rows that they share are counted once; None where all are
            counted. Batches of large groups hold more for each row, and large groups come together, so that the 95th
            percentile of the groups counts.
    """
    if group_by_prompt is not None:
        groups = groups_of(dataset, group_by_prompt).rows
        each = max(1, len(dataset) // _SAMPLE)
        parts = [_graph_ratios(dataset.select(rows).to_list(), layout) for rows in groups[::each]]
        return Ratios(*(float(x) for x in np.quantile(parts, 0.95, axis=0)))
    sample = dataset.select(range(0, len(dataset), max(1, len(dataset) // _SAMPLE)))
    rows, paths, targets, responses, longest = 0, 0, 0, 0, 0
    for example in arrays(sample):
        prompt, lengths = len(example["prompt_ids"]), [len(response) for response in responses_of(example)]
        rows += rows_of(example, layout)
        paths += sum(prompt + n - 1 for n in lengths)
        targets += sum(lengths)
        responses += len(lengths)
        longest = max(longest, prompt + max(lengths) - 1)
    return Ratios(paths / rows, targets / rows, responses * longest / rows)


def _graph_ratios(examples: list[dict[str, Any]], layout: str) -> Ratios:
    batch = shared_prefix_batch(examples, layout=layout, pad_to_multiple_of=1, across_examples=True)
    longest, responses = max(batch["tree_seqlens_k"]), len(batch["cu_target"]) - 1
    parts = (len(batch["tree_kv_index"]), len(batch["target_ids"]), responses * longest)
    return Ratios(*(part / batch["num_packed_tokens"] for part in parts))

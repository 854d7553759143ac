"""`fastdpo plan`: the tokens and memory of a run, before it starts and without loading weights.

The tokens are counted exactly. The memory is computed by `fastdpo.plan.memory`, and not measured.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from fastdpo.config import DPOConfig
from fastdpo.config.auto import AUTO
from fastdpo.config.checks import in_bytes
from fastdpo.data.vision.images import has_images
from fastdpo.loss.options import from_config
from fastdpo.model.attention.backends import Usable
from fastdpo.model.layout import choose_layout
from fastdpo.model.policy import configs_of, disable_dropout
from fastdpo.plan.memory import Memory, memory_model, meta_model
from fastdpo.plan.resident import Job
from fastdpo.plan.token_stats import Batches, TokenStats, epoch, token_stats
from fastdpo.plan.tracing.trace import Precision, Ratios
from fastdpo.reference.share import when_it_pays
from fastdpo.report.page import summary_table
from fastdpo.report.plots import BLUE, GREEN, GREY, GRID, INK, PURPLE
from fastdpo.run import RunConfig, lora

logger = logging.getLogger("fastdpo")

GIB = 2**30
RESERVED = GIB
"""Bytes of GPU memory that are left for the device's context and its matmul library."""
FRAGMENTED = 0.05
"""Share of the other memory that is kept free for gaps between allocations and for unusual batches."""
WORTH_GROUPING = 0.1
"""Share of the computed tokens that grouping must save to be recommended, because it changes the order of examples."""
BUDGETS = (4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Plan:
    """What `make_plan` returns."""

    stats: TokenStats
    batches: Batches
    """The batches of an epoch with the batch size of the config."""
    steps: int
    """Optimizer steps of an epoch."""
    memory: dict[bool, Memory]
    """With (True) and without (False) gradient checkpointing; empty if batches are padded, which are not modelled."""
    checkpointing: bool
    """Whether the config has gradient checkpointing on."""
    assumed: tuple[str, ...]
    """Assumptions of the memory model, for the user to read."""
    gpu_memory: float | None
    """GiB of the GPU planned for; None if there is none."""
    job: Job
    """How the work is divided over GPUs."""
    epochs: float
    """Epochs of the run."""
    reference_share: float | None
    """Share of a step's multiplications that precomputing the reference would save; None if it can't be precomputed, or
    is already."""

    @property
    def fits(self) -> dict[bool, int]:
        """The largest `tokens_per_batch` that fits into the GPU, with and without checkpointing; 0 if none fits."""
        if self.gpu_memory is None:
            return {}
        usable = int((self.gpu_memory * GIB - RESERVED) * (1 - FRAGMENTED))
        return {on: memory.largest(usable) // 64 * 64 for on, memory in self.memory.items()}


def make_plan(
    run: RunConfig,
    args: DPOConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    gpu_memory: float | None = None,
    processes: int = 1,
    strategy: str | None = None,
) -> Plan:
    """Count the tokens of a run's dataset and compute its memory.

    Args:
        run: names the model, of which only the config is read, and the adapter.
        args: all other settings.
        dataset: rows to train on, not tokenised.
        tokenizer: the model's tokenizer; for rows with images, its processor.
        gpu_memory: GiB of the GPU to train on; None: this machine's GPU, if it has one.
        processes: number of processes, one per GPU.
        strategy: how they divide the work, see `fastdpo.plan.resident.STRATEGIES`; None: as `args` says.

    Raises:
        ValueError: an argument is out of range, or `fastdpo.plan.token_stats.token_stats` or
            `fastdpo.plan.memory.memory_model` raises it.
    """
    if gpu_memory is not None and gpu_memory <= 0:
        raise ValueError(f"gpu_memory must be above 0 GiB, got {gpu_memory}")
    sums: Any = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    job = Job(
        _strategy(args) if strategy is None else strategy,
        processes,
        args.gradient_accumulation_steps,
        syncs_each=bool(sums.get("sync_each_batch")),
    )
    if gpu_memory is None and torch.cuda.is_available():
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB
    code = args.trust_remote_code
    config, adapter = configs_of(run.model_name_or_path or run.config_name, code, run.model_revision)
    if adapter is not None and run.use_peft:
        raise ValueError(f"use_peft=True would add an adapter to {run.model_name_or_path}, which is an adapter already")
    adapter = adapter or lora(run)
    own_reference = run.ref_model_name_or_path and configs_of(run.ref_model_name_or_path, code)[0]
    models = [meta_model(each, trust_remote_code=code) for each in (config, own_reference) if each]
    if args.disable_dropout:
        for model in models:
            disable_dropout(model)
    layout = choose_layout(models, args.prefix_sharing)
    stats = token_stats(dataset, tokenizer, args, models[0].get_input_embeddings().weight.shape[0], layout)
    batches = epoch(stats, args, processes)

    precision = _precision(args, config, on_gpu=gpu_memory is not None)
    needs_reference = from_config(args).needs_reference
    runs_reference = needs_reference and not args.precompute_ref_log_probs
    has_reference = runs_reference and bool(adapter is None or own_reference)
    options: Any = args.model_init_kwargs or {}
    quantization = options.get("quantization_config") or getattr(config, "quantization_config", None)
    kinds = () if layout == "padded" else (True, False)
    memory = {
        on: memory_model(
            config,
            ratios(batches),
            precision=precision,
            checkpointing=on,
            has_reference=has_reference,
            runs_reference=runs_reference,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            peft_config=adapter,
            reference_config=own_reference,
            backends=_backends(args, on_gpu=gpu_memory is not None),
            trust_remote_code=code,
            job=job,
            quantization=quantization,
            head_workspace=in_bytes("head_workspace", args.head_workspace),
        )
        for on in kinds
    }
    assumed = (
        f"{layout} batches",
        f"weights {_stored(precision, job, quantization)}",
        *(f"attention by {' and '.join(each.attention)}" for each in list(memory.values())[:1]),
        "reference: " + ("a copy of the weights" if has_reference else "no copy of the weights"),
        f"optimizer {getattr(args.optim, 'value', args.optim)}",
        *(["tokens_per_batch=auto, which is chosen in training, as unset"] if args.tokens_per_batch == AUTO else []),
        *(["no activations of the part that sees the images"] if has_images(dataset) else []),
    )
    steps = -(-len(batches.rows) // (processes * args.gradient_accumulation_steps))
    checkpointing = bool(getattr(args, "activation_checkpointing", args.gradient_checkpointing))
    # passes through the model: the reference's and the policy's forward, and a backward that recomputes the forward
    # with checkpointing, and without an adapter needs gradients of the weights too
    passes = 2 + (1 if adapter else 2) + checkpointing
    return Plan(
        stats=stats,
        batches=batches,
        steps=steps,
        memory=memory,
        checkpointing=checkpointing,
        assumed=assumed,
        gpu_memory=gpu_memory,
        job=job,
        epochs=args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs,
        reference_share=1 / passes if runs_reference and not args.sync_ref_model else None,
    )


def _strategy(args: DPOConfig) -> str:
    """Return the strategy that the settings name: DeepSpeed's stage, FSDP2 or else DDP."""
    if args.deepspeed:
        options: Any = args.deepspeed
        options = options if isinstance(options, dict) else json.loads(Path(options).read_text())
        stage = options.get("zero_optimization", {}).get("stage", 0)
        return f"zero{stage}" if stage else "ddp"
    return "fsdp2" if args.fsdp else "ddp"


def _stored(precision: Precision, job: Job, quantization: Any) -> str:
    """Say in which dtypes weights are stored and computed with."""
    stored, compute = _name(precision.weights), _name(precision.compute)
    if quantization:
        return f"quantised, else in {stored}, computed with in {compute}"
    if job.strategy == "ddp":
        return f"in {stored}" + (f", autocast to {compute}" if precision.autocast else "")
    if job.strategy == "fsdp2":
        master = "float32 if trained" if precision.autocast else stored
        return f"in {master}, gathered in {compute}"
    return f"in {compute}, with a float32 copy of the trained ones in the optimizer"


def ratios(batches: Batches) -> Ratios:
    """Return what batches hold for each of their rows: the 95th percentile, which one batch in twenty exceeds."""
    parts = (batches.paths, batches.targets, batches.grid)
    return Ratios(*(float(np.quantile(part / batches.rows, 0.95)) for part in parts))


def _backends(args: DPOConfig, *, on_gpu: bool) -> Usable:
    """Return the attention backends of the device planned for, which may be in another machine."""
    refused = {}
    for name, module in (("varlen", "torch.nn.attention.varlen"), ("flash", "flash_attn")):
        if not on_gpu:
            refused[name] = "there is no GPU"
        elif name != args.attention_backend and find_spec(module) is None:
            refused[name] = f"there is no {module}"
    return Usable(args.attention_backend, refused)


def _precision(args: DPOConfig, config: Any, *, on_gpu: bool) -> Precision:
    """Return the dtypes that the trainer will choose on a GPU, where bf16 is the default; here there may be none."""
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    weights: Any = options.get("dtype", "float32")
    weights = (config.dtype or "float32") if weights == "auto" else weights
    weights = getattr(torch, weights) if isinstance(weights, str) else weights
    autocast = torch.float16 if args.fp16 else torch.bfloat16
    planned_elsewhere = on_gpu and not torch.cuda.is_available() and args.bf16_is_default
    return Precision(weights, autocast if args.fp16 or args.bf16 or planned_elsewhere else None)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# Showing it


def tables(plan: Plan) -> str:
    """Show all of a plan in plain-text tables."""
    stats, batches = plan.stats, plan.batches
    lengths = [(name, *_spread(values)) for name, values in stats.lengths.items()]
    what = "computed for an example" if stats.groups is None else "computed for a group of examples"
    sizes = stats.sizes if stats.groups is None else stats.groups.sizes
    lengths.append((what, *_spread(sizes.prod(1))))
    counted = [
        ("rows of the dataset", f"{stats.given:,}"),
        *((f"left out: {reason}", _rows(rows)) for reason, rows in stats.dropped.items()),
        *((f"{name} cut to its limit", _rows(rows)) for name, rows in stats.cut.items()),
        ("examples trained on", f"{len(stats.prompts):,}"),
        ("batches of an epoch, all processes", f"{len(batches.rows):,}"),
        ("optimizer steps of an epoch", f"{plan.steps:,}"),
        ("tokens computed in a batch: median", f"{np.median(batches.rows):,.0f}"),
        ("tokens computed in a batch: largest", f"{batches.rows.max():,}"),
        ("padding avoided, share of the padded batch", f"{batches.padding_avoided:.1%}"),
        ("tokens shared, share of the unpadded batch", f"{batches.shared:.1%}"),
        *_grouping(stats),
    ]
    n, job = plan.job.processes, plan.job
    title = "memory (computed, not measured)" if n == 1 else f"memory of each of {n} GPUs, {job.strategy} (computed)"
    shown = [
        summary_table(lengths, ("tokens", "min", "median", "p95", "max", "mean")),
        summary_table(counted, ("data (counted)", "")),
    ]
    if not plan.memory:
        return "\n".join([*shown, "memory: not computed, because batches are padded", *_reference_advice(plan)])
    on, off = plan.memory[True], plan.memory[False]
    constant = [
        ("weights", on.weights),
        ("gradients", on.gradients),
        ("optimizer state", on.optimizer),
        ("reference", on.reference),
        *([("gathered weights and sent gradients", on.buffers)] if n > 1 else []),
        ("largest head workspace (of two)", on.workspace(int(batches.rows.max()))),
    ]
    needed: list[tuple[str, ...]] = [(name, _size(size), _size(size)) for name, size in constant]
    needed.append(("kept for the backward, per token", _size(on.kept_per_row), _size(off.kept_per_row)))
    largest = int(batches.rows.max())
    for rows, label in [(largest, "largest batch of the config"), *((n, f"tokens_per_batch={n}") for n in BUDGETS)]:
        needed.append((f"peak, {label}", _size(on.peak(rows)), _size(off.peak(rows))))
    if plan.gpu_memory is not None:
        label = f"largest tokens_per_batch in {plan.gpu_memory:.0f} GiB"
        needed.append((label, *(f"{plan.fits[kind]:,}" if plan.fits[kind] else "none" for kind in (True, False))))
    if n > 1:
        needed.append(("sent by each GPU in an optimizer step", _size(on.sent), _size(off.sent)))
    kind = {True: "with gradient checkpointing", False: "without"}
    return "\n".join(
        [
            *shown,
            summary_table(needed, (title, kind[True], kind[False])),
            f"memory assumes: {'; '.join(plan.assumed)}; the config has gradient checkpointing "
            f"{'on' if plan.checkpointing else 'off'}",
            *_head_advice(on, largest),
            *_reference_advice(plan),
            *([f"fits: {RESERVED / GIB:.0f} GiB and {FRAGMENTED:.0%} of the rest are kept free"] if plan.fits else []),
        ]
    )


def _head_advice(memory: Memory, rows: int) -> list[str]:
    """Say what a larger `head_workspace` would save, if not all probabilities of a batch with so many rows fit."""
    needed = memory.workspace_per_row * rows * 1.03  # 16-bit probabilities, their factors and the shares of tiles
    if not memory.keeps_probs or needed <= memory.head_workspace:
        return []
    kept = memory.head_workspace / needed
    larger = f"{math.ceil(needed / GIB * 10) / 10:.1f}GiB"
    return [
        f"head: head_workspace={_size(memory.head_workspace)} holds {kept:.0%} of the probabilities of the largest "
        f"batch, and the backward computes the others again; head_workspace={larger} holds all of them, for "
        f"{_size(needed - memory.head_workspace)} more memory and {(1 - kept) / (4 - kept):.0%} fewer multiplications "
        "in the head if its backward is exact (not with a soft-cap)"
    ]


def _reference_advice(plan: Plan) -> list[str]:
    """Say what precomputing the reference saves and when that pays, if it is possible."""
    if plan.reference_share is None or plan.epochs <= 0:
        return []
    return [
        f"reference: about {plan.reference_share:.0%} of the multiplications of a step; `fastdpo precompute` computes "
        f"it once for all epochs and for later runs on these rows, and pays {when_it_pays(plan.epochs)}"
    ]


def _grouping(stats: TokenStats) -> list[tuple[str, str]]:
    """Say what `group_by_prompt` would save, and which value is the smallest that saves nearly as much as any."""
    if not stats.grouped:
        return []
    saved = {n: 1 - rows / stats.ungrouped for n, rows in stats.grouped.items()}
    best = max(saved.values())
    advice = next(n for n, share in saved.items() if share >= 0.9 * best) if best >= WORTH_GROUPING else None
    return [
        ("examples of one prompt: largest number", f"{stats.per_prompt:,}"),
        *((f"tokens saved by group_by_prompt={n}", f"{share:.1%}") for n, share in saved.items()),
        ("recommended (see docs/grouping.md)", f"group_by_prompt={advice}" if advice else "no grouping"),
    ]


def _spread(values: np.ndarray[Any, Any]) -> tuple[str, ...]:
    low, median, high, top = np.quantile(values, (0, 0.5, 0.95, 1))
    return (f"{low:,.0f}", f"{median:,.0f}", f"{high:,.0f}", f"{top:,.0f}", f"{values.mean():,.1f}")


def _rows(rows: Sequence[int]) -> str:
    return f"{len(rows):,} (first: row {rows[0]})"


def _size(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"


def draw_lengths(stats: TokenStats, path: str | PathLike[str]) -> None:
    """Draw histograms of the lengths of prompts and responses, as a PNG that is 1650 pixels wide.

    Args:
        stats: token counts of a dataset.
        path: the file to write.
    """
    colours = {"prompt": BLUE, "chosen": GREEN, "rejected": PURPLE}
    figure = Figure(figsize=(11, 2.4 * len(stats.lengths)), dpi=150, layout="constrained")
    panels = figure.subplots(len(stats.lengths), 1, sharex=True, squeeze=False)[:, 0]
    top = max(values.max() for values in stats.lengths.values())
    bins = np.linspace(0, top, 1 + min(60, top)).tolist()
    for panel, (name, values) in zip(panels, stats.lengths.items(), strict=True):
        panel.hist(values, bins=bins, color=colours.get(name, GREEN), alpha=0.85)
        median = float(np.median(values))
        panel.axvline(median, color=GREY, linewidth=1, linestyle=(0, (6, 4)))
        title = f"{name}, median {median:,.0f}"
        panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        panel.set_ylabel("examples" if name != "response" else "responses", color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=GREY, labelcolor=INK)
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
    panels[-1].set_xlabel("tokens", color=INK)
    figure.savefig(path, format="png", facecolor="white")

"""`fastdpo plan`: the tokens and memory of a run, before it starts and without loading weights.

The tokens are counted exactly. The memory is computed by `fastdpo.plan.memory`, and not measured.
"""

import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.config import DPOConfig
from fastdpo.config.auto import AUTO
from fastdpo.config.checks import in_bytes
from fastdpo.data.vision.images import has_images
from fastdpo.loss.options import from_config
from fastdpo.model.attention.backends import Usable
from fastdpo.model.layout import choose_layout
from fastdpo.model.policy import configs_of, disable_dropout
from fastdpo.model.scoring_forward import decoder_layers
from fastdpo.plan.fit import Fit
from fastdpo.plan.free_memory import GIB, KEPT_FREE, RESERVED
from fastdpo.plan.memory import Memory, memory_model, meta_model
from fastdpo.plan.resident import Job
from fastdpo.plan.token_stats import Batches, TokenStats, epoch, token_stats
from fastdpo.plan.tracing.trace import Precision, Ratios
from fastdpo.run import RunConfig, lora

logger = logging.getLogger("fastdpo")


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
    checkpointing: bool | str
    """Whether the config has gradient checkpointing on, or "auto"."""
    layers: int
    """Layers that can be recomputed one by one."""
    assumed: tuple[str, ...]
    """Assumptions of the memory model, for the user to read."""
    gpu_memory: float | None
    """GiB of the GPU planned for; None if there is none."""
    job: Job
    """How the work is divided over GPUs."""
    epochs: float
    """Epochs of the run."""
    passes: int | None
    """Passes through the model in a step, without what is recomputed; None if the reference can't be precomputed, or is
    already."""

    @property
    def fits(self) -> dict[bool, int]:
        """The largest `tokens_per_batch` that fits into the GPU, with and without checkpointing; 0 if none fits."""
        if self.usable is None:
            return {}
        return {on: memory.largest(self.usable) // 64 * 64 for on, memory in self.memory.items()}

    @property
    def usable(self) -> int | None:
        """Bytes of the GPU that a step may take; None without a GPU."""
        return None if self.gpu_memory is None else int((self.gpu_memory * GIB - RESERVED) * (1 - KEPT_FREE))

    @property
    def recomputed(self) -> int | None:
        """Layers that are recomputed; None if `gradient_checkpointing=auto` chooses them, for an unknown device."""
        if self.checkpointing != AUTO or not self.memory or not self.layers:
            return self.layers * bool(self.checkpointing)
        if self.usable is None:
            return None
        fit = Fit(self.memory[False], self.memory[True], self.layers, self.batches.rows, self.usable)
        return fit.fewest(int(self.batches.rows.max()))

    @property
    def reference_share(self) -> float | None:
        """Share of a step's multiplications that precomputing saves; None if it is impossible, or done already."""
        recomputed = self.layers if self.recomputed is None else self.recomputed
        return None if self.passes is None else 1 / (self.passes + recomputed / max(self.layers, 1))


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
    # the forward of reference and policy, and a backward that needs gradients of the weights too without an adapter
    passes = 3 if adapter else 4
    return Plan(
        stats=stats,
        batches=batches,
        steps=steps,
        memory=memory,
        checkpointing=AUTO if args.gradient_checkpointing == AUTO else checkpointing,
        layers=len(decoder_layers(models[0])),
        assumed=assumed,
        gpu_memory=gpu_memory,
        job=job,
        epochs=args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs,
        passes=passes if runs_reference and not args.sync_ref_model else None,
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

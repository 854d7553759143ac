"""Compute how much memory a training step will take, before anything is loaded.

A model with fake weights runs one step forward and backward (`fastdpo.plan.tracing.trace`), which gives the bytes alive
after each operation i for T rows; a row is one token of the packed batch. If its layers are alike, it runs a few of
them (`fastdpo.plan.tracing.depth`). What does not depend on the batch comes from the sizes of the weights
(`fastdpo.plan.resident`).

    peak(T) = max over i of alive[i](T) + persistent bytes

So gradient checkpointing, autocast's copies, tied embeddings and adapters need no formulas of their own. The head's
workspace is counted at its upper bound. Not counted are the device's context, its matmul library and memory lost
between allocations.

Shapes: T rows of the packed batch, K key-path entries, M targets, D hidden size, V vocabulary.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.head.impl.interface import WORKSPACE_BYTES
from fastdpo.model.adapters import with_adapter
from fastdpo.model.attention.backends import Usable
from fastdpo.model.policy import auto_class
from fastdpo.model.scoring_forward import find_head
from fastdpo.plan.resident import Job, quantised, resident, units_of
from fastdpo.plan.tracing.depth import traces
from fastdpo.plan.tracing.stand_ins import NAME
from fastdpo.plan.tracing.trace import (
    TRACED_ROWS,
    Moment,
    Place,
    Precision,
    Ratios,
    Setting,
    line_of,
    make_fake,
    upper_envelope,
)

ANY_BACKEND = Usable("auto", {})
FLOAT32 = Precision()
ONE_DEVICE = Job()


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes, computed and not measured."""

    weights: int
    reference: int
    """Weights of the frozen reference; 0 if the policy serves as reference or log-probs are cached."""
    gradients: int
    """Gradients of all trained parameters."""
    optimizer: int
    kept_per_row: float
    """Bytes per row that the forward of the model's body keeps for its backward."""
    workspace_per_row: float
    """Bytes of logits per row; the head's workspace holds the logits of all rows, up to its bound."""
    timeline: tuple[Moment, ...]
    """The moments of a step at which memory could be at its peak."""
    attention: tuple[str, ...] = ()
    """Attention backends that the layers would use."""
    buffers: int = 0
    """Weights that are gathered from other processes, and gradients on their way to them, at their largest."""
    sent: int = 0
    """Bytes that a device sends in an optimizer step."""
    head_workspace: int = WORKSPACE_BYTES
    """Bound of what the head keeps, and of that in which it works; above the default, of what it keeps alone."""
    kept_by_layer: tuple[int, ...] = field(default=(), compare=False)
    """Bytes that the forward of each layer keeps of some batch, by which layers compare; empty where they are alike."""

    @property
    def persistent(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.reference + self.optimizer + self.buffers

    def workspace(self, rows: int) -> int:
        """Bytes of the larger of the head's two workspaces, the one that a trained head keeps for its backward."""
        return min(self.head_workspace, round(self.workspace_per_row * rows))

    @property
    def keeps_probs(self) -> bool:
        """Whether the head is trained, and so keeps probabilities."""
        return max(m.workspaces for m in self.timeline) == 2

    def peak(self, rows: int) -> int:
        """Peak bytes of a step with this many rows."""
        kept = self.workspace(rows)
        sizes = (0, kept, kept + min(kept, WORKSPACE_BYTES))
        alive = max(m.fixed + m.per_row * rows + sizes[m.workspaces] for m in self.timeline)
        return self.persistent + round(alive)

    def largest(self, budget: int) -> int:
        """Return the largest number of rows whose step fits into `budget` bytes; 0 if not even one row fits."""
        if self.peak(1) > budget:
            return 0
        low, high = 1, 2
        while self.peak(high) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= budget else (low, middle)
        return low


def memory_model(
    config: Any,
    ratios: Ratios,
    *,
    precision: Precision = FLOAT32,
    checkpointing: bool = True,
    has_reference: bool = True,
    runs_reference: bool = True,
    optimizer: str = "adamw_torch_fused",
    peft_config: Any | None = None,
    reference_config: Any | None = None,
    backends: Usable = ANY_BACKEND,
    trust_remote_code: bool = False,
    job: Job = ONE_DEVICE,
    quantization: Any | None = None,
    head_workspace: int = WORKSPACE_BYTES,
) -> Memory:
    """Compute the memory on each device of a training step of the model that `config` describes; no weights are loaded.

    Args:
        config: config of a causal LM of transformers.
        ratios: what the batches hold per row.
        precision: dtypes of the weights and of autocast.
        checkpointing: gradient checkpointing is on.
        has_reference: the reference has weights of its own in memory.
        runs_reference: the reference runs in the step; its log-probs are not read from a cache.
        optimizer: `TrainingArguments.optim`; an unknown name counts as Adam.
        peft_config: config of the adapter that is trained instead of the weights.
        reference_config: config of the reference, if it is another model than the policy.
        backends: attention backends that the device can use.
        trust_remote_code: run the code in the model's repository.
        job: how the work is divided over devices.
        quantization: transformers' quantization config of the models, or its entries.
        head_workspace: bytes of `DPOConfig.head_workspace`.

    Raises:
        ValueError: packed batches are not exact on the model, it can't use the attention backend asked for, or its
            operations depend on the values of its weights.
    """
    model = meta_model(config, precision.weights, trust_remote_code)
    find_head(model)
    reference = None
    if has_reference and reference_config is not None:
        reference = meta_model(reference_config, precision.weights, trust_remote_code).requires_grad_(False)
    shards_quantised = _dtype_of_storage(quantization).is_floating_point
    frozen = model if reference is None else reference
    others = units_of(frozen, quantised(frozen, quantization), shards_quantised=shards_quantised)
    stored = quantised(model, quantization)
    if peft_config is not None:
        with torch.device("meta"):
            model = with_adapter(model, peft_config)
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        if peft_config is not None:
            model.enable_input_require_grads()
    fixed = resident(
        units_of(model, stored, shards_quantised=shards_quantised),
        [[w._replace(trained=False) for w in unit] for unit in others] if has_reference else [],
        job=job,
        optimizer=optimizer,
        compute=precision.compute,
        upcasts=precision.autocast is not None,
        runs_reference=runs_reference,
    )
    if job.shards or stored:  # the weights come to the computation in its dtype
        precision = Precision(precision.compute)
        for each in (p for model in (model, reference) if model is not None for p in model.parameters()):
            each.data = each.data.to(precision.compute)
    accumulates = job.shards or job.micro_batches > 1
    chosen: set[str] = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for each in filter(None, (model, reference)):
            make_fake(each)
        setting = Setting(ratios, precision, accumulates, runs_reference, backends, chosen, Place())
        try:
            small, large = traces(model, reference, TRACED_ROWS, setting)
        except (RuntimeError, NotImplementedError) as error:  # some routers and kinds of RoPE depend on values
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{type(model).__name__} can't be run without the values of its weights: {why}") from error
        # the trace has whole gradients
        gradients = fixed.gradients - _bytes(p for p in model.parameters() if p.requires_grad) if accumulates else 0
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        lines = {line_of(*pair) for pair in zip(small.operations, large.operations, strict=True)}
        return Memory(
            weights=fixed.weights + _bytes(model.buffers()),
            reference=fixed.reference + _bytes((reference or model).buffers()) if has_reference else 0,
            gradients=fixed.gradients,
            optimizer=fixed.optimizer,
            kept_per_row=(large.kept - small.kept) / (TRACED_ROWS[1] - TRACED_ROWS[0]),
            workspace_per_row=ratios.targets * vocabulary * precision.compute.itemsize,
            timeline=upper_envelope({line._replace(fixed=line.fixed + gradients) for line in lines}),
            attention=tuple(sorted(chosen)),
            buffers=fixed.buffers,
            sent=fixed.sent,
            head_workspace=head_workspace,
            kept_by_layer=large.by_layer,
        )


def _dtype_of_storage(quantization: Any) -> torch.dtype:
    """Return the dtype of the tensors that hold quantised weights."""
    options = quantization if isinstance(quantization, dict) else vars(quantization) if quantization else {}
    dtype = options.get("bnb_4bit_quant_storage") or torch.uint8
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def meta_model(config: Any, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """Return the causal LM that `config` describes, on the meta device, without weights."""
    options = {"attn_implementation": NAME, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return auto_class(config).from_config(copy.deepcopy(config), **options)  # a copy, for it is changed


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)

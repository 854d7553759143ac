"""How much memory a training step will take, computed before anything is loaded.

A model with fake weights (shapes and dtypes, no memory) runs one step forward and backward on fake tensors, and every
storage that comes to life or dies is counted. Two steps of different size give, for each operation of the step, the
bytes alive as a straight line in the rows of the batch:

    alive[i](T) = fixed[i] + per_row[i] * T        peak(T) = max over i of alive[i](T) + what is always there

So gradient checkpointing, autocast's copies, tied embeddings and adapters need no formulas of their own. Attention and
head are stand-ins that keep what the real ones keep, and the head's workspace is the bound it promises. Not counted:
what the device's context and its matmul library take, and memory lost between allocations.

Shapes: T rows of the packed batch, K key-path entries, M targets, D hidden size, V vocabulary.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from fastdpo.impl.interface import WORKSPACE_BYTES
from fastdpo.model import find_head

NAME = "fastdpo_memory"
TRACED_ROWS = (1024, 2048)

STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
"""Numbers that an optimizer keeps for each parameter; Adafactor's are too few to count."""


class Ratios(NamedTuple):
    """What a batch holds for each of its rows, on average."""

    paths: float
    """K / T: keys and values that attention gathers."""
    targets: float
    """M / T: completion tokens."""
    grid: float
    """Places of the grid that attention without a variable-length kernel pads to, by T."""


@dataclass(frozen=True)
class Precision:
    """Dtypes: of the weights, and of autocast (None: off)."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.weights


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes; computed, not measured."""

    weights: int
    reference: int
    """Weights of the frozen reference; 0 where the policy serves, or log-probs are cached."""
    gradients: int
    """Of all trained parameters."""
    optimizer: int
    kept_per_row: float
    """Bytes that the forward of the body leaves for its backward, for each row of the batch."""
    workspace_per_row: float
    """Bytes of logits for each row of the batch; the head's workspace is as large as all, up to its bound."""
    timeline: tuple["Moment", ...]
    """The operations that could be the worst moment of a step."""

    @property
    def persistent(self) -> int:
        """Bytes that are there whatever the batch."""
        return self.weights + self.reference + self.optimizer

    def workspace(self, rows: int) -> int:
        """Bytes of one of the head's workspaces; it has two at most."""
        return min(WORKSPACE_BYTES, round(self.workspace_per_row * rows))

    def peak(self, rows: int) -> int:
        """Bytes at the worst moment of a step with so many rows."""
        workspace = self.workspace(rows)
        alive = max(m.fixed + m.per_row * rows + m.workspaces * workspace for m in self.timeline)
        return self.persistent + round(alive)

    def largest(self, budget: int) -> int:
        """The most rows whose step fits into `budget` bytes; 0 if none does."""
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
    precision: Precision = Precision(),
    checkpointing: bool = True,
    accumulates: bool = False,
    has_reference: bool = True,
    runs_reference: bool = True,
    optimizer: str = "adamw_torch_fused",
    peft_config: Any | None = None,
    varlen: bool = True,
    trust_remote_code: bool = False,
) -> Memory:
    """Compute the memory of a training step of the model that `config` describes; no weights are loaded.

    Args:
        config: of a causal LM of transformers.
        ratios: of the batches.
        precision: dtypes.
        checkpointing: the layers are recomputed in the backward.
        accumulates: gradients of earlier micro-batches are there already.
        has_reference: a second copy of the weights stands beside the policy's.
        runs_reference: the reference is computed in the step, not read from a cache.
        optimizer: `TrainingArguments.optim`; what its name does not tell counts as Adam.
        peft_config: adapter that is trained instead of the weights.
        varlen: attention has a variable-length kernel (CUDA, 16 bits); else paths are padded to a grid.
        trust_remote_code: for models that come with their own code.

    Raises:
        ValueError: packed batches are not exact on the model, or it can't run without its weights' values.
    """
    model = meta_model(config, precision.weights, trust_remote_code)
    find_head(model)
    weights = _bytes([*model.parameters(), *model.buffers()])
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        if peft_config is not None:
            model.enable_input_require_grads()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        setting = _Setting(ratios, precision, accumulates, runs_reference, varlen)
        try:
            small, large = (_trace(model, rows, setting) for rows in TRACED_ROWS)
        except (RuntimeError, NotImplementedError) as error:  # what depends on values: some routers, some RoPE
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{type(model).__name__} can't be run without its weights' values: {why}") from error
        trained = [p for p in model.parameters() if p.requires_grad]
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        if len(small.moments) != len(large.moments):
            raise ValueError(f"{type(model).__name__} does not run the same operations on batches of different sizes")
        return Memory(
            weights=_bytes([*model.parameters(), *model.buffers()]),
            reference=weights if has_reference else 0,
            gradients=_bytes(trained),
            optimizer=_optimizer_bytes(optimizer, _bytes(trained), precision.weights.itemsize),
            kept_per_row=(large.kept - small.kept) / (TRACED_ROWS[1] - TRACED_ROWS[0]),
            workspace_per_row=ratios.targets * vocabulary * precision.compute.itemsize,
            timeline=_upper_envelope({_line(*pair) for pair in zip(small.moments, large.moments, strict=True)}),
        )


def meta_model(config: Any, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The causal LM that `config` describes, without weights."""
    options = {"attn_implementation": NAME, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)  # which it writes to


def _make_fake(model: nn.Module) -> None:
    """Exchange tensors on the meta device for fake ones on the CPU, where autocast applies; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the first keeps an id from being used again
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]


class _Setting(NamedTuple):
    ratios: Ratios
    precision: Precision
    accumulates: bool
    runs_reference: bool
    varlen: bool


class Moment(NamedTuple):
    """Bytes alive after an operation, besides what is always there."""

    per_row: float
    fixed: float
    workspaces: int
    """How many of the head's workspaces there are: one it keeps for its backward, one it works in."""


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations bring to life, until they die."""

    def __init__(self, known: Iterator[Tensor], alive: int) -> None:
        super().__init__()
        self.alive, self.workspaces = alive, 0
        self.moments: list[tuple[int, int]] = []
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.moments.append((self.alive, self.workspaces))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class _Trace(NamedTuple):
    moments: list[tuple[int, int]]
    kept: int


def _trace(model: Any, rows: int, setting: "_Setting") -> _Trace:
    """Run one step on fake tensors."""
    ratios, precision = setting.ratios, setting.precision
    known = [*model.parameters(), *model.buffers()]
    alive = 0
    for parameter in model.parameters():
        parameter.grad = None
        if setting.accumulates and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
            alive += parameter.grad.nbytes
    layer = {
        "memory_paths": torch.zeros(round(rows * ratios.paths), dtype=torch.int64),
        "memory_grid": None if setting.varlen else torch.zeros(round(rows * ratios.grid), dtype=torch.int64),
    }
    head = find_head(model)
    linear: Any = head.linears[-1]  # with PEFT's modules_to_save the trained one
    lm_head = linear if isinstance(linear, nn.Linear) else linear.get_base_layer()
    with _Live(iter(known), alive) as live:
        ids = torch.zeros(1, rows, dtype=torch.int64)
        index = torch.zeros(round(rows * ratios.targets), dtype=torch.int64)

        def body() -> Tensor:
            mask = torch.ones_like(ids)
            out = head.decoder(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, **layer)
            hidden: Tensor = out[0][0]
            return hidden

        with torch.autocast("cpu", precision.autocast) if precision.autocast else nullcontext():
            hidden = body()
            kept = live.alive
            scores = _score(hidden, index, lm_head, precision, live)
            del hidden
            if setting.runs_reference:
                with torch.no_grad():
                    _score(body(), index, lm_head, precision, live)
        scores.sum().backward()
    return _Trace(live.moments, kept)


def _score(hidden: Tensor, index: Tensor, lm_head: nn.Linear, precision: Precision, live: _Live) -> Tensor:
    weight = lm_head.weight.to(precision.compute)
    scores: Tensor = _HeadMemory.apply(hidden.index_select(0, index).to(precision.compute), weight, live)
    return scores


class _HeadMemory(torch.autograd.Function):
    """What the fused head keeps and allocates."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, live: _Live) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        keeps = live.workspaces
        live.workspaces += 1
        scores = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        if needs_weight:  # probabilities, as many as fit
            keeps += 1
            ctx.save_for_backward(hidden, weight)
        elif needs_hidden:  # the mean of weight that attention over the vocabulary leaves
            ctx.save_for_backward(torch.empty_like(hidden, dtype=torch.float32), weight)
        live.workspaces = keeps
        ctx.live = live
        return scores

    @staticmethod
    def backward(ctx: Any, dscores: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        ctx.live.workspaces += 1
        dhidden = torch.empty_like(hidden, dtype=torch.float32) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None
        ctx.live.workspaces = 0
        return None if dhidden is None else dhidden.to(weight.dtype), dweight, None


class _AttentionMemory(torch.autograd.Function):
    """What a flash kernel keeps and allocates, whatever the layout of its arguments."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        sums = None if query.dtype == torch.float32 else torch.empty_like(query, dtype=torch.float32)  # of dquery
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums
        return grads


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    memory_paths: Tensor,
    memory_grid: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    rows = query.shape[2]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if memory_grid is None:
        key, value = key.index_select(0, memory_paths), value.index_select(0, memory_paths)
        return _AttentionMemory.apply(query, key, value)[None], None
    query, key, value = (x.index_select(0, memory_grid) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped heads are written out
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = _AttentionMemory.apply(query, key, value).clone()  # the buckets' results put together
    return out.index_select(0, torch.zeros(rows, dtype=torch.int64))[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_bytes(optimizer: str, trained: int, itemsize: int) -> int:
    """Bytes of the optimizer's state, from its name among `TrainingArguments.optim`."""
    states = next((count for name, count in STATES.items() if name in optimizer), STATES["adamw"])
    return states * trained // (itemsize if "8bit" in optimizer else 1)


def _upper_envelope(moments: set[Moment]) -> tuple[Moment, ...]:
    """Those that are the largest of all at some number of rows, among those with as many workspaces."""
    envelope: list[Moment] = []
    for workspaces in range(3):
        hull: list[Moment] = []
        for line in sorted(m for m in moments if m.workspaces == workspaces):
            # no less anywhere, or from where the one before is reached by the next but one
            while hull and (
                line.fixed >= hull[-1].fixed or (len(hull) > 1 and _meet(hull[-2], line) <= _meet(hull[-2], hull[-1]))
            ):
                hull.pop()
            hull.append(line)
        envelope += hull
    return tuple(envelope)


def _meet(a: Moment, b: Moment) -> float:
    """The number of rows at which b, the steeper line, reaches a."""
    return (a.fixed - b.fixed) / (b.per_row - a.per_row)


def _line(small: tuple[int, int], large: tuple[int, int]) -> Moment:
    """The same operation of two steps, as a function of the rows."""
    per_row = (large[0] - small[0]) / (TRACED_ROWS[1] - TRACED_ROWS[0])
    return Moment(per_row, large[0] - per_row * TRACED_ROWS[1], large[1])

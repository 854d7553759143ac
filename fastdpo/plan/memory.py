"""Compute how much memory a training step will take, before anything is loaded.

A model with fake weights (shapes and dtypes, no memory) runs one step forward and backward on fake tensors, and the
bytes of all storages are counted as they are allocated and freed. A row is one token of the packed batch. Two steps of
different size give, for each operation i of the step, the bytes alive after it as a straight line in the T rows:

    alive[i](T) = fixed[i] + per_row[i] * T        peak(T) = max over i of alive[i](T) + persistent bytes

So gradient checkpointing, autocast's copies, tied embeddings and adapters need no formulas of their own. Attention and
head are stand-ins (`fastdpo.plan.stand_ins`), and the head's workspace is counted at its upper bound. Not counted are
the device's context, its matmul library and memory lost between allocations.

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

from fastdpo.head.impl.interface import WORKSPACE_BYTES
from fastdpo.model.adapted_layers import base_linear
from fastdpo.model.adapters import with_adapter
from fastdpo.model.attention.backends import Usable
from fastdpo.model.policy import auto_class
from fastdpo.model.scoring_forward import find_head
from fastdpo.plan.stand_ins import NAME, HeadMemory

# a model that loops over tokens is refused after the small batches; the large ones would take minutes
PROBED_ROWS = (32, 64)
TRACED_ROWS = (1024, 2048)
ANY_BACKEND = Usable("auto", {})

STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
"""How many numbers an optimizer keeps for each parameter; Adafactor's are too few to count."""


class Ratios(NamedTuple):
    """What a batch holds for each of its rows."""

    paths: float
    """K / T: entries of the key paths, for which attention gathers keys and values."""
    targets: float
    """M / T: completion tokens."""
    grid: float
    """Places of the padded grid, which attention without a variable-length kernel uses, divided by T."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of the weights and of autocast; None if autocast is off."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.weights


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
    timeline: tuple["Moment", ...]
    """The moments of a step at which memory could be at its peak."""
    attention: tuple[str, ...] = ()
    """Attention backends that the layers would use."""
    head_workspace: int = WORKSPACE_BYTES
    """Bound of what the head keeps, and of that in which it works; above the default, of what it keeps alone."""

    @property
    def persistent(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.reference + self.optimizer

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
    precision: Precision = Precision(),
    checkpointing: bool = True,
    accumulates: bool = False,
    has_reference: bool = True,
    runs_reference: bool = True,
    optimizer: str = "adamw_torch_fused",
    peft_config: Any | None = None,
    reference_config: Any | None = None,
    backends: Usable = ANY_BACKEND,
    trust_remote_code: bool = False,
    head_workspace: int = WORKSPACE_BYTES,
) -> Memory:
    """Compute the memory of a training step of the model that `config` describes; no weights are loaded.

    Args:
        config: config of a causal LM of transformers.
        ratios: what the batches hold per row.
        precision: dtypes of the weights and of autocast.
        checkpointing: gradient checkpointing is on.
        accumulates: gradients of earlier micro-batches exist already.
        has_reference: the reference has weights of its own in memory.
        runs_reference: the reference runs in the step; its log-probs are not read from a cache.
        optimizer: `TrainingArguments.optim`; an unknown name counts as Adam.
        peft_config: config of the adapter that is trained instead of the weights.
        reference_config: config of the reference, if it is another model than the policy.
        backends: attention backends that the device can use.
        trust_remote_code: run the code in the model's repository.
        head_workspace: bytes of `DPOConfig.head_workspace`.

    Raises:
        ValueError: packed batches are not exact on the model, it can't use the attention backend asked for, or its
            operations depend on the values of its weights.
    """
    model = meta_model(config, precision.weights, trust_remote_code)
    find_head(model)
    weights = _bytes([*model.parameters(), *model.buffers()])
    if peft_config is not None:
        with torch.device("meta"):
            model = with_adapter(model, peft_config)
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        if peft_config is not None:
            model.enable_input_require_grads()
    reference = None
    if has_reference and reference_config is not None:
        reference = meta_model(reference_config, precision.weights, trust_remote_code).requires_grad_(False)
        weights = _bytes([*reference.parameters(), *reference.buffers()])
    chosen: set[str] = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for each in filter(None, (model, reference)):
            _make_fake(each)
        setting = _Setting(ratios, precision, accumulates, runs_reference, backends, chosen)
        try:
            for sizes in (PROBED_ROWS, TRACED_ROWS):
                (small, small_kept), (large, large_kept) = (_trace(model, reference, n, setting) for n in sizes)
                if len(small) != len(large):
                    name = type(model).__name__
                    raise ValueError(f"{name} does not run the same operations on batches of different sizes")
        except (RuntimeError, NotImplementedError) as error:  # some routers and kinds of RoPE depend on values
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{type(model).__name__} can't be run without the values of its weights: {why}") from error
        trained = [p for p in model.parameters() if p.requires_grad]
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        return Memory(
            weights=_bytes([*model.parameters(), *model.buffers()]),
            reference=weights if has_reference else 0,
            gradients=_bytes(trained),
            optimizer=_optimizer_bytes(optimizer, _bytes(trained), precision.weights.itemsize),
            kept_per_row=(large_kept - small_kept) / (TRACED_ROWS[1] - TRACED_ROWS[0]),
            workspace_per_row=ratios.targets * vocabulary * precision.compute.itemsize,
            timeline=_upper_envelope({_line(*pair) for pair in zip(small, large, strict=True)}),
            attention=tuple(sorted(chosen)),
            head_workspace=head_workspace,
        )


def meta_model(config: Any, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """Return the causal LM that `config` describes, on the meta device, without weights."""
    options = {"attn_implementation": NAME, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return auto_class(config).from_config(copy.deepcopy(config), **options)  # a copy, for it is changed


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU, where autocast works; tied weights stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # a kept tensor's id is not reused
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
    backends: Usable
    chosen: set[str]


class Moment(NamedTuple):
    """Bytes alive after an operation, without the persistent ones, as a straight line in the rows."""

    per_row: float
    fixed: float
    workspaces: int
    """Number of the head's workspaces alive: one that it keeps for its backward, one in which it works."""


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed."""

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


def _trace(model: Any, reference: Any | None, rows: int, setting: _Setting) -> tuple[list[tuple[int, int]], int]:
    """Run a step on fake tensors; return bytes and workspaces alive after each operation, and bytes the body keeps."""
    ratios, precision = setting.ratios, setting.precision
    known = [x for each in (model, reference) if each is not None for x in (*each.parameters(), *each.buffers())]
    alive = 0
    for parameter in model.parameters():
        parameter.grad = None
        if setting.accumulates and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
            alive += parameter.grad.nbytes
    layer = {
        "memory_paths": torch.zeros(round(rows * ratios.paths), dtype=torch.int64),
        "memory_grid": torch.zeros(round(rows * ratios.grid), dtype=torch.int64),
        "memory_backends": setting.backends,
        "memory_chosen": setting.chosen,
    }
    with _Live(iter(known), alive) as live:
        ids = torch.zeros(1, rows, dtype=torch.int64)
        index = torch.zeros(round(rows * ratios.targets), dtype=torch.int64)

        def body(scored: Any) -> tuple[Tensor, Any]:
            head, mask = find_head(scored), torch.ones_like(ids)
            out = head.decoder(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, **layer)
            return out[0][0], base_linear(head.linears[-1])  # the last one is the copy that is trained, if there is one

        with torch.autocast("cpu", precision.autocast) if precision.autocast else nullcontext():
            hidden, lm_head = body(model)
            kept = live.alive
            scores = _score(hidden, index, lm_head, precision, live)
            del hidden
            if setting.runs_reference:
                with torch.no_grad():
                    hidden, lm_head = body(model if reference is None else reference)
                    _score(hidden, index, lm_head, precision, live)
                    del hidden
        scores.sum().backward()
    return live.moments, kept


def _score(hidden: Tensor, index: Tensor, lm_head: nn.Linear, precision: Precision, live: _Live) -> Tensor:
    weight = lm_head.weight.to(precision.compute)
    scores: Tensor = HeadMemory.apply(hidden.index_select(0, index).to(precision.compute), weight, live)
    return scores


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_bytes(optimizer: str, trained: int, itemsize: int) -> int:
    """Return the bytes of the optimizer's state, by the optimizer's name in `TrainingArguments.optim`."""
    states = next((count for name, count in STATES.items() if name in optimizer), STATES["adamw"])
    return states * trained // (itemsize if "8bit" in optimizer else 1)


def _upper_envelope(moments: set[Moment]) -> tuple[Moment, ...]:
    """Return the moments that have the most bytes at some number of rows, for each number of workspaces."""
    envelope: list[Moment] = []
    for workspaces in range(3):
        hull: list[Moment] = []
        for line in sorted(m for m in moments if m.workspaces == workspaces):
            # the last line is nowhere the highest: `line` is above it, or passes the one before it earlier
            while hull and (
                line.fixed >= hull[-1].fixed or (len(hull) > 1 and _meet(hull[-2], line) <= _meet(hull[-2], hull[-1]))
            ):
                hull.pop()
            hull.append(line)
        envelope += hull
    return tuple(envelope)


def _meet(a: Moment, b: Moment) -> float:
    """Return the number of rows at which b, the steeper line, reaches a."""
    return (a.fixed - b.fixed) / (b.per_row - a.per_row)


def _line(small: tuple[int, int], large: tuple[int, int]) -> Moment:
    """Return the straight line through one operation's bytes in two steps."""
    per_row = (large[0] - small[0]) / (TRACED_ROWS[1] - TRACED_ROWS[0])
    return Moment(per_row, large[0] - per_row * TRACED_ROWS[1], large[1])

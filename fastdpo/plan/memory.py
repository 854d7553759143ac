"""How much memory a training step will take, computed before anything is loaded.

A model with fake weights (shapes and dtypes, no memory) runs one step forward and backward on fake tensors, and every
storage that comes to life or dies is counted. Two steps of different size give, for each operation of the step, the
bytes alive as a straight line in the rows of the batch:

    alive[i](T) = fixed[i] + per_row[i] * T        peak(T) = max over i of alive[i](T) + what is always there

So gradient checkpointing, autocast's copies, tied embeddings and adapters need no formulas of their own. Attention and
head are stand-ins (`fastdpo.plan.stand_ins`), and the head's workspace is the bound it promises. Not counted:
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
from transformers import AutoModelForCausalLM

from fastdpo.head.impl.interface import WORKSPACE_BYTES
from fastdpo.model.adapters import peft_is_older
from fastdpo.model.attention.backends import Usable
from fastdpo.model.scoring_forward import find_head
from fastdpo.plan.stand_ins import NAME, HeadMemory

PROBED_ROWS = (32, 64)  # where layers that loop over the tokens are found out, which would take minutes of the next:
TRACED_ROWS = (1024, 2048)
ANY_BACKEND = Usable("auto", {})

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
    attention: tuple[str, ...] = ()
    """Backends that the layers would have."""

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
    reference_config: Any | None = None,
    backends: Usable = ANY_BACKEND,
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
        reference_config: of that second model, where it is another than the policy.
        backends: of attention, that the device can have.
        trust_remote_code: for models that come with their own code.

    Raises:
        ValueError: packed batches are not exact on the model, it can't have the attention backend asked for, or it
            can't run without its weights' values.
    """
    model = meta_model(config, precision.weights, trust_remote_code)
    find_head(model)
    weights = _bytes([*model.parameters(), *model.buffers()])
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"), peft_is_older():
            model = get_peft_model(model, peft_config)
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
        except (RuntimeError, NotImplementedError) as error:  # what depends on values: some routers, some RoPE
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{type(model).__name__} can't be run without its weights' values: {why}") from error
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
    backends: Usable
    chosen: set[str]


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


def _trace(model: Any, reference: Any | None, rows: int, setting: _Setting) -> tuple[list[tuple[int, int]], int]:
    """Run one step on fake tensors: bytes and workspaces alive after each operation, bytes that the body keeps."""
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

        def body(scored: Any) -> tuple[Tensor, nn.Linear]:
            head, mask = find_head(scored), torch.ones_like(ids)
            linear: Any = head.linears[-1]  # with PEFT's modules_to_save the trained one
            out = head.decoder(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, **layer)
            return out[0][0], linear if isinstance(linear, nn.Linear) else linear.get_base_layer()

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

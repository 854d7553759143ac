"""The cases of the head's benchmark: shapes of well-known models, made small enough for the machine.

N, D and V of a model are divided by one number, so that the logits keep their size relative to the hidden states and
the weight. `divisor` computes it.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.benchmarks.harness import DEVICE

ROWS = 8192
"""N of a model's case before it is divided: the completion tokens of a large batch."""
MODELS = {
    "llama-3-8b": (4096, 128256),
    "gemma-3-1b": (1152, 262144),
    "qwen3-0.6b": (1024, 151936),
    "gpt2": (768, 50257),
    "smollm2-135m": (576, 49152),
}
"""D and V of the models whose shapes are measured."""
SMALL_LM = (2048, 256, 8192)
"""N, D and V of the rows of a small language model that is trained here, see `fastdpo.benchmarks.small_lm`."""
WORK = 2**35
"""Largest N * D * V for each thread of a CPU, on which one forward takes about a second then."""
BYTES = 16
"""For each entry of the weight: in float32 and in float64, and a gradient in float32."""
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """The sizes and settings that the variants are compared on."""

    N: int
    D: int
    V: int
    dtype: str = "bfloat16"
    frozen: bool = False
    inputs: str = "peaked"
    """Where the rows come from, see `fastdpo.benchmarks.head.rows.make_inputs`."""
    model: str | None = None
    """The model whose shape this is, after a division."""

    @property
    def pairs(self) -> int:
        """The number of pairs whose responses the rows are: two responses of one length each, of about 128 rows."""
        return next(pairs for pairs in range(max(self.N // 256, 1), 0, -1) if self.N % (2 * pairs) == 0)

    @property
    def key(self) -> dict[str, Any]:
        shape = {"N": self.N, "D": self.D, "V": self.V}
        return {
            "model": self.model,
            "shape": shape,
            "dtype": self.dtype,
            "frozen": self.frozen,
            "inputs": self.inputs,
        }

    def __str__(self) -> str:
        name = "" if self.model is None else f"{self.model} / {MODELS[self.model][0] // self.D}: "
        head = "frozen" if self.frozen else "trained"
        return f"{name}N={self.N} D={self.D} V={self.V} {self.dtype}, {head} head, {self.inputs} rows"


def divisor(D: int, V: int) -> int:
    """Return the smallest power of two by which N, D and V must be divided on this machine.

    On a CPU, N * D * V is at most `WORK` for each thread. On any device, `BYTES` for each entry of the weight are at
    most half of its memory.
    """
    if DEVICE == "cuda":
        memory, work = torch.cuda.get_device_properties(0).total_memory, None
    else:
        memory, work = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), WORK * torch.get_num_threads()
    by = 1
    while BYTES * D * V / by**2 > memory / 2 or (work is not None and ROWS * D * V / by**3 > work):
        by *= 2
    return by


def shape_of(model: str) -> tuple[int, int, int]:
    """Return N, D and V of a model of `MODELS`, divided for this machine."""
    D, V = MODELS[model]
    by = divisor(D, V)
    return ROWS // by, D // by, V // by


def rows_that_fit(D: int, V: int) -> int:
    """Return N for a weight that can't be divided: the largest power of two whose work is small enough."""
    most = ROWS if DEVICE == "cuda" else min(ROWS, WORK * torch.get_num_threads() // (D * V))
    return max(1 << (most.bit_length() - 1), 2)


def case_lists() -> dict[str, list[Case]]:
    """Return the lists of cases that `--cases` names: the most telling ones come first, in case the time runs out."""
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    llama = shape_of("llama-3-8b")
    models = [Case(*shape_of(name), dtype, frozen, model=name) for name in MODELS for frozen in (True, False)]
    if DEVICE == "cpu":  # where users train in float32, and plain PyTorch multiplies bfloat16 faster
        models[2:2] = [Case(*llama, "bfloat16", frozen, model="llama-3-8b") for frozen in (True, False)]
    trained = [Case(*SMALL_LM, dtype, frozen, "small-lm") for frozen in (True, False)]
    flat = [Case(*llama, dtype, frozen, "flat", model="llama-3-8b") for frozen in (True, False)]
    return {
        "smoke": [Case(32, 16, 500), Case(32, 16, 500, "float32", frozen=True, inputs="flat")],
        "models": [*models, *trained, *flat],
    }

"""Compute the memory and the communication of each GPU for large models, and write the tables of docs/scaling.md.

    python -m benchmarks.studies.scaling            # trace the models again (minutes), and write both files
    python -m benchmarks.studies.scaling --table    # write the tables from the traces in the repository

Nothing is measured and no weights are made. What does not depend on the batch comes from the sizes of all weights
(`fastdpo.plan.resident`), and activations from traces of a step (`fastdpo.plan.tracing.depth`).
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from fastdpo.benchmarks.report import replace
from fastdpo.model.adapters import with_adapter
from fastdpo.plan.memory import memory_model, meta_model
from fastdpo.plan.resident import Job, Resident, resident, units_of
from fastdpo.plan.tracing.trace import Precision, Ratios

ROOT = Path(__file__).parents[2]
PAGE, TRACES = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/computed/scaling.json"
MARK = "<!-- python -m benchmarks.studies.scaling {} the tables of memory and communication -->\n"

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Of Llama 3."""
TUNINGS = {"full": Precision(torch.float32, torch.bfloat16), "LoRA": Precision(torch.bfloat16, torch.bfloat16)}
STRATEGIES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
GPUS = (1, 8, 64, 256, 1024)
ROWS = 16384
RATIOS = Ratios(paths=1.3, targets=0.6, grid=1.5)
GIB, GB = 2**30, 10**9


def config_of(model: str) -> LlamaConfig:
    """Return the config of a model."""
    return LlamaConfig(vocab_size=128256, num_key_value_heads=8, **SHAPES[model])


def adapter_of(tuning: str) -> Any:
    """Return LoRA of rank 16 on all linear layers but the head; None for full fine-tuning."""
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if tuning == "LoRA" else None


def traced(model: str, tuning: str, sharded: bool) -> float:
    """Return the most bytes of activations at any moment of a step."""
    memory = memory_model(
        config_of(model),
        RATIOS,
        precision=TUNINGS[tuning],
        peft_config=adapter_of(tuning),
        has_reference=tuning == "full",
        job=Job("fsdp2") if sharded else Job(micro_batches=2),  # whose gradients are there from the start
    )
    return memory.peak(ROWS) - memory.persistent - memory.gradients


@functools.cache
def units(model: str, tuning: str) -> tuple[Any, Any]:
    """Return the units of weights of a policy and of its reference, with all layers."""
    whole = meta_model(config_of(model), TUNINGS[tuning].weights)
    others = units_of(whole.requires_grad_(False)) if tuning == "full" else []
    whole.requires_grad_(True)
    if tuning == "LoRA":
        with torch.device("meta"):
            whole = with_adapter(whole, adapter_of(tuning))
    return units_of(whole), others


def resident_of(model: str, tuning: str, strategy: str, gpus: int, *, precomputed: bool = False) -> Resident:
    """Return what each GPU holds whatever the batch."""
    policy, reference = units(model, tuning)
    return resident(
        policy,
        [] if precomputed else reference,
        job=Job(strategy, gpus),
        optimizer="adamw_torch_fused",
        compute=torch.bfloat16,
        upcasts=True,
        runs_reference=not precomputed,
    )


def rows_of(traces: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of memory, in GiB, and of communication, in GB."""
    for model in SHAPES:
        for tuning in TUNINGS:
            for precomputed in (False, True) if tuning == "full" else (False,):
                for strategy, name in STRATEGIES.items():
                    cells = []
                    needed = traces[model][tuning]["whole" if strategy == "ddp" else "sharded"]
                    for gpus in GPUS:
                        parts = resident_of(model, tuning, strategy, gpus, precomputed=precomputed)
                        total = parts.weights + parts.reference + parts.gradients + parts.optimizer + parts.buffers
                        sent = f"{parts.sent / GB:,.{parts.sent < 10 * GB:d}f}" if gpus > 1 else "0"
                        cells.append(f"{(total + needed) / GIB:,.0f} ({sent})")
                    label = "precomputed" if precomputed else "a copy" if tuning == "full" else "adapter off"
                    yield (model, tuning, label, name, *cells)


def table(traces: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    head = ("model", "tuning", "reference", "strategy", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS))
    lines = [head, ("---",) * len(head), *rows_of(traces)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(traces: dict[str, Any]) -> None:
    """Replace the table in the page."""
    replace(PAGE, MARK.format("writes"), MARK.format("has written"), f"\n{table(traces)}\n")


def main() -> None:
    """Trace the models, or read the traces, and write the page."""
    parser = argparse.ArgumentParser(description="Write the table of docs/scaling.md.")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    if not parser.parse_args().table:
        traces = {
            model: {
                tuning: {kind: traced(model, tuning, kind == "sharded") for kind in ("whole", "sharded")}
                for tuning in TUNINGS
            }
            for model in SHAPES
        }
        TRACES.parent.mkdir(parents=True, exist_ok=True)
        TRACES.write_text(json.dumps(traces, indent=1) + "\n")
    write(json.loads(TRACES.read_text()))


if __name__ == "__main__":
    main()

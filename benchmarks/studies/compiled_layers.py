"""Count what torch.compile compiles in 30 batches of different lengths, and time a step beside the plain layers.

    python -m benchmarks.studies.compiled_layers count    # a model of 2 small layers
    python -m benchmarks.studies.compiled_layers time     # 6 layers of SmolLM2-135M's size, compiled by inductor

Each prints what it found, and `--out FILE` writes it as JSON. `count` compares the layers alone, as `torch_compile:
true` compiles them, with all lengths left to be variables and with one compilation for each, both with and without
`few_lengths`, and with the whole model, as accelerate compiles it. Graphs are counted, and batches after which the
count rose. `time` alternates steps (forward and backward with recomputing) and compares the least process time of each
side; it needs a C++ compiler.
"""

import argparse
import copy
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import shared_prefix_batch
from fastdpo.benchmarks.harness import save
from fastdpo.model.scoring_forward import compile_layers, patch_forward

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}
VOCAB = 512
WAYS: dict[str, dict[str, Any]] = {
    "the layers, as `torch_compile: true` does": {},
    "the layers, with `few_lengths`": {"few": True},
    "the layers, with `dynamic=False`": {"dynamic": False},
    "the layers, with `dynamic=False` and `few_lengths`": {"dynamic": False, "few": True},
    "the whole model, as accelerate does": {"whole": True},
}
"""What is compiled, as docs/how_it_works.md names it."""


def make_model(sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"], vocab_size=VOCAB)
    model = LlamaForCausalLM(config).train()
    patch_forward(model)
    return model


def make_batch(lengths: random.Random, pairs: int, median: float, *, few: bool) -> dict[str, Any]:
    def ids(least: int) -> list[int]:
        return [lengths.randrange(3, VOCAB) for _ in range(least + round(lengths.lognormvariate(0, 0.6) * median))]

    examples = [{"prompt_ids": ids(1), "chosen_ids": ids(2), "rejected_ids": ids(2)} for _ in range(pairs)]
    return shared_prefix_batch(examples, few_lengths=few)


def step(model: Any, batch: dict[str, Any]) -> float:
    scores = model(**batch)
    scores.logps.mean().backward()
    model.zero_grad()
    return float(scores.logps.detach().mean())


def count(batches: int = 30) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        torch._dynamo.reset()
        counters.clear()
        model, lengths = make_model(SMALL), random.Random(1)
        called, options = model, {"backend": "eager"} | {key: way[key] for key in way if key == "dynamic"}
        if way.get("whole"):
            called = torch.compile(model, **options)
        else:
            compile_layers(model, **options)
        graphs, rows, filled = [], set(), 0
        for _ in range(batches):
            batch = make_batch(lengths, 4, 250, few=way.get("few", False))
            step(called, batch)
            graphs.append(counters["stats"]["unique_graphs"])
            rows.add(batch["input_ids"].shape[1])
            filled += batch["input_ids"].shape[1] - batch["num_packed_tokens"]
        rises = sum(after > before for before, after in zip([0, *graphs], graphs, strict=False))
        found[name] = {"graphs": graphs[-1], "batches_that_compiled": rises, "lengths": len(rows), "filling": filled}
        print(name, found[name], file=sys.stderr, flush=True)
    return {"batches": batches, "ways": found}


def timed(rounds: int = 5) -> dict[str, Any]:
    plain = make_model(SMOLLM2)
    for layer in plain.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend="inductor")
    batch = make_batch(random.Random(2), 2, 150, few=False)
    start = time.perf_counter()
    first = step(compiled, batch)
    compiling = time.perf_counter() - start
    error = abs(first - step(plain, batch))
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(rounds):
        for name, model in (("plain", plain), ("compiled", compiled)):
            start = time.process_time()
            step(model, batch)
            seconds[name].append(time.process_time() - start)
    least = {name: min(each) for name, each in seconds.items()}
    return {
        "rows": batch["input_ids"].shape[1],
        "first_step_seconds": round(compiling, 1),
        "mean_logp_error": error,
        "process_seconds": {name: [round(x, 3) for x in each] for name, each in seconds.items()},
        "ratio_of_minima": round(least["plain"] / least["compiled"], 3),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "time"), help="Count compilations, or time a step.")
    parser.add_argument("--out", type=Path, help="JSON file to which the result is written (default: none).")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = count() if args.what == "count" else timed()
    print(json.dumps(found, indent=1))
    if args.out:
        save(args.out, found)


if __name__ == "__main__":
    main()

"""Measure where the time of a training step goes, by the part of the model and the pass over it.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.step_profile parts tldr hh ultrafeedback --out parts.json
    OMP_NUM_THREADS=1 python -m benchmarks.studies.step_profile removed tldr hh ultrafeedback --out removed.json

The model is llama-20m of `fastdpo bench training`, with 4 pairs a step of the lengths named and all layers recomputed.
Each operation of one step is timed by the time that the process spends on the CPU. It belongs to the innermost part
that is running or, in the backward pass, to the part that made its node of the graph. `removed` compares two things
with what they were before, in turns: the rows that fill batches up, and the scores and the time of attention, forward
and backward. The time is the least of all rounds.
"""

import argparse
import contextlib
import functools
import json
import random
import tempfile
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PrinterCallback, TrainerCallback
from transformers.models.llama import modeling_llama

from fastdpo import DPOConfig, DPOTrainer, shared_prefix_batch
from fastdpo.benchmarks import harness, lengths
from fastdpo.benchmarks.training_cases import Case, dataset, make_model, make_tokenizer, rows
from fastdpo.model import body_and_head
from fastdpo.model.attention import backends, key_paths, registered

MODULES = {
    "Attention": "attention, projections",
    "MLP": "MLP",
    "Norm": "norms",
    "Rotary": "RoPE",
    "Embedd": "embedding",
}
"""The part of a module, by what its class is called."""
SHARED: dict[tuple[Any, str], str] = {
    (body_and_head, "fused_scores"): "head",
    (backends, "gather"): "attention, gathers",
    (backends, "_bucket"): "attention, scores",
    (modeling_llama, "apply_rotary_pos_emb"): "RoPE",
}
"""The part of a function, by the module that has it; both models call it, so it stays wrapped."""
PASSES = ("forward", "recomputed", "backward", "reference", "once")
KINDS = ("seconds", "operations", "flops", "reads")
"""What is added up for each part and pass; reads are those by the host."""


class Profile(TorchDispatchMode):
    """Adds up seconds, operations, floating-point operations of matmuls and reads by the host, by part and pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.where = "others", "once"
        self.made = [(0, "others")]  # the part that makes the nodes of the graph from this number on
        self.found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
        self.batch: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part, where, node = self.part, self.where, torch._C._current_autograd_node()
        if where == "backward" and torch.is_grad_enabled():
            where = "recomputed"
        elif where == "backward" and node is not None:
            part = self.made[bisect(self.made, (node._sequence_nr(), "~")) - 1][1]
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)(*args, **(kwargs or {}), out_val=out)
        for i, x in enumerate((seconds, 1, flops, "_local_scalar_dense" in str(func))):
            self.found[part, where][i] += x
        return out

    @contextlib.contextmanager
    def during(self, part: str, where: str) -> Iterator[None]:
        before = self.part, self.where
        self.part, self.where = part, where if self.where == "once" else self.where
        self._mark()
        try:
            yield
        finally:
            self.part, self.where = before
            self._mark()

    def _mark(self) -> None:
        if torch.is_grad_enabled():
            self.made.append((_get_sequence_nr(), self.part))

    def wrap(self, owner: Any, name: str, part: str, where: str = "once") -> None:
        """Let all calls of a function count as this part and, unless another has begun, as this pass."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.during(part, where):
                return function(*args, **kwargs)

        setattr(owner, name, call)

    def watch(self, trainer: Any) -> None:
        """Name the parts of a trainer's step."""
        for model in (trainer.model, trainer.ref_model):
            for module in model.modules():
                for name, part in MODULES.items():
                    if name in type(module).__name__:
                        self.wrap(module, "forward", part)
            self.wrap(model.get_decoder(), "forward", "residuals", "forward")
        for (owner, name), part in SHARED.items():
            self.wrap(owner, name, part, "forward")
        self.wrap(trainer, "get_batch_samples", "data")
        self.wrap(trainer, "compute_loss", "loss and metrics")
        self.wrap(trainer, "_reference_logps", "others", "reference")
        self.wrap(trainer.accelerator, "backward", "others", "backward")
        self.wrap(trainer, "_get_grad_norm", "optimizer")
        self.wrap(trainer.model, "zero_grad", "optimizer")


class Second(TrainerCallback):
    """Runs the second step inside a profile, or times it without one."""

    def __init__(self, profile: Profile | None) -> None:
        self.profile, self.seconds = profile, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.seconds = time.process_time() - self.seconds
        control.should_training_stop = state.global_step == 2  # before the last step, which is logged
        if self.profile is not None and state.global_step == 1:
            self.profile.wrap(optimizer, "step", "optimizer")
            self.profile.__enter__()
        elif self.profile is not None:
            self.profile.__exit__(None, None, None)


def second_step(case: Case, profile: Profile | None = None) -> float:
    """Train two steps, and return the seconds of the second."""
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, max_steps=3, per_device_train_batch_size=case.pairs, max_length=case.max_length,
            gradient_checkpointing=True, precompute_ref_log_probs=False, use_cpu=True, disable_tqdm=True, report_to=[],
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(
            make_model(case.model, "float32", 0),
            make_model(case.model, "float32", 1),
            args,
            train_dataset=dataset(case),
            processing_class=make_tokenizer(case.model),
        )
        watch = Second(profile)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        if profile is not None:
            profile.watch(trainer)
        trainer.train()
        return watch.seconds


def parts(name: str, model: str = "llama-20m") -> dict[str, Any]:
    """Return the seconds of a step that is not watched, and what was added up for each part of one that is."""
    case, profile = Case(model, name, steps=2), Profile()
    found: dict[str, Any] = {"plain_seconds": second_step(case), "parts": {}}
    second_step(case, profile)
    for (part, where), numbers in sorted(profile.found.items()):
        found["parts"].setdefault(part, {})[where] = dict(zip(KINDS, numbers, strict=True))
    return found


def as_before(paths: list[int], own: list[int]) -> Any:
    """Return the buckets of a grid as they were: all places of a path are queries unless its own rows are a few."""
    places, queries, shapes, firsts, place, first = [0] * len(own), [], [], [0] * len(own), 0, 0
    up = [(-(-n // 32) * 32, -(-q // 32) * 32) for n, q in zip(paths, own, strict=True)]
    up = [(n, q if 2 * q < n else n) for n, q in up]
    for length, count in sorted(set(up), reverse=True):
        for i in (i for i, each in enumerate(up) if each == (length, count)):
            places[i], place = place, place + length
            firsts[i], first = first + (paths[i] - own[i] if count == length else 0), first + count
        shapes.append((up.count((length, count)), length))
        queries.append(count)
    return tuple(shapes), places, tuple(queries), firsts


@contextlib.contextmanager
def before() -> Iterator[None]:
    """Inside the block, attention computes what it did before."""
    settings: list[tuple[Any, str, Any]] = [
        (key_paths, "_own_buckets", as_before),
        (backends, "MOST_QUERIES", 2**30),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for setting in settings:
            setattr(*setting)
        yield
    finally:
        for setting in kept:
            setattr(*setting)


def removed(name: str, batches: int = 10, rounds: int = 7) -> dict[str, Any]:
    """Return what was computed before and is now, of rows, scores and time, relative to what is needed."""
    case = Case("llama-20m", name, steps=batches - 1)
    numbers, ids = lengths.token_counts(rows(case), case.max_length), random.Random(0)
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    examples = [
        {field: ids.choices(range(3, 9999), k=n) for field, n in zip(fields, each, strict=True)} for each in numbers
    ]
    fills = {"before": 64, "now": 8}
    found: dict[str, list[float]] = {way: [0.0] * 3 for way in fills}
    rows_needed = scores_needed = 0
    for at in range(0, len(examples), case.pairs):
        for way, multiple in fills.items():
            batch = shared_prefix_batch(examples[at : at + case.pairs], pad_to_multiple_of=multiple)
            found[way][0] += batch["input_ids"].shape[1]
        own, path = (batch[f"tree_cu_seqlens_{x}"].diff() for x in "qk")
        rows_needed += batch["num_packed_tokens"]
        scores_needed += int((own * path - own * (own - 1) // 2).sum())
        seconds = defaultdict(list)
        for i in range(rounds):
            for way in list(fills)[:: 1 if i % 2 else -1]:
                with before() if way == "before" else contextlib.nullcontext():
                    scores, spent = attention(batch)
                found[way][1] += scores / rounds
                seconds[way].append(spent)
        for way in fills:
            found[way][2] += min(seconds[way])
    return {
        way: {"rows": x[0] / rows_needed, "scores": x[1] / scores_needed, "time": x[2] / found["before"][2]}
        for way, x in found.items()
    }


def attention(batch: dict[str, Any]) -> tuple[int, float]:
    """Run attention with the heads of llama-20m forward and backward; return its scores of a head, and seconds."""
    query, key, value = (
        torch.randn(1, batch["input_ids"].shape[1], h, 64).transpose(1, 2).requires_grad_() for h in (6, 2, 2)
    )
    kept: Any = backends._sdpa
    scores: list[int] = []

    def counted(query: Any, key: Any, *others: Any, **options: Any) -> Any:
        scores.append(query.shape[0] * query.shape[2] * key.shape[2])
        return kept(query, key, *others, **options)

    layer = registered.layer_kwargs(batch)
    backends._sdpa = counted
    start = time.process_time()
    out = registered.attention(torch.nn.Module(), query, key, value, None, **layer)[0]
    torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    seconds = time.process_time() - start
    backends._sdpa = kept
    return sum(scores), seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parts", "removed"), help="What to print.")
    parser.add_argument("lengths", nargs="+", help="Datasets whose lengths the synthetic pairs have.")
    parser.add_argument("--out", type=Path, help="JSON file to which the result is written (default: none).")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    for name in args.lengths:
        found[name] = parts(name) if args.what == "parts" else removed(name)
        print(name, json.dumps(found[name]), flush=True)
    if args.out:
        harness.save(args.out, {"lengths": found})


if __name__ == "__main__":
    main()

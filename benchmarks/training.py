"""Compare whole DPO steps of fastdpo and trl.DPOTrainer: pairs per second, peak memory, and where the time goes.

    fastdpo bench training --model llama-20m --lengths hh
    fastdpo bench training --cases cpu

Every variant trains the same randomly initialised model, against the same reference, on the same rows in the same
order, with the same settings of transformers' Trainer. With --model FOLDER and --pairs-file, the model and the rows are
real, and the reference is the policy as it was loaded. Variants take turns. A turn builds everything, trains a first
step that does not count and then the steps that do, one of them a logging step, and drops everything. On devices that
compile kernels, the first turn of each variant is a rehearsal. Memory is the most that a turn needs beside the two
models' weights: gradients, optimizer state, activations. If there are several turns, the first one does not count,
because it also loads code. Loss and gradient norm are those of the first step, and of a real model's last logged steps.

fastdpo runs as it is, and with one thing switched off at a time: graphs, which share what pairs have in common; sharing
of a pair's prompt; packing, and therefore sharing too; the fused head. Other variants read the reference's log-probs
from a cache that was filled before training, or let fastdpo choose by memory which layers are recomputed
(`gradient_checkpointing=auto`) where all others recompute all of them. Times are split where modules begin and end:
body and head (of the policy, forward and backward), reference, data, and the rest (optimizer, clipping, the Trainer's
loop). On CUDA, events in the stream measure them. With --per-prompt, a step has whole prompts, in the same order in all
variants, so that their losses are equal. The cases of `tokens` bound the tokens of fastdpo's batches, so that its steps
hold other pairs than TRL's, and the ratio is that of the time of a pair.

With --cases, cases that --out already holds from this machine are skipped, so that a second call goes on where the
first was cut off. A variant that cannot run is left out and named. The exit code is 4 if that variant was fastdpo, and
5 if --seconds were over before all cases were measured. The benchmark needs torch, and `fastdpo[bench]` for TRL.
"""

import functools
import gc
import logging
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
import transformers
from datasets import disable_progress_bars

from fastdpo import DPOConfig
from fastdpo.benchmarks import lengths
from fastdpo.benchmarks.harness import (
    DEVICE,
    Measured,
    peak_memory,
    provenance,
    record,
    results_folder,
    rows_of,
)
from fastdpo.benchmarks.peers import first_line
from fastdpo.benchmarks.training_cases import CASES, VARIANTS, Case, Trainer, make_model, make_tokenizer, parse, rows
from fastdpo.report.page import summary_table

PHASES = ("body", "head", "reference", "data", "rest")


class Clock:
    """Adds up the time between marks by phase; on CUDA it is the device's time, read after the last step."""

    of_cpu: ClassVar[bool] = False

    @classmethod
    def now(cls) -> float:
        """Return the clock's seconds, or this process's on all threads of the CPU."""
        return time.process_time() if cls.of_cpu else time.perf_counter()

    def __init__(self) -> None:
        self.phase = "rest"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.phase, self._marks = "rest", []
        self.switch("rest")

    def switch(self, phase: str) -> str:
        """Count the time from now on as that of `phase`, and return the phase before."""
        before, self.phase = self.phase, phase
        if DEVICE == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = 1e3 * self.now()
        self._marks.append((phase, now))
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.switch(phase)
        yield
        self.switch(before)

    def read(self) -> dict[str, float]:
        """Return the milliseconds by phase, from the start to the last mark."""
        totals: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] += start.elapsed_time(end) if DEVICE == "cuda" else end - start
        return {phase: totals[phase] for phase in PHASES}


def watch(trainer: Any, clock: Clock, laps: "Laps | None" = None) -> None:
    """Mark where the parts of a step begin and end, in a trainer of any variant, and count its pairs.

    Where an adapter is trained, the reference is the policy without it, and its time is that of body and head.
    """

    def into(phase: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            clock.switch(phase)

        return mark

    def body_done(_module: Any, _args: Any, output: Any) -> None:
        clock.switch("head")
        if output[0].requires_grad:  # the head's backward ends when this gradient is there
            output[0].register_hook(into("body"))

    decoder: Any = trainer.model.get_decoder()
    decoder.register_forward_pre_hook(into("body"))
    decoder.register_forward_hook(body_done)
    trainer.model.register_forward_hook(into("rest"))
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(into("reference"))
        trainer.ref_model.register_forward_hook(into("rest"))

    def timed(phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.during(phase):
                return fn(*args, **kwargs)

        return call

    batches = timed("data", trainer.get_batch_samples)

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = batches(*args, **kwargs)
        if laps is not None:
            laps.count(found[0])
        return found

    trainer.get_batch_samples = counted
    trainer.accelerator.backward = timed("head", trainer.accelerator.backward)


class Laps(transformers.TrainerCallback):
    """Times the steps after the first, and counts them and their pairs."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.began, self.ms, self.steps, self.pairs = clock, 0.0, 0.0, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in (1, state.max_steps):
            return
        if state.global_step == state.max_steps:
            self.clock.switch("rest")
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if state.global_step == 1:
            self.clock.start()
            self.began, self.pairs = self.clock.now(), 0
        else:
            self.ms, self.steps = 1e3 * (self.clock.now() - self.began), state.max_steps - 1

    def count(self, batch_samples: Any) -> None:
        """Add the pairs of a step's batches, of fastdpo or of TRL."""
        for batch in batch_samples:
            self.pairs += len(batch["pair_index"]) if "pair_index" in batch else len(batch["input_ids"]) // 2


@dataclass(frozen=True)
class Turn:
    """The time and memory of one turn of a variant, and the loss and gradient norm that it computed."""

    ms: float
    steps: int
    pairs: int
    peak_mib: float
    split: dict[str, float]
    loss: float
    grad_norm: float


def turn(case: Case, make: Trainer) -> Turn:
    """Build a trainer, train, and drop everything."""
    dtype = case.dtype
    # transformers 5.18 gave it another name
    checkpointing = "activation" if hasattr(DPOConfig, "activation_checkpointing") else "gradient"
    tokenizer = make_tokenizer(case.model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL calls what newer versions of transformers rename
        settings: dict[str, Any] = {
            "output_dir": folder,
            **({"num_train_epochs": 1} if case.tokens else {"max_steps": case.steps + 1}),
            "per_device_train_batch_size": case.pairs,
            "max_length": case.max_length,
            f"{checkpointing}_checkpointing": case.checkpointing,
            f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
            "bf16": dtype == "bfloat16",
            "use_cpu": DEVICE == "cpu",
            "dataloader_pin_memory": DEVICE == "cuda",
            "logging_steps": case.steps,
            "logging_first_step": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        if case.per_prompt > 1 or case.is_real:  # whole prompts in each step, the same rows for all variants
            settings["train_sampling_strategy"] = "sequential"
        if case.is_real:  # every trainer makes the reference from the policy
            settings |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant"}
        # two models that differ, so that the losses say whether all variants compute the same
        model = make_model(case.model, dtype, 0)
        ref_model = None if case.is_real else make_model(case.model, dtype, 1)
        trainer = make(case, model, ref_model, tokenizer, settings)
        clock = Clock()
        laps = Laps(clock)
        trainer.add_callback(laps)
        trainer.remove_callback(transformers.PrinterCallback)
        watch(trainer, clock, laps)
        peak = peak_memory(trainer.train)
        logged = [each for each in trainer.state.log_history if "loss" in each]
        # the first loss of a policy that is its own reference is ln 2 in any case
        told = logged[1 if case.is_real else 0]
        return Turn(laps.ms, laps.steps, laps.pairs, peak, clock.read(), told["loss"], told["grad_norm"])


def clean() -> None:
    """Collect what a turn has left, because a trainer is full of reference cycles."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def run(case: Case, variants: dict[str, Trainer], repetitions: int) -> list[dict[str, Any]]:
    """Measure the variants that can run, and return one row of results for each."""
    turns: dict[str, list[Turn]] = {name: [] for name in variants}
    left_out = set()
    rehearsals = 1 if DEVICE == "cuda" else 0
    for repetition in range(rehearsals + repetitions):
        for name in list(variants)[:: -1 if repetition % 2 else 1]:
            if name in left_out:
                continue
            try:
                turns[name].append(turn(case, variants[name]))
            except Exception as error:  # a peer may fail in any way, and our own must not stop the others
                print(f"left out: {name}: {first_line(error)}", flush=True)
                left_out.add(name)
            clean()
    timed = {name: laps[rehearsals:] for name, laps in turns.items() if name not in left_out}
    measured = {
        # the first turn also holds what is imported on first use, 10 MiB or more
        name: Measured([lap.ms for lap in laps], max(lap.peak_mib for lap in laps[1:] or laps))
        for name, laps in timed.items()
    }
    tokens = None
    if not case.is_real:
        tokens = sum(2 * p + c + r for p, c, r in lengths.token_counts(rows(case), case.max_length))
    count = case.pairs * (case.steps + 1)

    def row(name: str) -> dict[str, Any]:
        m, laps = measured[name], timed[name]
        trl = measured.get("TRL")
        speed = 1e3 * laps[0].pairs / m.ms
        ratio = None if trl is None else m.ratio_to(trl) * timed["TRL"][0].pairs / laps[0].pairs
        return {
            "op": "dpo_step",
            "impl": name,
            **case.key,
            "ms": m.ms,
            "min_ms": m.min_ms,
            "times_ms": m.times,
            "ratio_to_trl": ratio,  # of the time of a pair
            "pairs_per_second": speed,
            # which rows the first step takes is up to the sampler, so this is by the mean of all rows
            "tokens_per_second": None if tokens is None else speed * tokens / count,
            "peak_mib": m.peak_mib,
            "split_ms": {phase: median(lap.split[phase] for lap in laps) / laps[0].steps for phase in PHASES},
            "loss": laps[0].loss,
            "grad_norm": laps[0].grad_norm,
        }

    return [row(name) for name in timed]


def table(results: list[dict[str, Any]]) -> str:
    headers = (
        "",
        "pairs/s",
        "tokens/s",
        "times TRL",
        "peak MiB",
        *(f"{phase} ms" for phase in PHASES),
        "loss",
        "grad norm",
    )
    lines = [
        (
            row["impl"],
            f"{row['pairs_per_second']:.2f}",
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            "-" if row["ratio_to_trl"] is None else f"{1 / row['ratio_to_trl']:.2f}",
            f"{row['peak_mib']:.0f}",
            *(f"{row['split_ms'][phase]:.0f}" for phase in PHASES),
            f"{row['loss']:.5f}",
            f"{row['grad_norm']:.5f}",
        )
        for row in results
    ]
    return summary_table(lines, headers)


def main(argv: list[str] | None = None) -> None:
    args, one = parse(sys.argv[1:] if argv is None else argv, __doc__)
    args.out = args.out or results_folder() / "training.jsonl"
    record(args.out, [])  # so that a file that can't be written shows before hours of measuring
    Clock.of_cpu = args.cpu_time
    where = provenance() | ({"time": "of the CPU"} if args.cpu_time else {})
    print(f"results: {args.out}\n{', '.join(f'{name}: {value}' for name, value in where.items())}", flush=True)
    here = [row for row in rows_of(args.out) if row["provenance"]["machine"] == where["machine"]]
    variants = {name: VARIANTS[name] for name in args.variants}
    disable_progress_bars()
    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    failed, start, longest = False, time.monotonic(), 0.0
    for case in CASES[args.cases] if args.cases else [one]:
        if args.cases and any(case.key.items() <= row.items() for row in here):
            print(f"{case}: measured before")
            continue
        began = time.monotonic()
        if began - start + longest > args.seconds:
            print(f"{case}: no time left")
            sys.exit(5)
        found = [row | {"provenance": where} for row in run(case, variants, args.repetitions)]
        failed |= not {name for name in variants if not name.startswith("TRL")} <= {row["impl"] for row in found}
        print(f"{case}\n{table(found) if found else 'no variant could be measured'}", flush=True)
        record(args.out, found)
        longest = max(longest, time.monotonic() - began)
    if failed:
        sys.exit(4)

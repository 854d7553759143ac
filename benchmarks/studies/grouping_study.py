"""Compare trainings with and without `group_by_prompt`, on the same pairs, over several seeds.

    python -m benchmarks.studies.grouping_study --out benchmarks/results/cpu-2-cores/grouping.json
    python -m benchmarks.studies.grouping_study --pairs 32 --out benchmarks/results/cpu-2-cores/grouping-32.json
    python -m benchmarks.studies.grouping_study --table benchmarks/results/cpu-2-cores/grouping.json

The task has four pairs of each prompt, over four responses. Each word has a worth, which no model is told; of two
responses, the one whose words are worth more is chosen, but for one pair in ten, whose label is flipped. All runs see
the same number of pairs in steps of eight (or --pairs), in one epoch. Runs differ in their seed (of model, data and
order), and in whether the four pairs of a prompt are in one step (grouped) or wherever chance puts them. Held-out pairs
have other prompts and responses, and no flipped labels.
"""

import argparse
import json
import logging
import random
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.benchmarks.harness import provenance
from fastdpo.report.page import summary_table

VOCAB, PROMPTS, HELD_OUT = 96, 160, 64
FLIPPED = 0.1
EDGES = ((0, 1), (0, 2), (1, 3), (2, 3))
METRICS = ("rewards/accuracies", "loss", "rewards/margins", "logps/chosen_below_ref")


def rows(prompts: int, worth: list[float], flipped: float, rng: random.Random) -> Dataset:
    """Return tokenised pairs, the pairs of one prompt as neighbours."""

    def words(n: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(n)]

    pairs = []
    for _ in range(prompts):
        prompt, answers = [1, *words(12)], [words(rng.randint(4, 8)) for _ in range(4)]
        for edge in EDGES:
            best, worst = sorted((answers[i] for i in edge), key=lambda ids: -sum(worth[i] for i in ids))
            if rng.random() < flipped:
                best, worst = worst, best
            pairs.append({"prompt_ids": prompt, "chosen_ids": [*best, 2], "rejected_ids": [*worst, 2]})
    return Dataset.from_list(pairs)


class NoTokenizer:
    """Stands for the tokenizer of rows that are tokenised already."""

    bos_token_id = None

    def save_pretrained(self, *_: Any) -> None: ...


def train(seed: int, most: int | None, pairs: int) -> list[dict[str, float]]:
    """Train once, and return the held-out metrics at four points of the epoch."""
    rng = random.Random(seed)
    worth = [rng.gauss(0, 1) for _ in range(VOCAB)]
    data, held_out = rows(PROMPTS, worth, FLIPPED, rng), rows(HELD_OUT, worth, 0.0, rng)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, pad_token_id=0))
    steps = PROMPTS * len(EDGES) // pairs
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            group_by_prompt=most,
            per_device_train_batch_size=pairs,
            per_device_eval_batch_size=64,
            num_train_epochs=1,
            learning_rate=2e-3,
            warmup_steps=5,
            lr_scheduler_type="linear",
            eval_strategy="steps",
            eval_steps=steps // 4,
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=seed,
        )
        tokenizer: Any = NoTokenizer()
        trainer = DPOTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{"step": entry["step"]} | {name: entry[f"eval_{name}"] for name in METRICS} for entry in history]


def table(runs: list[dict[str, Any]]) -> str:
    """Show mean and standard deviation over seeds of the held-out metrics, and of their differences seed by seed."""
    seeds = sorted({run["seed"] for run in runs})
    found = {(run["seed"], run["group_by_prompt"]): run["evaluations"] for run in runs}
    lines = []
    for at in range(len(runs[0]["evaluations"])):
        for name in METRICS:
            off, on = ([found[seed, most][at][name] for seed in seeds] for most in (None, len(EDGES)))
            difference = [b - a for a, b in zip(off, on, strict=True)]
            cells = [f"{mean(x):.3f} ± {stdev(x):.3f}" for x in (off, on)]
            cells.append(f"{mean(difference):+.3f} ± {stdev(difference) / len(seeds) ** 0.5:.3f}")
            lines.append((str(runs[0]["evaluations"][at]["step"]), name, *cells))
    return summary_table(lines, ("step", "held out", "not grouped", "grouped", "difference ± standard error"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="Runs of each case, with seeds of their own (default: 8).")
    parser.add_argument("--pairs", type=int, default=8, help="Pairs of a step (default: 8).")
    parser.add_argument("--out", type=Path, help="JSON file to which all runs are written (default: none).")
    parser.add_argument("--table", type=Path, help="Train nothing, and show the runs of such a file.")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())["runs"]))
        return
    disable_progress_bars()
    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    runs = [
        {"seed": seed, "group_by_prompt": most, "evaluations": train(seed, most, args.pairs)}
        for seed in range(args.seeds)
        for most in (None, len(EDGES))
    ]
    print(table(runs))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"provenance": provenance(), "pairs_a_step": args.pairs, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""The command line: parse, call, print."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger("fastdpo")

# what the final table shows of the held-out split: metric, label, format
HELD_OUT = (
    ("rewards/accuracies", "reward accuracy", "{:.3f}"),
    ("rewards/margins", "reward margin", "{:+.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("logps/chosen", "log-prob of chosen", "{:.2f}"),
    ("logps/rejected", "log-prob of rejected", "{:.2f}"),
)
THROUGHPUT = (
    ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ("padding_saved", "padding avoided, share of the padded batch", "{:.1%}"),
    ("prompt_shared", "tokens shared, share of the unpadded batch", "{:.1%}"),
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fastdpo` command."""
    parser = argparse.ArgumentParser(prog="fastdpo", description="Direct Preference Optimization without the logits.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        usage="fastdpo train CONFIG.yaml [--any-field value ...]",
        epilog="Fields are those of fastdpo.DPOConfig (with all of transformers.TrainingArguments) and RunConfig.",
    )
    command.add_argument("config", type=Path, help="YAML file of settings")
    args, rest = parser.parse_known_args(argv)
    # OpenMP threads that wait for work spin, unless told not to before torch loads: beside other processes a run on
    # the CPU took five times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        train(args.config, _overrides(rest))
    except (ValueError, OSError) as error:  # the message says what to mend; -X dev shows where it was raised
        if sys.flags.dev_mode:
            raise
        sys.exit(f"fastdpo: {error}")


def train(config: Path, overrides: dict[str, Any]) -> None:
    """Train, evaluate before and after, save the model, draw `training.png`, print the table."""
    from fastdpo.config import read_config

    run, args = read_config(config, overrides)  # before the slow imports: mistakes show at once

    from fastdpo import report
    from fastdpo.loading import load_datasets, load_model, lora
    from fastdpo.trainer import DPOTrainer

    model, tokenizer = load_model(run, args)
    train_dataset, eval_dataset = load_datasets(run)
    if eval_dataset is None:
        args.set_evaluate(strategy="no")
    args.eval_on_start = eval_dataset is not None
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora(run),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_dataset is not None and _held_out(trainer.state.log_history)[-1]["step"] < trainer.state.global_step:
        trainer.evaluate()

    trainer.save_model()
    trainer.save_state()
    picture = Path(args.output_dir) / "training.png"
    report.draw_training(trainer.state.log_history, picture)
    _print_tables(trainer.state.log_history)
    print(f"model: {args.output_dir}\npicture: {picture}")  # noqa: T201


def _overrides(rest: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` to a dict; values are read as YAML."""
    values: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"expected --field value, got {word!r}")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            value = next(words, "")
        if not value:
            raise ValueError(f"--{key} needs a value")
        values[key.replace("-", "_")] = yaml.safe_load(value)
    return values


def _held_out(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log_history if "eval_loss" in entry]


def _print_tables(log_history: list[dict[str, float]]) -> None:
    from fastdpo.report import summary_table

    if held_out := _held_out(log_history):
        before, after = held_out[0], held_out[-1]
        rows = [
            (label, form.format(before[f"eval_{name}"]), form.format(after[f"eval_{name}"]))
            for name, label, form in HELD_OUT
        ]
        print(summary_table(rows, ("held out", "before", "after")))  # noqa: T201
    logged = [entry for entry in log_history if "tokens_per_second" in entry]
    if logged:
        rates = [
            (label, form.format(sum(entry[name] for entry in logged) / len(logged))) for name, label, form in THROUGHPUT
        ]
        print(summary_table(rates, ("training", "mean")))  # noqa: T201

"""The command line: parse, call, print."""

import argparse
import logging
import os
import sys
import time
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
    for function in (train, precompute, score, plan):
        summary = (function.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            function.__name__,
            help=summary,
            description=summary,
            allow_abbrev=False,
            usage=f"fastdpo {function.__name__} CONFIG.yaml [--any-field value ...]",
            epilog="Fields are those of fastdpo.DPOConfig (with all of transformers.TrainingArguments) and RunConfig.",
        )
        command.add_argument("config", type=Path, help="YAML file of settings")
        if function is plan:
            command.add_argument("--gpu_memory", type=float, help="GiB of the GPU to plan for; default: this machine's")
            command.add_argument("--processes", type=int, default=1, help="GPUs to plan for")
        command.set_defaults(function=function)
    args, rest = parser.parse_known_args(argv)
    options = {name: value for name, value in vars(args).items() if name in ("gpu_memory", "processes")}
    # OpenMP threads that wait for work spin, unless told not to before torch loads: beside other processes a run on
    # the CPU took five times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        args.function(args.config, _overrides(rest), **options)
    except (ValueError, OSError) as error:  # the message says what to mend; -X dev shows where it was raised
        if sys.flags.dev_mode:
            raise
        sys.exit(f"fastdpo: {error}")


def train(config: Path, overrides: dict[str, Any]) -> None:
    """Train a model on preferences; evaluate before and after, save it, write `report.html`."""
    from fastdpo.config import read_config

    run, args = read_config(config, overrides)  # before the slow imports: mistakes show at once

    from fastdpo import samples

    started = time.time()
    trainer = _trainer(run, args)
    shown = samples.before_training(trainer, run.report_samples)
    failure = None
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if (
            trainer.eval_dataset is not None
            and _held_out(trainer.state.log_history)[-1]["step"] < trainer.state.global_step
        ):
            trainer.evaluate()
        trainer.save_model()
        trainer.save_state()
        shown = samples.after_training(trainer, shown)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        failure = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
        raise
    finally:
        page = _report(trainer, run, failure, started, shown) if trainer.is_world_process_zero() else None
    if trainer.is_world_process_zero():
        _print_tables(trainer.state.log_history)
        print(f"model: {args.output_dir}" + (f"\nreport: {page}" if page else ""))  # noqa: T201


def precompute(config: Path, overrides: dict[str, Any]) -> None:
    """Score the datasets with the reference and keep that for `train`, which finds it."""
    from fastdpo.config import read_config

    run, args = read_config(config, overrides | {"precompute_ref_log_probs": True, "report_to": "none"})

    from fastdpo.reference.precompute import reference_folder

    _trainer(run, args)  # which does all that training would before its first step
    print(f"reference log-probs: {reference_folder(args.reference_cache_dir)}")  # noqa: T201


def score(config: Path, overrides: dict[str, Any]) -> None:
    """Reward the responses of the held-out split, beta * log(pi / pi_ref), to `scores.jsonl`."""
    from fastdpo.config import read_config

    run, args = read_config(config, overrides)

    from fastdpo.loading import load_datasets, load_model, load_policy, load_reference
    from fastdpo.reference.precompute import options_of
    from fastdpo.report import summary_table
    from fastdpo.scoring import score as score_rows

    model, tokenizer = load_model(run, args)
    train_dataset, eval_dataset = load_datasets(run)
    output = Path(args.output_dir) / "scores.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    options = options_of(args)  # precision and batches of training
    result = score_rows(
        load_policy(model, args).to(args.device),
        reference if (reference := load_reference(run, args)) is None else reference.to(args.device),
        train_dataset if eval_dataset is None else eval_dataset,
        tokenizer=tokenizer,
        beta=args.beta,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        on_bad_row=args.on_bad_row,
        output=output,
        ref_adapter_name=args.ref_adapter_name,
        cache_dir=args.reference_cache_dir,
        **options,
    )
    rows: list[tuple[str, ...]] = [("rows", f"{len(result.rows):,}")]
    if result.accuracy is not None:
        rows.append(("pairs in the right order", f"{result.accuracy:.3f}"))
    print(summary_table(rows, ("scored", "")))  # noqa: T201
    print(f"scores: {output}")  # noqa: T201


def plan(config: Path, overrides: dict[str, Any], gpu_memory: float | None, processes: int) -> None:
    """Count the tokens of a run and compute its memory, without loading weights; draw `plan.png`."""
    from fastdpo.config import read_config

    run, args = read_config(config, overrides)

    from fastdpo.loading import load_datasets, load_tokenizer
    from fastdpo.plan import draw_lengths, make_plan, tables

    dataset, _ = load_datasets(run)
    found = make_plan(run, args, dataset, load_tokenizer(run, args), gpu_memory=gpu_memory, processes=processes)
    picture = Path(args.output_dir) / "plan.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_lengths(found.stats, picture)
    print(f"{tables(found)}\npicture: {picture}")  # noqa: T201


def _trainer(run: Any, args: Any) -> Any:
    """The trainer of a run; without a held-out split nothing is evaluated, whatever the config says."""
    from fastdpo.loading import load_datasets, load_model, load_reference, lora
    from fastdpo.trainer import DPOTrainer

    model, tokenizer = load_model(run, args)
    train_dataset, eval_dataset = load_datasets(run)
    if eval_dataset is None:
        args.set_evaluate(strategy="no")
    args.eval_on_start = eval_dataset is not None
    return DPOTrainer(
        model=model,
        ref_model=load_reference(run, args),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora(run),
    )


def _report(trainer: Any, run: Any, failure: str | None, started: float, samples: list[Any]) -> Path | None:
    """Write the report of a run that began at `started`; one that logged nothing leaves an earlier run's report."""
    from dataclasses import asdict
    from datetime import datetime, timedelta

    from fastdpo import facts, report

    args, state = trainer.args, trainer.state
    # only what this process logged, not the records of a checkpoint that it resumed from
    logged = [name for name in trainer.histograms if failure is None or not name.startswith("eval_")]
    if failure is not None:
        failure += f", after step {state.global_step:,} of {state.max_steps:,}"
    return report.write_report(
        args.output_dir,
        state.log_history,
        title=f"DPO of {run.model_name_or_path or run.config_name} on {run.dataset_name}",
        about={
            "command": facts.command_line(sys.argv[1:]),
            "started": f"{datetime.fromtimestamp(started).astimezone():%Y-%m-%d %H:%M %Z}",
            "took": timedelta(seconds=round(time.time() - started)),
            "device": facts.device(args.device, args.world_size),
        },
        config={name: value for name, value in asdict(run).items() if name != "given"} | args.to_dict(),
        given=run.given,
        facts={"Versions": facts.versions()},
        histograms=trainer.histograms,
        samples=samples,
        failure=failure,
        keep=not logged,
    )


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
            if f"eval_{name}" in after
        ]
        print(summary_table(rows, ("held out", "before", "after")))  # noqa: T201
    logged = [entry for entry in log_history if "tokens_per_second" in entry]
    if logged:
        rates = [
            (label, form.format(sum(entry[name] for entry in logged) / len(logged))) for name, label, form in THROUGHPUT
        ]
        print(summary_table(rates, ("training", "mean")))  # noqa: T201

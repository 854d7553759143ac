"""The command line: parse, call, print. Slow modules are imported only after all settings have been checked."""

import logging
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastdpo
from fastdpo.benchmarks.command import SUMMARY, bench
from fastdpo.checkpoint import lock
from fastdpo.checkpoint.preempt import EXIT_CODE, Preempted
from fastdpo.commands.tools import TOOLS, run_tool
from fastdpo.settings.config_file import MANIFEST, OUTPUT_DIR, UsageError, newest_checkpoint, read_settings
from fastdpo.settings.failures import name_of, one_line, signals_raise, stopped_by
from fastdpo.settings.fields import Setting
from fastdpo.settings.flags import overrides_of, settings_help, without_debug, without_flag
from fastdpo.settings.names import nearest
from fastdpo.untrusted.text import printable

logger = logging.getLogger("fastdpo")

EXIT_CODES = """\
exit codes:
  0    done
  1    a failure: an expected one is explained in one line, a bug is shown with its traceback
  2    a command or setting that does not exist, or that lacks its value
  130  stopped by Ctrl-C
  143  stopped by SIGTERM, SIGUSR1 or SIGHUP; a training saves a checkpoint first"""

# what the final table of throughput shows: metric, label, format
THROUGHPUT = (
    ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ("padding_saved", "padding avoided, share of the padded batch", "{:.1%}"),
    ("prompt_shared", "tokens shared, share of the unpadded batch", "{:.1%}"),
    ("reference/share", "reference, share of the time", "{:.1%}"),
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fastdpo` command.

    Raises:
        SystemExit: after any failure, with a code of `EXIT_CODES`.
    """
    words, debug = without_debug(sys.argv[1:] if argv is None else list(argv))
    started = time.time()
    # OpenMP threads spin while they wait for work, unless this is set before torch loads: beside other processes a run
    # on the CPU took five times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # in a file or a pipe, a progress bar would add a line each time it is redrawn
        os.environ.setdefault("TQDM_DISABLE", "1")
    from fastdpo.report import log_output  # tqdm reads the environment when it is imported

    log_output.show(debug=debug)
    with signals_raise() as came:
        try:
            _run(words)
        except Preempted as stop:
            came.append(stop.signum)
            if os.environ.get("RANK", "0") == "0":
                print(f"fastdpo: {_stopped(words, started)}", file=sys.stderr, flush=True)  # noqa: T201
            sys.exit(EXIT_CODE)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not came:
                came.append(signal.SIGINT)
            message = _stopped(words, started) if came else one_line(error)
            _close_bars()
            if debug or message is None:
                print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)  # noqa: T201
            if message is None:
                message = f"this {type(error).__name__} was not expected; please report it with the lines above"
            if not came or os.environ.get("RANK", "0") == "0":
                print(f"fastdpo: {printable(message)}", file=sys.stderr, flush=True)  # noqa: T201
            if came:
                sys.exit(130 if came[0] == signal.SIGINT else EXIT_CODE)
            sys.exit(2 if isinstance(error, UsageError) else 1)


def _run(words: list[str]) -> None:
    command, *rest = words or ["--help"]
    if command in ("-h", "--help"):
        _show(_help())
    elif command == "--version":
        print(f"fastdpo {fastdpo.__version__}")  # noqa: T201
    elif command == "bench":
        bench(rest, _show)
    elif command in TOOLS:
        if os.environ.get("RANK", "0") != "0":  # a tool is for one process
            return
        config = run_tool(command, rest, EXIT_CODES, _show)
        if config is not None:
            train(config, {})
    elif command not in COMMANDS:
        like = nearest(command, (*COMMANDS, *TOOLS, "bench")) or "; see fastdpo --help"
        raise UsageError(f"unknown command {command!r}{like}")
    elif "-h" in rest or "--help" in rest:
        _show(settings_help(command, _summary(command), OPTIONS.get(command, {}), EXIT_CODES))
    elif not rest:
        raise UsageError(f"give a config file, settings or both: fastdpo {command} CONFIG.yaml --any_setting value")
    else:
        config, flags = _config_of(rest)
        COMMANDS[command](config, overrides_of(flags, OPTIONS.get(command, {})))


def _config_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, which is the first word or follows `--config`, and the other words; it may be missing."""
    if words and not words[0].startswith("-"):
        return Path(words[0]), words[1:]
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return Path(words[i + 1]), words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), words[:i] + words[i + 1 :]
    return None, words


def _close_bars() -> None:
    """Close all progress bars, or they would be drawn again below the error message when the process ends."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _show(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:  # `fastdpo train --help | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped(words: list[str], started: float) -> str:
    """Say what was saved before a signal, and which command continues from there."""
    stopped = stopped_by()
    command, *rest = words or [""]
    config, flags = _config_of(rest)
    if command == "bench":
        return f"{stopped}; the cases that were measured so far are kept"
    if command == "precompute":
        return f"{stopped}; what was scored so far is kept, and the same command continues from there"
    try:
        chosen = read_settings(config, overrides_of(flags, {})) if command == "train" else None
    except (ValueError, OSError, ImportError):
        chosen = None
    if chosen is None:
        return f"{stopped}; nothing was saved"
    folder = Path(chosen.get("output_dir") or OUTPUT_DIR)
    state = folder / "trainer_state.json"  # it follows the weights when training has ended
    if state.exists() and state.stat().st_mtime >= started:
        return f"{stopped} after training; the model in {folder} is complete"
    newest = newest_checkpoint(folder)
    if newest is not None and (newest / MANIFEST).stat().st_mtime >= started:
        go_on = shlex.join(
            ["fastdpo", *without_flag(words, "resume_from_checkpoint"), f"--resume_from_checkpoint={newest}"]
        )
        return f"{stopped}; saved: {newest}; continue with: {go_on}"
    resumed = chosen.get("resume_from_checkpoint")
    if resumed := newest if resumed in (True, "auto") else resumed:
        return f"{stopped}; nothing was saved after {resumed}; the same command continues from that checkpoint"
    why = "save_strategy is 'no'" if chosen.get("save_strategy") == "no" else "no checkpoint was due yet"
    return f"{stopped}; nothing was saved, because {why}; the same command starts from the beginning"


def train(config: Path | None, overrides: dict[str, Any]) -> None:
    """Train a model on preferences, evaluate it before and after, save it and write `report.html`."""
    chosen = read_settings(config, overrides)  # before the slow imports, so that mistakes show at once
    if os.environ.get("RANK", "0") != "0":  # the first process has the lock of output_dir for all
        _train(chosen)
        return
    folder = Path(chosen.get("output_dir") or OUTPUT_DIR).expanduser()
    with lock.held(folder):
        if not chosen.get("resume_from_checkpoint"):
            lock.check_new_run(folder, overwrite=chosen.get("overwrite_output_dir", False))
        _train(chosen)


def _train(chosen: dict[str, Any]) -> None:
    from fastdpo.report import samples
    from fastdpo.run import make_configs

    started = time.time()
    run, args = make_configs(chosen)
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
        trainer.save_model(_internal_call=True)  # which uploads nothing yet
        trainer.save_state()
        shown = samples.after_training(trainer, shown)
    except Preempted as stop:
        failure = f"stopped by {name_of(stop.signum)}"
        raise
    except BaseException as error:
        failure = stopped_by() or f"{type(error).__name__}: {error}"
        if stopped_by():
            logger.info("%s; writing the report (a second signal ends the process at once)", failure)
        raise
    finally:
        main = trainer.is_world_process_zero()
        page = _report(trainer, run, chosen, failure, started, shown) if main else None
    if args.push_to_hub:  # with the report
        trainer.push_to_hub(dataset_name=run.dataset_name)
    if trainer.is_world_process_zero():
        _print_tables(trainer.state.log_history)
        print(f"model: {args.output_dir}" + (f"\nreport: {page}" if page else ""))  # noqa: T201
        if page is None:
            raise OSError(f"the model in {args.output_dir} is complete, but its report could not be written; see above")


def precompute(config: Path | None, overrides: dict[str, Any]) -> None:
    """Compute the reference's log-probs of the datasets and keep them in a cache that `train` uses."""
    fixed = {"precompute_ref_log_probs": True, "report_to": "none", "push_to_hub": False}
    chosen = read_settings(config, overrides | fixed)

    from fastdpo.reference.precompute import reference_folder
    from fastdpo.run import make_configs

    with tempfile.TemporaryDirectory() as nothing:  # the trainer makes its output_dir, though nothing is written there
        run, args = make_configs(chosen | {"output_dir": nothing})
        if not args.precompute_ref_log_probs:
            raise ValueError(f"loss_type {', '.join(args.loss_type)} uses no reference that could be precomputed")
        _trainer(run, args)  # the trainer precomputes when it is made, before a first step
    if args.process_index == 0:
        print(f"reference log-probs: {reference_folder(args.reference_cache_dir)}")  # noqa: T201


def score(config: Path | None, overrides: dict[str, Any]) -> None:
    """Compute rewards beta * log(pi / pi_ref) of the held-out responses and write them to `scores.jsonl`."""
    chosen = read_settings(config, overrides | {"deepspeed": None})
    start = Path(chosen.get("model_name_or_path") or chosen["config_name"])
    if chosen.get("ref_model_name_or_path") is None and start.is_dir() and not (start / "adapter_config.json").exists():
        raise ValueError(
            f"score compares {str(start)!r} with a reference: set ref_model_name_or_path to the model from which its "
            "training started"
        )

    from fastdpo.commands.score import score_run

    score_run(chosen)


def plan(config: Path | None, overrides: dict[str, Any]) -> None:
    """Count the tokens of a run and compute the memory it needs, without loading weights."""
    options = {name: overrides.pop(name) for name in OPTIONS["plan"] if name in overrides}
    chosen = read_settings(config, overrides | {"deepspeed": None})

    from fastdpo.commands.plan import plan_run

    plan_run(chosen, options)


def _trainer(run: Any, args: Any) -> Any:
    """Make the trainer of a run; without a held-out split nothing is evaluated, whatever the config says."""
    from fastdpo.run import load_datasets, load_model, load_reference, lora
    from fastdpo.trainer import DPOTrainer
    from fastdpo.trainer.failing_together import failing_together

    with failing_together(args):
        train_dataset, eval_dataset = load_datasets(run, args.seed)
        model, tokenizer = load_model(run, args, train_dataset)
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


def _report(
    trainer: Any, run: Any, chosen: dict[str, Any], failure: str | None, started: float, samples: list[Any]
) -> Path | None:
    """Write the report of a run that began at `started`; a run that logged nothing keeps an earlier run's report."""
    from dataclasses import asdict
    from datetime import datetime, timedelta

    from fastdpo.report import facts
    from fastdpo.report.page import write_report

    args, state = trainer.args, trainer.state
    # records of the checkpoint that this process resumed from do not count as logged
    logged = [name for name in trainer.histograms if failure is None or not name.startswith("eval_")]
    if failure is not None:
        failure += f", after step {state.global_step:,} of {state.max_steps:,}"
    return write_report(
        args.output_dir,
        state.log_history,
        title=f"DPO of {run.model_name_or_path or run.config_name} on {run.data}",
        about={
            "command": facts.command_line(sys.argv[1:]),
            "started": f"{datetime.fromtimestamp(started).astimezone():%Y-%m-%d %H:%M %Z}",
            "took": timedelta(seconds=round(time.time() - started)),
            "device": facts.device(args.device, args.world_size),
        },
        config=asdict(run) | args.to_dict() | {"output_dir": chosen.get("output_dir") or OUTPUT_DIR},  # as it was given
        given=chosen,
        facts={"Versions": facts.versions()},
        histograms=trainer.histograms,
        samples=samples,
        failure=failure,
        keep=not logged,
    )


COMMANDS: dict[str, Callable[[Path | None, dict[str, Any]], None]] = {
    function.__name__: function for function in (train, precompute, score, plan)
}
OPTIONS = {
    "plan": {
        "gpu_memory": Setting(
            "gpu_memory", frozenset({"float"}), "this machine's", "GiB of GPU memory to plan for.", "The plan"
        ),
        "processes": Setting("processes", frozenset({"int"}), "this job's", "Number of GPUs to plan for.", "The plan"),
        "strategy": Setting(
            "strategy",
            frozenset({"str"}),
            "the config's",
            "How they divide the work: ddp, fsdp2, zero1, zero2 or zero3.",
            "The plan",
        ),
    }
}
"""Options that a command has besides the settings of a run."""


# Help


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    summaries = {name: _summary(name) for name in COMMANDS} | {name: tool.summary for name, tool in TOOLS.items()}
    summaries["bench"] = SUMMARY
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, summary in summaries.items())
    tools = "\n".join(f"       fastdpo {name} {tool.takes}" for name, tool in TOOLS.items())
    return f"""usage: fastdpo COMMAND [CONFIG.yaml] [--any_setting value ...] [--debug]
{tools}
       fastdpo bench head|training|report [OPTIONS]
       fastdpo COMMAND --help        all settings, with their defaults
       fastdpo --version

Direct Preference Optimization without the logits.

commands:
{commands}

Write a setting as `name: value` in the file, or as `--name value` behind it, which overrides the file. Settings on the
command line suffice without a file. `--name` and `--no_name` switch a boolean on and off. `--debug` shows the traceback
of any failure.

{EXIT_CODES}"""


def _summary(command: str) -> str:
    return (COMMANDS[command].__doc__ or "").partition("\n")[0]


# Results


def _held_out(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log_history if "eval_loss" in entry]


def _print_tables(log_history: list[dict[str, float]]) -> None:
    from fastdpo.report.page import results, summary_table

    if rows := results(log_history):
        print(summary_table(rows, ("held out", "before", "after")))  # noqa: T201
    logged = [entry for entry in log_history if "tokens_per_second" in entry]
    if logged:
        rates = [
            (label, form.format(sum(found) / len(found)))
            for name, label, form in THROUGHPUT
            if (found := [entry[name] for entry in logged if name in entry])
        ]
        print(summary_table(rates, ("training", "mean")))  # noqa: T201

"""What a run shows in the terminal: a progress bar, and one line for each log and each evaluation.

The line holds the numbers that a user watches during a run; `log_history`, TensorBoard and W&B hold the whole record.
"""

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerState

from fastdpo.report.log_output import write_line

_PARTS = {
    "loss": "loss {:.4f}",
    "aux_loss": "aux loss {:.3f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.1%}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.1f} GiB",
    "grad_norm": "grad norm {:.3g}",
}


def replace_callback(callbacks: list[Any]) -> None:
    """Replace the callback with which transformers' Trainer prints by `Bar`, or by `Lines` if stderr is no terminal.

    A notebook keeps its table, which another callback draws.

    Args:
        callbacks: the list of the Trainer's `callback_handler`, which is changed in place.
    """
    for i, callback in reversed(list(enumerate(callbacks))):
        if type(callback) in (ProgressCallback, PrinterCallback):
            callbacks[i] = Bar() if type(callback) is ProgressCallback and sys.stderr.isatty() else Lines()
            return


class Lines(PrinterCallback):
    """Prints one line for each record, in the first process only."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line for a record."""
        if state.is_world_process_zero:
            write_line(line(logs, state))


class Bar(ProgressCallback):
    """Draws transformers' progress bars, and prints a line above them for each record."""

    on_log = Lines.on_log


def line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """Return the line for a record: of training, of an evaluation, of the end of a run, or of a user's own numbers."""
    total = f"/{state.max_steps}" if state.max_steps else ""
    parts = [f"step {state.global_step:{len(total[1:])}}{total}"]
    if "epoch" in logs:
        parts.append(f"epoch {logs['epoch']:.2f}")
    evaluated = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "train")
    if "train_loss" in logs:
        took = timedelta(seconds=round(logs.get("train_runtime", 0)))
        mean = f"mean loss {logs['train_loss']:.4f}" if state.global_step else "no step was made"
        parts += ["done ", mean, f"took {took}"]
        if numbers := _numbers(logs):  # these are means over the steps since the last log
            parts += ["last steps:", *numbers]
    elif "loss" in logs:
        parts += ["train", *_numbers(logs)]
    elif evaluated != "train":
        parts += [f"{evaluated.replace('_', ' ', 1):5}", *_numbers(logs, f"{evaluated}_")]
    else:
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in logs.items()
            if name != "epoch"
        ]
    return "  ".join(parts)


def _numbers(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [form.format(logs[prefix + name]) for name, form in _PARTS.items() if prefix + name in logs]

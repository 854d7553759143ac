"""Write a model card, the `README.md` that the Hub shows: what was trained on which data, with curves and a table."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from matplotlib.image import imsave
from transformers import ProcessorMixin

from fastdpo.model.adapted_layers import unwrap
from fastdpo.report import facts, page, plots
from fastdpo.settings.files import write_file

logger = logging.getLogger("fastdpo")

PAPER = "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"
CITATION = f"""\
@inproceedings{{rafailov2023direct,
  title     = {{{PAPER}}},
  author    = {{Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D.
               and Finn, Chelsea}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  volume    = {{36}},
  year      = {{2023}},
  url       = {{https://arxiv.org/abs/2305.18290}}
}}"""
SETTINGS = (
    *("loss_type", "beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_length"),
    *("bf16", "fp16", "seed"),
)
"""The settings that a card always shows. Those of `DPOConfig` that differ from their defaults follow."""
_OF_THE_MACHINE = ("reference_cache_dir", "dataset_num_proc", "model_init_kwargs", "show_example")


def write_model_card(
    trainer: Any, name: str, dataset_name: str | None, tags: Iterable[str], metadata: Mapping[str, Any]
) -> Path:
    """Write `README.md` and, if curves can be drawn, `training.png` into the output folder; secrets are hidden.

    Args:
        trainer: a `DPOTrainer`.
        name: title of the card.
        dataset_name: the dataset, as a name on the Hub or a path, of which only the end is shown.
        tags: tags for the Hub.
        metadata: entries of the metadata besides the usual ones, which they replace.

    Returns:
        The path of `README.md`.
    """
    args, log_history = trainer.args, trainer.state.log_history
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    base = _on_the_hub(getattr(unwrap(trainer.model).config, "_name_or_path", None))
    dataset = _on_the_hub(dataset_name)
    sees = isinstance(trainer.processing_class, ProcessorMixin)
    entries: dict[str, Any] = {
        "base_model": base,
        "datasets": dataset,
        "library_name": "peft" if hasattr(trainer.model, "peft_config") else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "model_name": name,
        "tags": list(dict.fromkeys(["generated_from_trainer", *tags])),
    }
    start = f"[{base}](https://huggingface.co/{base})" if base else "a local model"
    data = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    data = data or (f"the dataset `{Path(dataset_name).name}`" if dataset_name else "preferences")
    paper = f"[Direct Preference Optimization](https://arxiv.org/abs/2305.18290), loss `{'`, `'.join(args.loss_type)}`"
    sections = [
        f"---\n{ModelCardData(**entries | dict(metadata)).to_yaml()}\n---",
        f"# {name}",
        f"This model was trained from {start} on {data} by {paper}, with fastdpo.",
        _use(trainer.hub_model_id or name, sees),
        _results(log_history),
        _curves(folder, log_history, args),
        "## Data\n\n" + _table(_rows_of(trainer), ("split", "rows")),
        "## Settings\n\n" + _table(_settings(args, args.world_size), ("setting", "value")),
        "## Versions\n\n" + _table(facts.versions().items(), ("package", "version")),
        f"## Citation\n\nThe method is that of *{PAPER}*:\n\n```bibtex\n{CITATION}\n```",
    ]
    path = folder / "README.md"
    write_file(path, ("\n\n".join(filter(None, sections)) + "\n").encode())
    return path


def _on_the_hub(name: str | None) -> str | None:
    """Return the name if it is one on the Hub, None if it is a local path or empty."""
    return name if name and not Path(name).exists() and name.count("/") <= 1 and name[0] not in "./~" else None


def _use(name: str, sees: bool) -> str:
    model, reader = ("ImageTextToText", "Processor") if sees else ("CausalLM", "Tokenizer")
    return f"""## Use

```python
from transformers import AutoModelFor{model}, Auto{reader}

model = AutoModelFor{model}.from_pretrained("{name}")
{reader.lower()} = Auto{reader}.from_pretrained("{name}")
```"""


def _results(log_history: plots.LogHistory) -> str:
    """Return a table of the first and last values, held-out ones if there are any."""
    for prefix in (*plots.prefixes(log_history), ""):
        if rows := page.results(log_history, prefix):
            where = plots.split_name(prefix) if prefix else "training"
            return "## Results\n\n" + _table(rows, (where, "first", "last"))
    return ""


def _curves(folder: Path, log_history: plots.LogHistory, args: Any) -> str:
    try:
        figures = plots.training(log_history, page.first_loss(args.to_dict()))
        if not figures:
            return ""
        imsave(folder / "training.png", plots.tile([plots.pixels(figure) for figure in figures]), dpi=plots.DPI)
    except Exception as error:  # a picture can't spoil an upload
        logger.warning("the curves of the model card could not be drawn: %s: %s", type(error).__name__, error)
        return ""
    return "## Curves\n\n![Loss, reward margin, reward accuracy and log-probs over the steps](training.png)"


def _rows_of(trainer: Any) -> list[tuple[str, str]]:
    held_out = trainer.eval_dataset
    splits = {"train": trainer.train_dataset, **(held_out if isinstance(held_out, dict) else {"held out": held_out})}
    return [
        (name, f"{len(rows):,}" if hasattr(rows, "__len__") else "a stream")
        for name, rows in splits.items()
        if rows is not None
    ]


def _settings(args: Any, processes: int) -> list[tuple[str, str]]:
    own = [f for f in fields(args) if f.name in type(args).__annotations__ and f.name not in _OF_THE_MACHINE]
    changed = [f.name for f in own if f.name not in SETTINGS and getattr(args, f.name) not in (f.default, None)]
    changed = [name for name in changed if name not in ("gradient_checkpointing", "logging_steps")]
    unread = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    names = [name for name in (*SETTINGS, *changed) if name != unread]
    shown = facts.without_secrets({name: getattr(args, name) for name in names})
    rows = [(name, getattr(value, "value", value)) for name, value in shown.items()]
    return [(f"`{name}`", f"`{value}`") for name, value in (*rows, ("processes", processes))]


def _table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

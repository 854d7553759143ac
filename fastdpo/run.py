"""What a config file names: the settings of a run, its model, tokenizer, datasets and adapter."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from fastdpo.config import DPOConfig
from fastdpo.model.adapters import lora_config
from fastdpo.model.policy import build_policy, load_policy
from fastdpo.settings.config_file import nearest
from fastdpo.settings.dataset_files import load_splits
from fastdpo.settings.failures import loading

logger = logging.getLogger("fastdpo")


@dataclass
class RunConfig:
    """What the command line needs besides `DPOConfig`: model, data and adapter. The names are those of TRL's CLI."""

    # The run
    dataset_name: str = field(
        metadata={
            "help": "The dataset: a folder of JSONL, CSV or Parquet files named after their splits, one such file, a "
            "folder that `save_to_disk` wrote, or the name of a dataset on the Hub."
        }
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The model to train, as a folder or a name on the Hub. Unless ref_model_name_or_path is set, the "
            "model as it starts is also the reference."
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The reference model. Unset: the model to train as it starts."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Config of a model to start from random weights; set it instead of model_name_or_path."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the model's weights: auto (as saved), float32, bfloat16, float16 or float64. Unset: "
            "float32."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})
    dataset_test_split: str | None = field(
        default="test",
        metadata={
            "help": "The split to evaluate on, or none. If the dataset has no split called test, nothing is evaluated."
        },
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a LoRA adapter instead of the whole model. Needs pip install 'fastdpo[peft]'."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout on the adapter's input; it is 0 while `disable_dropout` is on."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the modules that get an adapter. Unset: PEFT's choice for the model."}
    )

    # The report
    report_samples: int = field(
        default=4,
        metadata={
            "help": "Number of held-out prompts for which the report shows the model's answers before and after "
            "training. 0: none."
        },
    )

    def __post_init__(self) -> None:
        if self.report_samples < 0:
            raise ValueError(f"report_samples must be at least 0 (0: no samples), got {self.report_samples}")


def make_configs(settings: Mapping[str, Any]) -> tuple[RunConfig, DPOConfig]:
    """Make both configs from the settings that `fastdpo.settings.config_file.read_settings` returns.

    Raises:
        ValueError: a config refuses a setting; the message names it.
    """
    of_run = {f.name for f in fields(RunConfig)}
    run = RunConfig(**{name: value for name, value in settings.items() if name in of_run})
    others = {name: value for name, value in settings.items() if name not in of_run}
    if run.dtype is not None:
        others["model_init_kwargs"] = _with_dtype(others.get("model_init_kwargs"), run.dtype)
    try:
        return run, DPOConfig(**others)
    except ValueError as error:  # transformers' enums raise it without the name of the setting
        value, is_enum, _ = str(error).partition(" is not a valid ")
        names = [name for name, given in others.items() if is_enum and str(given) == value]
        if not names:
            raise
        raise ValueError(f"{' or '.join(names)}: {error}") from error


def _with_dtype(model_init_kwargs: Any, dtype: str) -> dict[str, Any]:
    """Return `model_init_kwargs` with the value of the setting `dtype`."""
    kwargs = json.loads(model_init_kwargs) if isinstance(model_init_kwargs, str) else dict(model_init_kwargs or {})
    for name in ("dtype", "torch_dtype"):
        if kwargs.get(name, dtype) != dtype:
            raise ValueError(f"dtype={dtype!r} and {name}={kwargs[name]!r} in model_init_kwargs differ; leave one out")
    return kwargs | {"dtype": dtype}


def load_model(run: RunConfig, args: DPOConfig) -> tuple[Any, Any]:
    """Return the policy, as a name to load or a model with random weights, and its tokenizer.

    Raises:
        ValueError: as `fastdpo.model.policy.build_policy`.
    """
    tokenizer = load_tokenizer(run, args)
    if run.config_name is None:
        return run.model_name_or_path, tokenizer
    if run.use_peft:
        logger.warning("only the adapter is saved: the random weights of %s below it are not", run.config_name)
    return build_policy(run.config_name, args), tokenizer


def load_tokenizer(run: RunConfig, args: DPOConfig) -> Any:
    """Load the tokenizer that is saved with the model or its config."""
    source: Any = run.model_name_or_path or run.config_name
    with loading("model_name_or_path" if run.model_name_or_path else "config_name", source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)


def load_reference(run: RunConfig, args: DPOConfig) -> Any | None:
    """Load the reference model, or return None if the run names none."""
    if run.ref_model_name_or_path is None:
        return None
    return load_policy(run.ref_model_name_or_path, args, setting="ref_model_name_or_path")


def load_datasets(run: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Load the split to train on and the split to evaluate on, or None if the dataset lacks that one.

    Raises:
        ValueError: the dataset can't be read, or has no split of a name that was set.
    """
    with loading("dataset_name", run.dataset_name):
        splits = load_splits(run.dataset_name)
    held_out = None if run.dataset_test_split == "none" else run.dataset_test_split
    for setting, split in (("dataset_train_split", run.dataset_train_split), ("dataset_test_split", held_out)):
        if split is None or split in splits:
            continue
        if setting == "dataset_test_split" and split == RunConfig.dataset_test_split:
            logger.warning("%s has no split %r, so nothing is evaluated", run.dataset_name, split)
            continue
        has = f"it has {', '.join(splits)}{nearest(split, splits)}"
        raise ValueError(f"{setting}: {run.dataset_name} has no split {split!r}; {has}")
    return splits[run.dataset_train_split], None if held_out is None else splits.get(held_out)


def lora(run: RunConfig) -> Any | None:
    """Return the `peft.LoraConfig` of a run, or None without `use_peft`."""
    if not run.use_peft:
        return None
    return lora_config(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=run.lora_target_modules,
    )

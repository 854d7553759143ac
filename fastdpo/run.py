"""What a config file names: the settings of a run, its model, tokenizer, datasets and adapter."""

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastdpo.config import DPOConfig
from fastdpo.data.vision.images import has_images
from fastdpo.model import policy
from fastdpo.model.adapters import lora_config
from fastdpo.settings.dataset_files import load_mixture, load_splits
from fastdpo.settings.failures import loading
from fastdpo.settings.names import check_name, nearest

logger = logging.getLogger("fastdpo")


@dataclass
class RunConfig:
    """What the command line needs besides `DPOConfig`: model, data and adapter. The names are those of TRL's CLI."""

    # The run
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The dataset: a folder of JSONL, CSV or Parquet files named after their splits, with or without "
            "images that they name, one such file, a folder that `save_to_disk` wrote, or the name of a dataset on the "
            "Hub."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The model to train, as a folder or a name on the Hub. Unless ref_model_name_or_path is set, the "
            "model as it starts is also the reference."
        },
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the model and its tokenizer on the Hub. Unset: main."},
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
    torch_dtype: str | None = field(default=None, metadata={"help": "The old name of dtype."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "transformers' attention, where attention_backend does not replace it: on models whose batches are "
            "padded. Unset: transformers' choice."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training, instead of loading it whole. Set max_steps."}
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "A mixture instead of dataset_name: entries with `path` and, if need be, `name` (configuration), "
            "`data_dir`, `data_files`, `split` (default: train), `columns` and `fraction` (share of the mixture)."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Like dataset_streaming, for `datasets`."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share or number of the rows of `datasets` to hold out. Unset: nothing is evaluated."},
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

    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters that get an adapter though no linear layer holds them, as of experts."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of modules that are trained whole beside the adapter, and saved with it."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: multiply the adapter's output by lora_alpha / sqrt(lora_r)."}
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "DoRA: train the length of each weight's columns besides LoRA's change of them."},
    )

    # Quantised weights, below an adapter
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: keep the model's linear layers in 4 bits. Needs use_peft."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Keep the model's linear layers in 8 bits. Needs use_peft."}
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Kind of 4-bit numbers: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of 4-bit weights too, which saves 0.4 bits each."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Dtype of the tensors that hold the 4-bit numbers. Unset: uint8."}
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
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; leave one out")
        check_name("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
            if getattr(self, name) != getattr(RunConfig, name) and not self.load_in_4bit:
                raise ValueError(f"{name} has no effect without load_in_4bit: true; set both or neither")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_peft:
                raise ValueError(f"{name} needs use_peft: true, because quantised weights themselves can't be trained")
        if self.datasets is None and (self.streaming or self.test_split_size is not None):
            name = "streaming" if self.streaming else "test_split_size"
            instead = "dataset_streaming" if self.streaming else "dataset_test_split"
            raise ValueError(f"{name} is for a mixture in `datasets`; for dataset_name set {instead}")

    @property
    def data(self) -> str:
        """What the run trains on, in one name."""
        return self.dataset_name or ", ".join(str(entry.get("path")) for entry in self.datasets or ())

    def model_options(self) -> dict[str, Any]:
        """Return the entries of `model_init_kwargs` that settings of this class stand for."""
        dtype = self.dtype or self.torch_dtype
        options: dict[str, Any] = {
            "dtype": dtype,
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
        }
        if self.load_in_8bit:
            options["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        if self.load_in_4bit:
            options["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
                "bnb_4bit_compute_dtype": dtype if dtype not in (None, "auto") else "float32",
            }
            if self.bnb_4bit_quant_storage is not None:
                options["quantization_config"]["bnb_4bit_quant_storage"] = self.bnb_4bit_quant_storage
        return {name: value for name, value in options.items() if value is not None}


def make_configs(settings: Mapping[str, Any]) -> tuple[RunConfig, DPOConfig]:
    """Make both configs from the settings that `fastdpo.settings.config_file.read_settings` returns.

    Raises:
        ValueError: a config refuses a setting; the message names it.
    """
    of_run = {f.name for f in fields(RunConfig)}
    run = RunConfig(**{name: value for name, value in settings.items() if name in of_run})
    others = {name: value for name, value in settings.items() if name not in of_run}
    if run.dtype and run.torch_dtype and run.dtype != run.torch_dtype:
        raise ValueError(f"dtype={run.dtype!r} and torch_dtype={run.torch_dtype!r} differ; leave torch_dtype out")
    if options := run.model_options():
        others["model_init_kwargs"] = _merged(others.get("model_init_kwargs"), options)
    try:
        return run, DPOConfig(**others)
    except ValueError as error:  # transformers' enums raise it without the name of the setting
        value, is_enum, rest = str(error).partition(" is not a valid ")
        names = [name for name, given in others.items() if is_enum and str(given) == value]
        if not names:
            raise
        hint = nearest(value, re.findall("'([^']+)'", rest))
        raise ValueError(f"{' or '.join(names)}: {error}{hint}") from error


def _merged(model_init_kwargs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return `model_init_kwargs` with options that settings of their own stand for."""
    kwargs: dict[str, Any]
    kwargs = json.loads(model_init_kwargs) if isinstance(model_init_kwargs, str) else dict(model_init_kwargs or {})
    for name, value in options.items():
        for given in ("dtype", "torch_dtype") if name == "dtype" else (name,):
            if kwargs.get(given, value) != value:
                setting = _SETTING_OF.get(name, name)
                raise ValueError(
                    f"{setting}={value!r} and {given}={kwargs[given]!r} in model_init_kwargs differ; leave one out"
                )
    return kwargs | options


_SETTING_OF = {"revision": "model_revision", "quantization_config": "load_in_4bit or load_in_8bit"}


def load_model(run: RunConfig, args: DPOConfig, dataset: Any = None) -> tuple[Any, Any]:
    """Return the policy, as a name to load or a model with random weights, and what `load_tokenizer` returns.

    Raises:
        ValueError: as `fastdpo.model.policy.build_policy`.
    """
    tokenizer = load_tokenizer(run, args, dataset)
    if run.config_name is None:
        return run.model_name_or_path, tokenizer
    if run.use_peft:
        logger.warning("only the adapter is saved: the random weights of %s below it are not", run.config_name)
    return policy.build_policy(run.config_name, args), tokenizer


def load_tokenizer(run: RunConfig, args: DPOConfig, dataset: Any = None) -> Any:
    """Load the tokenizer that is saved with the model or its config; for a dataset with images, the processor."""
    source: Any = run.model_name_or_path or run.config_name
    setting = "model_name_or_path" if run.model_name_or_path else "config_name"
    images = dataset is not None and has_images(dataset)
    return policy.load_tokenizer(source, args, setting=setting, images=images)


def load_reference(run: RunConfig, args: DPOConfig) -> Any | None:
    """Load the reference model, or return None if the run names none."""
    if run.ref_model_name_or_path is None:
        return None
    if run.model_revision is not None and run.ref_model_name_or_path != run.model_name_or_path:
        args = copy.copy(args)
        assert isinstance(args.model_init_kwargs, dict)  # __post_init__ parsed it, and it holds the revision
        args.model_init_kwargs = {k: v for k, v in args.model_init_kwargs.items() if k != "revision"}
    return policy.load_policy(run.ref_model_name_or_path, args, setting="ref_model_name_or_path")


def load_datasets(run: RunConfig, seed: int = 0, *, without: str = "nothing is evaluated") -> tuple[Any, Any | None]:
    """Load the split to train on and the split to evaluate on, or None if the dataset lacks that one.

    Args:
        run: names the dataset, or the mixture of datasets.
        seed: decides which rows of a mixture are held out.
        without: what the log says will happen if the dataset has no split to evaluate on.

    Raises:
        ValueError: the dataset can't be read, or has no split of a name that was set.
    """
    if run.datasets:
        if run.dataset_name is not None:
            logger.warning("dataset_name=%s is not read, because `datasets` is set", run.dataset_name)
        splits = load_mixture(run.datasets, streaming=run.streaming, test_split_size=run.test_split_size, seed=seed)
    else:
        assert run.dataset_name is not None  # read_settings has checked it
        with loading("dataset_name", run.dataset_name):
            splits = load_splits(run.dataset_name, run.dataset_config, streaming=run.dataset_streaming)
    held_out = None if run.dataset_test_split == "none" else run.dataset_test_split
    for setting, split in (("dataset_train_split", run.dataset_train_split), ("dataset_test_split", held_out)):
        if split is None or split in splits:
            continue
        if setting == "dataset_test_split" and split == RunConfig.dataset_test_split:
            logger.warning("%s has no split %r, so %s", run.data, split, without)
            continue
        has = f"it has {', '.join(splits)}{nearest(split, splits)}"
        raise ValueError(f"{setting}: {run.data} has no split {split!r}; {has}")
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
        target_parameters=run.lora_target_parameters,
        modules_to_save=run.lora_modules_to_save,
        use_rslora=run.use_rslora,
        use_dora=run.use_dora,
    )

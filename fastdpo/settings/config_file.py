"""Read and check a config file and the settings that follow it on the command line, without torch or transformers.

Everything that can be checked without a model, a dataset or the network is checked here, within a second: YAML, names,
types, paths and packages.
"""

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdpo.settings.fields import Setting, choices, settings
from fastdpo.settings.names import OLD_NAMES, check_name, nearest
from fastdpo.untrusted.json_files import read_json
from fastdpo.untrusted.model_folder import check_model_folder, is_kernel_on_hub, items
from fastdpo.untrusted.yaml_file import read_yaml

OUTPUT_DIR = "trainer_output"
"""The default of transformers."""
MANIFEST = "fastdpo_manifest.json"
"""The last file of a checkpoint that is written."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""From the suffix of a file to the builder of the datasets library that reads it."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LOCAL_SUFFIXES = (*DATA_FILES, *COMPRESSED, ".arrow", ".tsv", ".txt", ".safetensors", ".bin", ".gguf", ".yaml", ".yml")
"""A name with one of these endings is a local file; names on the Hub may hold other dots, as in Qwen2.5-0.5B."""

ADVICE = OLD_NAMES | {
    "lora_task_type": "leave it out: the adapter is always that of a causal language model",
    "ignore_bias_buffers": "leave it out: buffers are never synchronised as bias buffers need it",
    "env": "set environment variables in the shell",
}
"""What to do instead of settings of TRL and other libraries that have no equivalent here."""

PACKAGES = {
    "peft": "pip install 'fastdpo[peft]'",
    "deepspeed": "pip install 'fastdpo[deepspeed]'",
    "flash_attn": "pip install 'fastdpo[flash]'",
    "tree_recurrence": "pip install 'fastdpo[hybrid]'",
    "liger_kernel": "pip install 'fastdpo[liger]'",
    "bitsandbytes": "pip install bitsandbytes",
    "comet_ml": "pip install comet-ml",
}
"""Commands that install optional packages, if they are not `pip install` and the name of the module."""


REPORTS = dict.fromkeys(
    ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "codecarbon", "dagshub", "dvclive"),
    True,
) | dict.fromkeys(("azure_ml", "flyte", "kubeflow", "neptune"), False)
"""Destinations of `report_to`, and whether each needs a package of the same name."""


class UsageError(ValueError):
    """The command line or config file names a command or setting that does not exist, or lacks a value."""


def read_settings(path: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Read a flat YAML file of `RunConfig` and `DPOConfig` fields; `overrides` replace its values, or stand alone.

    Raises:
        UsageError: a key is unknown; the message names the nearest valid one.
        ValueError: the file is not flat YAML, a value has the wrong type, or a path does not exist.
        ModuleNotFoundError: a setting needs a package that is not installed.
        OSError: the file can't be read.
    """
    in_file = _read_file(Path(path)) if path else {}
    values = in_file | dict(overrides)
    known = settings()
    for key in values:
        if key not in known:
            raise UsageError(f"unknown setting {key!r}{advice(str(key), known)}")
    values = {key: typed(known[key], value) for key, value in values.items()}
    for key, value in values.items():
        if names := choices(known[key]):
            for each in value if isinstance(value, list) else [value]:
                check_name(key, each, names)
    if in_file.get("trust_remote_code") and "trust_remote_code" not in overrides:
        raise ValueError(
            f"{path} sets trust_remote_code, which lets the code in a model's repository run, but the file may have "
            "come with that model: take the line out, and type --trust_remote_code if you trust that code"
        )
    _check_code(values)
    if values.get("dataset_name") is None and not values.get("datasets"):
        where = f"set it in {path}, or " if path else ""
        raise ValueError(f"dataset_name is not set; {where}add --dataset_name to the command line")
    start, config = values.get("model_name_or_path"), values.get("config_name")
    if (start is None) == (config is None):
        raise ValueError(
            f"give either model_name_or_path (trained weights) or config_name (random weights), got {start!r} and "
            f"{config!r}"
        )
    _check_dtype(values)
    for name in ("model_name_or_path", "ref_model_name_or_path", "config_name"):
        if values.get(name) is not None:
            values[name] = _checked_model(name, values[name], values)
    if values.get("dataset_name") is not None:
        values["dataset_name"] = _checked_dataset(values["dataset_name"])
    _check_output(values)
    _check_packages(values)
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = _deepspeed_config(values["deepspeed"])
    return values


def advice(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown setting: what to do instead of it, or the nearest valid name."""
    return f"; {ADVICE[name]}" if name in ADVICE else nearest(name, known)


def _read_file(path: Path) -> dict[str, Any]:
    """Return the settings of a file, in which nothing may allow code to run."""
    try:
        values = read_yaml(path, {name for name, setting in settings().items() if setting.is_text})
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config file {str(path)!r}{sibling(path)}") from None
    if values is None:
        raise ValueError(f"{path} is empty; it must hold `key: value` lines, one of them dataset_name")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    return values


def typed(setting: Setting, value: Any) -> Any:
    """Return `value` converted to a type of a setting; for example, YAML reads 1e-6 as text.

    Raises:
        ValueError: it cannot be converted.
    """
    name, allowed = setting.name, setting.types
    if "dict" in allowed and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is neither YAML nor JSON: {error}") from error
    if (type(value).__name__ if value is not None else "None") in allowed:
        return value
    if "float" in allowed and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    if value is False and name.endswith("_strategy"):
        return "no"  # YAML reads an unquoted `no` as False
    if "int" in allowed and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(_\d+)+", value):
        return int(value)  # 10_000
    if "list" in allowed and isinstance(value, str):
        return [value]
    if "str" in allowed and len(allowed) > 1 and isinstance(value, (str, int, bool, list)) and "dict" not in allowed:
        return value  # an enum's value or an alternative spelling, which the config itself resolves
    names = " or ".join(sorted(each for each in allowed if each in ("bool", "dict", "float", "int", "list", "str")))
    raise ValueError(f"{name} must be {names or 'left out of a config file'}, got {value!r}")


_CODE = {
    "trust_remote_code": "it belongs on the command line, as --trust_remote_code",
    "weights_only": "weights are always read without running code",
    **dict.fromkeys(("allow_all_kernels", "use_kernels", "kernel_config"), "it runs kernels from the Hub"),
}
"""Arguments of `from_pretrained` by which code from a model's repository or from the Hub would run."""


def _check_code(values: Mapping[str, Any]) -> None:
    """Refuse `model_init_kwargs` that would run code, or read a file outside the model's folder."""
    for name, value in items(values.get("model_init_kwargs")):
        if name in _CODE and value is not (name == "weights_only"):
            raise ValueError(f"model_init_kwargs may not hold {name}: {_CODE[name]}; take it out")
        if is_kernel_on_hub(name, value) and not values.get("trust_remote_code"):
            raise ValueError(
                f"{name} {value!r} of model_init_kwargs runs a kernel from the Hub; add --trust_remote_code to the "
                "command line if you trust its code"
            )
        if name in ("gguf_file", "subfolder") and (Path(str(value)).is_absolute() or ".." in Path(str(value)).parts):
            raise ValueError(f"{name} of model_init_kwargs must lie in the model's folder, got {value!r}")


def _check_dtype(values: Mapping[str, Any]) -> None:
    kwargs = values.get("model_init_kwargs")
    of_model = kwargs if isinstance(kwargs, dict) else {}
    for name, value in (*values.items(), *of_model.items()):
        if name not in ("dtype", "torch_dtype"):
            continue
        check_dtype(name, value)


def check_dtype(name: str, value: Any) -> None:
    """Refuse a string that does not name a dtype that weights can have; values of other types pass.

    Raises:
        ValueError: it is not one of `DTYPES`.
    """
    if isinstance(value, str):
        check_name(name, value.removeprefix("torch."), DTYPES)


# Paths


def _looks_local(name: str) -> bool:
    could_be_on_hub = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    return could_be_on_hub is None or name.lower().endswith(LOCAL_SUFFIXES)


def local_path(setting: str, name: str) -> tuple[str, Path | None]:
    """Return the name with `~` expanded, and its local path; the path is None if the name is one on the Hub.

    Raises:
        ValueError: the name is a path, and nothing exists there.
    """
    expanded = os.path.expanduser(name)
    path = Path(expanded)
    if path.exists():
        return expanded, path
    if not _looks_local(name):
        return name, None
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise ValueError(f"{setting}: there is no {name!r}{where}{sibling(path)}")


def sibling(path: Path) -> str:
    """Return the end of a message that suggests an existing file with a name similar to a missing path's."""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.7)
    except OSError:
        return ""
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _checked_model(setting: str, name: str, values: Mapping[str, Any]) -> str:
    name, path = local_path(setting, name)
    if path is None:
        return name
    if path.is_file() and setting != "config_name":
        raise ValueError(
            f"{setting} must be a folder or a repository on the Hub, and {name!r} is a file; give its folder"
            + (f", and model_init_kwargs: {{gguf_file: {path.name}}}" if path.suffix == ".gguf" else "")
        )
    kwargs = values.get("model_init_kwargs")
    if path.is_dir() and not (isinstance(kwargs, dict) and "gguf_file" in kwargs):
        wanted = ("config.json",) if setting == "config_name" else ("config.json", "adapter_config.json")
        if not any((path / file).exists() for file in wanted):
            newest = newest_checkpoint(path, "trainer_state.json")
            hint = f"; did you mean {str(newest)!r}?" if newest else ""
            raise ValueError(f"{setting}: the folder {name!r} holds no {' or '.join(wanted)}, so no model{hint}")
        if (path / "adapter_config.json").exists():
            _need("peft", f"{setting}={name!r}, an adapter,")
    check_model_folder(setting, path, trusts_code=values.get("trust_remote_code") is True)
    return name


def _deepspeed_config(name: str) -> dict[str, Any]:
    path = Path(os.path.expanduser(name))
    if not path.exists():
        raise ValueError(f"deepspeed: there is no {name!r}{sibling(path)}")
    try:
        config = read_json(path, 2**20)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed: {name!r} is not a config of DeepSpeed: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ValueError(f"deepspeed: {name!r} is not a config of DeepSpeed, because it has no zero_optimization")
    return config


def _checked_dataset(name: str) -> str:
    name, path = local_path("dataset_name", name)
    if path is not None and path.is_file():
        if data_kind(path) is None:
            raise ValueError(
                f"dataset_name: {name!r} has none of the suffixes that can be read: {', '.join(DATA_FILES)}, each also "
                f"followed by {', '.join(COMPRESSED)}"
            )
        if path.stat().st_size == 0:
            raise ValueError(f"dataset_name: the file {name!r} is empty")
        if path.suffix == ".zst":
            _need("zstandard", f"dataset_name={name!r}")
    if path is not None and path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"dataset_name: the folder {name!r} is empty")
    return name


def data_kind(path: Path) -> str | None:
    """Return the builder of the datasets library that reads files with this suffix; None if there is none."""
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    return DATA_FILES.get(inner.suffix)


def newest_checkpoint(folder: Path, last: str = MANIFEST) -> Path | None:
    """Return the latest checkpoint in a folder that was written completely; None if there is none.

    Args:
        folder: a run's output folder.
        last: the last file that is written, by which a complete checkpoint is known; that of transformers' Trainer is
            trainer_state.json.
    """
    steps = {}
    for path in folder.glob(f"checkpoint-*/{last}"):
        if (step := path.parent.name.removeprefix("checkpoint-")).isdigit():
            steps[int(step)] = path.parent
    return steps[max(steps)] if steps else None


def _check_output(values: dict[str, Any]) -> None:
    """Refuse an output folder that can't be written, and a `resume_from_checkpoint` that is not a checkpoint."""
    output = Path(values.get("output_dir") or OUTPUT_DIR)
    nearest_there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest_there.is_dir():
        raise ValueError(f"output_dir {str(output)!r} can't be made: {str(nearest_there)!r} is a file")
    if not os.access(nearest_there, os.W_OK):
        raise ValueError(f"output_dir {str(output)!r} can't be written: no permission in {str(nearest_there)!r}")
    resume = values.get("resume_from_checkpoint")
    if str(resume).lower() in ("true", "false"):  # as text, if it was typed behind a command
        values["resume_from_checkpoint"] = resume = str(resume).lower() == "true"
    if resume is True and newest_checkpoint(output) is None:
        raise ValueError(
            f"resume_from_checkpoint: there is no complete checkpoint in output_dir {str(output)!r}; auto would start "
            "from the beginning"
        )
    if isinstance(resume, str) and resume != "auto":
        path = Path(os.path.expanduser(resume))
        if not path.exists():
            raise ValueError(f"resume_from_checkpoint: there is no {resume!r}{sibling(path)}")
        if not (path / "trainer_state.json").exists():
            newest = newest_checkpoint(path, "trainer_state.json")
            hint = f"; did you mean {str(newest)!r}?" if newest else ""
            raise ValueError(f"resume_from_checkpoint: {resume!r} holds no trainer_state.json, so no checkpoint{hint}")
        values["resume_from_checkpoint"] = str(path)


# Packages


def _check_packages(values: Mapping[str, Any]) -> None:
    if values.get("use_peft"):
        _need("peft", "use_peft")
    elif of_adapter := [
        name for name, x in values.items() if x and name.startswith(("lora_", "use_dora", "use_rslora"))
    ]:
        raise ValueError(
            f"{of_adapter[0]} has no effect without use_peft: true; set that, or leave {of_adapter[0]} out"
        )
    if values.get("deepspeed"):
        _need("deepspeed", "deepspeed")
    if values.get("use_liger_kernel"):
        _need("liger_kernel", "use_liger_kernel")
    if values.get("attention_backend") == "flash":
        _need("flash_attn", "attention_backend='flash'")
    if any(part in str(values.get("optim")) for part in ("8bit", "bnb", "paged")):
        _need("bitsandbytes", f"optim={values['optim']!r}")
    for name in ("load_in_4bit", "load_in_8bit"):
        if values.get(name):
            _need("bitsandbytes", name)
    kwargs = values.get("model_init_kwargs")
    quantized = (kwargs.get("quantization_config") if isinstance(kwargs, dict) else None) or {}
    if not isinstance(quantized, dict):
        raise ValueError(
            "quantization_config of model_init_kwargs must be a mapping such as {quant_method: bitsandbytes, "
            f"load_in_4bit: true}}, got {quantized!r}"
        )
    if any(quantized.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        _need("bitsandbytes", "quantization_config of model_init_kwargs")
    reports = values.get("report_to") or []
    for name in [reports] if isinstance(reports, str) else reports:
        if name in ("all", "none"):
            continue
        check_name("report_to", name, ("all", "none", *REPORTS))
        if REPORTS[name] and not (name == "tensorboard" and importlib.util.find_spec("tensorboardX")):
            _need(name, f"report_to={name!r}")


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{what} needs the package {package}: {install(package)}", name=package)


def install(package: str) -> str:
    """Return the command that installs an optional package."""
    return PACKAGES.get(package, f"pip install {package}")

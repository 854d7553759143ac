"""Facts about a run for its report: command line, device and versions. Secrets are hidden."""

import contextlib
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(r"(^|hub_|auth_|api_|access_)(token|key)$|password|secret|credential", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\bhf_\w{16,}|(?<=://)[^/@\s]+(?=@)")  # a token of the Hub; user and password in a URL


def without_secrets(value: Any, name: object = "") -> Any:
    """Return a setting's value without secrets, which are known by a name, at any depth, or by the form of a text.

    Args:
        value: value of the setting.
        name: name of the setting, such as `hub_token`.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(each, name) for each in value]
    if value and _SECRET_NAME.search(str(name)):
        return HIDDEN
    return _SECRET_TEXT.sub(HIDDEN, value) if isinstance(value, str) else value


def command_line(words: Sequence[str]) -> str:
    """Return the command line of `fastdpo` as one types it in a shell; values that hold a secret are hidden.

    Args:
        words: the words after the name of the command, as in `sys.argv[1:]`.
    """
    shown, option = ["fastdpo"], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else (option, "", word)
        option = word if word.startswith("--") and not equals else ""
        if word.startswith("--") and not equals:
            shown.append(word)
            continue
        key = name.lstrip("-").replace("-", "_")
        parsed = value
        with contextlib.suppress(yaml.YAMLError):
            parsed = yaml.safe_load(value)
        safe = without_secrets(parsed, key)
        if safe != parsed:
            value = without_secrets(value) if isinstance(parsed, str) and safe != HIDDEN else HIDDEN
        shown.append(f"{name}={value}" if equals else value)
    return shlex.join(shown)


def device(where: Any, processes: int) -> str:
    """Return the name of the device and the number of processes.

    Args:
        where: the `torch.device` of this process.
        processes: number of processes of the run; each is assumed to have a device like this one.
    """
    import torch

    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    elif where.type == "cpu":
        name = f"{cpu_name()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    else:
        name = where.type.upper()
    return f"{name}, {processes} process{'es' * (processes > 1)}"


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or os.name


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect a run's numbers."""
    found = {"Python": platform.python_version()}
    for name in ("fastdpo", "torch", "triton", "transformers", "accelerate", "datasets", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

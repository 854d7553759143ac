"""`fastdpo doctor`: the packages and devices of this machine, and what fastdpo does on them.

The slow imports happen one by one, so that a broken installation is a line of the result, not the end of the command.
"""

import os
import platform
import shutil
import sys
import tempfile
import textwrap
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from fastdpo.commands.doctor.findings import Findings
from fastdpo.settings.config_file import install, local_path
from fastdpo.settings.files import cache_home

GIB = 2**30
SMALL_CACHE = 5 * GIB
"""Free bytes below which there is little room for precomputed log-probs."""
PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "datasets", "peft", "trl", "liger-kernel", "bitsandbytes"),
    *("flash-attn", "tree-recurrence", "deepspeed"),
)
FOR_WHAT = {
    "peft": "adapters",
    "trl": "its callbacks, and patch_trl",
    "liger-kernel": "use_liger_kernel",
    "bitsandbytes": "4-bit weights and 8-bit optimizers",
    "flash-attn": "soft-capped attention on CUDA",
    "deepspeed": "ZeRO",
    "tree-recurrence": "shared prompts through recurrent layers",
}
"""What an optional package is for."""
NOT_OURS = ("bench", "test")
"""Extras whose bounds are for fastdpo's own tests."""
IMPORTED = ("torch", "transformers", "accelerate", "datasets")
"""Packages without which nothing can be trained."""


def doctor(model: str | None, options: dict[str, Any]) -> None:
    """Check the versions, the devices and the cache of this machine, and compare the head with PyTorch on it.

    Args:
        model: a model whose training is described too, as a folder or a name on the Hub; None: no model.
        options: must be empty.

    Raises:
        SystemExit: with code 1, if a version is outside its bounds, a package can't be imported, or the head is not as
            accurate as PyTorch, or `model` can't be trained.
        ValueError: `model` is no model.
        OSError: the config of `model` can't be read.
    """
    if model is not None:
        model, folder = local_path("model", model)
        if folder is not None and (folder / "adapter_config.json").is_file():
            raise ValueError(f"model: {model!r} is an adapter; give its base model")
    found = Findings()
    _check_packages(found)
    _check_cache(found)
    if _check_imports(found):
        from fastdpo.commands.doctor import device_report

        device = device_report.check_devices(found)
        device_report.check_serving(device, found)
        if model is not None:
            device_report.describe(model, device, found)
    found.end()
    if found.faults:
        sys.exit(1)


def _check_packages(found: Findings) -> None:
    found.heading("versions")
    found.line("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    bounds = _bounds(found)
    for name in dict.fromkeys((*PACKAGES, *bounds)):
        version, bound = _version(name), bounds.get(name)
        if version is None:
            required = bound is not None and not bound[1]
            found.line(name, f"not installed{f'; for {FOR_WHAT[name]}' if name in FOR_WHAT else ''}")
            if required:
                found.faults.append(f"{name} is not installed: {install(name.replace('-', '_'))}")
            continue
        if bound is None or not str(bound[0]):
            found.line(name, version)
        elif bound[0].contains(version, prereleases=True):
            found.line(name, f"{version}, within {bound[0]}")
        else:
            found.line(name, f"{version}, but fastdpo needs {bound[0]}")
            found.faults.append(f"{name} {version} is outside {bound[0]}: pip install '{name}{bound[0]}'")


def _bounds(found: Findings) -> dict[str, tuple[Any, bool]]:
    """Return, for each package, the versions that fastdpo takes, and whether it is optional."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("fastdpo") or ()]
    except metadata.PackageNotFoundError:
        found.line("fastdpo", "is run from its sources and not installed, so no bounds of versions are known")
        return {}
    found.line("fastdpo", metadata.version("fastdpo"))
    bounds = {}
    for each in requirements:
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            bounds[each.name] = each.specifier, False
        elif not any(each.marker.evaluate({"extra": extra}) for extra in NOT_OURS) and "extra" in str(each.marker):
            bounds.setdefault(each.name, (each.specifier, True))
    return bounds


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_cache(found: Findings) -> None:
    """Try to write to the folder of the caches, or to the nearest folder above it that exists."""
    found.heading("cache")
    folder = cache_home()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    set_by = "set by FASTDPO_CACHE" if "FASTDPO_CACHE" in os.environ else "FASTDPO_CACHE would move it"
    found.line("folder", f"{_short(folder)} ({set_by})")
    found.line("free space", f"{free / GIB:,.1f} GiB")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        found.line("writing", f"impossible: {error.strerror}")
        found.advice.append(
            f"set FASTDPO_CACHE to a folder that can be written, for {folder} can't be: without one, precomputing "
            "fails, and the head is timed again in each process"
        )
        return
    if free < SMALL_CACHE:
        found.advice.append(f"free some space in {folder}, where precomputed log-probs are kept")


def _short(path: Path) -> str:
    home = str(Path.home())
    return f"~{str(path)[len(home) :]}" if f"{path}/".startswith(f"{home}/") else str(path)


def _check_imports(found: Findings) -> bool:
    """Import what a training needs, and return whether all could be imported."""
    found.heading("imports")
    for name in IMPORTED:
        try:
            import_module(name)
        except Exception as error:  # a broken package may raise anything, and the next ones import it too
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found.line(name, f"can't be imported: {textwrap.shorten(text, 300)}")
            reinstall = f"pip install --force-reinstall {name}" if _version(name) else install(name)
            found.faults.append(f"{name} can't be imported: {reinstall}")
            return False
    found.line("all", f"{', '.join(IMPORTED)} can be imported")
    return True

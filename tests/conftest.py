"""Shared by all tests. Without a GPU the kernels run in Triton's interpreter."""

import fcntl
import gc
import itertools
import json
import logging
import os
from importlib.util import find_spec

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where accelerate imports it, warns of what it found
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS warns that it is not deterministic

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tqdm  # noqa: F401 - before a test's command line switches bars off, as it does where stderr is no terminal

CACHES = itertools.count()


def patch_language_once_a_kernel() -> None:
    """Halve the time of Triton's interpreter, which patches its language again at each call of a device function."""
    from triton.runtime import interpreter

    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope_class is None:  # of another version
        return
    running: list[Any] = []  # the scope of the kernel that runs, and the modules that are patched in it

    seen: dict[int, set[int]] = {}  # the modules that the globals of a kernel hold
    languages = {id(interpreter.tl), id(interpreter.tl.core)}

    def patch_lang(fn: Any) -> Any:
        modules = seen.get(id(fn.__globals__)) or languages & set(map(id, fn.__globals__.values()))
        seen[id(fn.__globals__)] = modules
        if running and running[0]._changes:
            if modules <= running[1]:
                return scope_class()
            running[1].update(modules)
            return patch(fn)
        running[:] = [patch(fn), set(modules)]
        return running[0]

    interpreter._patch_lang = patch_lang


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    patch_language_once_a_kernel()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is in the home folder must not decide what a test finds, nor a fixture of its module."""
    os.environ["FASTDPO_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def no_cache_of_other_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that one test computed must not be found by another."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(CACHES)}"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """Compute something slow, which must be JSON, in one of pytest-xdist's processes; the others read it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def once(name: str, compute: Callable[[], Any]) -> Any:
        result = folder / f"{name}.json"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                result.write_text(json.dumps(compute()))
        return json.loads(result.read_text())

    return once


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """torch.empty() comes back as NaN, so a kernel that skips an output element fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of pytest-xdist's processes begins with slow tests: one at the end would leave the others idle."""
    quick = [item for item in items if item.get_closest_marker("slow") is None]
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    files = [list(tests) for _, tests in itertools.groupby(slow, key=lambda item: item.path)]
    processes, left = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items)
    items.clear()
    for i in range(processes):
        part = list(itertools.chain(*files[i::processes]))
        share = left // (processes - i)  # as `--dist worksteal` divides the tests, in this order
        part += [quick.pop(0) for _ in range(min(len(quick), max(0, share - len(part))))]
        left -= len(part)
        items += part
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Keep the garbage collector, which every training calls, from walking through all modules each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or libraries would take what is left for leaks


@pytest.fixture(autouse=True)
def log_as_before_any_command() -> None:
    """The command line sets the level of fastdpo's logger, which decides what a later test finds in `caplog`."""
    logging.getLogger("fastdpo").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def forget_densities() -> None:
    """What one test's head was like must not choose another's algorithm."""
    from fastdpo.head.impl import sparsity

    sparsity._densities.clear()
    sparsity._calls.clear()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """Make a trainer of a tiny model, see `tests.helpers.trainers.make_trainer`."""
    from tests.helpers.trainers import make_trainer

    return partial(make_trainer, tmp_path)

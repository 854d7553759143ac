"""Each case of the modules about files, rows, inputs and caches of strangers is handled right."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

MODULES = ("data_cases", "cache_cases", "kernel_cases", "malicious_files")
CASES = [
    pytest.param(handles, id=f"{module}: {name}")
    for module in MODULES
    for name, handles in importlib.import_module(f"tests.reliability.{module}").cases()
]


@pytest.mark.filterwarnings("ignore")  # of the libraries that read what is malicious
@pytest.mark.parametrize("handles", CASES)
def test_a_case_is_handled_right(tmp_path: Path, handles: Callable[[Path], bool]) -> None:
    assert handles(tmp_path)

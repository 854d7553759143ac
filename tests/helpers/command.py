"""The command `fastdpo` in this process."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from fastdpo import cli


class Ended(NamedTuple):
    """What is left of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


def command(capsys: pytest.CaptureFixture[str], *first: str) -> Run:
    """Return a function that runs the command with `first` and further words."""

    def run(*words: object) -> Ended:
        code = 0
        try:
            cli.main([*first, *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return run

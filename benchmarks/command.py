"""`fastdpo bench`, for the command line: which benchmark, and the words behind it. Slow modules are imported last."""

from collections.abc import Callable
from typing import Any

from fastdpo.settings.config_file import UsageError
from fastdpo.settings.names import nearest

SUMMARY = "Measure time, memory and error of the head or of whole training steps, beside other libraries."


def _head(words: list[str]) -> None:
    from fastdpo.benchmarks.head.compare import main

    main(words)


def _training(words: list[str]) -> None:
    from fastdpo.benchmarks.training import main

    main(words)


def _report(words: list[str]) -> None:
    from fastdpo.benchmarks.report import main

    main(words)


BENCHMARKS: dict[str, Callable[[list[str]], Any]] = {"head": _head, "training": _training, "report": _report}
HELP = f"""usage: fastdpo bench head|training|report [OPTIONS]
       fastdpo bench head --help     what is measured, and all options

{SUMMARY}

  head      linear_logprobs beside PyTorch, TRL, Liger and CCE, on the same tensors
  training  steps of fastdpo's trainer beside those of TRL's, and with one part of fastdpo switched off at a time
  report    tables and pictures of what was measured

Results are JSON lines in benchmarks/results/<machine>/ in a clone of the repository, else in bench-results/<machine>/.
The peers come with pip install 'fastdpo[bench]'."""


def bench(words: list[str], show: Callable[[str], None]) -> None:
    """Run a benchmark with the words behind its name, or show the help if they ask for it.

    Raises:
        UsageError: there is no such benchmark, or a word behind it is wrong.
    """
    name, *rest = words or [""]
    if name in ("-h", "--help"):
        show(HELP)
    elif name in BENCHMARKS:
        BENCHMARKS[name](rest)
    else:
        what = f"no benchmark {name!r}{nearest(name, BENCHMARKS)}" if name else "name a benchmark"
        raise UsageError(f"{what}: fastdpo bench {'|'.join(BENCHMARKS)}")

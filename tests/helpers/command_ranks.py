"""Run by test_command_ranks.py under torchrun: commands on two processes; what each printed and computed, to a file."""

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from fastdpo import cli
from fastdpo.reference import precompute

RANK = int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def counting(owner: Any, name: str, note: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside the block, keep what `note` makes of the arguments of each call of a function."""
    notes: list[Any] = []
    function = getattr(owner, name)

    @functools.wraps(function)
    def noting(*args: Any, **options: Any) -> Any:
        notes.append(note(*args, **options))
        return function(*args, **options)

    setattr(owner, name, noting)
    yield notes
    setattr(owner, name, function)


def run(*words: object) -> dict[str, Any]:
    """One command: what it printed, the responses that it scored, and how many times it mapped a dataset."""
    out, code = io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        counting(precompute, "score_batch", lambda _, items, name, **__: (name, items)) as scored,
        counting(Dataset, "_map_single", lambda *_, **__: 1) as maps,
    ):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
    keys = [[name, key.hex()] for name, items in scored for item in items for key in item.keys]
    return {"code": code, "out": out.getvalue(), "scored": keys, "maps": len(maps)}


def fails(*_: Any, **__: Any) -> Any:
    raise FloatingPointError("row 3 of this process is not finite")


def main(folder: Path) -> None:
    common = ("--config_name", "null", "--dataset_name", folder / "data.jsonl", "--use_cpu", "--report_to", "none")
    models = (*common, "--model_name_or_path", folder / "policy")
    both = ("score", *models, "--ref_model_name_or_path", folder / "reference", "--tokens_per_batch", 300)
    results = {
        "score": run(*both, "--output_dir", folder / "scores"),
        "plan": run("plan", *models, "--output_dir", folder / "plan"),
        # each process has a disk of its own, as on several machines
        "precompute": run("precompute", *models, "--reference_cache_dir", folder / f"{RANK}", "--output_dir", folder),
    }
    (folder / f"rank{RANK}.json").write_text(json.dumps(results))
    if RANK == 1:
        precompute.score_batch = fails
    run(*both, "--output_dir", folder / "failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

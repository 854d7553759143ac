"""`fastdpo plan`: count the tokens of a run, compute its memory, and print both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.plan.plan import make_plan
from fastdpo.plan.tables import draw_lengths, tables
from fastdpo.run import load_datasets, load_tokenizer, make_configs


def plan_run(chosen: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Print the plan of a run with its settings and the options of `make_plan`; draw it where `output_dir` is set."""
    run, args = make_configs(chosen)
    if args.process_index > 0:  # the first process makes the plan
        return
    options.setdefault("processes", args.world_size)
    dataset, _ = load_datasets(run, args.seed)
    found = make_plan(run, args, dataset, load_tokenizer(run, args, dataset), **options)
    print(tables(found))  # noqa: T201
    if not chosen.get("output_dir"):
        print("picture: none, because no output_dir is set")  # noqa: T201
        return
    picture = Path(args.output_dir) / "plan.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_lengths(found.stats, picture)
    print(f"picture: {picture}")  # noqa: T201

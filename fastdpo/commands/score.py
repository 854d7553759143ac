"""`fastdpo score`: score the held-out rows of a run, on one process or on several."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo import scoring
from fastdpo.data.prepare import limits_of
from fastdpo.model.policy import load_policy
from fastdpo.reference.precompute import options_of
from fastdpo.report.page import summary_table
from fastdpo.run import load_datasets, load_model, load_reference, make_configs
from fastdpo.trainer.failing_together import failing_together


def score_run(chosen: Mapping[str, Any]) -> None:
    """Score the rows of a run with its settings; the first process writes `scores.jsonl` and prints a summary."""
    run, args = make_configs(chosen)
    _keep_whole(args)
    output = Path(args.output_dir) / "scores.jsonl"
    with failing_together(args):
        instead = f"the split {run.dataset_train_split!r} is scored"
        train_dataset, eval_dataset = load_datasets(run, args.seed, without=instead)
        model, tokenizer = load_model(run, args, train_dataset)
        output.parent.mkdir(parents=True, exist_ok=True)
        options = options_of(args)  # the precision and batch size of training
        result = scoring.score(
            load_policy(model, args).to(args.device),
            reference if (reference := load_reference(run, args)) is None else reference.to(args.device),
            train_dataset if eval_dataset is None else eval_dataset,
            tokenizer=tokenizer,
            beta=args.beta,
            on_bad_row=args.on_bad_row,
            output=output,
            ref_adapter_name=args.ref_adapter_name,
            cache_dir=args.reference_cache_dir,
            processes=args.distributed_state if args.world_size > 1 else None,
            **limits_of(args),
            **options,
        )
    if args.process_index > 0:
        return
    rows: list[tuple[str, ...]] = [("rows", f"{len(result.rows):,}")]
    if result.accuracy is not None:
        rows.append(("pairs in the right order", f"{result.accuracy:.3f}"))
    print(summary_table(rows, ("scored", "")))  # noqa: T201
    print(f"scores: {output}")  # noqa: T201


def _keep_whole(args: Any) -> None:
    """Let each process load all weights, whatever the settings of training share.

    Raises:
        ValueError: DeepSpeed is on, which would shard or cast what is loaded.
    """
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "fastdpo score keeps the whole model on each GPU and can't use DeepSpeed; leave `deepspeed` out, and start "
            "it with `torchrun` or with the DDP settings of accelerate"
        )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # otherwise only the first process would read the weights

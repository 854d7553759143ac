"""Add reference log-probs to a trainer's datasets, and find out whether the cache already has all of them."""

import contextlib
import functools
import logging
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer

from fastdpo.data import prepare
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model import adapters
from fastdpo.model.layout import Layout
from fastdpo.reference.exchange import exchange
from fastdpo.reference.fingerprint import fingerprint
from fastdpo.reference.precompute import holds, options_of, reference_folder, with_reference
from fastdpo.sharding import is_sharded, largest

logger = logging.getLogger("fastdpo")


def is_complete(trainer: Trainer) -> bool:
    """Whether the cache holds the log-probs that the policy, as its own reference, gives all rows of the datasets."""
    args: Any = trainer.args
    if args.sync_ref_model:
        return False
    folder = reference_folder(args.reference_cache_dir)
    datasets = [trainer.train_dataset]
    prepare.each(trainer.eval_dataset, lambda rows, _: datasets.append(rows))
    held, key, autocast = [False], None, options_of(args)["autocast"]
    with _answering(trainer.model, trainer.model, None):
        if is_sharded(trainer.model):  # all processes read its weights together
            key = fingerprint(trainer.model, autocast=autocast)[0]
        if trainer.is_world_process_zero():
            held = [holds(datasets, trainer.model, folder=folder, autocast=autocast, key=key)]
    broadcast_object_list(held)  # a process whose own cache lacks them computes them
    if held[0]:
        logger.info(
            "reference: log-probs of all rows are in %s, so the reference need not run "
            "(precompute_ref_log_probs=False ignores them)",
            folder,
        )
    return held[0]


def add(trainer: Trainer, reference: Any, layout: Layout) -> None:
    """Add the reference's log-probs to the trainer's datasets, from the cache as far as it has them.

    Args:
        trainer: its `train_dataset` and `eval_dataset` are replaced, except those that came with reference log-probs.
        reference: the model that answers. If it is the trainer's own PEFT model, it must not be trained yet, and it is
            switched to its reference adapter.
        layout: the layout of the batches.
    """
    trainer.train_dataset = with_logps(trainer, reference, layout, trainer.train_dataset, "train")
    trainer.eval_dataset = prepare.each(trainer.eval_dataset, functools.partial(with_logps, trainer, reference, layout))


def with_logps(trainer: Trainer, reference: Any, layout: Layout, rows: Any, name: str) -> Any:
    """Return one dataset with the reference's log-probs; one that came with reference log-probs stays as it is.

    Args:
        trainer: its settings say how to compute them, and where the cache is.
        reference: as in `add`.
        layout: as in `add`.
        rows: the tokenised dataset.
        name: what errors and the progress bar call it.
    """
    if not prepare.REFERENCES.keys().isdisjoint(rows.column_names or ()):
        return rows
    args: Any = trainer.args
    home, device = reference.device, trainer.accelerator.device
    options = options_of(args) | {
        "folder": reference_folder(args.reference_cache_dir),
        "layout": layout,
        "collate": getattr(trainer, "collate", shared_prefix_batch),
        "model": reference if home == device or is_sharded(reference) else reference.to(device),
        "process_index": args.process_index,
        "num_processes": args.world_size,
        "wait_for_everyone": trainer.accelerator.wait_for_everyone,
        "exchange": exchange,
    }
    if is_sharded(reference):
        options["largest"] = functools.partial(largest, device=device)
    with _answering(reference, trainer.model, args.ref_adapter_name):
        rows = with_reference(rows, name=name, **options)
    if home != device and reference is not trainer.model and not is_sharded(reference):
        reference.to(home)  # so that it takes no memory of the device in training
    return rows


def _answering(reference: Any, policy: Any, adapter: str | None) -> contextlib.AbstractContextManager[None]:
    """Inside the block, `reference` answers as the reference, also if it is the PEFT policy itself."""
    switched = reference is policy and adapters.is_peft_model(policy)
    return adapters.as_reference(policy, adapter) if switched else contextlib.nullcontext()

"""Which run a checkpoint belongs to: its settings, data, model and reference, and how another run differs."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from fastdpo.data.columns import REFERENCES
from fastdpo.model.adapted_layers import unwrap
from fastdpo.reference.fingerprint import numerics
from fastdpo.report.facts import versions
from fastdpo.sharding import local, plain_name, plain_parts, shape_of

IRRELEVANT = {
    *("output_dir", "run_name", "project", "report_to", "log_level", "log_level_replica", "log_on_each_node"),
    *("disable_tqdm", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "show_example"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "local_rank", "do_train", "do_eval", "do_predict", "debug", "skip_memory_metrics"),
    *("resume_from_checkpoint", "resume_changed", "overwrite_output_dir", "enable_jit_checkpoint"),
    *("restore_callback_states_from_checkpoint", "eval_on_start", "remove_unused_columns", "label_names"),
    *("dataset_num_proc", "reference_cache_dir", "self_check", "precompute_ref_log_probs", "on_bad_row"),
    *("trust_remote_code", "parallelism_config", "fsdp_config", "deepspeed"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "logging_nan_inf_filter"),
    *("ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "torch_empty_cache_steps", "include_for_metrics"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "batch_eval_metrics"),
    *("prediction_loss_only", "include_num_input_tokens_seen", "model_init_kwargs"),
}
"""Settings that change no number of a training. Those of model and data are seen in the model and the data."""

OPTIMIZER = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_steps", "num_train_epochs"),
}
"""Settings that are in the state of the optimizer and of its schedule, from where they would come back."""

FROM_NOW_ON = OPTIMIZER | {
    "max_grad_norm",
    *("logging_strategy", "logging_steps", "logging_first_step", "save_strategy", "save_steps", "save_total_limit"),
    *("save_only_model", "save_on_each_node", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "precompute_ref_batch_size"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "use_cache"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu"),
    *(
        "attention_backend",
        "head_impl",
        "head_backward",
        "head_workspace",
        "prefix_sharing",
        "full_determinism",
        "versions",
    ),
    *("use_liger_kernel", "liger_kernel_config", "ddp_find_unused_parameters", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "bf16_full_eval", "fp16_full_eval"),
    *("max_length", "max_prompt_length", "max_completion_length"),  # where they matter, the training data differ
}
"""What may change between two parts of a run; it is said, and the new value is used from the checkpoint's step on.

Everything else decides what the run computes, so a checkpoint of other values is of another run.
"""

_SAMPLE = 1024
"""Elements of each tensor that its digest reads: training moves almost all elements, so other weights are noticed."""


def identity(trainer: Any) -> dict[str, Any]:
    """Return what a trainer's run is, as JSON values; call it before the policy is trained or resumed.

    The weights of model and reference are read at 1024 evenly spaced elements of each tensor. The training data are
    read whole; a stream is not.
    """
    args = trainer.args
    settings = {name: value for name, value in args.to_dict().items() if name not in IRRELEVANT}
    policy = unwrap(trainer.model)
    frozen = ((plain_name(name), p) for name, p in policy.named_parameters() if not p.requires_grad)
    shapes = [(plain_name(name), str(p.dtype), shape_of(p)) for name, p in policy.named_parameters()]
    columns = trainer.train_dataset.column_names if isinstance(trainer.train_dataset, Dataset) else []
    in_data = sorted(REFERENCES.keys() & set(columns))
    reference = None
    if in_data:
        reference = data_digest(trainer.train_dataset, in_data)
    elif trainer.ref_model is not None:
        reference = weights_digest(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    found: dict[str, Any] = json.loads(  # as it will be read from a checkpoint
        json.dumps(
            settings
            | {
                "processes": args.world_size,
                "model config": _digest(numerics(policy.config.to_dict()), shapes),
                "frozen weights": weights_digest(frozen),
                "reference": reference,
                "training data": data_digest(trainer.train_dataset, sorted({*columns} - REFERENCES.keys())),
                "versions": versions(),
            },
            default=str,
        )
    )
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what differs between a checkpoint's run and this one, each as "name: old value -> new value".

    Settings that only one of them has, because of another version, are left out.

    Returns:
        The differences that make it another run, and those that hold from now on.
    """
    others: list[str] = []
    from_now_on: list[str] = []
    for name in sorted(then.keys() & now.keys()):
        old, new = then[name], now[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            parts = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            text = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in parts)
            text = f"{name}: {text}"
        else:
            text = f"{name}: {old} -> {new}"
        (from_now_on if name in FROM_NOW_ON else others).append(text)
    return others, from_now_on


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hex digits of names, dtypes, shapes and evenly spaced elements of tensors; see `_SAMPLE`."""
    parts, described = [], []
    for name, tensor in named:
        for part in plain_parts(local(tensor)):
            flat = part.reshape(-1)
            parts.append(flat[:: max(1, len(flat) // _SAMPLE)].contiguous().view(torch.uint8))
        described.append((name, str(tensor.dtype), shape_of(tensor)))
    found = hashlib.sha256()
    for part in parts:
        found.update(part.cpu().numpy().data)
    return _digest(described, found.hexdigest())


def data_digest(dataset: Any, columns: list[str]) -> str | None:
    """Return the number of rows and 16 hex digits of the columns' values in their order; None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    found = hashlib.sha256(json.dumps(columns).encode())
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            _add(found, table[name].combine_chunks())
    return f"{len(dataset):,} rows, {found.hexdigest()[:16]}"


def _add(found: Any, column: Any) -> None:
    """Add an Arrow column's values, whatever its buffers are like."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        found.update(np.asarray(column.value_lengths().fill_null(-1), np.int64).tobytes())
        _add(found, column.flatten())
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        found.update(np.asarray(column.is_null()).tobytes() if column.null_count else b"")
        found.update(column.fill_null(0).to_numpy(zero_copy_only=False).tobytes())
    else:
        found.update(json.dumps(column.to_pylist(), default=str).encode())


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

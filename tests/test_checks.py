"""fastdpo.checks: the stop at what is not finite, and the kinds of parallelism that are refused."""

import importlib
import math
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig

from fastdpo.checks import (
    NonFiniteGuard,
    check_deepspeed,
    check_parallelism,
    leave_checkpointing_to_fsdp,
    load_once_with_fsdp,
    stay_on_cpu,
)
from fastdpo.trainer import failing_together


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_stops(value: float, device: torch.device) -> None:
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(1.0, device=device), lambda: "the first loss")

    def watch_second() -> None:
        guard.watch(torch.tensor(value, device=device), lambda: "the second loss")
        guard.check_now()  # on a GPU the verdict may still be on its way

    with pytest.raises(FloatingPointError, match="the second loss is not finite"):
        watch_second()


def test_an_error_is_worded_only_when_needed(device: torch.device) -> None:
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(0.0, device=device), lambda: pytest.fail("worded for nothing"))
    guard.check_now()


# Several processes


def a_trainer(**changes: Any) -> Any:
    """What `check_parallelism` reads of a trainer."""
    given = {"parallelism_config": None, "is_fsdp_enabled": False, "fsdp_version": 2, "world_size": 2} | changes
    args = {"n_gpu": 1, "save_on_each_node": False, "activation_offloading": False, "torch_compile": False}
    accelerator = SimpleNamespace(
        parallelism_config=given["parallelism_config"],
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=given["fsdp_version"])),
    )
    return SimpleNamespace(
        args=SimpleNamespace(**{name: given.get(name, value) for name, value in (args | {"world_size": 2}).items()}),
        accelerator=accelerator,
        is_deepspeed_enabled=given.get("is_deepspeed_enabled", False),
        is_fsdp_enabled=given["is_fsdp_enabled"],
        optimizer=given.get("optimizer"),
        lr_scheduler=None,
        is_distributed_loading_by_transformers=given.get("is_distributed_loading_by_transformers", False),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_gpu": 2}, "accelerate launch"),
        ({"is_deepspeed_enabled": True, "optimizer": object()}, "optimizers=... has no effect with DeepSpeed"),
        ({"is_fsdp_enabled": True, "fsdp_version": 1}, "set `fsdp_version: 2` in accelerate's YAML"),
        ({"is_fsdp_enabled": True, "torch_compile": True}, "torch_compile is not supported with FSDP"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "set tp_size=1, and dp_shard_size=2"),
        ({"parallelism_config": ParallelismConfig(cp_size=4)}, "set cp_size=1, and dp_shard_size=4"),
        ({"parallelism_config": SimpleNamespace(sp_size=2)}, "set sp_size=1, and dp_shard_size=2"),
        ({"is_distributed_loading_by_transformers": True}, "load it without"),
        ({"save_on_each_node": True}, "give an output_dir that all machines share"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parallelism_that_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parallelism(a_trainer(**changes))


@pytest.mark.parametrize("changes", [{}, {"is_fsdp_enabled": True}, {"is_deepspeed_enabled": True}], ids=str)
def test_supported_parallelism_passes(changes: dict[str, Any]) -> None:
    check_parallelism(a_trainer(parallelism_config=ParallelismConfig(dp_replicate_size=2), **changes))


@pytest.mark.parametrize(("restarts", "shares"), [("3", "True"), ("0", "True"), ("3", "False")])
def test_a_store_that_outlives_its_processes_is_said(
    restarts: str, shares: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("MAX_RESTARTS", restarts), ("USE_AGENT_STORE", shares)):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", "0")
    check_parallelism(a_trainer())
    assert ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == (restarts == "3" and shares == "True")


@pytest.mark.parametrize("asked", ["true", "false"])
def test_fsdp_left_out_on_the_cpu_is_said(
    asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    check_parallelism(a_trainer())
    assert ("accelerate leaves FSDP out on the CPU" in caplog.text) == (asked == "true")


@pytest.mark.parametrize(
    ("plugin", "environment", "expected"),
    [
        ({"activation_checkpointing": True}, {}, False),
        ({"activation_checkpointing": False}, {"ACCELERATE_USE_FSDP": "true"}, True),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, False),
        (None, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, True),
        (None, {}, True),
    ],
    ids=str,
)
def test_checkpointing_is_left_to_fsdp_if_it_does_it(
    plugin: Any, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(fsdp_plugin_args=plugin, activation_checkpointing=True)
    leave_checkpointing_to_fsdp(args)
    assert args.activation_checkpointing is expected


@pytest.mark.parametrize(("has_accelerator", "is_launched"), [(False, True), (False, False), (True, True)])
def test_what_runs_without_an_accelerator_knows_it(
    has_accelerator: bool, is_launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    if is_launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    args = SimpleNamespace(use_cpu=False, dataloader_pin_memory=True, deepspeed=None)
    stay_on_cpu(args)
    assert args.use_cpu is not has_accelerator
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == ("true" if has_accelerator else "false")
    assert args.dataloader_pin_memory is has_accelerator


@pytest.mark.parametrize("efficient", [True, False])
def test_one_process_loads_if_fsdp_is_asked_to(efficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    load_once_with_fsdp(SimpleNamespace(fsdp_plugin_args={"cpu_ram_efficient_loading": efficient}))
    assert os.environ["ACCELERATE_USE_FSDP"] == ("true" if efficient else "false")
    load_once_with_fsdp(SimpleNamespace(fsdp_plugin_args=None))


def test_an_error_of_processes_before_a_restart_does_not_end_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun may keep the store in which processes report their errors."""
    ended: list[int] = []
    args = SimpleNamespace(world_size=2, process_index=1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(OSError, match="gone"), failing_together.failing_together(args):
            raise OSError("gone")
        importlib.reload(failing_together)  # as in a new process
        monkeypatch.setattr(failing_together, "_POLL_SECONDS", 0.01)
        monkeypatch.setattr(failing_together, "_GRACE_SECONDS", 0.01)
        monkeypatch.setattr("os._exit", ended.append)
        with failing_together.failing_together(args):
            time.sleep(0.2)
    finally:
        torch.distributed.destroy_process_group()
    assert not ended


# DeepSpeed


@pytest.mark.parametrize(
    ("use_cpu", "has_accelerator", "is_launched", "message"),
    [
        (False, False, True, "leave deepspeed out for a trial on the CPU"),
        (True, True, True, "leave deepspeed out for a trial on the CPU"),
        (False, True, False, "torchrun --nproc-per-node 1"),
    ],
)
@pytest.mark.parametrize("by", ["config", "launcher"])
def test_where_deepspeed_cannot_run_is_said(
    use_cpu: bool,
    has_accelerator: bool,
    is_launched: bool,
    message: str,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if is_launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(by == "launcher"))
    given = {"zero_optimization": {"stage": 2}} if by == "config" else None
    args = SimpleNamespace(use_cpu=use_cpu, dataloader_pin_memory=True, deepspeed=given)
    with pytest.raises(ValueError, match=message):
        stay_on_cpu(args)


def deepspeed_args(config: dict[str, Any], **changes: Any) -> Any:
    """What `check_deepspeed` reads: four pairs a step on each of two processes."""
    settings = {"bf16": False, "fp16": False, "max_grad_norm": 0.7, "torch_compile": False, "world_size": 2}
    settings |= {"activation_offloading": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    config = {"zero_optimization": {"stage": 3}} | config
    return SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config), **(settings | changes))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, "stage is 0; set 1, 2 or 3"),
        ({"zero_optimization": {}}, {}, "stage is 0; set 1, 2 or 3"),
        ({"optimizer": {"type": "AdamW"}}, {}, "take 'optimizer' out of DeepSpeed's config: optim, learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "take 'scheduler' out of DeepSpeed's config: lr_scheduler_type"),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel is not supported"),
        ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size is not supported"),
        ({"torch_autocast": {"enabled": True}}, {}, "'torch_autocast' is not supported"),
        ({"compile": {"deepcompile": True}}, {}, "'compile' is not supported"),
        ({"progressive_layer_drop": {"theta": 0.5}}, {}, "'progressive_layer_drop' is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "set device: cpu, or none"),
        ({}, {"torch_compile": True}, "torch_compile is not supported with DeepSpeed's ZeRO-3"),
        ({}, {"activation_offloading": True}, "activation_offloading is not supported with DeepSpeed's ZeRO-3"),
        ({"gradient_accumulation_steps": 1}, {}, "gradient_accumulation_steps is 1, but .* makes it 3; set the first"),
        ({"train_micro_batch_size_per_gpu": 3}, {}, "is 3, but fastdpo's per_device_train_batch_size makes it 4"),
        ({"train_batch_size": 8}, {}, "train_batch_size is 8, but .* makes it 24"),
        ({"gradient_clipping": 1.0}, {}, "gradient_clipping is 1.0, but fastdpo's max_grad_norm makes it 0.7"),
        ({"fp16": {"enabled": True}}, {}, "fp16 is True, but fastdpo's fp16 makes it False"),
        ({"bf16": {"enabled": False}}, {"bf16": True}, "bf16 is False, but fastdpo's bf16 makes it True"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_settings_of_deepspeed_that_are_not_supported_are_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_deepspeed(deepspeed_args(config, **changes))


def test_settings_of_deepspeed_that_are_unset_are_those_of_fastdpo() -> None:
    config: dict[str, Any] = {"train_batch_size": "auto", "gradient_accumulation_steps": 3, "fp16": {"enabled": "auto"}}
    config |= {"zero_optimization": {"stage": 2}, "compile": {"deepcompile": False}, "amp": {"enabled": False}}
    args = deepspeed_args(config, bf16=True, activation_offloading=True)
    check_deepspeed(args)
    found = args.deepspeed_plugin.deepspeed_config
    assert found["gradient_clipping"] == 0.7
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["train_batch_size"] == "auto"
    check_deepspeed(SimpleNamespace(deepspeed_plugin=None))

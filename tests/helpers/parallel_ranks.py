"""Run by test_parallel.py in two processes: gradients on both against those on one, results to a file.

Every process computes the truth itself, with the whole batch and no wrapper; then the wrapped model with its half.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.scoring_forward import patch_forward
from tests.helpers.tiny import PAIRS, make_model

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def pairs_loss(model: nn.Module, pairs: list[dict[str, list[int]]]) -> Tensor:
    """Sum over the pairs, so that halves add up to the whole."""
    batch = shared_prefix_batch(pairs)
    logps = torch.segment_reduce(model(**batch).logps, "sum", offsets=batch["cu_target"])
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).sum()


def gradients(model: nn.Module, pairs: list[dict[str, list[int]]], scale: float = 1.0) -> dict[str, Tensor]:
    model.zero_grad()
    (pairs_loss(model, pairs) * scale).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name.removeprefix("module.")] = grad.clone()
    return found


def make(family: str = "llama", lora: bool = False, checkpointing: bool | None = None, **overrides: Any) -> nn.Module:
    model: Any = make_model(family, **overrides)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        with torch.no_grad(), torch.random.fork_rng():  # LoRA's B starts at 0
            torch.manual_seed(5)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    patch_forward(model)
    if checkpointing is not None:
        base = model.get_base_model() if lora else model
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(
            {"use_reentrant": checkpointing}
        )
        if lora:
            base.enable_input_require_grads()
    return model


# How the model is wrapped


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def layers_of(model: Any) -> nn.ModuleList:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers: nn.ModuleList = base.model.layers
    return layers


def fsdp_head_in_root(model: Any) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    return model


def fsdp_head_alone(model: Any) -> nn.Module:
    fully_shard(model.get_output_embeddings())
    return fsdp_head_in_root(model)


def fsdp_tail(model: Any) -> nn.Module:
    """As accelerate has it: the last norm and the head are one unit, with the embedding where that is tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.norm
    if embedding.weight is head.weight:
        tail = [norm, embedding, head]
    else:
        tail = [norm, head]
        fully_shard(embedding)
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)
    return model


CASES: dict[str, tuple[Callable[[Any], nn.Module], dict[str, Any]]] = {
    "ddp": (ddp, {}),
    "ddp-reentrant": (ddp, {"checkpointing": True}),
    "ddp-tied": (ddp, {"tie_word_embeddings": True}),
    "ddp-lora-checkpointed": (ddp, {"lora": True, "checkpointing": False}),
    "fsdp-head-in-root": (fsdp_head_in_root, {}),
    "fsdp-head-in-root-tied": (fsdp_head_in_root, {"tie_word_embeddings": True}),
    "fsdp-head-alone": (fsdp_head_alone, {}),
    "fsdp-head-alone-checkpointed": (fsdp_head_alone, {"checkpointing": False}),
    "fsdp-tail": (fsdp_tail, {}),
    "fsdp-tail-tied-reentrant": (fsdp_tail, {"tie_word_embeddings": True, "checkpointing": True}),
    "fsdp-tail-lora": (fsdp_tail, {"lora": True}),
    "fsdp-window-softcap": (fsdp_tail, {"family": "gemma2", "sliding_window": 6, "attn_logit_softcapping": 2.0}),
}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Error of each parameter's gradient over its largest."""
    if actual.keys() != expected.keys():
        raise AssertionError(sorted(actual.keys() ^ expected.keys()))
    return {n: float((actual[n] - g).abs().max() / g.abs().max()) for n, g in expected.items()}


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), len(PAIRS) // 2
    errors: dict[str, Any] = {}
    for name, (wrap, options) in CASES.items():
        expected = gradients(make(**options), PAIRS)
        model = wrap(make(**options))
        # gradients are averaged over the processes
        errors[name] = worst(gradients(model, PAIRS[rank * half : (rank + 1) * half], dist.get_world_size()), expected)
    if rank == 0:
        result.write_text(json.dumps(errors))

"""Compute one key of what a model's log-probs depend on: its weights, its config and the precision it computes in.

Nothing else is in the key, so it is the same for all losses, learning rates, names and folders. Log-probs also depend
on things that a model in memory does not show, above all the versions of libraries and the model's own code. Therefore
`fastdpo.reference.precompute` computes a few cached entries again before it uses the cache.
"""

import hashlib
import json
from typing import Any

import torch

from fastdpo.model.adapted_layers import tensors_in_use, unwrap
from fastdpo.reference.cache import FORMAT
from fastdpo.sharding import plain_parts, reshard, whole

_COSMETIC = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"),
    *("dtype", "torch_dtype"),  # the dtype that the file asks for; tensors count with their own dtype
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("initializer_range", "initializer_factor", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "tie_word_embeddings"),
}
"""Config entries that no log-prob depends on. All others count, so an unknown entry is never ignored."""


def fingerprint(model: Any, *, autocast: torch.dtype | None = None) -> tuple[str, dict[str, Any]]:
    """Return the key of the log-probs that `model` would give now, and what the key is made of.

    Args:
        model: a causal LM, or a PEFT model. Adapters count as they are at this moment: off, or the active ones. With
            all of them off, the key is that of the model without any. If it is sharded, all processes must
            call this, and the key is that of the whole weights.
        autocast: the dtype that it will compute in under autocast; None if autocast is off.

    Returns:
        64 hex digits, and the description whose SHA-256 they are.
    """
    base = unwrap(model)
    reshard(model)
    tensors, factors = tensors_in_use(base)
    weights = hashlib.sha256()
    device = "cpu"
    for name, each in tensors:
        tensor = whole(each)
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_parts(tensor):
            weights.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        device = tensor.device.type
    description = {
        "format": FORMAT,
        "class": type(base).__qualname__,
        "weights": weights.hexdigest(),
        "adapters": factors,
        "config": numerics(base.config.to_dict()),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "device": device,
        "matmul_precision": _matmul_precision(device),
    }
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest(), description


def numerics(config: Any) -> Any:
    """Return a config without cosmetic entries at any depth, and without dropout, which is off for a reference."""
    if not isinstance(config, dict):
        return config
    return {
        str(key): numerics(value)
        for key, value in config.items()
        if key not in _COSMETIC and "dropout" not in str(key) and not str(key).endswith("_pdrop")
    }


def _matmul_precision(device: str) -> str:
    """Return how float32 matmuls are computed: in float32 ("ieee"), or in TF32 or bf16."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    precision = str(backend.matmul.fp32_precision)
    return "ieee" if precision == "none" else precision

"""Tiny random models, and what they must score: every sequence alone, unpadded, through the stock forward."""

import copy
import random
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 101
WINDOW = 6

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}),
    "gemma3-window": (
        "Gemma3",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "cohere": ("Cohere", {}),
    "granite": ("Granite", {}),
    "hyperclovax": ("HyperCLOVAX", {}),
    "phi": ("Phi", {}),  # its head has a bias
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
    "llama4": ("Llama4", {"intermediate_size_mlp": 48, "head_dim": 8, "moe_layers": [1], "num_local_experts": 2}),
    "qwen2-window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 4}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "cohere2-window": (
        "Cohere2",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "starcoder2": ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "deepseek-v3": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2}
        | {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "bamba": (
        "Bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen2-moe-window": (  # its layers do not know of the window, only the mask does
        "Qwen2Moe",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2},
    ),
}


def make_model(family: str, **overrides: Any) -> Any:
    """A causal LM in float32 with random weights, norms and biases included, in training mode."""
    name, options = FAMILIES[family]
    options = _SIZES | {"tie_word_embeddings": False} | options | overrides
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, name + suffix)(config_class(**options))
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # wide enough for attention to be far from uniform
    return model.train()


def make_pairs(lengths: list[tuple[int, int, int, int]], seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs with so many tokens of the prompt, common to the responses, of chosen alone, of rejected alone."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(n)]

    pairs = []
    for prompt, common, chosen, rejected in lengths:
        start = ids(common)
        pairs.append(
            {
                "prompt_ids": ids(prompt),
                "chosen_ids": start + [3] * bool(chosen) + ids(chosen - 1) + [2],
                "rejected_ids": start + [4] * bool(rejected) + ids(rejected - 1) + [2],
            }
        )
    return pairs


PAIRS = make_pairs([(5, 0, 7, 3), (1, 0, 2, 9), (12, 4, 1, 6), (3, 2, 0, 2)])
"""Ragged; longer than the windows; a prompt of one token, shared starts, and a response that another one begins."""


def sequences(pairs: list[dict[str, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) in the order of a packed batch's responses."""
    return [(pair["prompt_ids"], pair[f"{name}_ids"]) for name in ("chosen", "rejected") for pair in pairs]


def stock_logps(model: nn.Module, pairs: list[dict[str, list[int]]]) -> Tensor:
    """`[M]`: each sequence alone through the model's own forward and a plain log_softmax."""
    parts = []
    for prompt, response in sequences(pairs):
        ids = torch.tensor([prompt + response])
        logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        parts.append(logps[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(parts)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a random weighting of `logps`, by parameter name."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Each parameter's within `bound` of its own largest gradient.

    Or, where that is nothing but rounding (the bias of keys shifts all scores alike), of the largest of all.
    """
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error, scale = (actual[name] - gradient).abs().max(), gradient.abs().max()
        scale = scale if scale > 1e-5 * largest else largest
        assert error <= bound * scale, f"{name}: off by {error:.1e}, largest gradient {scale:.1e}"


def stock(model: Any, attn_implementation: str = "eager") -> Any:
    """An unpatched copy of a model that has not been patched."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(attn_implementation)
    return model

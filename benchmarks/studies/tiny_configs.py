"""Make tiny random models of every causal-LM class of transformers, from its own config class.

`SIZES` has a small value for each name of a size that configs use, and `OVERRIDES` has the values that a class needs
besides. Sub-configs (the text part of a model that also sees) are made the same way.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 101
WINDOW = 6
MAX_PARAMETERS = 20_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embedding_size", "n_embed"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "attention_hidden_size", "lru_width", "hidden_size_global"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "d_inner"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "intermediate_size_mlp", "dim_ff", "shared_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "n_head_kv", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "attention_head_size", "dim_head", "v_head_dim", "mamba_d_head"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts"], 2),
    **dict.fromkeys(["vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size_per_layer_input", "mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["image_size"], 32),
    **dict.fromkeys(["patch_size"], 8),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["sliding_window", "attention_window_size"], WINDOW),
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_d_ssm": 64}
_FOUR_LAYERS = {"num_hidden_layers": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": {"num_hidden_layers": 8},
    "BambaForCausalLM": _MAMBA | {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "BigBirdForCausalLM": {"attention_type": "original_full"},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "Dots3NoteForCausalLM": _FOUR_LAYERS,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "Gemma3nForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 0},
    "GraniteMoeHybridForCausalLM": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"num_hidden_layers": 8},
    "KimiLinearForCausalLM": {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm3ForCausalLM": _FOUR_LAYERS,
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2},
    "Qwen3NextForCausalLM": _FOUR_LAYERS,
    "Qwen3_5ForCausalLM": _FOUR_LAYERS,
    "Qwen3_5MoeForCausalLM": _FOUR_LAYERS,
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 64},
    "Qwen4ExpForCausalLM": _FOUR_LAYERS
    | {"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 2}
    | {"indexer_kv_heads": 1, "indexer_head_dim": 8},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XLMWithLMHeadModel": {"causal": True},
    "ZambaForCausalLM": _FOUR_LAYERS
    | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 64, "head_dim": 16},
    "Zamba2ForCausalLM": _FOUR_LAYERS
    | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 64, "head_dim": 16}
    | {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


class NotBuildableError(Exception):
    """No tiny model of the class can be made or run here; the message says why."""


def class_names() -> list[str]:
    """Return all classes of transformers that AutoModelForCausalLM can return."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def tiny_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """Make a config whose sizes are small."""
    default = config_class()
    options = {name: value for name, value in SIZES.items() if _settable(default, name)}
    if hasattr(default, "kv_lora_rank"):
        options["num_key_value_heads"] = 4
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            options[name] = tiny_config(type(sub), overrides.get(name, {})).to_dict()
    return config_class(**options | {k: v for k, v in overrides.items() if k not in options or not isinstance(v, dict)})


def _settable(config: Any, name: str) -> bool:
    try:
        getattr(config, name)
    except AttributeError:
        return False
    except Exception:  # a value that differs between layers
        return False
    try:
        setattr(copy.deepcopy(config), name, getattr(config, name))
    except (AttributeError, NotImplementedError):
        return False
    return True


def make_tiny(name: str) -> Any:
    """Make a model of a class in float32 with random weights, in training mode, without dropout.

    Raises:
        NotBuildableError: its config or constructor fails; the message has the reason.
    """
    cls = getattr(transformers, name)
    try:
        config = tiny_config(cls.config_class, OVERRIDES.get(name, {}))
        with torch.device("meta"):
            size = sum(x.numel() for x in cls(copy.deepcopy(config)).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{size} parameters of the smallest config made for it")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            model = cls(copy.deepcopy(config))
            for parameter in model.parameters():
                # wide enough for attention to be far from uniform
                parameter.copy_(parameter.nan_to_num() + 0.2 * torch.randn_like(parameter))
    except Exception as error:
        raise NotBuildableError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        ) from error
    without_dropout(model)
    return model.float().train()


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)

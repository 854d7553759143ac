"""The cases and the variants of whole training steps: models, lengths, pairs per prompt, and what is switched off."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset

from fastdpo import DPOConfig, DPOTrainer, shared_prefix_batch
from fastdpo.benchmarks import lengths
from fastdpo.benchmarks.harness import DEVICE

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": (
        "Llama",
        {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    # 20.1 M parameters, 31 % of them in the tied embedding: nearly the share that it has in Qwen3-0.6B (26 %)
    "llama-20m": (
        "Llama",
        {"vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8}
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-3.2-1b": (
        "Llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
}
DTYPES = {"toy": "float32", "llama-20m": "float32"}  # the others: bfloat16


@dataclass(frozen=True)
class Case:
    """The sizes and settings that the variants are compared on."""

    model: str
    lengths: str
    pairs: int = 4
    steps: int = 5
    max_length: int = 1024
    checkpointing: bool = True
    per_prompt: int = 1
    """Pairs of one prompt, which are neighbours; a step has whole prompts."""
    responses: int = 2
    """Responses of one prompt, from which its pairs are made."""

    @property
    def dtype(self) -> str:
        return DTYPES.get(self.model, "bfloat16")

    @property
    def key(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "lengths": self.lengths,
            "pairs_per_device": self.pairs,
            "steps": self.steps,
            "max_length": self.max_length,
            "gradient_checkpointing": self.checkpointing,
            "dtype": self.dtype,
        } | ({"pairs_per_prompt": self.per_prompt, "responses": self.responses} if self.per_prompt > 1 else {})

    def __str__(self) -> str:
        checkpointing = "with" if self.checkpointing else "without"
        shared = f" ({self.per_prompt} per prompt over {self.responses} responses)" if self.per_prompt > 1 else ""
        return (
            f"{self.model} {self.dtype}, {self.lengths} lengths, {self.pairs} pairs a step{shared}, "
            f"{self.steps} steps, {checkpointing} gradient checkpointing"
        )


_DATASETS = ("ultrafeedback", "hh", "tldr")
CASES = {
    "smoke": [Case("toy", "toy", 2, 2, 32)],
    "cpu": [Case("llama-20m", name) for name in _DATASETS],
    "grouped": [
        Case("llama-20m", "tldr", 4, per_prompt=4, responses=4),
        Case("llama-20m", "shp", 5, per_prompt=5, responses=6),
        *(Case("llama-20m", name, 4, per_prompt=4, responses=4) for name in ("hh", "ultrafeedback")),
        *(Case("llama-20m", name, 10, 3, per_prompt=10, responses=5) for name in ("tldr", "hh", "ultrafeedback")),
    ],
    "gpu": [Case(model, name, 8, 10) for model in ("llama-3.2-1b", "qwen3-0.6b") for name in _DATASETS],
}

Trainer = Callable[[Case, Any, Any, Any, dict[str, Any]], Any]
"""A function that makes a trainer from a case, policy, reference, tokenizer and the settings common to all variants."""


def _fastdpo(layout: str = "shared", across_examples: bool = True, **options: Any) -> Trainer:
    def make(case: Case, model: Any, ref_model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
        return DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=DPOConfig(**settings, **options),
            data_collator=functools.partial(shared_prefix_batch, layout=layout, across_examples=across_examples),
            train_dataset=dataset(case),
            processing_class=tokenizer,
        )

    return make


def _trl(case: Case, model: Any, ref_model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    import trl

    return trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=trl.DPOConfig(**settings),
        train_dataset=dataset(case),
        processing_class=tokenizer,
    )


VARIANTS: dict[str, Trainer] = {
    "fastdpo": _fastdpo(),
    "fastdpo, no graphs": _fastdpo(across_examples=False),
    "fastdpo, no sharing": _fastdpo("packed", across_examples=False),
    "fastdpo, no packing": _fastdpo("padded", across_examples=False),
    "fastdpo, no fused head": _fastdpo(head_impl="eager"),
    "TRL": _trl,
}


def rows(case: Case) -> list[dict[str, str]]:
    """Return the rows of all steps, the first of which does not count; each row is trained on once."""
    vocab, count = MODELS[case.model][1]["vocab_size"], case.pairs * (case.steps + 1)
    if case.per_prompt == 1:
        return lengths.pairs(case.lengths, count, vocab, case.max_length)
    return lengths.pairs_of_prompts(case.lengths, count, case.per_prompt, case.responses, vocab, case.max_length)


def dataset(case: Case) -> Dataset:
    return Dataset.from_list(rows(case))


def make_model(name: str, dtype: str, seed: int) -> Any:
    family, sizes = MODELS[name]
    special = {"pad_token_id": lengths.PAD, "eos_token_id": lengths.EOS, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes, **special)
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype))

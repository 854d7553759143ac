"""The cases and the variants of `fastdpo.benchmarks.training`: models, data, batches, and what is switched off."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from fastdpo import DPOConfig, DPOTrainer, shared_prefix_batch
from fastdpo.benchmarks import lengths
from fastdpo.benchmarks.harness import DEVICE, OUT, Parser
from fastdpo.benchmarks.peers import require_trl
from fastdpo.model.adapters import lora_config

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


OF_ONE_CASE = (
    *("model", "lengths", "pairs_file", "lora_r", "pairs", "steps", "max_length"),
    *("per_prompt", "responses", "no_checkpointing"),
)
"""Arguments that describe one case."""


@dataclass(frozen=True)
class Case:
    """The sizes and settings that the variants are compared on."""

    model: str
    """One of `MODELS`, with random weights, or the folder of a real one."""
    lengths: str
    """One of `lengths.LENGTHS`, or a file of JSON lines with real pairs."""
    pairs: int = 4
    steps: int = 5
    max_length: int = 1024
    checkpointing: bool = True
    per_prompt: int = 1
    """Pairs of one prompt, which are neighbours; a step has whole prompts."""
    responses: int = 2
    """Responses of one prompt, from which its pairs are made."""
    tokens: int | None = None
    """The most tokens of a batch of fastdpo; TRL's have as many pairs as surely fit, `pairs` in any case."""
    lora_r: int = 0
    """Rank of the LoRA adapter that is trained; 0: all weights are."""

    @property
    def is_real(self) -> bool:
        """Whether the model is a folder: then the policy as it was loaded is the reference."""
        return self.model not in MODELS

    @property
    def dtype(self) -> str:
        return "float32" if self.is_real and DEVICE == "cpu" else DTYPES.get(self.model, "bfloat16")

    @property
    def key(self) -> dict[str, Any]:
        grouped = {"pairs_per_prompt": self.per_prompt, "responses": self.responses}
        return {
            "model": Path(self.model).name,
            "lengths": Path(self.lengths).stem,
            "pairs_per_device": self.pairs,
            "steps": self.steps,
            "max_length": self.max_length,
            "gradient_checkpointing": self.checkpointing,
            "dtype": self.dtype,
        } | {
            **(grouped if self.per_prompt > 1 else {}),
            **({"tokens_per_batch": self.tokens} if self.tokens else {}),
            **({"lora_r": self.lora_r} if self.lora_r else {}),
        }

    def __str__(self) -> str:
        checkpointing = "with" if self.checkpointing else "without"
        shared = f" ({self.per_prompt} per prompt over {self.responses} responses)" if self.per_prompt > 1 else ""
        size = f"{self.pairs} pairs a step{shared}"
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        size += f" in TRL and up to {self.tokens} tokens in fastdpo" if self.tokens else ""
        return (
            f"{self.key['model']} {self.dtype}{f', LoRA of rank {self.lora_r}' if self.lora_r else ''}, "
            f"lengths of {self.key['lengths']}, {size}, {steps}, {checkpointing} gradient checkpointing"
        )


_DATASETS = ("ultrafeedback", "hh", "tldr")
_MORE = ("helpsteer", "metamath")
CASES = {
    "smoke": [Case("toy", "toy", 2, 2, 32)],
    "smoke-tokens": [Case("toy", "toy", 2, 3, 32, tokens=128)],
    "cpu": [Case("llama-20m", name, steps=2) for name in (*_DATASETS, *_MORE)],
    # as many padded rows of 1024 tokens as 4096 tokens hold are 2 pairs
    "tokens": [Case("llama-20m", name, 2, 8, tokens=4096) for name in (*_DATASETS, *_MORE)],
    "grouped": [
        *(Case("llama-20m", name, 4, steps=2) for name in ("tldr", "shp")),
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
        chosen = {name: value for name, value in settings.items() if name not in options}
        if options.get("gradient_checkpointing") == "auto":
            chosen = {name: value for name, value in chosen.items() if "checkpointing" not in name}
        if case.tokens:
            chosen |= {"tokens_per_batch": case.tokens}
        chosen = {"precompute_ref_log_probs": False} | chosen  # unless a variant asks for it, never from the cache
        return DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=DPOConfig(**chosen | options),
            data_collator=functools.partial(
                shared_prefix_batch,
                layout=layout,
                across_examples=across_examples,
                pad_to_multiple_of=8 if DEVICE == "cpu" else 64,  # as the trainer itself does
            ),
            train_dataset=dataset(case),
            processing_class=tokenizer,
            peft_config=_adapter(case),
        )

    return make


def _trl(**options: Any) -> Trainer:
    def make(case: Case, model: Any, ref_model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
        import trl

        return trl.DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=trl.DPOConfig(**settings | options),
            train_dataset=dataset(case),
            processing_class=tokenizer,
            peft_config=_adapter(case),
        )

    return make


def _adapter(case: Case) -> Any:
    if not case.lora_r:
        return None
    return lora_config(r=case.lora_r, lora_alpha=2 * case.lora_r, target_modules=["all-linear"])


VARIANTS: dict[str, Trainer] = {
    "fastdpo": _fastdpo(),
    "fastdpo, no graphs": _fastdpo(across_examples=False),
    "fastdpo, no sharing": _fastdpo("packed", across_examples=False),
    "fastdpo, no packing": _fastdpo("padded", across_examples=False),
    "fastdpo, no fused head": _fastdpo(head_impl="eager"),
    "fastdpo, checkpointing auto": _fastdpo(gradient_checkpointing="auto"),
    "fastdpo, cached reference": _fastdpo(precompute_ref_log_probs=True),
    "fastdpo, cached reference, checkpointing auto": _fastdpo(
        gradient_checkpointing="auto", precompute_ref_log_probs=True
    ),
    "TRL, cached reference": _trl(precompute_ref_log_probs=True),
    "TRL": _trl(),
}


def rows(case: Case) -> list[dict[str, Any]]:
    """Return the rows of all steps, the first of which does not count; each row is trained on once."""
    count = case.pairs * (case.steps + 1)
    if case.is_real:
        with Path(case.lengths).open() as file:
            found = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
        if len(found) < count:
            raise ValueError(
                f"{case.lengths} has {len(found)} rows, and {count} are needed: choose fewer --steps or --pairs"
            )
        return found
    vocab = MODELS[case.model][1]["vocab_size"]
    if case.per_prompt == 1:
        return lengths.pairs(case.lengths, count, vocab, case.max_length)
    return lengths.pairs_of_prompts(case.lengths, count, case.per_prompt, case.responses, vocab, case.max_length)


def dataset(case: Case) -> Dataset:
    return Dataset.from_list(rows(case))


def make_tokenizer(name: str) -> Any:
    """Return the tokenizer of one of `MODELS`, or of a real model's folder."""
    if name in MODELS:
        return lengths.tokenizer(MODELS[name][1]["vocab_size"])
    return transformers.AutoTokenizer.from_pretrained(name)


def make_model(name: str, dtype: str, seed: int) -> Any:
    """Return one of `MODELS` with random weights, or the model of a folder."""
    if name not in MODELS:
        real = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        return real.to(DEVICE)
    family, sizes = MODELS[name]
    special = {"pad_token_id": lengths.PAD, "eos_token_id": lengths.EOS, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes, **special)
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype))


def parse(words: list[str], about: str | None) -> tuple[Any, Case]:
    """Return the arguments of `fastdpo bench training`, whose help begins with `about`, and the one case they describe.

    Raises:
        UsageError: a word is unknown or out of range, or two of them do not go together.
    """
    parser = Parser("training", about)
    parser.add_argument(
        "--cases", choices=CASES, help="Measure a list of cases instead of the one of the options below."
    )
    models = f"one of {', '.join(MODELS)}, or the folder of a real model"
    parser.add_argument("--model", default="llama-20m", help=f"Model: {models} (default: llama-20m).")
    parser.add_argument(
        "--lengths",
        choices=lengths.LENGTHS,
        default="hh",
        help="Dataset whose lengths the synthetic pairs have (default: hh).",
    )
    parser.add_argument("--pairs-file", type=Path, help="JSON lines with real pairs, for a real model.")
    parser.add_argument(
        "--lora-r", type=int, default=0, help="Train a LoRA adapter of this rank; 0 trains all weights (default: 0)."
    )
    parser.add_argument("--pairs", type=int, default=4, help="Pairs of a step (default: 4).")
    parser.add_argument(
        "--steps", type=int, default=5, help="Timed steps of a turn, after one that is not (default: 5)."
    )
    parser.add_argument(
        "--max-length", type=int, default=1024, help="Longest prompt and response together, in tokens (default: 1024)."
    )
    parser.add_argument("--per-prompt", type=int, default=1, help="Pairs that have the same prompt (default: 1).")
    parser.add_argument(
        "--responses", type=int, default=4, help="Responses of a prompt that has several pairs (default: 4)."
    )
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="Keep activations instead of recomputing them, in all variants."
    )
    names = ", ".join(map(repr, VARIANTS))
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="VARIANT",
        help=f"Variants to measure (default: all): {names}.",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="Turns of each variant (default: 3).")
    parser.add_seconds()
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="Count the time of the CPU instead of the clock's, on a machine that has other work.",
    )
    parser.add_argument("--out", type=Path, help=OUT)
    args = parser.parse(words)
    if args.variants is None:
        require_trl("fastdpo bench training", "--variants fastdpo")
        args.variants = list(VARIANTS)
    least = dict.fromkeys(("pairs", "steps", "per_prompt", "responses", "repetitions"), 1)
    for name, number in (least | {"max_length": 2, "lora_r": 0}).items():
        if (given := getattr(args, name)) < number:
            parser.error(f"--{name.replace('_', '-')} must be at least {number}, got {given}")
    fixed = sorted(name for name in OF_ONE_CASE if getattr(args, name) != parser.get_default(name))
    if args.cases and fixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        parser.error(f"--cases has its own settings in place of {flags}; leave out one or the other")
    if args.pairs % args.per_prompt:
        parser.error(
            f"--pairs {args.pairs} must be a multiple of --per-prompt {args.per_prompt}, as a step has whole prompts"
        )
    if args.per_prompt > max(most := math.comb(args.responses, 2), 1):
        parser.error(
            f"--responses {args.responses} of a prompt give {most} pairs, fewer than --per-prompt {args.per_prompt}"
        )
    if args.pairs_file is not None and not args.pairs_file.is_file():
        parser.error(f"--pairs-file: there is no file {str(args.pairs_file)!r}")
    if (args.model not in MODELS) != (args.pairs_file is not None):
        parser.error(f"--model must be {models}, which needs --pairs-file, and only that does; got {args.model!r}")
    if args.model not in MODELS and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model must be {models}; got {args.model!r}, which has no config.json")
    data = args.lengths if args.pairs_file is None else str(args.pairs_file)
    one = Case(args.model, data, args.pairs, args.steps, args.max_length, not args.no_checkpointing, lora_r=args.lora_r)
    if args.per_prompt > 1:
        one = replace(one, per_prompt=args.per_prompt, responses=args.responses)
    return args, one

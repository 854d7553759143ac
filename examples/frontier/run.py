"""DPO's reward-KL frontier on a task with a known reward, by fastdpo and by a plain PyTorch loop.

    python -m examples.frontier.run

Figure 2 (left) of https://arxiv.org/abs/2305.18290, small. Writes `frontier.json` and `frontier.png` beside this file.
"""

import copy
import json
import logging
import math
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed

import fastdpo
from examples.frontier import reference, task
from examples.frontier.draw import draw

BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws its own preferences
    held_out: int = 12  # prompts without preferences, over which all results are averaged
    demonstrations: int = 16_384
    pairs: int = 8192
    batch: int = 64
    epochs: int = 1
    learning_rate: float = 3e-3
    hidden_size: int = 32
    samples: int = 100  # per held-out prompt


def reproduce(settings: Settings) -> dict[str, Any]:
    """Train everything and measure it; the result is what `frontier.json` holds."""
    prompts = random.Random(0).sample(task.PROMPTS, len(task.PROMPTS))
    held_out, seen = prompts[: settings.held_out], prompts[settings.held_out :]
    sft = make_sft(settings)
    sft_logps, true_rewards = task.response_logps(sft, held_out), task.rewards(held_out)
    seen_logps, seen_rewards = task.response_logps(sft, seen), task.rewards(seen)

    runs = []
    for seed in settings.seeds:
        pairs = task.sample_pairs(settings.pairs, seen, seen_logps, seen_rewards, seed)
        for beta in settings.betas:
            fused, fused_losses = train_fused(sft, pairs, beta, settings)
            plain, plain_losses = train_plain(sft, pairs, beta, settings)
            exact = [task.outcome(task.response_logps(m, held_out), sft_logps, true_rewards) for m in (fused, plain)]
            set_seed(seed)
            run = {
                "beta": beta,
                "seed": seed,
                "fused": exact[0]._asdict(),
                "reference": exact[1]._asdict(),
                "fused_sampled": sample(fused, sft, held_out, settings.samples),
                "loss_difference": max(abs(a - b) for a, b in zip(fused_losses, plain_losses, strict=True)),
                "weight_difference": distance(fused, plain) / distance(plain, sft),
                "last_loss": fused_losses[-1],
            }
            runs.append(run)
            print(
                f"beta {beta:<5} seed {seed}: reward {exact[0].reward:.4f} (reference {exact[1].reward:.4f}), "
                f"KL {exact[0].kl:.4f} (reference {exact[1].kl:.4f}) nats"
            )

    low, high = min(settings.betas) / 2, 8 * max(settings.betas)
    line = [low * (high / low) ** (i / 60) for i in range(61)]
    return {
        "settings": asdict(settings),
        "sft": task.outcome(sft_logps, sft_logps, true_rewards)._asdict(),
        "runs": runs,
        "largest_difference": {
            "loss": max(run["loss_difference"] for run in runs),
            "weights": max(run["weight_difference"] for run in runs),
            "reward": max(abs(run["fused"]["reward"] - run["reference"]["reward"]) for run in runs),
            "kl": max(abs(run["fused"]["kl"] - run["reference"]["kl"]) for run in runs),
        },
        "optimum": [
            {"beta": beta, **task.optimum(sft_logps, true_rewards, beta)._asdict()}
            for beta in sorted({*line, *settings.betas}, reverse=True)
        ],
        "best_of": [
            {
                "n": n,
                "kl_bound": math.log(n) - (n - 1) / n,
                **task.best_of(n, sft_logps, true_rewards)._asdict(),
            }
            for n in BEST_OF
        ],
    }


# Training


def make_sft(settings: Settings) -> LlamaForCausalLM:
    """A small transformer, trained on demonstrations until it writes as their writer does."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=task.VOCAB,
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.1,
        bos_token_id=task.EOS,
        eos_token_id=task.EOS,
        pad_token_id=task.EOS,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(0)
    demonstrations = [task.demonstrate(rng) for _ in range(settings.demonstrations)]
    reference.train_sft(model, demonstrations, batch=128, learning_rate=3e-3)
    return model


def train_fused(
    sft: LlamaForCausalLM, pairs: list[dict[str, list[int]]], beta: float, settings: Settings
) -> tuple[LlamaForCausalLM, list[float]]:
    """A copy of `sft` trained by fastdpo, and the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        args = fastdpo.DPOConfig(
            beta=beta,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            per_device_train_batch_size=settings.batch,
            num_train_epochs=settings.epochs,
            train_sampling_strategy="sequential",  # the order of the plain loop
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            output_dir=folder,
        )
        trainer = fastdpo.DPOTrainer(
            copy.deepcopy(sft),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=make_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_plain(
    sft: LlamaForCausalLM, pairs: list[dict[str, list[int]]], beta: float, settings: Settings
) -> tuple[LlamaForCausalLM, list[float]]:
    """The same by the plain loop."""
    policy = copy.deepcopy(sft)
    options = {"batch": settings.batch, "epochs": settings.epochs, "learning_rate": settings.learning_rate}
    return policy, reference.train_dpo(policy, sft, pairs, beta=beta, **options)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token ids by name; the rows are tokenised already."""
    vocab = {"<eos>": task.EOS} | {letter: token for letter, token in zip("abcdef", task.LETTERS, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "<eos>")), eos_token="<eos>")


# Measuring


@torch.no_grad()
def sample(policy: LlamaForCausalLM, sft: nn.Module, prompts: list[list[int]], per_prompt: int) -> dict[str, float]:
    """Reward and KL once more, estimated from what `generate()` says: means and their standard errors."""
    asked: list[list[int]] = []
    said: list[list[int]] = []
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [prompt for prompt in prompts if len(prompt) == length for _ in range(per_prompt)]
        ids = torch.tensor(alike)
        out = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=task.MAX_LETTERS)
        for tokens in out[:, length:].tolist():
            said.append(tokens[: tokens.index(task.EOS) + 1] if task.EOS in tokens else tokens)
        asked += alike
    scores = torch.tensor([task.reward(prompt, response) for prompt, response in zip(asked, said, strict=True)])
    ratios = reference.sequence_logps(policy, asked, said) - reference.sequence_logps(sft, asked, said)
    result = {}
    for name, values in (("reward", scores.double()), ("kl", ratios.double())):
        result |= {name: values.mean().item(), f"{name}_se": values.std().item() / math.sqrt(len(values))}
    return result


def distance(a: nn.Module, b: nn.Module) -> float:
    """Euclidean, between all weights."""
    gaps = [(p - q).double().square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return math.sqrt(sum(gap.item() for gap in gaps))


def main() -> None:
    datasets.disable_progress_bars()
    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    folder = Path(__file__).parent
    results = reproduce(Settings())
    (folder / "frontier.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, folder / "frontier.png")
    print("largest differences between fastdpo and the plain loop:", results["largest_difference"])


if __name__ == "__main__":
    main()

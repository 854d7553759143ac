"""Train a small language model on this machine, whose hidden states and targets stand in for those of a real one.

The text is the source code of the models of transformers. It is there wherever fastdpo is, and repeats itself enough
for a small model to become as confident as a large one is on prose. One twentieth of the files is held out. Everything
is seeded: two runs with the same versions give the same model.

Shapes: B sequences of T tokens, N = B * (T - 1) rows.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import linear_logprobs
from fastdpo.head.impl import sparsity
from fastdpo.head.op import density_key

B, T = 8, 129


class Text(NamedTuple):
    """Token ids of the text, `[tokens]` each."""

    train: Tensor
    held_out: Tensor


class Run(NamedTuple):
    """A training run step by step, and its final loss on held-out text, in nats per token."""

    losses: list[float]
    densities: list[float]  # in the steps whose forward kept what a sparse backward needs
    held_out: float


def sources(most: int) -> list[str]:
    """Read source files, until there are `most` characters."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    texts: list[str] = []
    for path in sorted((Path(spec.origin).parent / "models").rglob("modeling_*.py")):
        if sum(map(len, texts)) < most:
            texts.append(path.read_text())
    return texts


def tokenize(V: int, most: int) -> Text:
    """Train a byte-pair tokenizer of V tokens on the text, and encode it."""
    texts = sources(most)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=V, min_frequency=1, show_progress=False)
    encoded = [torch.tensor(e.ids) for e in tokenizer.encode_batch(texts)]
    return Text(train=torch.cat([e for i, e in enumerate(encoded) if i % 20]), held_out=torch.cat(encoded[::20]))


def make_model(V: int, D: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=layers, num_attention_heads=D // 32,
        num_key_value_heads=D // 32, max_position_embeddings=T, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches `[B, T]` of token ids, from random places in the text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - T, (B,), generator=generator)
        yield torch.stack([tokens[start : start + T] for start in starts.tolist()])


def rows(model: LlamaForCausalLM, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the hidden states `[N, D]` and the targets `[N]` of a batch."""
    return model.model(batch[:, :-1]).last_hidden_state.flatten(0, 1), batch[:, 1:].flatten()


def train(
    model: LlamaForCausalLM,
    text: Text,
    steps: int,
    *,
    seed: int,
    lr: float,
    backward: Literal["auto", "exact", "sparse"] = "exact",
    dtype: torch.dtype = torch.float32,
    noise: float = 0.0,
) -> Run:
    """Train with AdamW and a learning rate that falls to 0.

    The head computes on inputs of `dtype`. The gradient of hidden gets Gaussian noise of the same size in every
    row, whose Frobenius norm is `noise` times that of the gradient.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    weight = model.lm_head.weight
    losses, densities, last = [], [], None
    generator = torch.Generator().manual_seed(seed)

    def noisy(gradient: Tensor) -> Tensor:
        scale = noise * gradient.float().norm() / gradient.numel() ** 0.5
        return torch.randn(gradient.shape, generator=generator).mul_(scale).add_(gradient)

    for _, batch in zip(range(steps), batches(text.train, seed), strict=False):
        hidden, targets = rows(model, batch)
        if noise:
            hidden.register_hook(noisy)
        loss = -linear_logprobs(hidden.to(dtype), weight.to(dtype), targets, impl="torch", backward=backward).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        history = sparsity._densities.get(density_key(hidden.to(dtype), weight), [])
        if history and history[-1] is not last:
            last = history[-1]
            densities.append(float(last.found[0]))
    return Run(losses, densities, evaluate(model, text))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, text: Text) -> float:
    """Compute the loss on 16 batches of held-out text, which are the same in every call."""
    losses = []
    for _, batch in zip(range(16), batches(text.held_out, seed=0), strict=False):
        hidden, targets = rows(model, batch)
        losses.append(-linear_logprobs(hidden, model.lm_head.weight, targets, impl="torch").mean())
    return float(torch.stack(losses).mean())

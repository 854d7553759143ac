"""DPO as one would write it down: padded batches, all logits, a plain loop. Nothing of fastdpo is in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sequence_logps(model: nn.Module, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """`[R]`: log-probability of each response to its prompt, in nats."""
    L = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, mask, scored = (torch.zeros(len(prompts), L, dtype=torch.int64) for _ in range(3))
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        n = len(p) + len(r)
        ids[i, :n], mask[i, :n], scored[i, len(p) : n] = torch.tensor(p + r), 1, 1
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (logps.gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]).sum(1)


def train_sft(model: nn.Module, data: list[tuple[list[int], list[int]]], batch: int, learning_rate: float) -> None:
    """Supervised training on (prompt, response) pairs, one pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    for start in range(0, len(data), batch):
        set_linear_rate(optimizer, learning_rate, start / len(data))
        logps = sequence_logps(model, *map(list, zip(*data[start : start + batch], strict=True)))
        optimizer.zero_grad()
        (-logps.mean()).backward()
        optimizer.step()


def train_dpo(
    policy: nn.Module,
    sft: nn.Module,
    pairs: list[dict[str, list[int]]],
    *,
    beta: float,
    batch: int,
    epochs: int,
    learning_rate: float,
) -> list[float]:
    """Train `policy` in place, pairs in the order given; returns the loss of each step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0)
    starts = [start for _ in range(epochs) for start in range(0, len(pairs), batch)]
    losses = []
    for step, start in enumerate(starts):
        set_linear_rate(optimizer, learning_rate, step / len(starts))
        now = pairs[start : start + batch]
        prompts = [pair["prompt_ids"] for pair in now] * 2
        responses = [pair["chosen_ids"] for pair in now] + [pair["rejected_ids"] for pair in now]
        chosen, rejected = sequence_logps(policy, prompts, responses).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = sequence_logps(sft, prompts, responses).chunk(2)
        loss = -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def set_linear_rate(optimizer: torch.optim.Optimizer, peak: float, done: float) -> None:
    """From `peak` down to 0 as `done` goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = peak * (1 - done)

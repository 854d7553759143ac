"""The rows that the variants of the head are measured on, and what float64 computes on them.

The rows are the responses of pairs, as in a step of DPO, and the upstream gradient is that of DPO's loss.

Shapes: N rows, D hidden size, V vocabulary; responses have N / (2 * pairs) rows each, the chosen ones first.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.benchmarks.harness import DEVICE
from fastdpo.benchmarks.head.cases import SMALL_LM, Case
from fastdpo.settings.failures import loading

SAMPLE = 256  # rows and vocabulary entries whose gradients are compared
BETA = 0.1
SYNTHETIC = ("peaked", "flat", "small-lm")
CHARACTERS = 2_000_000  # of the text that a small language model is trained on
STEPS = 150


class Inputs(NamedTuple):
    """Inputs of a variant; those that are trained require gradients, and dlogps is the upstream gradient."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    dlogps: Tensor  # [N] float32
    pairs: int


class Exact(NamedTuple):
    """The float64 truth, with gradients of the sampled rows and vocabulary entries only."""

    logps: Tensor
    rows: Tensor
    dhidden: Tensor
    entries: Tensor
    dweight: Tensor


def responses(logps: Tensor, pairs: int) -> Tensor:
    """Sum the log-probs `[N]` of the rows over each response, `[2 * pairs]`."""
    return logps.view(2 * pairs, -1).sum(1)


def dpo_loss(logps: Tensor, pairs: int) -> Tensor:
    """Compute -log sigmoid(beta * (chosen - rejected)), of https://arxiv.org/abs/2305.18290, where the reference is 1.

    Args:
        logps: log-probs of the responses, `[2 * pairs]`, the chosen ones first.
        pairs: number of pairs, over which the loss is a mean.
    """
    return -F.logsigmoid(BETA * (logps[:pairs] - logps[pairs:])).mean()


def make_inputs(case: Case) -> Inputs:
    """Make the rows of a case, with DPO's gradient at their exact log-probs.

    - `peaked` rows are like a language model's: a power-law rank curve over Zipf-distributed candidates, with targets
      drawn from the rows' own distributions;
    - `flat` rows and targets are random: no token has more than a few thousandths of the probability;
    - `small-lm` rows are those of a small model that is trained here for a minute or two;
    - any other name is a folder or a repository on the Hub, whose model reads the source code of transformers.
    """
    torch.manual_seed(0)
    if case.inputs in ("peaked", "flat"):
        hidden, weight, targets = synthetic(case)
    else:
        hidden, weight, targets = small_lm_rows() if case.inputs == "small-lm" else model_rows(case.inputs, case.N)
    dtype = getattr(torch, case.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    log_probs = responses(exact_logps(hidden, weight, targets), case.pairs).requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(log_probs, case.pairs), log_probs)
    dlogps = gradient.float().repeat_interleave(case.N // (2 * case.pairs))
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(not case.frozen), targets, dlogps, case.pairs)


def synthetic(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states, weight and targets of a `peaked` or `flat` case, in float32."""
    N, D, V = case.N, case.D, case.V
    weight = torch.randn(V, D, device=DEVICE) / math.sqrt(D)
    hidden = torch.randn(N, D, device=DEVICE)
    if case.inputs == "flat":
        return hidden, weight, torch.randint(V, (N,), device=DEVICE)
    zipf = 1 / (torch.arange(V, device=DEVICE) + 10.0)
    candidates = torch.multinomial(zipf, N * 24, replacement=True).view(N, 24)
    height = 15 + torch.randn(N, 1, device=DEVICE)
    slope = 2 + 4 * torch.rand(N, 1, device=DEVICE)
    for rank in range(24):
        hidden += (height - slope * math.log(rank + 1)) * weight[candidates[:, rank]]
    drawn = [torch.multinomial((rows @ weight.T).softmax(-1), 1) for rows in hidden.split(128)]
    return hidden, weight, torch.cat(drawn).squeeze(1)


@functools.cache
def small_lm_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Train a small language model, and return rows of held-out text, its head's weight and the next tokens."""
    from fastdpo.benchmarks import small_lm

    N, D, V = SMALL_LM
    print(f"training a small language model for its rows: {STEPS} steps, D={D}, V={V}", flush=True)
    text = small_lm.tokenize(V, CHARACTERS)
    torch.manual_seed(0)
    model = small_lm.make_model(V, D, layers=2)
    small_lm.train(model, text, STEPS, seed=1, lr=3e-3)
    batches = itertools.islice(small_lm.batches(text.held_out, seed=0), N // (small_lm.B * (small_lm.T - 1)))
    with torch.no_grad():
        found = [small_lm.rows(model, batch) for batch in batches]
    hidden, targets = (torch.cat(parts).to(DEVICE) for parts in zip(*found, strict=True))
    return hidden, model.lm_head.weight.detach().to(DEVICE), targets


@functools.cache
def load_model(name: str) -> Any:
    """Load a causal LM in float32.

    Raises:
        OSError: there is no such folder or repository, or a file is broken.
    """
    from transformers import AutoModelForCausalLM

    with loading("--inputs", name):
        return AutoModelForCausalLM.from_pretrained(name, dtype="float32").to(DEVICE).eval()


def shape_of_model(name: str) -> tuple[int, int]:
    """Return D and V of a model's head."""
    V, D = load_model(name).get_output_embeddings().weight.shape
    return D, V


@functools.cache
@torch.no_grad()
def model_rows(name: str, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return N rows of a model that reads the source code of transformers, its head's weight and the next tokens."""
    from transformers import AutoTokenizer

    from fastdpo.benchmarks.small_lm import sources

    model, T = load_model(name), 128
    with loading("--inputs", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    ids = torch.tensor(tokenizer("".join(sources(10 * (N + T))))["input_ids"], device=DEVICE)
    windows = ids[: (N // T + 1) * T + 1]
    batch = windows[:-1].view(-1, T)
    hidden = torch.cat([model.get_decoder()(rows).last_hidden_state.flatten(0, 1) for rows in batch.split(4)])
    return hidden[:N], model.get_output_embeddings().weight.detach(), windows[1:][:N]


def exact_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probs in float64, in blocks of rows."""
    wide = weight.detach().double()
    blocks = zip(hidden.detach().split(128), targets.split(128), strict=True)
    found = [(rows.double() @ wide.T).log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1) for rows, ids in blocks]
    return torch.cat(found)


def exact_results(inputs: Inputs) -> Exact:
    """Compute everything in float64, in blocks of rows."""
    hidden, weight, dlogps = (t.detach().double() for t in (inputs.hidden, inputs.weight, inputs.dlogps))
    N, V = hidden.shape[0], weight.shape[0]
    rows = torch.linspace(0, N - 1, min(N, SAMPLE), device=DEVICE).long()
    entries = torch.cat([torch.linspace(0, V - 1, SAMPLE // 2, device=DEVICE).long(), inputs.targets[: SAMPLE // 2]])
    entries = entries.unique()
    dweight = weight.new_zeros(len(entries), weight.shape[1])
    logps, dhidden = [], []
    for block in torch.arange(N, device=DEVICE).split(128):
        log_probs = (hidden[block] @ weight.T).log_softmax(-1)
        targets = inputs.targets[block].unsqueeze(1)
        logps.append(log_probs.gather(1, targets).squeeze(1))
        dlogits = log_probs.exp_().mul_(-dlogps[block].unsqueeze(1))
        dlogits.scatter_add_(1, targets, dlogps[block].unsqueeze(1))
        dweight += dlogits[:, entries].T @ hidden[block]
        dhidden.append(dlogits[torch.isin(block, rows)] @ weight)
    return Exact(torch.cat(logps), rows, torch.cat(dhidden), entries, dweight)

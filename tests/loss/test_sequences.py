"""fastdpo.loss.sequences: the sum over a long response has the digits of its dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.loss.sequences import sum_tokens

LENGTHS = torch.tensor([517, 1, 0, 733])
BOUNDS = F.pad(LENGTHS.cumsum(0), (1, 0))


def log_probs() -> Tensor:
    """Of tokens that a model is sure of, and of every third one, of which it is not."""
    generator = torch.Generator().manual_seed(11)
    sizes = torch.rand(int(BOUNDS[-1]), generator=generator)
    return -torch.where(torch.arange(len(sizes)) % 3 == 0, 14 * sizes, 1e-3 * sizes)


def truth(x: Tensor) -> Tensor:
    return torch.stack([part.double().sum() for part in x.split(LENGTHS.tolist())])


def test_a_sum_is_the_exact_one_rounded_once() -> None:
    x = log_probs().requires_grad_()
    sums = sum_tokens(x, BOUNDS)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, truth(x.detach()).float())
    sums[0].backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 517 + [0.0] * 734

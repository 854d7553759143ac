"""Peers of the head, as `hidden [N, D], weight [V, D], targets [N] -> logps [N]`, or with DPO's loss in one piece.

Every peer is called as its own documentation shows, with its defaults. A peer that can't run here is listed with the
reason.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.benchmarks.harness import DEVICE

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of hidden, weight and targets that returns logps, or the loss."""

TRL_CHUNK = 32768  # the value that its DPOTrainer uses
INSTALL = "pip install 'fastdpo[bench]'"


class Peer(NamedTuple):
    """How a peer is loaded, and what it needs."""

    load: Callable[[], Logps]
    package: str = "torch"
    """The name under which its package is imported."""
    needs_gpu: bool = False
    """Whether it consists of Triton kernels."""
    whole_logits: bool = False
    """Whether it holds the logits of all rows, and their gradient."""
    is_loss: bool = False
    """Whether it returns DPO's loss; hidden is `[2 * pairs, T, D]` then, and targets are `[2 * pairs, T]`."""


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _compiled() -> Logps:
    torch._dynamo.reset()  # it compiles anew for the shapes of each case, and gives up after eight of them
    return torch.compile(pytorch, dynamic=False)


def _torch_chunked(**options: Any) -> Logps:
    """Return PyTorch's own loss in chunks of rows (from version 2.13 on); without a policy it chooses by device."""
    chunks = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda hidden, weight, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chunks)
    )


def _trl(*, statistics: bool = False) -> Logps:
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    outputs = OPTIONAL_OUTPUTS if statistics else ("log_probs",)

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, outputs
        )[0]
        return result

    return logps


def _liger() -> Logps:
    """Return Liger's fused cross-entropy of every token, whose backward recomputes the logits for the gradients."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets: -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def _liger_scaled() -> Logps:
    """Return Liger's op for policy gradients.

    It is a CuTe kernel on Hopper (with nvidia-cutlass-dsl) and works in chunks of 512 rows elsewhere.
    """
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return lambda hidden, weight, targets: -Scaled.apply(hidden, weight, targets)


def _liger_dpo() -> Logps:
    """Return Liger's loss of DPO, which takes a pair at a time and computes the gradients in the forward."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    torch._dynamo.reset()
    loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)[0]


def _cce(**options: Any) -> Logps:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce", **options)
    )


PEERS: dict[str, Peer] = {
    "PyTorch": Peer(lambda: pytorch, whole_logits=True),
    "PyTorch, compiled": Peer(_compiled, whole_logits=True),
    "PyTorch, chunked": Peer(_torch_chunked),
    "PyTorch, chunked, accurate": Peer(lambda: _torch_chunked(acc_policy="accurate")),
    "PyTorch, chunked, compact": Peer(lambda: _torch_chunked(acc_policy="compact")),
    "TRL": Peer(_trl, "trl"),
    "TRL, all statistics": Peer(lambda: _trl(statistics=True), "trl"),
    "Liger DPO": Peer(_liger_dpo, "liger_kernel", is_loss=True),
    "Liger": Peer(_liger, "liger_kernel", needs_gpu=True),
    "Liger, scaled": Peer(_liger_scaled, "liger_kernel", needs_gpu=True),
    "CCE": Peer(_cce, "cut_cross_entropy", needs_gpu=True),
    "CCE, no filter": Peer(lambda: _cce(filter_eps=None), "cut_cross_entropy", needs_gpu=True),
}


def require_trl(command: str, otherwise: str) -> None:
    """Check that TRL can be imported, before any work.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("trl") is None:
        raise ImportError(
            f"{command} compares with TRL, which is not installed: {INSTALL}; or compare without it: {otherwise}"
        )


def loaded(name: str) -> Logps | str:
    """Import a peer and return it, or return the reason why it can't run here."""
    peer = PEERS[name]
    if find_spec(peer.package) is None:
        return f"{peer.package} is not installed: {INSTALL}"
    if peer.needs_gpu and DEVICE == "cpu":
        return "its Triton kernels need a GPU"
    try:
        return peer.load()
    except Exception as error:  # a peer may fail in any way
        return first_line(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

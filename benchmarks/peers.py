"""Peers that compute log-probabilities of rows, as `hidden [N, D], weight [V, D], targets [N] -> logps [N]`.

Every peer is called as its own documentation shows, with its defaults. A peer that is not installed is left out and
named.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of hidden, weight and targets that returns logps."""

TRL_CHUNK = 32768  # the value that its DPOTrainer uses


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


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


def _cce(**options: Any) -> Logps:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce", **options)
    )


PEERS: dict[str, Callable[[], Logps]] = {
    "TRL": _trl,
    "TRL, all statistics": lambda: _trl(statistics=True),
    "Liger": _liger,
    "Liger, scaled": _liger_scaled,
    "CCE": _cce,
    "CCE, no filter": lambda: _cce(filter_eps=None),
}


def installed() -> dict[str, Logps]:
    """Import all peers and return them; print those that cannot be imported."""
    found = {}
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except Exception as error:  # a peer may fail in any way
            print(f"left out: {name}: {first_line(error)}")
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

"""The other ways to a row's log-probability, each as `hidden [N, D], weight [V, D], targets [N] -> logps [N]`.

Every peer is called as its own documentation has it, with its defaults; what is not installed is left out and named.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An implementation: hidden, weight, targets -> logps."""

TRL_CHUNK = 32768  # as its DPOTrainer asks


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
    """Its fused cross-entropy of every token: the gradients are computed in the backward, which recomputes."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets: -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def _liger_scaled() -> Logps:
    """Its op for policy gradients: a CuTe kernel on Hopper (needs nvidia-cutlass-dsl), elsewhere chunks of 512 rows."""
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
    """Import all peers; print those that cannot be."""
    found = {}
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except Exception as error:  # a peer may fail in any way
            print(f"left out: {name}: {first_line(error)}")
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

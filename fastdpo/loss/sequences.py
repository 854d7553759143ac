"""Sum the log-probs of tokens over responses, and bring responses to the examples that hold them.

A batch holds each response once, and its examples are edges: they index the responses that they compare. What an
objective reads is therefore gathered along the edges, and the gradient of a response is the sum over its edges. Most
batches have one edge for each response, which changes nothing of this.

Shapes: B examples, K responses of an example, R responses, M completion tokens.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.data.packing import edges
from fastdpo.loss.options import ObjectiveSettings


class Sequences(NamedTuple):
    """Sums over responses, in nats; where an example has fewer than K responses, its missing ones have 0."""

    edges: Tensor
    """`[K, B]`: the responses of each example among the R, chosen or best ones first."""
    logps: Tensor
    """`[K, B]`: log pi, with discounted tails if LD-DPO is on."""
    ref_logps: Tensor | None
    """`[K, B]`: the same under the reference."""
    whole_logps: Tensor
    """`[R]`: log pi."""
    whole_ref_logps: Tensor | None
    """`[R]`"""

    @property
    def chosen_logps(self) -> Tensor:
        """`[B]`: log pi of the first response of each example, not discounted."""
        return along_edges(self.whole_logps, self.edges)[0]


def sum_responses(
    batch: Mapping[str, Any], logps: Tensor, ref_token_logps: Tensor | None, settings: ObjectiveSettings
) -> Sequences:
    """Sum over responses, and gather the sums along the edges; arguments are those of `batch_loss.compute`."""
    bounds, alpha, index = batch["cu_target"], settings.ld_alpha, edges(batch)
    if ref_token_logps is None:
        ref_token_logps = batch.get("ref_token_logps")
    whole = sum_tokens(logps, bounds)
    ref_whole = batch.get("ref_logps") if ref_token_logps is None else sum_tokens(ref_token_logps, bounds)
    if not settings.needs_reference:
        return Sequences(index, along_edges(whole, index), None, whole, ref_whole)
    if ref_whole is None:
        raise ValueError(f"loss_type {settings.loss_type[0]!r} needs log-probs under a reference; the batch has none")
    if alpha is None:
        return Sequences(index, along_edges(whole, index), along_edges(ref_whole, index), whole, ref_whole)
    if ref_token_logps is None:
        raise ValueError(
            f"ld_alpha {alpha} needs the reference's log-probs of every token, but the batch has their sums only "
            "(ref_chosen_logps, ref_rejected_logps); drop these columns"
        )
    targets = batch.get("num_targets", len(logps))
    policy, ref = (_discounted_sums(x, bounds, index, alpha, targets) for x in (logps, ref_token_logps))
    return Sequences(index, policy, ref, whole, ref_whole)


def sum_tokens(x: Tensor, bounds: Tensor) -> Tensor:
    """Sum over the tokens of each response, `[M, ...]` to `[R, ...]`, in float64; the sums have the dtype of `x`."""
    # it adds one number after the other, which would round hundreds of them too much in float32; unsafe skips checks
    # that wait for the device
    return torch.segment_reduce(x.double(), "sum", offsets=bounds, unsafe=True).to(x.dtype)


def along_edges(values: Tensor, index: Tensor) -> Tensor:
    """Gather values `[R]` by an index `[K, B]`, in which R stands for no response and gives 0."""
    return F.pad(values, (0, 1))[index]  # unlike index_select, its backward adds in a fixed order on CUDA


def _discounted_sums(x: Tensor, bounds: Tensor, index: Tensor, alpha: float, targets: int) -> Tensor:
    """Sum `x [M]` over the responses of pairs, scaled by `alpha` beyond the length of the pair's shorter response.

    A response of several pairs has a sum for each of them, so its tokens are repeated here: `targets` in all.
    """
    lengths = bounds.diff()[index].flatten()
    ends = lengths.cumsum(0)
    token = torch.arange(targets, device=x.device)
    edge = torch.searchsorted(ends, token, right=True)
    place = token - (ends - lengths)[edge]  # in its response
    shorter = bounds.diff()[index].min(0).values.repeat(len(index))
    x = x[bounds[index.flatten()[edge]] + place]
    x = x.where(place < shorter[edge], alpha * x)
    return sum_tokens(x, F.pad(ends, (1, 0))).view(index.shape)


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the weights of pairs `[B]`, Eq. 2 of WPO with its alignment.

    A weight is the product over both responses of their geometric mean of p(token) / sum_v p(v)^2.
    """
    bounds = batch["cu_target"]
    means = sum_tokens(logps.detach() - log_sum_sq_probs.detach(), bounds) / bounds.diff()
    chosen, rejected = along_edges(means.exp(), edges(batch))
    weights: Tensor = chosen * rejected
    return weights

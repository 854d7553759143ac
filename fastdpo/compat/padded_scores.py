"""Score the responses of a padded batch of hidden states and labels, as Liger's losses get it, with fastdpo's head.

Shapes: R responses, T positions, D hidden size, V vocabulary, M positions that have a label.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
from fastdpo.loss.sequences import sum_tokens


class Scores(NamedTuple):
    """What the head says of a batch."""

    positions: Tensor
    """`[M]`, the labelled positions in the flattened batch."""
    token_logps: Tensor
    """`[M]`."""
    bounds: Tensor
    """`[R + 1]`: response r has the tokens from bounds[r] to bounds[r + 1]."""
    lengths: Tensor
    """`[R]`, numbers of labels, in the dtype of the log-probs."""
    logps: Tensor
    """`[R]`, sums over the tokens."""
    logits: Tensor
    """`[R]`, sums over the tokens of the mean over the vocabulary; detached."""

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return chosen_logps, rejected_logps, chosen_lengths and rejected_lengths, `[B]` each."""
        (chosen, rejected), (chosen_lengths, rejected_lengths) = self.logps.chunk(2), self.lengths.chunk(2)
        return chosen, rejected, chosen_lengths, rejected_lengths

    def nll(self) -> Tensor:
        """Return the mean negative log-likelihood of the chosen tokens, a scalar."""
        chosen, _, lengths, _ = self.pairs()
        return -chosen.sum() / lengths.sum()

    def mean_logits(self) -> tuple[Tensor, Tensor]:
        """Return the mean logit of the chosen and of the rejected tokens, two scalars."""
        chosen, rejected = self.logits.chunk(2)
        _, _, chosen_lengths, rejected_lengths = self.pairs()
        return chosen.sum() / chosen_lengths.sum(), rejected.sum() / rejected_lengths.sum()


def score(
    lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, *, pairs: bool = True
) -> Scores:
    """Run the head on the positions of a batch that have a label.

    Raises:
        ValueError: the batch is malformed; the message names the argument as Liger's losses do.
    """
    R = target.shape[0] if target.ndim else 0
    if R == 0 or (pairs and R % 2):
        wanted = "2B sequences, first the chosen ones and then the rejected ones" if pairs else "at least one sequence"
        raise ValueError(f"target must hold {wanted}, got {R}")
    _check("target", target, "_input", _input, "lin_weight", lin_weight)
    labelled = _labelled("target", target, ignore_index, lin_weight.shape[0])
    lengths = labelled.sum(1)
    if empty := (lengths == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"target has no label in sequence {empty[0]}: each position holds ignore_index {ignore_index}; drop the "
            "example, or truncate its prompt"
        )
    index = labelled.flatten().nonzero().flatten()
    rows, tokens = _input.flatten(0, 1).index_select(0, index), target.flatten().index_select(0, index)
    logps, stats = linear_logprobs_with_stats(rows, lin_weight, tokens, bias)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    sums = (sum_tokens(x, bounds) for x in (logps, stats.mean_logits))
    return Scores(index, logps, bounds, lengths.to(logps.dtype), *sums)


def score_reference(
    use_ref_model: bool,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    target: Tensor,
    batch: Scores,
) -> Tensor:
    """Return the reference's log-probs of the same labels, `[R]`, without gradients; zeros if there is no reference.

    Raises:
        ValueError: the reference is missing, malformed or would be ignored.
    """
    if not use_ref_model:
        given = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        if ignored := [name for name, x in given.items() if x is not None]:
            raise ValueError(f"{ignored[0]} must be None with use_ref_model=False, which would ignore it")
        return torch.zeros_like(batch.logps)
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing} must be given with use_ref_model=True, got None")
    _check("target", target, "ref_input", ref_input, "ref_weight", ref_weight)
    tokens = target.flatten().index_select(0, batch.positions)
    if bool((tokens >= ref_weight.shape[0]).any()):
        raise ValueError(f"ref_weight must have a row for each label, got {ref_weight.shape[0]} rows")
    with torch.no_grad():
        rows = ref_input.flatten(0, 1).index_select(0, batch.positions)
        return sum_tokens(linear_logprobs(rows, ref_weight, tokens, ref_bias), batch.bounds)


def nll_of_other_labels(
    nll_target: Tensor,
    target: Tensor,
    batch: Scores,
    lin_weight: Tensor,
    _input: Tensor,
    bias: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Return the mean negative log-likelihood of the chosen responses' labels in `nll_target`, a scalar.

    The head runs only on positions whose label is not the one in `target`, which `batch` has scored.

    Raises:
        ValueError: `nll_target` is malformed or has no label.
    """
    if nll_target.shape != target.shape:
        raise ValueError(
            f"nll_target must have the shape of target, {list(target.shape)}, got {list(nll_target.shape)}"
        )
    _check("nll_target", nll_target, "_input", _input, "lin_weight", lin_weight)
    chosen = nll_target.chunk(2)[0]
    labelled = _labelled("nll_target", chosen, ignore_index, lin_weight.shape[0])
    known = labelled & (chosen == target.chunk(2)[0])
    index = (labelled & ~known).flatten().nonzero().flatten()
    if not bool(labelled.any()):
        raise ValueError(f"nll_target has no label in the chosen sequences: each holds ignore_index {ignore_index}")
    rows, tokens = _input.flatten(0, 1).index_select(0, index), chosen.flatten().index_select(0, index)
    others = linear_logprobs(rows, lin_weight, tokens, bias)
    scored = F.pad(known.flatten(), (0, known.numel())).index_select(0, batch.positions)  # no rejected token counts
    return -(others.sum() + batch.token_logps.where(scored, 0.0).sum()) / labelled.sum()


def _labelled(name: str, target: Tensor, ignore_index: int, V: int) -> Tensor:
    """Return where there is a label, which must be a token."""
    labelled = target != ignore_index
    wrong = labelled & ((target < 0) | (target >= V))
    if bool(wrong.any()):
        r, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{r}, {t}] is {int(target[r, t])}, which is neither a token in [0, {V}) nor ignore_index "
            f"{ignore_index}"
        )
    return labelled


def _check(target_name: str, target: Tensor, input_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    """Check ranks, sizes, dtypes and devices that the head would not see, or would name otherwise."""
    if target.ndim != 2 or target.dtype != torch.int64:
        raise ValueError(f"{target_name} must be int64 [R, T], got {target.dtype} {list(target.shape)}")
    if hidden.ndim != 3 or hidden.shape[:2] != target.shape:
        wanted = [*target.shape, "D"]
        raise ValueError(
            f"{input_name} must be [R, T, D] with the R and T of {target_name}, {wanted}, got {list(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"{weight_name} must be [V, {hidden.shape[2]}], got {list(weight.shape)}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"{weight_name} must have the dtype of {input_name}, {hidden.dtype}, got {weight.dtype}")
    if target.device != hidden.device:
        raise ValueError(f"{target_name} must be on the device of {input_name}, {hidden.device}, got {target.device}")

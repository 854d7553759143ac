"""Log-probabilities of a linear head without logits: check the arguments, run the op and combine its results.

    logps[n] = log softmax(transform(hidden[n] @ weight.T + bias))[targets[n]]

`transform` applies, in this order: z * logit_scale, softcap * tanh(z / softcap), z / temperature.

Shapes: N rows, D hidden size, V vocabulary, R rank of the low-rank part.
"""

import logging
import math
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from fastdpo.head import eager, vocab_parallel
from fastdpo.head.autotune import choose_impl
from fastdpo.head.eager import Stats
from fastdpo.head.impl import sparsity
from fastdpo.head.impl.interface import WORKSPACE_BYTES, Forward, Transform, autocast_dtype, is_captured, result_dtype
from fastdpo.head.op import check_targets, density_key, linear_logprobs_op, results_of
from fastdpo.settings.names import check_name

logger = logging.getLogger("fastdpo")

Impl = Literal["auto", "eager", "torch", "triton", "blas"]
Backward = Literal["auto", "exact", "sparse"]

IMPLS = ("auto", "eager", "torch", "triton", "blas")
BACKWARDS = ("auto", "exact", "sparse")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Options(NamedTuple):
    """What the public functions are given besides tensors, checked."""

    transform: Transform
    impl: str
    backward: str
    workspace: int

    @classmethod
    def checked(
        cls, logit_scale: float, softcap: float | None, temperature: float, impl: str, backward: str, workspace: int
    ) -> "_Options":
        """Check each value, and fold the first three into one transform."""
        for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("temperature", temperature)):
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} requires grad, but it gets no gradient; give a number or {name}.detach(), or multiply "
                    "hidden and the bias by what is trained"
                )
        if not math.isfinite(logit_scale) or logit_scale == 0:
            raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
        if softcap is not None and not 0 < softcap < math.inf:
            raise ValueError(f"softcap must be None, or finite and above 0, got {softcap}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        check_name("impl", impl, IMPLS)
        check_name("backward", backward, BACKWARDS)
        if workspace < 2**20:
            raise ValueError(f"workspace_bytes must be at least 2^20, got {workspace}")
        transform = Transform.of(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
        return cls(transform, impl, backward, workspace)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
    backward: Backward = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
    shard: tuple[ProcessGroup, int, int] | None = None,
) -> Tensor:
    """Compute the log-probability of every row's target, without ever holding `[N, V]` logits.

    The result is differentiable once with respect to all floating-point tensors, and only the gradients asked for are
    computed. Under `torch.autocast`, these tensors are cast as `F.linear` would cast them.

    Args:
        hidden: `[N, D]`, float64, float32, bfloat16 or float16, any strides.
        weight: `[V, D]`, dtype and device of `hidden`.
        targets: `[N]` int64 in [0, V).
        bias: `[V]`, dtype and device of `hidden`.
        low_rank: `hidden2 [N, R]` and `weight2 [V, R]`; `hidden2 @ weight2.T` is added to the logits. For LoRA they are
            `(scaling * hidden @ A.T, B)`, and neither `weight + scaling * B @ A` nor its gradient is formed. For
            trainable rows of some tokens they are `(hidden @ (rows - weight[tokens]).T, one_hot(tokens, V).T)`.
        logit_scale: factor of the raw logits, finite and not 0.
        softcap: bound of the soft-capped logits, above 0; None for no soft-cap.
        temperature: divisor of the logits, above 0.
        impl: "triton" keeps logits in registers and has a sparse backward; "blas" uses vendor matmuls and has a dense
            backward; both need CUDA or TRITON_INTERPRET=1. "torch" runs on any device. "eager" forms `[N, V]` logits
            in the dtype of the inputs, for tests. "auto" takes the faster of triton and blas on CUDA, timed on the
            first calls of a shape and remembered in ~/.cache/fastdpo (or $FASTDPO_CACHE); elsewhere, and without
            Triton, it takes torch.
        backward: which cells of the gradient of the logits to compute; a cell is one row by some neighbouring tokens.
            "exact" computes all. "auto" is exact except for the gradient of `hidden` of 16-bit inputs, which skips
            cells of small probability where that is faster. A row skips at most 0.005 of the root mean square of the
            rows' |dlogps| * (1 - p), with p the target's probability, and a skipped cell acts as its average. "sparse"
            lets all gradients skip cells, in every dtype. docs/sparse_backward.md says what that costs, and `Stats`
            has the share of cells computed and the probability skipped.
        workspace_bytes: upper bound of temporary memory, and of what is kept for the backward besides `[N, D]`. With a
            trained head, the backward computes again the probabilities that did not fit; 2 bytes each hold them all
            for 16-bit inputs with impl="triton".
        shard: `(group, start, V)` if the ranks of a process group each hold a part of the vocabulary of V tokens.
            `weight`, `bias` and `weight2` are this rank's part, which begins with token `start`. `hidden`, `targets`,
            the result and the gradient of `hidden` are the same on all ranks.

    Returns:
        `[N]` float32 (float64 for float64 inputs), in nats, never above 0. Logits have at least float32 precision.

    Raises:
        ValueError: an argument breaks a rule above. On CUDA, where checking targets would wait for the device, a target
            outside [0, V) raises no error: its row, and every gradient it takes part in, becomes NaN.
    """
    options = _Options.checked(logit_scale, softcap, temperature, impl, backward, workspace_bytes)
    return _compute(hidden, weight, targets, bias, low_rank, options, shard=shard, with_stats=False)[0]


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
    backward: Backward = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Stats]:
    """Compute `linear_logprobs` and the statistics of each row's distribution, in the same pass over the vocabulary.

    Arguments and errors are those of `linear_logprobs`, without `shard`.

    Returns:
        The log-probabilities and `Stats`, all `[N]`: entropy, log_sum_sq_probs and mean_logits in the dtype of the
        log-probabilities, is_top1 bool; density and bound are None if the backward is dense. The log-probabilities
        and the entropy are differentiable, the other fields are not. A backward through the entropy is exact.
    """
    options = _Options.checked(logit_scale, softcap, temperature, impl, backward, workspace_bytes)
    logps, stats = _compute(hidden, weight, targets, bias, low_rank, options, shard=None, with_stats=True)
    assert stats is not None
    return logps, stats


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    options: _Options,
    *,
    shard: tuple[ProcessGroup, int, int] | None,
    with_stats: bool,
) -> tuple[Tensor, Stats | None]:
    """Check the tensors, run the op, and combine the target's logit with the other tokens' log-sum-exp."""
    hidden2, weight2 = low_rank or (None, None)
    hidden, weight, bias, hidden2, weight2 = _as_autocast(hidden, weight, bias, hidden2, weight2)
    _check_tensors(hidden, weight, targets, bias, hidden2, weight2)
    transform, impl, backward, workspace = options
    if impl == "eager":
        if shard is not None or low_rank is not None:
            raise ValueError("impl must be other than 'eager' with shard or low_rank, got 'eager'")
        return _eager(hidden, weight, targets, bias, transform, with_stats)

    _refuse_forward_mode(hidden, weight, bias, hidden2, weight2)
    group, start, V = shard or (None, 0, weight.shape[0])
    if not 0 <= start <= V - weight.shape[0]:
        raise ValueError(f"shard must leave room for the {weight.shape[0]} rows of weight, got start {start} of {V}")
    if group is not None:
        hidden = vocab_parallel.sum_gradients(hidden, group)
        hidden2 = None if hidden2 is None else vocab_parallel.sum_gradients(hidden2, group)
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias, hidden2, weight2)]
    sparse = backward == "sparse" or (backward == "auto" and hidden.element_size() == 2)
    if sparse and not torch.compiler.is_compiling():  # compiled code keeps the same tensors in every call
        trained = needs[1] or needs[2] or needs[4]
        sparse = is_captured(hidden) or not sparsity.expect_dense(
            density_key(hidden, weight), trained, backward != "sparse"
        )
        if not sparse and backward == "sparse":
            _say_dense()
    plain = bias is None and low_rank is None and not with_stats
    impl, trial = choose_impl(impl, hidden, weight, needs, sparse, workspace, plain)
    outputs = linear_logprobs_op(
        hidden, weight, targets, bias, hidden2, weight2, *transform, impl, with_stats, needs, sparse,
        backward != "sparse", start, V, workspace, trial,
    )  # fmt: skip
    result = results_of(outputs, with_stats)
    target, others = result.target, result.others
    if group is not None:
        target, others = vocab_parallel.merge(target, others, group)
    valid = (targets >= 0) & (targets < V) & (target < math.inf)  # on the CPU, the op has checked the targets
    logps = F.logsigmoid(target - others) * torch.where(valid, 1.0, math.nan).to(target.dtype)
    return logps, _merge_stats(logps, result, V) if with_stats else None


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse tangents, which the op would drop: its forward-mode derivative would be 0."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "fastdpo.linear_logprobs has no forward-mode derivative (torch.func.jvp, linearize, jacfwd); "
            "use reverse mode, or torch.func.jvp with impl='eager'"
        )


@cache
def _say_dense() -> None:
    logger.info(
        "head: most of its cells hold probability worth computing, so head_backward='sparse' computes all of them, "
        "which is faster; it tries again every %d calls",
        sparsity.RETRY,
    )


def _merge_stats(logps: Tensor, result: Forward, V: int) -> Stats:
    """Combine the statistics of q, the distribution of the other tokens, with the target's probability p.

    The whole distribution is p at the target and (1 - p) q elsewhere.
    """
    stats, kept = result.stats, result.kept
    assert stats is not None
    log_rest = F.logsigmoid(result.others - result.target)
    lowest = torch.finfo(logps.dtype).min  # replaces -inf, because 0 * -inf is NaN
    p, rest = logps.exp(), log_rest.exp()
    with torch.no_grad():
        log_sum_sq = torch.logaddexp(2 * logps, 2 * log_rest + stats.log_sum_sq)
        is_top1 = (result.target >= stats.top) & (result.target > stats.top_before)
        density = bound = None
        if kept.shares is not None:
            _, bound, density, _ = sparsity.select(kept.shares, rest)
    return Stats(
        entropy=rest * (stats.entropy - log_rest.clamp(min=lowest)) - p * logps.clamp(min=lowest),
        log_sum_sq_probs=log_sum_sq,
        mean_logits=stats.sum_logits / V,
        is_top1=is_top1,
        density=density,
        bound=bound,
    )


def _eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, transform: Transform, with_stats: bool
) -> tuple[Tensor, Stats | None]:
    if not torch.compiler.is_compiling():
        check_targets(targets, weight.shape[0])
    logps, _, values = eager.linear_logprobs(
        hidden, weight, targets, bias, transform.slope, transform.cap, stats=with_stats
    )
    dtype = result_dtype(hidden)
    if values is None:
        return logps.to(dtype), None
    return logps.to(dtype), Stats(
        values.entropy.to(dtype),
        values.log_sum_sq_probs.detach().to(dtype),
        values.mean_logits.detach().to(dtype),
        values.is_top1,
    )


def _as_autocast(hidden: Tensor, *others: Tensor | None) -> list[Any]:
    """Cast the tensors as `F.linear` would under autocast."""
    dtype = autocast_dtype(hidden)
    return [t if t is None or dtype is None else t.to(dtype) for t in (hidden, *others)]


def _check_tensors(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, hidden2: Tensor | None, weight2: Tensor | None
) -> None:
    """Check ranks, sizes, dtypes and devices."""
    tensors = [
        ("hidden", hidden, 2, "[N, D]"), ("weight", weight, 2, "[V, D]"), ("targets", targets, 1, "[N]"),
        ("bias", bias, 1, "[V]"), ("low_rank[0]", hidden2, 2, "[N, R]"), ("low_rank[1]", weight2, 2, "[V, R]"),
    ]  # fmt: skip
    for name, tensor, ndim, layout in tensors:
        if tensor is None:
            continue
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
        if tensor is not targets and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must have a dtype among {', '.join(map(str, DTYPES))}, got {hidden.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must have dtype torch.int64, got {targets.dtype}")

    (N, D), (V, weight_D) = hidden.shape, weight.shape
    if weight_D != D:
        raise ValueError(f"weight must have the D of hidden, {D}, got {weight_D} (shape {tuple(weight.shape)})")
    if targets.shape[0] != N:
        raise ValueError(f"targets must have the N of hidden, {N}, got {targets.shape[0]}")
    if bias is not None and bias.shape[0] != V:
        raise ValueError(f"bias must have the V of weight, {V}, got {bias.shape[0]}")
    if hidden2 is not None and weight2 is not None:
        if hidden2.shape[0] != N:
            raise ValueError(f"low_rank[0] must have the N of hidden, {N}, got {hidden2.shape[0]}")
        if weight2.shape != (V, hidden2.shape[1]):
            expected, shape = (V, hidden2.shape[1]), tuple(weight2.shape)
            raise ValueError(f"low_rank[1] must have the V of weight and the R of low_rank[0], {expected}, got {shape}")
    if D == 0:
        raise ValueError(f"hidden must have at least one feature, got shape {tuple(hidden.shape)}")
    if V == 0:
        raise ValueError(f"weight must have at least one vocabulary entry, got shape {tuple(weight.shape)}")

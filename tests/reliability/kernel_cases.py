"""Bad or extreme inputs of the fused head: each gives the exact result, or an error; none a plausible wrong number."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fastdpo.config import DPOConfig
from fastdpo.head.linear_logprobs import linear_logprobs
from tests.reliability.data_cases import listening

Case = tuple[str, Callable[[Path], bool]]
N, V, D = 7, 131, 9
_RUNS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ("torch", "blas", "triton") if _RUNS_TRITON and find_spec("triton") is not None else ("torch",)
BACKWARDS = ("exact", "sparse")


def _inputs(n: int = N, v: int = V, d: int = D, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, d, generator=generator).to(dtype) for size in (n, v))
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Return log-probs and the gradients of their weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logps = linear_logprobs(leaves[0], leaves[1], targets, *leaves[2:], **options)
    (logps * torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)).sum().backward()
    return logps.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def _near(found: tuple[Tensor, ...], true: tuple[Tensor, ...], bound: float = 1e-9) -> bool:
    """Whether all tensors are finite, and within `bound` of the true ones, relative to the largest element and 1."""

    def largest(x: Tensor) -> float:
        return float(x.abs().max()) if x.numel() else 0.0

    return len(found) == len(true) and all(
        bool(torch.isfinite(a).all()) and largest(a - b) <= bound * (1 + largest(b))
        for a, b in zip(found, true, strict=True)
    )


def _exact(make: Callable[[], tuple[Any, ...]], bound: float = 1e-9, **options: Any) -> Callable[[Path], bool]:
    """All implementations agree with eager, in the log-probs and in all gradients."""

    def case(folder: Path) -> bool:
        true = _run(*make(), impl="eager", **options)
        return all(
            _near(_run(*make(), impl=impl, backward=backward, **options), true, bound)
            for impl in IMPLS
            for backward in BACKWARDS
        )

    return case


def _raises(kind: type[Exception], words: str, call: Callable[[str], Any]) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        for impl in IMPLS:
            try:
                call(impl)
            except kind as error:
                if words not in str(error):
                    return False
            else:
                return False
        return True

    return case


def _target(value: int) -> Callable[[str], Any]:
    def call(impl: str) -> Any:
        hidden, weight, targets = _inputs()
        targets[3] = value
        return linear_logprobs(hidden, weight, targets, impl=impl)

    return call


def _with(change: Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]], **options: Any) -> Callable[[str], Any]:
    return lambda impl: linear_logprobs(*change(*_inputs()), impl=impl, **options)


def _bias(value: float, tokens: slice, but: int | None = None) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        hidden, weight, targets = _inputs()
        bias = torch.linspace(-1, 1, V, dtype=torch.float64)
        targets = targets.fill_(V - 1 if but is None else but)
        kept = bias[targets[0]].clone()
        bias[tokens] = value
        bias[targets[0]] = kept
        return hidden, weight, targets, bias

    return make


def _nan_row_stays(folder: Path) -> bool:
    hidden, weight, targets = _inputs()
    hidden[2] = torch.nan
    others = torch.arange(N) != 2
    true = _run(hidden[others], weight, targets[others], impl="eager")[0]
    for impl in IMPLS:
        hidden_ = hidden.clone().requires_grad_()
        logps = linear_logprobs(hidden_, weight, targets, impl=impl)
        logps.sum().backward()
        grad = hidden_.grad
        if grad is None or not logps[2].isnan() or not _near((logps[others].detach(),), (true,)):
            return False
        if not torch.isfinite(grad[others]).all() or torch.isfinite(grad[2]).any():
            return False
    return True


def _twice(impl: str) -> None:
    hidden, weight, targets = _inputs()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets, impl=impl).sum(), hidden, create_graph=True)
    grad.sum().backward()


def _retained(folder: Path) -> bool:
    hidden, weight, targets = _inputs()
    for impl in IMPLS:
        leaf = hidden.clone().requires_grad_()
        loss = linear_logprobs(leaf, weight, targets, impl=impl).sum()
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf)
        if not torch.equal(first, second):
            return False
    return True


def _changed_in_place(impl: str) -> None:
    hidden, weight, targets = _inputs()
    leaf = weight.clone().requires_grad_()
    loss = linear_logprobs(hidden.requires_grad_(), leaf, targets, impl=impl).sum()
    with torch.no_grad():
        leaf.mul_(2)
    loss.backward()


def _frozen(folder: Path) -> bool:
    """With a frozen weight, which lets an implementation keep less for its backward."""
    hidden, weight, targets = _inputs()
    true = _run(hidden, weight, targets, impl="eager")[1]
    for impl in IMPLS:
        for backward in BACKWARDS:
            leaf = hidden.clone().requires_grad_()
            logps = linear_logprobs(leaf, weight, targets, impl=impl, backward=backward)
            (logps * torch.linspace(0.5, 1.5, N, dtype=logps.dtype)).sum().backward()
            if leaf.grad is None or not _near((leaf.grad,), (true,)):
                return False
    return True


def _one_side(folder: Path) -> bool:
    hidden, weight, targets = _inputs()
    true = _run(hidden, weight, targets, impl="eager")[1:]
    for impl in IMPLS:
        for side in (0, 1):
            leaves = [t.clone().requires_grad_(k == side) for k, t in enumerate((hidden, weight))]
            logps = linear_logprobs(*leaves, targets, impl=impl)
            (logps * torch.linspace(0.5, 1.5, N, dtype=logps.dtype)).sum().backward()
            grads = [leaf.grad for leaf in leaves]
            found = grads[side]
            if found is None or grads[1 - side] is not None or not _near((found,), (true[side],)):
                return False
    return True


def _strided() -> tuple[Any, ...]:
    hidden, weight, targets = _inputs()
    wide = torch.zeros(V, 2 * D, dtype=weight.dtype)
    wide[:, ::2] = weight
    return hidden.t().contiguous().t(), wide[:, ::2], targets.repeat_interleave(2)[::2]


def _repeats(folder: Path) -> bool:
    return all(
        torch.equal(a, b)
        for impl in IMPLS
        for first, *others in [[_run(*_inputs(dtype=torch.float32), impl=impl) for _ in range(3)]]
        for other in others
        for a, b in zip(first, other, strict=True)
    )


def _alone(folder: Path) -> bool:
    hidden, weight, targets = _inputs(dtype=torch.float32)
    for impl in IMPLS:
        whole = linear_logprobs(hidden, weight, targets, impl=impl)
        rows = [linear_logprobs(hidden[i : i + 1], weight, targets[i : i + 1], impl=impl) for i in range(N)]
        if float((whole - torch.cat(rows)).abs().max()) > 2e-6:
            return False
    return True


def _empty() -> tuple[Any, ...]:
    hidden, weight, targets = _inputs()
    return hidden[:0], weight, targets[:0]


def _scaled(factor: float) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        hidden, weight, targets = _inputs()
        return hidden * factor, weight, targets

    return make


def _half_overflows(folder: Path) -> bool:
    """Logits beyond float16 give the exact log-probs, since they are never rounded to 16 bits."""
    hidden, weight, targets = _inputs(dtype=torch.float16)
    hidden = hidden * 300
    true = linear_logprobs(hidden.double() * 300, weight.double(), targets, impl="eager")
    found = linear_logprobs(hidden, weight, targets, impl="torch", logit_scale=300.0)
    return _near((found.double(),), (true,), 1e-5)


def _forward_mode(impl: str) -> None:
    hidden, weight, targets = _inputs()
    jvp(lambda x: linear_logprobs(x, weight, targets, impl=impl), (hidden,), (hidden,))


def _beta(value: float) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        try:
            with listening() as lines:
                config = DPOConfig(output_dir=str(folder), use_cpu=True, beta=value)
        except ValueError as error:
            return "beta" in str(error)
        return config.beta == 0 and any("beta is 0" in line for line in lines)  # as TRL accepts it

    return case


def cases() -> list[Case]:
    """Return the names of the cases, and functions that return whether no number was silently wrong."""
    trained = torch.tensor(1.5, requires_grad=True)
    return [
        ("a target of V", _raises(ValueError, f"got {V} at position 3", _target(V))),
        ("a target of -1", _raises(ValueError, "got -1 at position 3", _target(-1))),
        ("a target of -100", _raises(ValueError, "got -100 at position 3", _target(-100))),
        ("a target of 2^40", _raises(ValueError, "at position 3", _target(2**40))),
        ("too few targets", _raises(ValueError, "must have the N", _with(lambda h, w, t: (h, w, t[:-1])))),
        ("targets of floats", _raises(ValueError, "torch.int64", _with(lambda h, w, t: (h, w, t.float())))),
        ("another D", _raises(ValueError, "must have the D", _with(lambda h, w, t: (h[:, 1:], w, t)))),
        ("another dtype", _raises(ValueError, "must have the dtype", _with(lambda h, w, t: (h.bfloat16(), w, t)))),
        ("D = 0", _raises(ValueError, "at least one feature", _with(lambda h, w, t: (h[:, :0], w[:, :0], t)))),
        ("no rows", _exact(_empty)),
        ("one token in the vocabulary", _exact(lambda: _inputs(v=1))),
        ("one row, odd sizes", _exact(lambda: _inputs(1, 257, 37))),
        ("a row of NaN", _nan_row_stays),
        ("a bias of -inf over whole tiles", _exact(_bias(-torch.inf, slice(0, 128)))),
        ("a bias of -inf over all but the target", _exact(_bias(-torch.inf, slice(None)))),
        ("the same, for the first token", _exact(_bias(-torch.inf, slice(None), but=0))),
        ("a second derivative", _raises(RuntimeError, "once, not twice", _twice)),
        ("a derivative in forward mode", _raises(NotImplementedError, "forward-mode", _forward_mode)),
        *(
            (f"a trained {name}", _raises(ValueError, f"{name} requires grad", _with(lambda *x: x, **{name: trained})))
            for name in ("logit_scale", "softcap", "temperature")
        ),
        ("a backward that is run twice", _retained),
        ("a weight that changed after the forward", _raises(RuntimeError, "inplace", _changed_in_place)),
        ("logits of 1e4", _exact(_scaled(1e4))),
        ("logits beyond float16", _half_overflows),
        ("a frozen weight", _frozen),
        ("a gradient on one side only", _one_side),
        ("strided inputs", _exact(_strided)),
        ("the same inputs three times", _repeats),
        ("a row alone and in a batch", _alone),
        ("a soft-cap, a scale and a temperature", _exact(_inputs, softcap=3.0, logit_scale=0.7, temperature=1.3)),
        *((f"beta = {value}", _beta(value)) for value in (0.0, -0.1, float("nan"))),
    ]

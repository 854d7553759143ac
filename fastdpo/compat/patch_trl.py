"""`patch_trl()`: TRL's own trainers compute log-probs with fastdpo's head, without a changed line.

TRL has computed log-probs in three ways, and a release may have more than one of them:

    1.15 to 1.16     `ChunkedLogProbFunction`, a fused head that all trainers share
    1.14             the same for some trainers on CUDA, with two outputs; logits elsewhere
    1.4 to 1.14      `_chunked_cross_entropy_loss`, a loss in chunks of rows for SFT; logits elsewhere
    0.24 to 1.14     the model's logits

The first three are functions, which are replaced wherever a module of TRL refers to them. In the last case the methods
of trainers that call a model run with `lazy_heads`, and TRL's three functions of logits recognise what it returns.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.compat.lazy.heads import lazy_heads
from fastdpo.compat.lazy.logits import LazyLogits
from fastdpo.head.eager import Stats
from fastdpo.head.impl.interface import autocast_dtype
from fastdpo.head.linear_logprobs import DTYPES, linear_logprobs, linear_logprobs_with_stats

logger = logging.getLogger("fastdpo")

FIRST, LAST = (0, 24), (1, 16)
"""The releases of TRL that the tests have run with, and those between them."""

TRAINERS = ("dpo", "kto", "sft", "grpo", "rloo")
GENERATE = ("grpo", "rloo")
MODEL_CALLS = ("_get_per_token_logps", "_get_per_token_logps_and_entropies")
MODEL_CALLS_WITHOUT_GENERATION = (
    *("compute_loss", "get_batch_loss_metrics", "prediction_step"),
    *("compute_ref_log_probs", "compute_reference_log_probs", "_compute_ref_log_probs"),
)
"""Methods that call a model and reduce its logits. Those of GRPO and RLOO also generate, which needs logits."""
OF_LOGITS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")

_restore: list[Callable[[], object]] = []


def patch_trl() -> None:
    """Let the trainers of the installed TRL compute log-probs with fastdpo's head, until `unpatch_trl` is called.

    DPO, KTO, SFT, GRPO and RLOO trainers are patched, also those that exist already and those of libraries that derive
    their own from TRL's. Losses and metrics stay as they are, but for rounding: in 16 bits TRL rounds logits or their
    tiles, and fastdpo does not. Where a head cannot be fused, TRL's own computation runs, and a line in the log says
    why. A second call has no effect.

    Raises:
        ImportError: TRL is not installed, or it is a release that this function does not know; the message has the
            version that was found, and the versions or names that were looked for.
    """
    if _restore:
        return
    found = _installed_version()
    utils = import_module("trl.trainer.utils")
    _import_trainers()
    changes: list[str] = []
    try:
        for home, name, make in (
            ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _fused_function),
            ("trl.trainer.utils", "_ChunkedLogProbFunction", _fused_function),
            ("trl.trainer.sft_trainer", "_chunked_cross_entropy_loss", _chunked_loss),
        ):
            original = getattr(sys.modules.get(home), name, None)
            known = original is not None and original.__module__ != __name__  # else it was replaced just now
            replacement = make(original) if known else None
            if replacement is not None:
                changes += _replace_everywhere(original, replacement)
        if found < (1, 15) or not changes:
            for name in OF_LOGITS:
                if original := getattr(utils, name, None):
                    changes += _replace_everywhere(original, _of_lazy_logits(name, original))
            changes += _patch_methods()
        if not changes or not ("ChunkedLogProbFunction" in str(changes) or OF_LOGITS[0] in str(changes)):
            raise ImportError(
                f"fastdpo.patch_trl() found neither trl.kernels.chunked_logprob.ChunkedLogProbFunction nor "
                f"trl.trainer.utils.{OF_LOGITS[0]} in TRL {version('trl')}, so it changed nothing"
            )
    except BaseException:
        unpatch_trl()
        raise
    logger.info("patch_trl: TRL %s computes log-probs with fastdpo's head (%s)", version("trl"), ", ".join(changes))


def unpatch_trl() -> None:
    """Undo `patch_trl`: every name in TRL refers to the object that it referred to before. Without it, do nothing."""
    while _restore:
        _restore.pop()()


def _installed_version() -> tuple[int, int]:
    try:
        text = version("trl")
    except PackageNotFoundError as error:
        raise ImportError("fastdpo.patch_trl() needs TRL: pip install 'fastdpo[trl]'") from error
    major, minor = (int(part) for part in text.split(".")[:2])
    if not FIRST <= (major, minor) <= LAST:
        first, last = (".".join(map(str, v)) for v in (FIRST, LAST))
        raise ImportError(f"fastdpo.patch_trl() knows TRL {first} to {last}, and found {text}; install one of these")
    return major, minor


def _import_trainers() -> None:
    for name in TRAINERS:
        try:
            import_module(f"trl.trainer.{name}_trainer")
        except ImportError as error:  # a trainer may need a package that is missing; then nobody can use it
            logger.info("patch_trl: TRL's %s trainer cannot be imported and is left out: %s", name, error)


# Names


def _replace_everywhere(original: Any, replacement: Any) -> list[str]:
    """Replace an object in all modules that refer to it. To undo it, modules imported in the meantime are searched."""

    def swap(old: Any, new: Any) -> list[str]:
        changed = []
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is old and module.__name__ != __name__:
                    setattr(module, name, new)
                    changed.append(f"{module.__name__}.{name}")
        return changed

    changed = swap(original, replacement)
    if changed:
        _restore.append(lambda: swap(replacement, original))
    return changed


# Functions that fuse the head


def _refused(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> str | None:
    """Return why TRL's own function must serve a call, or None."""
    if hasattr(weight, "ds_id"):
        return "ZeRO-3 partitions its weight, which TRL gathers again in the backward"
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 and autocast_dtype(hidden) is None:
        return f"hidden states and weights differ in dtype ({', '.join(sorted(map(str, dtypes)))})"
    if not dtypes <= set(DTYPES):
        return f"its dtype is {dtypes.pop()}"
    if not scale or softcap == 0:
        return f"its logit scale is {scale} and its soft-cap {softcap}"
    return None


@functools.cache
def _say_refused(reason: str) -> None:
    logger.warning("patch_trl: TRL's own function computes the head, because %s", reason)


def _served(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> bool:
    reason = _refused(hidden, weight, bias, scale, softcap)
    if reason:
        _say_refused(reason)
    return reason is None


def _fused_function(original: Any) -> Any:
    """Return a subclass of TRL's autograd function whose `apply` is fastdpo's head; None for an older signature."""
    parameters = inspect.signature(original.forward).parameters
    if "final_logit_softcapping" not in parameters:
        return None
    five = "outputs" in parameters
    optional = tuple(name for name in Stats._fields if name not in ("density", "bound"))

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        *outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        if not _served(hidden, weight, bias, logit_scale, final_logit_softcapping):
            args = hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale
            result: tuple[Tensor | None, ...] = original.apply(*args, *outputs)
            return result
        options: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
            "temperature": temperature,
        }
        wanted = outputs[0] if outputs else optional if five else ("entropy",)
        if not set(wanted) & set(optional):
            return linear_logprobs(hidden, weight, targets, bias, **options), None, None, None, None
        logps, stats = linear_logprobs_with_stats(hidden, weight, targets, bias, **options)
        if not five:
            return logps, stats.entropy
        return logps, *(getattr(stats, name) if name in wanted else None for name in optional)

    return type(original.__name__, (original,), {"apply": staticmethod(apply), "__module__": __name__})


def _chunked_loss(original: Any) -> Any:
    """Return the SFT loss of TRL 1.4 to 1.14, computed with fastdpo's head."""

    @functools.wraps(original)
    def loss(
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        chunk_size: int,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping
        if (labels is None and shift_labels is None) or not _served(hidden_states, *head):
            result: tuple[Tensor, Tensor, Tensor, Tensor] = original(
                hidden_states, lm_head_weight, chunk_size, labels, shift_labels, num_items_in_batch, *head[2:],
                lm_head_bias,
            )  # fmt: skip
            return result
        if shift_labels is None:
            assert labels is not None
            hidden_states, shift_labels = hidden_states[..., :-1, :], labels[..., 1:]
        valid = shift_labels != -100
        logps, stats = linear_logprobs_with_stats(
            hidden_states[valid], lm_head_weight, shift_labels[valid], lm_head_bias,
            logit_scale=logit_scale, softcap=final_logit_softcapping,
        )  # fmt: skip
        count = valid.sum()
        items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        items = items.to(logps.device) if isinstance(items, Tensor) else items
        return -logps.sum() / items, stats.is_top1.sum().float(), stats.entropy.detach().sum(), count

    return loss


# Functions and methods that use logits


def _of_lazy_logits(name: str, original: Any) -> Any:
    """Return a function of logits that recognises `LazyLogits` and leaves everything else to TRL's."""

    def scaled(logits: LazyLogits, temperature: float) -> LazyLogits:
        result: LazyLogits = logits if temperature == 1 else logits / temperature
        return result

    def logps_of(logits: LazyLogits, index: Tensor, row_mask: Tensor | None) -> Tensor:
        logps = logits.logps(index)
        return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0.0)

    @functools.wraps(original)
    def selective_log_softmax(
        logits: Any, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None, **others: Any
    ) -> Any:
        if not isinstance(logits, LazyLogits) or index.shape != logits.shape[:-1] or others:
            given = {"temperature": temperature, "row_mask": row_mask} if "temperature" in parameters else {}
            return original(_real(logits, name), index, **given, **others)
        return logps_of(scaled(logits, temperature), index, row_mask)

    @functools.wraps(original)
    def entropy_from_logits(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, LazyLogits):
            return original(logits, *args, **kwargs)
        return logits.statistics().entropy

    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits: Any,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Any:
        if not isinstance(logits, LazyLogits) or index.shape != logits.shape[:-1]:
            return original(_real(logits, name), index, entropy_requires_grad, temperature, row_mask)
        logits = scaled(logits, temperature)
        logps, entropy = logps_of(logits, index, row_mask), logits.statistics().entropy
        entropy = entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)
        return logps, entropy if entropy_requires_grad else entropy.detach()

    parameters = inspect.signature(original).parameters
    return locals()[name]


def _real(logits: Any, asked: str) -> Any:
    return logits.realise(asked) if isinstance(logits, LazyLogits) else logits


def _trainer(name: str) -> Any:
    return getattr(sys.modules.get(f"trl.trainer.{name}_trainer"), f"{name.upper()}Trainer", None)


def _methods() -> Iterator[tuple[type, str]]:
    """Find the methods of TRL's trainers that call a model and reduce its logits."""
    for name in TRAINERS:
        calls = MODEL_CALLS if name in GENERATE else (*MODEL_CALLS, *MODEL_CALLS_WITHOUT_GENERATION)
        for cls in getattr(_trainer(name), "__mro__", ()):
            if cls.__module__.partition(".")[0] == "trl":
                yield from ((cls, call) for call in calls if call in vars(cls))


def _patch_methods() -> list[str]:
    changed = []

    def patch(cls: type, name: str, only: tuple[type, ...]) -> None:
        original = vars(cls)[name]
        setattr(cls, name, _with_lazy_heads(original, only))
        _restore.append(functools.partial(setattr, cls, name, original))
        changed.append(f"{cls.__name__}.{name}")

    for cls, name in dict.fromkeys(_methods()):
        patch(cls, name, (object,))
    # trainers derived from TRL's may override all of these methods
    trainers = tuple(_trainer(name) for name in TRAINERS if name not in GENERATE and _trainer(name) is not None)
    patch(import_module("transformers").Trainer, "training_step", trainers)
    return changed


def _with_lazy_heads(method: Any, only: Any) -> Any:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, only):
            return method(self, *args, **kwargs)
        models = [self.model, getattr(self, "ref_model", None), *args, *kwargs.values()]
        with lazy_heads(dict.fromkeys(m for m in models if isinstance(m, nn.Module))):
            result = method(self, *args, **kwargs)
        if method.__name__ != "prediction_step" or not isinstance(result, tuple):
            return result
        with torch.no_grad():
            return tuple(_real(x, "the evaluation loop") for x in result)

    return run

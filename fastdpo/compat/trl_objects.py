"""What scripts for TRL read from a trainer, and which of TRL's objects they hand to it."""

import dataclasses
import logging
from typing import Any

from fastdpo.config import DPOConfig
from fastdpo.data.columns import COLUMNS

logger = logging.getLogger("fastdpo")


def _of_objective(name: str, *, may_change: bool = False) -> Any:
    """Return a property that reads a setting of the objective; if it may change, a new value is checked and used."""

    def read(self: Any) -> Any:
        value = getattr(self._settings, name)
        return list(value) if isinstance(value, tuple) else value

    def write(self: Any, value: Any) -> None:
        if not may_change:
            raise AttributeError(f"{name} can't be changed once the trainer is made; set it in DPOConfig({name}=...)")
        self._settings = dataclasses.replace(self._settings, **{name: value})

    return property(read, write, doc=f"`{name}` of the objective, see `DPOConfig`.")


class TRLAttributes:
    """The public attributes of TRL's trainer; callbacks may change the numbers of the loss during training."""

    _settings: Any
    _layout: Any
    _aux_coef: float
    _is_precomputed: bool

    beta = _of_objective("beta", may_change=True)
    label_smoothing = _of_objective("label_smoothing", may_change=True)
    loss_types = _of_objective("loss_type")
    ld_alpha = _of_objective("ld_alpha")
    f_divergence_type = _of_objective("f_divergence_type")
    f_alpha_divergence_coef = _of_objective("f_alpha_divergence_coef")
    use_weighting = _of_objective("use_weighting")
    reference_free = _of_objective("reference_free")

    @property
    def loss_weights(self) -> list[float]:
        """Weight of each objective of `loss_types` in the sum."""
        return list(self._settings.loss_weights or [1.0] * len(self._settings.loss_type))

    @property
    def precompute_ref_logps(self) -> bool:
        """Whether the datasets hold the reference's log-probs, computed before training."""
        return self._is_precomputed

    @property
    def padding_free(self) -> bool:
        """Whether batches hold no padding."""
        return bool(self._layout != "padded")

    @property
    def router_aux_loss_coef(self) -> float:
        """Coefficient of the load-balancing loss of a mixture of experts; 0 if it is not part of the loss."""
        return self._aux_coef

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss is part of the loss."""
        return self._aux_coef > 0


def resolve_collator(collator: Any, args: DPOConfig) -> Any:
    """Return the collator to use: None, for fastdpo's own, in place of TRL's, which pads the same rows.

    Raises:
        ValueError: TRL's collator would cut other tokens than `args` says, or it is one for other data.
    """
    kinds = [cls.__name__ for cls in type(collator).__mro__ if cls.__module__.partition(".")[0] == "trl"]
    if not kinds:
        return collator
    known = {"DataCollatorForPreference", "DataCollatorForVisionPreference"}
    if known.isdisjoint(kinds) or type(collator).__name__ != kinds[0]:
        raise ValueError(
            f"data_collator is a {type(collator).__name__}, which makes padded batches as TRL's trainer needs them; "
            "leave it out, or pass one that calls fastdpo.shared_prefix_batch"
        )
    if collator.max_length is not None:
        for name, expected in (("max_length", args.max_length), ("truncation_mode", "keep_start")):
            if (found := getattr(collator, name, expected)) != expected:
                raise ValueError(
                    f"data_collator would cut rows with {name}={found!r}, but DPOConfig says {expected!r}; set "
                    f"{name} there, and leave data_collator out"
                )
    logger.info("data_collator is TRL's, which pads rows; they are packed instead, which gives the same loss")
    return None


def check_collator(collator: Any, rows: Any) -> None:
    """Refuse a collator that does not make packed batches, by what it makes of the first row.

    Args:
        collator: the user's collator, or None.
        rows: the tokenised training dataset.

    Raises:
        ValueError: its batch lacks what scoring needs.
    """
    if collator is None:
        return
    batch = collator([{name: value for name, value in next(iter(rows)).items() if name in COLUMNS}])
    if "logit_index" not in batch:
        raise ValueError(
            f"data_collator makes batches of {', '.join(batch)}, but training needs those of "
            "fastdpo.shared_prefix_batch; call that in it, or leave data_collator out"
        )

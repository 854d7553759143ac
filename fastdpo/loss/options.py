"""The settings of a run's objective: the checks of their combinations, and what the objective needs.

The parameter names of an objective tell what it needs and which options it allows, see `fastdpo.loss.objectives`.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeAlias

from fastdpo.loss.objectives import DIVERGENCES, OBJECTIVES
from fastdpo.settings.names import check_name

Kind: TypeAlias = Literal["preference", "ranked", "unpaired"]

PARAMETERS = {name: frozenset(inspect.signature(function).parameters) for name, function in OBJECTIVES.items()}
"""Names of the parameters of each objective."""

_SCORES = {"z", "chosen_scores", "rejected_scores"}
_DIFFERENCES = _SCORES | {"ranked_logratios"}
"""Differences between responses, from which a constant reference cancels out."""
_MATCHED = {"matched_ref_margins", "matched_rejected", "matched_chosen"}
_STEP = _MATCHED | {"kl"}
_REFERENCE = _DIFFERENCES | _STEP | {"chosen_logratios", "rejected_logratios", "logratios"}

_POSITIVE = {"discopop_tau", "desirable_weight", "undesirable_weight", "rpo_alpha"}

_DIVIDE_BY_BETA = {"ipo", "sppo_hard"}

EXAMPLE_NUMBERS = ("weight", "margin", "beta")
"""Numbers that an example may set for itself."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The objective of a run. Names and defaults are TRL's where TRL has the field.

    Raises:
        ValueError: a field is out of range, misspelt, incompatible with another or without effect; the message names
            it, its value and the fix.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    """Names in `fastdpo.loss.objectives.OBJECTIVES` (a list or one name is taken too); several are summed."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each objective in the sum. None gives each a weight of 1."""
    beta: float = 0.1
    """Strength of the pull towards the reference, at least 0. It is `ipo`'s tau and `orpo`'s lambda."""
    label_smoothing: float = 0.0
    """Probability that a preference label is flipped, in [0, 0.5)."""
    f_divergence_type: str = "reverse_kl"
    """Divergence that keeps the policy near the reference: a name in `fastdpo.loss.objectives.DIVERGENCES`."""
    f_alpha_divergence_coef: float = 0.5
    """Coefficient of `alpha_divergence`."""
    discopop_tau: float = 0.05
    """Temperature of `discopop`."""
    use_weighting: bool = False
    """WPO: weigh pairs by how likely the policy itself would write them, https://arxiv.org/abs/2406.11827."""
    ld_alpha: float | None = None
    """LD-DPO: factor in [0, 1] of the log-probs of tokens beyond the length of the pair's shorter response,
    https://arxiv.org/abs/2409.06411."""
    rpo_alpha: float | None = None
    """RPO: weight of an added `sft` term, https://arxiv.org/abs/2404.19733."""
    reference_free: bool = False
    """Take a reference under which all responses are equally likely, instead of loading a model."""
    simpo_gamma: float = 0.5
    """Target margin of `simpo`."""
    cpo_alpha: float = 1.0
    """Weight of `sft` in `cpo`."""
    desirable_weight: float = 1.0
    """Weight of desirable responses in `kto` and `apo_zero_unpaired`."""
    undesirable_weight: float = 1.0
    """Weight of undesirable responses in `kto` and `apo_zero_unpaired`."""

    def __post_init__(self) -> None:
        names = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        object.__setattr__(self, "loss_type", names)
        if self.loss_weights is not None:
            weights = self.loss_weights if isinstance(self.loss_weights, (list, tuple)) else (self.loss_weights,)
            object.__setattr__(self, "loss_weights", tuple(weights))
        self._check_loss_types()
        self._check_numbers()
        self._check_effects()
        self._check_combinations()

    # What the objective needs

    @property
    def kind(self) -> Kind:
        """Kind of examples: preference pairs, K ranked responses, or single responses with a label."""
        return kind_of_loss(self.loss_type[0])

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the inputs that the objectives read."""
        return frozenset().union(*(PARAMETERS[name] for name in self.loss_type))

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under a reference are read."""
        return not self.reference_free and bool(self.parameters & _REFERENCE)

    @property
    def needs_lengths(self) -> bool:
        """Whether numbers of completion tokens are read."""
        return "chosen_lengths" in self.parameters or self.nll_weight > 0

    @property
    def needs_step_context(self) -> bool:
        """Whether an example's loss depends on other examples of the optimizer step, see `fastdpo.loss.whole_step`."""
        return bool(self.parameters & _STEP)

    @property
    def needs_kl(self) -> bool:
        """Whether unpaired examples must come with `kl_ids`."""
        return "kl" in self.parameters

    @property
    def needs_token_stats(self) -> bool:
        """Whether statistics of each token's distribution are read."""
        return self.use_weighting

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each objective in the sum."""
        return self.loss_weights or (1.0,) * len(self.loss_type)

    @property
    def nll_weight(self) -> float:
        """Weight of the mean negative log-likelihood of the chosen tokens in the sum."""
        own = {"sft": 1.0, "orpo": 1.0, "cpo": self.cpo_alpha}
        terms = [weight * own.get(name, 0.0) for name, weight in zip(self.loss_type, self.weights, strict=True)]
        return sum(terms) + (self.rpo_alpha or 0.0)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if examples cannot set the numbers of their own (EXAMPLE_NUMBERS) that `columns` names."""
        own = set(columns) & set(EXAMPLE_NUMBERS)
        for name in self.loss_type:
            if own and PARAMETERS[name] & _MATCHED:
                raise ValueError(
                    f"a {min(own)} per example makes no sense with loss_type {name!r}, which compares responses of "
                    f"different examples; drop the column or choose another loss_type"
                )
        if "margin" in own and (without := [n for n in self.loss_type if "z" not in PARAMETERS[n] and n != "sft"]):
            raise ValueError(
                f"loss_type {without[0]!r} takes no margin per example; drop the column, or use one of "
                f"{_names(with_parameter('z'))}"
            )
        if "margin" in own and "z" not in self.parameters:
            raise ValueError(f"loss_type {self.loss_type[0]!r} takes no margin per example; drop the column")

    # Checks

    def _check_loss_types(self) -> None:
        if not self.loss_type:
            raise ValueError(f"loss_type must name an objective, got none; choose from {_names(OBJECTIVES)}")
        for name in self.loss_type:
            check_name("loss_type", name, OBJECTIVES)
            if self.loss_type.count(name) > 1:
                raise ValueError(f"loss_type names {name!r} twice; name it once and set its weight in loss_weights")
        kinds = {name: kind_of_loss(name) for name in self.loss_type}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{name!r} takes {kind} examples" for name, kind in kinds.items())
            raise ValueError(f"loss_type must not mix kinds of examples, but {listed}; keep objectives of one kind")

    def _check_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("use_weighting", "reference_free"):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be True or False, got {value!r}")
            elif isinstance(field.default, float) or (field.name.endswith("_alpha") and value is not None):
                _check_number(field.name, value, positive=field.name in _POSITIVE)
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.beta == 0 and (dividing := _DIVIDE_BY_BETA & set(self.loss_type)):
            raise ValueError(f"beta must be above 0 with loss_type {min(dividing)!r}, which divides by it, got 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}; None switches LD-DPO off")
        for name in ("cpo_alpha", "simpo_gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 switches it off")
        check_name("f_divergence_type", self.f_divergence_type, DIVERGENCES)
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must hold one number per loss_type, got {len(self.loss_weights)} for "
                f"{len(self.loss_type)}: {list(self.loss_weights)} for {list(self.loss_type)}"
            )
        for weight in self.loss_weights:
            _check_number("loss_weights", weight)
            if weight < 0:
                raise ValueError(f"loss_weights must not be negative, got {list(self.loss_weights)}")

    def _check_effects(self) -> None:
        """Refuse an option that no objective would read."""
        for name in ("label_smoothing", "discopop_tau", "simpo_gamma", "desirable_weight", "undesirable_weight"):
            self._check_read(name, with_parameter(name))
        self._check_read("cpo_alpha", ["cpo"])
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                f"f_alpha_divergence_coef {self.f_alpha_divergence_coef} has no effect on f_divergence_type "
                f"{self.f_divergence_type!r}; set f_divergence_type to 'alpha_divergence', or leave it out"
            )

    def _check_read(self, name: str, readers: list[str]) -> None:
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default and not set(readers) & set(self.loss_type):
            raise ValueError(
                f"{name} {value} has no effect on loss_type {_names(self.loss_type)}; leave it at {default}, or use "
                f"one of {_names(readers)}"
            )

    def _check_combinations(self) -> None:
        names = self.loss_type
        if "exo_pair" in names and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing must be above 0 with loss_type 'exo_pair', got 0.0; its paper recommends 0.001"
            )
        if self.rpo_alpha is not None:
            self._check_pairs("rpo_alpha", self.rpo_alpha)
            for name in {"sft", "cpo", "orpo"} & set(names):
                raise ValueError(
                    f"rpo_alpha {self.rpo_alpha} would add a likelihood term to loss_type {name!r}, which has one; "
                    f"leave rpo_alpha out" + ("" if name == "orpo" else " and set the weight of that term")
                )
        if self.f_divergence_type != "reverse_kl":
            allowed = [*with_parameter("z"), *with_parameter("chosen_scores"), "sft"]
            self._check_all("f_divergence_type", self.f_divergence_type, allowed, "leave it at 'reverse_kl'")
        if self.use_weighting:
            self._check_pairs("use_weighting", True)
            allowed = [name for name in names if not PARAMETERS[name] & _MATCHED]
            self._check_all(
                "use_weighting",
                True,
                allowed,
                "set it to False: this loss sorts pairs over the whole step, so a pair cannot be weighted",
            )
        if self.ld_alpha is not None:
            self._check_pairs("ld_alpha", self.ld_alpha)
            allowed = [name for name in OBJECTIVES if PARAMETERS[name] & _REFERENCE or name == "sft"]
            self._check_all("ld_alpha", self.ld_alpha, allowed, "leave it at None")
        if self.reference_free:
            allowed = [name for name in OBJECTIVES if not PARAMETERS[name] & (_REFERENCE - _DIFFERENCES)]
            self._check_all("reference_free", True, allowed, "set it to False: this loss needs a reference model")
            for name, off in (("f_divergence_type", "reverse_kl"), ("ld_alpha", None)):
                if (value := getattr(self, name)) != off:
                    raise ValueError(f"{name} {value!r} needs a reference; leave it at {off!r} with reference_free")

    def _check_pairs(self, name: str, value: object) -> None:
        if self.kind != "preference":
            raise ValueError(
                f"{name} {value} needs preference pairs; leave it out with loss_type {_names(self.loss_type)}"
            )

    def _check_all(self, name: str, value: object, allowed: list[str], fix: str) -> None:
        for loss_type in self.loss_type:
            if loss_type not in allowed:
                raise ValueError(f"{name} {value!r} is not possible with loss_type {loss_type!r}; {fix}")
        if set(self.loss_type) == {"sft"} and name in ("f_divergence_type", "ld_alpha"):
            raise ValueError(f"{name} {value!r} has no effect on loss_type 'sft'; {fix}")


def kind_of_loss(name: str) -> Kind:
    """Return the kind of examples that an objective takes."""
    if "label" in PARAMETERS[name]:
        return "unpaired"
    return "ranked" if "ranked_mask" in PARAMETERS[name] else "preference"


def with_parameter(parameter: str) -> list[str]:
    """Return the names of the objectives that read `parameter`."""
    return [name for name in OBJECTIVES if parameter in PARAMETERS[name]]


def from_config(config: Any) -> ObjectiveSettings:
    """Return the settings that the attributes of `config` hold, but for those that have no effect."""
    given: Any = config.loss_type
    for name in given if isinstance(given, (list, tuple)) else [given]:  # scripts may pass None or lists of lists
        check_name("loss_type", name, OBJECTIVES)
    values = {field.name: getattr(config, field.name) for field in fields(ObjectiveSettings)}
    return ObjectiveSettings(**values | {name: getattr(ObjectiveSettings, name) for name in without_effect(config)})


def without_effect(config: Any) -> list[str]:
    """Return the names of TRL's settings in `config` that are set, but that none of its objectives reads."""
    names = {config.loss_type} if isinstance(config.loss_type, str) else set(config.loss_type)
    read: set[str] = set().union(*(PARAMETERS.get(name, ()) for name in names))
    unread = [name for name in ("label_smoothing", "discopop_tau") if name not in read]
    if config.f_divergence_type != "alpha_divergence":
        unread.append("f_alpha_divergence_coef")
    if names == {"sft"}:
        unread += ["f_divergence_type", "ld_alpha"]
    return [name for name in unread if getattr(config, name) != getattr(ObjectiveSettings, name)]


def _check_number(field: str, value: object, *, positive: bool = False) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{field} must be a {'positive' if positive else 'finite'} number, got {value!r}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))

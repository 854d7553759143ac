"""ObjectiveSettings: what is refused, and what follows from a choice."""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.options import ObjectiveSettings, from_config

_NO_SCORES = "nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down simpo cpo orpo plackett_luce kto"
_ABSOLUTE = "nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down kto apo_zero_unpaired"

REFUSED: list[tuple[dict[str, Any], str]] = [
    # names
    ({"loss_type": "sigmod"}, "loss_type 'sigmod' is unknown; did you mean 'sigmoid'?"),
    ({"loss_type": ["sigmoid", "aot_unpared"]}, "loss_type 'aot_unpared' is unknown; did you mean 'aot_unpaired'?"),
    ({"loss_type": "dpo"}, "loss_type 'dpo' is unknown; did you mean 'sigmoid'?"),
    ({"loss_type": "kto_pair"}, "loss_type 'kto_pair' is unknown; did you mean 'kto'?"),
    ({"loss_type": "zzz"}, "loss_type must be one of sigmoid, hinge"),
    ({"loss_type": []}, "loss_type must name an objective, got none"),
    ({"loss_type": ["hinge", "hinge"]}, "loss_type names 'hinge' twice; name it once and set its weight"),
    (
        {"f_divergence_type": "reverse-kl"},
        "f_divergence_type must be one of reverse_kl, forward_kl,",
    ),
    (
        {"loss_type": ["sigmoid", "kto"]},
        "loss_type must not mix kinds of examples, but 'sigmoid' takes preference examples",
    ),
    ({"loss_type": ["plackett_luce", "sft"]}, "'plackett_luce' takes ranked examples, 'sft' takes preference examples"),
    # numbers
    ({"beta": 0.0, "loss_type": "ipo"}, "beta must be above 0 with loss_type 'ipo', which divides by it, got 0"),
    ({"beta": 0, "loss_type": ["sigmoid", "sppo_hard"]}, "above 0 with loss_type 'sppo_hard', which divides by it"),
    ({"beta": -0.1}, "beta must not be negative, got -0.1"),
    ({"beta": math.nan}, "beta must be a finite number, got nan"),
    ({"beta": math.inf}, "beta must be a finite number, got inf"),
    ({"beta": "0.1"}, "beta must be a finite number, got '0.1'"),
    ({"beta": True}, "beta must be a finite number, got True"),
    ({"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
    ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 0.5), got -0.1"),
    ({"label_smoothing": math.nan}, "label_smoothing must be a finite number, got nan"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be a positive number, got 0.0"),
    ({"ld_alpha": 1.5}, "ld_alpha must be in [0, 1], got 1.5; None switches LD-DPO off"),
    ({"ld_alpha": -0.1}, "ld_alpha must be in [0, 1], got -0.1"),
    ({"rpo_alpha": 0.0}, "rpo_alpha must be a positive number, got 0.0"),
    ({"rpo_alpha": math.nan}, "rpo_alpha must be a positive number, got nan"),
    ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must not be negative, got -1.0"),
    ({"loss_type": "cpo", "cpo_alpha": -1.0}, "cpo_alpha must not be negative, got -1.0"),
    ({"loss_type": "kto", "desirable_weight": 0.0}, "desirable_weight must be a positive number, got 0.0"),
    ({"loss_type": "kto", "undesirable_weight": math.inf}, "undesirable_weight must be a positive number, got inf"),
    ({"use_weighting": "yes"}, "use_weighting must be True or False, got 'yes'"),
    ({"reference_free": 1}, "reference_free must be True or False, got 1"),
    ({"loss_weights": [0.5, 0.5]}, "loss_weights must hold one number per loss_type, got 2 for 1"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "got 1 for 2: [1.0] for ['sigmoid', 'sft']"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, math.nan]}, "loss_weights must be a finite number, got"),
    ({"loss_weights": "0.5"}, "loss_weights must be a finite number, got '0.5'"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": 0.5}, "got 1 for 2: [0.5] for ['sigmoid', 'sft']"),
    (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.5]},
        "loss_weights must not be negative, got [1.0, -0.5]",
    ),
    # no effect
    (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        "label_smoothing 0.1 has no effect on loss_type 'hinge'; leave it",
    ),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "or use one of 'sigmoid', 'exo_pair'"),
    ({"discopop_tau": 0.1}, "discopop_tau 0.1 has no effect on loss_type 'sigmoid'; leave it at 0.05, or use one of"),
    ({"simpo_gamma": 1.0}, "simpo_gamma 1.0 has no effect on loss_type 'sigmoid'"),
    ({"loss_type": "simpo", "cpo_alpha": 0.5}, "cpo_alpha 0.5 has no effect on loss_type 'simpo'"),
    ({"desirable_weight": 2.0}, "desirable_weight 2.0 has no effect on loss_type 'sigmoid'"),
    ({"loss_type": ["sigmoid", "sft"], "undesirable_weight": 2.0}, "no effect on loss_type 'sigmoid', 'sft'"),
    ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef 0.3 has no effect on f_divergence_type 'reverse_kl'"),
    ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "'forward_kl' has no effect on loss_type 'sft'"),
    ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha 0.5 has no effect on loss_type 'sft'"),
    # combinations
    ({"loss_type": "exo_pair"}, "label_smoothing must be above 0 with loss_type 'exo_pair', got 0.0"),
    *[
        ({"loss_type": name, "f_divergence_type": "js_divergence"}, f"is not possible with loss_type {name!r}")
        for name in _NO_SCORES.split()
    ],
    (
        {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
        "with loss_type 'apo_zero'; leave it at",
    ),
    ({"loss_type": "aot", "use_weighting": True}, "use_weighting True is not possible with loss_type 'aot'"),
    (
        {"loss_type": "aot_unpaired", "use_weighting": True},
        "not possible with loss_type 'aot_unpaired'; set it to False",
    ),
    ({"loss_type": "kto", "use_weighting": True}, "use_weighting True needs preference pairs"),
    ({"loss_type": "plackett_luce", "ld_alpha": 0.5}, "ld_alpha 0.5 needs preference pairs"),
    ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha 0.5 is not possible with loss_type 'simpo'; leave it at None"),
    ({"loss_type": "orpo", "ld_alpha": 0.5}, "ld_alpha 0.5 is not possible with loss_type 'orpo'"),
    ({"loss_type": "cpo", "ld_alpha": 0.5}, "ld_alpha 0.5 is not possible with loss_type 'cpo'"),
    ({"loss_type": "kto", "rpo_alpha": 1.0}, "rpo_alpha 1.0 needs preference pairs; leave it out with loss_type 'kto'"),
    (
        {"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0},
        "rpo_alpha 1.0 would add a likelihood term to loss_type 'sft'",
    ),
    ({"loss_type": "cpo", "rpo_alpha": 1.0}, "which has one; leave rpo_alpha out and set the weight of that term"),
    ({"loss_type": "orpo", "rpo_alpha": 1.0}, "loss_type 'orpo', which has one; leave rpo_alpha out"),
    *[
        ({"loss_type": name, "reference_free": True}, f"reference_free True is not possible with loss_type {name!r}")
        for name in _ABSOLUTE.split()
    ],
    ({"reference_free": True, "f_divergence_type": "forward_kl"}, "f_divergence_type 'forward_kl' needs a reference"),
    ({"reference_free": True, "ld_alpha": 0.5}, "ld_alpha 0.5 needs a reference; leave it at None"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveSettings(**fields)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_accepted(name: str) -> None:
    ObjectiveSettings((name,), label_smoothing=0.01 if name == "exo_pair" else 0.0)


def test_one_name_and_lists_are_taken() -> None:
    assert ObjectiveSettings("hinge").loss_type == ("hinge",)
    several = ObjectiveSettings(["sigmoid", "sft"], loss_weights=[1, 0.5])
    assert several == ObjectiveSettings(("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    assert hash(several)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"kind": "preference", "needs_reference": True, "needs_lengths": False, "nll_weight": 0.0}),
        ({"reference_free": True}, {"needs_reference": False}),
        ({"rpo_alpha": 0.5}, {"nll_weight": 0.5, "needs_lengths": True}),
        ({"use_weighting": True}, {"needs_token_stats": True}),
        ({"loss_type": "sft"}, {"needs_reference": False, "nll_weight": 1.0, "needs_step_context": False}),
        ({"loss_type": "ipo"}, {"needs_reference": True, "needs_lengths": True}),
        ({"loss_type": "simpo"}, {"needs_reference": False, "needs_lengths": True, "nll_weight": 0.0}),
        ({"loss_type": "orpo"}, {"needs_reference": False, "nll_weight": 1.0}),
        ({"loss_type": "cpo", "cpo_alpha": 0.3, "loss_weights": [2.0]}, {"needs_reference": False, "nll_weight": 0.6}),
        ({"loss_type": "aot"}, {"needs_step_context": True, "needs_reference": True, "needs_kl": False}),
        ({"loss_type": "aot_unpaired"}, {"needs_step_context": True, "needs_reference": True}),
        ({"loss_type": "kto"}, {"kind": "unpaired", "needs_step_context": True, "needs_kl": True}),
        ({"loss_type": "apo_zero_unpaired"}, {"kind": "unpaired", "needs_step_context": False, "needs_kl": False}),
        ({"loss_type": "plackett_luce"}, {"kind": "ranked", "needs_reference": True, "needs_step_context": False}),
        ({"loss_type": "plackett_luce", "reference_free": True}, {"needs_reference": False}),
        ({"loss_type": ["simpo", "sigmoid"]}, {"needs_reference": True}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_follows(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = ObjectiveSettings(**fields)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("loss_type", "columns", "message"),
    [
        ("ipo", ["margin"], "loss_type 'ipo' takes no margin per example; drop the column, or use one of 'sigmoid'"),
        ("sft", ["margin"], "loss_type 'sft' takes no margin"),
        ("kto", ["margin"], "loss_type 'kto' takes no margin"),
        ("aot", ["weight"], "a weight per example makes no sense with loss_type 'aot'"),
        ("aot_unpaired", ["beta"], "a beta per example makes no sense with loss_type 'aot_unpaired'"),
        (["sigmoid", "bco_pair"], ["margin"], "loss_type 'bco_pair' takes no margin"),
    ],
)
def test_columns_that_mean_nothing_are_refused(loss_type: Any, columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveSettings(loss_type).check_columns(["prompt", *columns])


def test_columns_that_mean_something_are_accepted() -> None:
    ObjectiveSettings(("sigmoid", "sft")).check_columns(["prompt", "margin", "beta", "weight"])
    ObjectiveSettings(("kto",)).check_columns(["beta", "weight"])
    ObjectiveSettings(("aot",)).check_columns(["prompt"])


def test_settings_from_a_config() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ObjectiveSettings)}
    config = SimpleNamespace(**fields | {"loss_type": ["ipo"], "beta": 0.2, "learning_rate": 1.0})
    assert from_config(config) == ObjectiveSettings(("ipo",), beta=0.2)

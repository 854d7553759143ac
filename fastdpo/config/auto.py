"""Read the two settings that may be `auto`: `gradient_checkpointing` and `tokens_per_batch`."""

import argparse
from typing import Any

from transformers.hf_argparser import string_to_bool

AUTO = "auto"


def read_switch(word: Any) -> bool | str:
    """Return what a word of a command line says: True, False or "auto"."""
    return AUTO if word == AUTO else bool(string_to_bool(word))


class Switch(argparse.Action):
    """Lets HfArgumentParser read `--name`, `--name true`, `--name auto` and `--no_name`.

    It makes a flag `--no_name` itself only for fields that can be true or false and nothing else.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set the field to the value of the flag that was given."""
        setattr(namespace, self.dest, False if str(option_string).startswith("--no") else values)


def given_tokens(config: Any) -> int | None:
    """Return the `tokens_per_batch` of a `DPOConfig`; None if it is unset, or chosen when training begins."""
    tokens = config.tokens_per_batch
    return None if tokens is None or tokens == AUTO else int(tokens)


def chooses_layers(config: Any) -> bool:
    """Return whether options of checkpointing choose the layers that are recomputed, as "auto" would."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    return any("every_n_layers" in (getattr(config, name, None) or {}) for name in names)


def resolve(config: Any) -> None:
    """Read both settings of a `DPOConfig` into bool or "auto", and int, None or "auto".

    `gradient_checkpointing` is "auto" by default, unless other settings choose layers or move their activations away.
    `activation_checkpointing`, the name in newer transformers, becomes True with `auto`, so that transformers prepares
    the model for checkpointing; the trainer then chooses the layers.

    Raises:
        ValueError: a value is none of these.
    """
    given, newer = config.gradient_checkpointing, getattr(config, "activation_checkpointing", None)
    if given is None and newer is None:
        given = True if chooses_layers(config) or config.activation_offloading else AUTO
    if given is not None and not isinstance(given, bool) and given != AUTO:
        raise ValueError(f"gradient_checkpointing must be true, false or auto, got {given!r}")
    if newer is not None and not (newer and given == AUTO):
        given = newer
    config.checkpointing_is_auto = given == AUTO
    if hasattr(config, "activation_checkpointing"):
        config.activation_checkpointing = bool(given)
        config.gradient_checkpointing = None  # transformers sets it, and would warn of this old name
    else:  # transformers 5.17 has only this name
        config.gradient_checkpointing = bool(given)
    tokens = config.tokens_per_batch
    if tokens is None or tokens == AUTO:
        return
    try:
        config.tokens_per_batch = int(tokens)
    except (TypeError, ValueError):
        raise ValueError(f"tokens_per_batch must be a number of tokens or auto, got {tokens!r}") from None

"""`gradient_checkpointing: auto` and `tokens_per_batch: auto`: spend free memory on speed, and give it back in need.

A run begins with as few recomputed layers as its largest batch allows by the memory model; see `fastdpo.plan.fit`. What
a step computes does not depend on which layers are recomputed, nor on the cutting of a micro-batch into smaller ones,
because the loss is a mean over the whole optimizer step. So a step that runs out of memory is computed again, with more
layers recomputed or in smaller parts. Where no step can be computed again, as in several processes, a run begins with
all layers recomputed, and chooses once its first steps have shown that the memory model is right.
"""

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from fastdpo import sharding
from fastdpo.config.auto import AUTO
from fastdpo.model.scoring_forward import decoder_layers
from fastdpo.plan.fit import Fit, fit_of
from fastdpo.plan.free_memory import measured_peak, size_text, usable_memory
from fastdpo.settings.failures import is_out_of_memory

logger = logging.getLogger("fastdpo")

MEASURED_STEPS = 3
"""Steps after which the choice is corrected by the memory that they took."""
AGREES = 1.25
"""Measured by computed memory of a batch, up to which the memory model counts as right."""


class MemoryChoice:
    """The layers that a run recomputes and the tokens of its batches, while it trains.

    Args:
        trainer: a `fastdpo.trainer.packed_trainer.PackedTrainer`.
        loader: the loader of its training data, whose batches may have to be cut.
    """

    def __init__(self, trainer: Any, loader: Any) -> None:
        args = trainer.args
        self._trainer, self._rows, self._collate = trainer, loader.dataset, loader.collate_fn
        self._layers: list[Any] = []
        self._fit: Fit | None = None
        self._largest_batch, self._largest_seen = 0, 0
        self._start: int | None = None
        self._queue: list[list[Any]] = []  # the micro-batches of the step, each in the parts into which it is cut
        self._at = 0
        self._places: dict[Any, int] | None = None
        self._most: int | None = None
        self._was_lowered, self._is_corrected = False, False
        self._once = _why_once(trainer)
        self._rng: list[Tensor] = []
        self._chooses_tokens = args.tokens_per_batch == AUTO
        self.checkpointed: int | None = None
        """Layers that are recomputed; None if that is not chosen here."""
        self.tokens: int | None = None if self._chooses_tokens else args.tokens_per_batch
        self._decide()

    # Before the first step

    def _decide(self) -> None:
        trainer, args = self._trainer, self._trainer.args
        chooses_layers = args.gradient_checkpointing == AUTO
        if self._chooses_tokens and not isinstance(self._rows, Dataset):
            raise ValueError("tokens_per_batch=auto needs a datasets.Dataset, to plan whole epochs; this is a stream")
        layers = decoder_layers(trainer.model)
        usable, before = usable_memory(trainer), _rng_state()
        if self._once and measured_peak(args.device) is None and not self._chooses_tokens:
            self._say_unknown(chooses_layers, f"it is not counted on the {args.device.type}, and {self._once}")
            return
        try:
            self._fit = trainer._agree(lambda: self._ask(len(layers), usable))
        except ValueError as error:
            self._say_unknown(chooses_layers, str(error))
            return
        finally:
            _set_rng_state(before)  # the memory model makes random weights, and a run must not depend on that
        found = self._fit
        kept = trainer._earlier_tokens() if self._chooses_tokens else None
        if kept is not None:
            self.tokens = kept or None
        elif self._chooses_tokens:
            self.tokens = found.tokens(args.gradient_checkpointing or False)
        count = args.train_batch_size if self.tokens is None else 1
        self._largest_batch = max(int(found.examples[:count].sum()), self.tokens or 0)
        if self.tokens is not None:  # a small dataset fills no batch
            self._largest_batch = min(self._largest_batch, int(found.examples.sum()))
        if chooses_layers:
            self._layers = layers
            self.checkpointed = len(layers) if self._once else found.fewest(self._largest_batch)
        recomputed = len(layers) * bool(args.gradient_checkpointing) if self.checkpointed is None else self.checkpointed
        said_batch = f"{self._largest_batch:,} tokens"
        if self.tokens is None and (count := min(count, len(found.examples))) > 1:
            said_batch = f"the {count} largest examples with together {self._largest_batch:,} tokens"
        logger.info(
            "memory: %s; a step with the largest possible batch, %s, takes %s (computed) of the %s that it may use",
            "; ".join([*([self._said_layers()] if chooses_layers else []), *self._said_tokens(kept)]),
            *(said_batch, *map(size_text, (found.peak(recomputed, self._largest_batch), found.usable))),
        )

    def _ask(self, layers: int, usable: int | None) -> Fit:
        """Ask the memory model; what it can't compute, in whatever way, is a `ValueError` and ends no run."""
        try:
            return fit_of(self._trainer, self._rows, layers, usable)
        except ValueError:
            raise
        except Exception as error:  # `auto` is the default, and code of a strange model can raise anything
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"the memory model can't be computed for this model ({why})") from error

    def _said_layers(self) -> str:
        said = f"gradient_checkpointing=auto recomputes {self.checkpointed} of {len(self._layers)} layers"
        return f"{said} in the first {MEASURED_STEPS} steps" if self._once and not self._is_corrected else said

    def _said_tokens(self, kept: int | None) -> list[str]:
        if not self._chooses_tokens:
            return []
        count = self._trainer.args.per_device_train_batch_size
        said = f"is {self.tokens}" if self.tokens else f"takes per_device_train_batch_size={count} examples"
        return [f"tokens_per_batch=auto {said}" + (", as before the checkpoint" if kept is not None else "")]

    def _say_unknown(self, chooses_layers: bool, why: str) -> None:
        kept = self._trainer._earlier_tokens() if self._chooses_tokens else None
        self.tokens = kept or self.tokens
        said = ["gradient_checkpointing=auto recomputes all layers"] if chooses_layers else []
        said += self._said_tokens(kept)
        level = logging.WARNING if self._chooses_tokens else logging.INFO  # all layers are what `true` recomputes
        logger.log(level, "memory: %s, because the memory of a step is not known: %s", " and ".join(said), why)

    # In each step

    def begin(self, batches: list[Any]) -> list[Any]:
        """Begin an optimizer step; return its micro-batches, of which those that are too large are cut into parts."""
        if self._start is None:
            self._start = self._trainer.state.global_step
        self._correct(self._trainer.state.global_step - self._start)
        self._queue, self._at = [self._parts(batch) for batch in batches], 0
        return [part for parts in self._queue for part in parts]

    def step(self, run: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        """Run a micro-batch forward and backward, again with less memory if it runs out; return its part of the loss.

        Args:
            run: runs a batch and returns its part of the loss, `[]`.
            inputs: the batch. If it was not given to `begin`, its step is not known, and it is run just once.
        """
        trainer, at = self._trainer, self._at
        if at >= len(self._queue):
            self._set_layers()
            return run(inputs)
        if at == 0:
            self._rng = _rng_state()
        sums, again, now = trainer._sums.copy(), False, at
        while True:
            self._set_layers()
            try:
                if again:
                    self._begin_again()
                    for now in range(at):
                        for part in self._queue[now]:
                            run(part)
                    now, trainer._sums = at, sums.copy()
                losses = [run(part) for part in self._queue[at]]
                self._at += 1
                self._largest_seen = max([self._largest_seen, *map(_size, self._queue[at])])
                return torch.stack(losses).sum()
            except Exception as error:
                if not is_out_of_memory(error) or not self._lower(now):
                    raise
            again = True  # out here, where the error does not hold the failed step's tensors any more

    def _set_layers(self) -> None:
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i < (self.checkpointed or 0)

    def _begin_again(self) -> None:
        """Undo what the step has done so far; a backward that failed has added a part of its gradients."""
        trainer = self._trainer
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()  # the failed step may be held by cycles
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._rng:
            _set_rng_state(self._rng)
        trainer._prepare_whole_step([part for parts in self._queue for part in parts])

    def _lower(self, at: int) -> bool:
        """Choose to take less memory from now on; return whether that was possible."""
        trainer = self._trainer
        number, why = trainer.state.global_step + 1, None
        if self._once:
            why = self._once
        elif self._layers and self.checkpointed is not None and self.checkpointed < len(self._layers):
            half = len(self._layers) // 2
            self.checkpointed = half if self.checkpointed < half else len(self._layers)
            said = f"{self._said_layers()} from now on"
        elif self._chooses_tokens and self._cut_smaller(at):
            said = f"batches of more than {self._most} tokens are computed in parts from now on"
        else:
            why = "gradient_checkpointing and tokens_per_batch can't be lowered any further by themselves"
        if why is not None:
            logger.error("memory: step %d ran out of memory, and %s; see docs/memory.md for what to lower", number, why)
            return False
        self._was_lowered = True
        logger.warning("memory: step %d ran out of memory and is computed again; %s", number, said)
        return True

    def _correct(self, steps: int) -> None:
        """Choose once more after the first steps, by the memory that they took.

        All processes call this after the same step, and come to `sharding.largest` together.
        """
        trainer, found = self._trainer, self._fit
        if self._is_corrected or steps < MEASURED_STEPS:
            return
        self._is_corrected = True
        if found is None or self.checkpointed is None or self._largest_seen == 0:
            return
        measured = measured_peak(trainer.args.device)
        if measured is None:
            return
        fixed, computed = found.full.persistent, found.peak(self.checkpointed, self._largest_seen)
        scale = min(max((measured - fixed) / max(computed - fixed, 1.0), 0.5), 4.0)
        if self._once is None:
            new = found.fewest(self._largest_batch, scale)
            if self._was_lowered:  # where a lack of memory was seen, none is risked
                new = max(new, self.checkpointed)
        else:
            new = found.fewest(self._largest_batch, max(scale, 1.0)) if scale <= AGREES else self.checkpointed
            if trainer.args.world_size > 1:
                new = sharding.largest(new, trainer.args.device)
        if new != self.checkpointed or self._once:
            self.checkpointed = new
            logger.info(
                "memory: %s from now on, because a step took %s, and %s were computed",
                *(self._said_layers(), size_text(measured), size_text(computed)),
            )

    # Cutting micro-batches

    def _cut_smaller(self, at: int) -> bool:
        """Cut all micro-batches, so that the parts of the one at `at` become smaller; return whether they could."""
        count, before = len(self._queue[at]), self._most
        self._most = max(map(_size, self._queue[at])) // 2
        cut = [[smaller for part in parts for smaller in self._parts(part)] for parts in self._queue]
        if len(cut[at]) == count:
            self._most = before
            return False
        self._queue = cut
        return True

    def _parts(self, batch: Any) -> list[Any]:
        """Cut a batch of more tokens than `_most` into halves, and these again, as far as it has several examples."""
        if self._most is None or _size(batch) <= self._most or (keys := self._keys(batch)) is None:
            return [batch]
        half = len(keys) // 2
        made = [
            self._collate(self._rows.__getitems__([self._place(k) for k in ks])) for ks in (keys[:half], keys[half:])
        ]
        return [part for each in made for part in self._parts(self._trainer._prepare_inputs(each))]

    def _keys(self, batch: Any) -> list[Any] | None:
        """Return by what the rows of a batch's examples are found; None if it can't be cut."""
        if self._places is None:
            names = [name for name in ("pair_index", "label") if name in batch and name in self._rows.column_names]
            columns = [self._rows[name] for name in names] if "pair_index" in names else []
            keys = [tuple(map(int, key)) for key in zip(*columns, strict=True)]
            self._places = {key: place for place, key in enumerate(keys)}
            if len(self._places) < len(keys):
                self._places = {}  # rows with the same number can't be told apart
        if len(batch["pair_index"]) < 2 or not self._places:
            return None
        columns = [batch[name].tolist() for name in ("pair_index", "label") if name in batch]
        found = [tuple(map(int, key)) for key in zip(*columns, strict=True)]
        return found if all(key in self._places for key in found) else None

    def _place(self, key: Any) -> int:
        assert self._places is not None
        return self._places[key]


def _why_once(trainer: Any) -> str | None:
    """Return why no step of a trainer can be computed again after it ran out of memory; None if it can be."""
    args = trainer.args
    if args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "several processes, FSDP or DeepSpeed can't compute a step again"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(each in optimizer for each in ("lomo", "layerwise")):
        return f"optim={optimizer} changes the weights in the backward pass, so no step can be computed again"
    return None


def leave_out_checkpointing(trainer: Any) -> None:
    """Switch `gradient_checkpointing: auto` off where code of a model can't checkpoint, because nobody asked for it."""
    args, model = trainer.args, trainer.model
    if args.gradient_checkpointing != AUTO:
        return
    try:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        logger.info("gradient_checkpointing=auto recomputes no layers, because the model can't (%s)", why)
        args.gradient_checkpointing = False
        if hasattr(args, "activation_checkpointing"):
            args.activation_checkpointing = False


def _size(batch: Any) -> int:
    return int(batch["num_packed_tokens"])


def _rng_state() -> list[Tensor]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_gpu else [])]


def _set_rng_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])

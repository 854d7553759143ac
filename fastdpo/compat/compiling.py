"""`torch_compile`: compile the layers of the models for packed batches, and count what is compiled.

accelerate would compile the whole model, with the code around its layers, which depends on the batch. The layers alone
depend on nothing but the number of rows, which torch.compile makes a variable when it changes for the first time.
"""

import logging
import time
from typing import Any

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import TrainerCallback

from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.layout import has_state
from fastdpo.model.scoring_forward import compile_layers

logger = logging.getLogger("fastdpo")

FIRST_STEPS = 3
"""Steps after which the compilations so far are logged."""
MOST_LATER = 8
"""Graphs that may be compiled later without a warning, such as those of an evaluation; no fewer than at first."""
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes in which inductor runs what it has compiled as CUDA graphs."""
RECOMPILE_LIMIT = 64
"""Compilations of the layers, of policy and reference, in training and evaluation, for one number of rows and for any
other, before torch gives up compiling them; its own limit of 8 is too low for models with several kinds of layers."""


def take_over(trainer: Any) -> dict[str, Any] | None:
    """Return the options of torch.compile that were set here or with `accelerate launch`; None if it is off.

    From then on accelerate compiles nothing.

    Raises:
        ValueError: the layers carry a state, DeepSpeed runs them, which has not been tested, or they are to be compiled
            without a break and can't be.
    """
    args = trainer.args
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    if plugin.backend == DynamoBackend.NO or plugin.disable:
        return None
    args.torch_compile = True  # for the checks of what it goes together with
    if plugin.fullgraph and trainer._aux_coef > 0:
        raise ValueError(
            "torch_compile with fullgraph is not possible with the balancing loss of a router, whose logits "
            "transformers collects outside of compiled code; leave fullgraph out, or set router_aux_loss_coef=0"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("torch_compile is not supported with DeepSpeed yet; take dynamo out of accelerate's settings")
    if has_state(model := unwrap(trainer.model)):
        raise ValueError(
            f"torch_compile is not possible with {type(model).__name__}, whose recurrent layers would be compiled "
            "again for almost every batch; leave it out"
        )
    options: dict[str, Any] = {"backend": plugin.backend.value.lower(), "fullgraph": plugin.fullgraph}
    if plugin.mode != "default":
        options["mode"] = plugin.mode
    if plugin.dynamic is not None:
        options["dynamic"] = plugin.dynamic
    return options


def compile_models(trainer: Any, options: dict[str, Any]) -> None:
    """Compile the layers of the policy and of its reference, and log after the first steps what was compiled."""
    import torch._dynamo.config  # only here, because it takes a second

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    name = type(unwrap(trainer.model)).__name__
    layers = compile_layers(trainer.model, **options)
    if not layers:
        logger.warning("torch_compile has no effect: no layers were found in the decoder of %s", name)
        return
    if trainer.ref_model is not None:
        compile_layers(trainer.accelerator.unwrap_model(trainer.ref_model), **options)
    trainer.add_callback(_Count(f"{layers} layers of {name} (backend {options['backend']})"))


def wants_few_lengths(options: dict[str, Any] | None) -> bool:
    """Whether each length of a batch costs a compilation or the recording of a CUDA graph."""
    return options is not None and (options.get("dynamic") is False or options.get("mode") in CUDA_GRAPH_MODES)


class _Count(TrainerCallback):
    """Log how many graphs were compiled in the first steps, and warn once if it does not stop."""

    def __init__(self, what: str) -> None:
        self._what, self._steps, self._first, self._warned = what, 0, 0, False
        self._known, self._started = compiled_graphs(), time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._steps, self._known, self._started = 0, compiled_graphs(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        made = compiled_graphs() - self._known
        if self._steps == min(FIRST_STEPS, state.max_steps):
            seconds = time.perf_counter() - self._started
            logger.info(
                "torch_compile: %d graphs compiled for %s; the first %d steps took %.0f s",
                *(made, self._what, self._steps, seconds),
            )
            self._known, self._first = self._known + made, made
        elif self._steps > FIRST_STEPS and made > max(MOST_LATER, self._first) and not self._warned:
            self._warned = True
            logger.warning(
                "torch_compile: %d more graphs were compiled in steps %d to %d; if this goes on, training is slower "
                "than without torch_compile, so leave it out; TORCH_LOGS=recompiles names the reasons",
                *(made, FIRST_STEPS + 1, self._steps),
            )


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])

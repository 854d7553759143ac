"""Every setting of a run, and every check that needs no model.

`DPOConfig` is what `DPOTrainer` takes; `fastdpo.run.RunConfig` is what the command line needs beside it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fastdpo.head.linear_logprobs import BACKWARDS, IMPLS
from fastdpo.loss.options import ObjectiveSettings, from_config
from fastdpo.model.attention.backends import BACKENDS
from fastdpo.settings.config_file import check_dtype

AT_LEAST_ONE = (
    *("max_prompt_length", "max_completion_length", "tokens_per_batch"),
    *("ref_model_sync_steps", "precompute_ref_batch_size"),
)
ON_BAD_ROW = ("error", "drop")
SELF_CHECK = ("fallback", "error")


@dataclass
class DPOConfig(TrainingArguments):
    """Settings of `DPOTrainer`: those of `transformers.TrainingArguments`, TRL's names for DPO, and a few of ours.

    Raises:
        ValueError: a setting is unknown, out of range or impossible in combination; the message names the field, its
            value and the fix. Nothing has been loaded by then.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward: less memory, about 20%% slower. Unset: on."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision in bf16. Unset: on where the device has it, unless fp16 is set."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: a loss that is not finite stops training."}
    )

    # The objective; what each field may be with which is checked by `fastdpo.loss.options.ObjectiveSettings`
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "The objective, by its name in fastdpo.loss.objectives; several are summed. `sigmoid` is DPO."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the objectives in the sum. Unset: 1 each."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the reference, > 0; 0.1 to 0.5 is usual."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference label is flipped (cDPO), in [0, 0.5)."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "What keeps the policy near: reverse_kl, forward_kl, js_divergence or alpha_divergence."},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Coefficient of `alpha_divergence`."})
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weigh pairs by how likely the policy itself would write them."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "LD-DPO: factor in [0, 1] of the tokens beyond the length of the pair's shorter response."},
    )
    rpo_alpha: float | None = field(
        default=None, metadata={"help": "RPO: weight of the chosen tokens' negative log-likelihood, added to the loss."}
    )
    reference_free: bool = field(
        default=False, metadata={"help": "A reference to which all responses are equally likely; none is loaded."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of `discopop`."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of `simpo`."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the log-likelihood term of `cpo`."})
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of desirable responses in `kto`."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of undesirable responses in `kto`."})

    # The reference
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Score the datasets with the reference before training, then train without it in memory. Unset: "
            "where the cache holds all of that already, as `fastdpo precompute` leaves it. False: never look."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per batch of that. Unset: batches of 16384 tokens, or tokens_per_batch if more."},
    )
    ref_adapter_name: str | None = field(
        default=None,
        metadata={"help": "With PEFT: the adapter that is the reference. Unset: `ref` if there is one, else none."},
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where precomputed log-probs are kept. Unset: in ~/.cache/fastdpo/reference."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "TR-DPO: mix the policy into the reference while training."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "TR-DPO: the policy's share in the new reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "TR-DPO: mix every this many optimizer steps."})

    # The model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` where the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let a model repository run its own code. Off unless you trust it."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of policy and reference to 0, as DPO assumes."}
    )

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of a mixture's balancing loss, added to the objective. Unset: the model config's; 0: "
            "none. Micro-batches' are averaged by their examples."
        },
    )

    # The data
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt + completion in tokens; the end of longer ones is cut. None: no limit."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; the start of longer ones is cut. None: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest completion in tokens; the end of longer ones is cut. None: no limit."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})
    on_bad_row: str = field(
        default="error",
        metadata={"help": "A malformed dataset row: `error` stops and names it, `drop` leaves it out and says so."},
    )

    show_example: bool = field(
        default=True, metadata={"help": "Show one training example in the log, with the scored tokens marked."}
    )

    # Packing, attention and the head
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill batches up to so many rows of tokens, instead of per_device_train_batch_size examples each."
        },
    )
    longest_first: bool = field(
        default=False, metadata={"help": "Start with the largest batch, so that one too large shows at once."}
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Compute the common start of a pair once instead of twice."}
    )
    self_check: str = field(
        default="fallback",
        metadata={
            "help": "At the start, log-probs are compared with the model's own. Where packed batches are not exact but "
            "padded ones are: `fallback` warns and pads, `error` refuses."
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={"help": "Attention of packed batches: auto, varlen, flash (the flash_attn package) or grid."},
    )
    head_impl: str = field(
        default="auto", metadata={"help": "Implementation of the fused LM head: auto, triton, blas, torch or eager."}
    )
    head_backward: str = field(
        default="auto", metadata={"help": "Backward of the fused LM head: auto, exact or sparse."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        settings = from_config(self)
        self._check_reference(settings)
        if (coef := self.router_aux_loss_coef) is not None and not 0 <= coef < float("inf"):
            raise ValueError(f"router_aux_loss_coef must be finite and at least 0 (0: no such loss), got {coef}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 (a prompt and a completion token), got {self.max_length}")
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.tokens_per_batch or self.longest_first:
            for name, only in (("dataloader_drop_last", False), ("train_sampling_strategy", "random")):
                if (value := getattr(self, name, only)) != only:
                    raise ValueError(
                        f"{name}={value!r} has no effect on batches that tokens_per_batch or longest_first plans; "
                        "leave it out"
                    )
        for name, allowed in (
            ("attention_backend", ("auto", *BACKENDS)),
            ("head_impl", IMPLS),
            ("head_backward", BACKWARDS),
            ("on_bad_row", ON_BAD_ROW),
            ("self_check", SELF_CHECK),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter must be False: it would log a loss that is not finite as a plausible number"
            )
        self.bf16_is_default = self.bf16 is None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # it would be for nothing, and torch would say so
        self._resolve_checkpointing()
        given = self.accelerator_config
        super().__post_init__()
        self._resolve_loading(given)
        if self.model_init_kwargs is not None and not isinstance(self.model_init_kwargs, dict):
            raise ValueError(f"model_init_kwargs must be a dict, or JSON of one, got {self.model_init_kwargs!r}")
        if isinstance(self.model_init_kwargs, dict) and "torch_dtype" in self.model_init_kwargs:
            self.model_init_kwargs = dict(self.model_init_kwargs)
            old = self.model_init_kwargs.pop("torch_dtype")
            if self.model_init_kwargs.setdefault("dtype", old) != old:
                raise ValueError(f"model_init_kwargs has torch_dtype={old!r} beside another dtype; leave it out")
        if isinstance(self.model_init_kwargs, dict):
            check_dtype("dtype of model_init_kwargs", self.model_init_kwargs.get("dtype"))

    def _check_reference(self, settings: ObjectiveSettings) -> None:
        """Refuse settings of a reference that the objective does not read, or that exclude each other."""
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(self, name) and not settings.needs_reference:
                raise ValueError(f"{name} has no effect: loss_type {self.loss_type} reads no reference; leave it out")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model changes the reference while training, so its log-probs can't be computed before; "
                "set precompute_ref_log_probs=False"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and (value := getattr(self, name)) != getattr(DPOConfig, name):
                raise ValueError(f"{name}={value} has no effect without sync_ref_model=True; set that, or leave it out")

    def _resolve_checkpointing(self) -> None:
        """On unless switched off, under TRL's name for it and under the one newer transformers give it."""
        wanted = True if self.gradient_checkpointing is None else self.gradient_checkpointing
        if not hasattr(self, "activation_checkpointing"):
            self.gradient_checkpointing = wanted
        elif getattr(self, "activation_checkpointing") is None:  # noqa: B009 - older versions lack it
            self.activation_checkpointing = wanted
            self.gradient_checkpointing = None

    def _resolve_loading(self, given: Any) -> None:
        """Each process reads its data itself, and copies from pinned memory wait for nothing.

        Args:
            given: `accelerator_config` as the user wrote it, which decides on `non_blocking`.
        """
        loading: Any = self.accelerator_config
        if loading.dispatch_batches:
            raise ValueError(
                "accelerator_config dispatch_batches=True cuts the tensors of a batch into equal rows, but those of a "
                "packed batch differ in length; leave it out, each process then reads its part of the data itself"
            )
        loading.dispatch_batches = False
        chosen = given is not None and not (isinstance(given, dict) and "non_blocking" not in given)
        if not chosen and self.dataloader_pin_memory and not self.use_cpu and torch.cuda.is_available():
            loading.non_blocking = True

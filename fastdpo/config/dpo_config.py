"""The settings of a training.

`DPOTrainer` takes a `DPOConfig`. The command line also needs a `fastdpo.run.RunConfig`: the model, data and adapter.
"""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fastdpo.checks import (
    check_deepspeed,
    check_loading,
    leave_checkpointing_to_fsdp,
    load_once_with_fsdp,
    stay_on_cpu,
)
from fastdpo.config import auto, checks
from fastdpo.config.auto import AUTO, Switch, read_switch
from fastdpo.loss.options import from_config
from fastdpo.settings.names import in_words

logger = logging.getLogger("fastdpo")

SWITCH: dict[str, Any] = {"nargs": "?", "const": True}
"""Metadata that lets HfArgumentParser read `--name` without a value, also if the field is None by default."""


@in_words
@dataclass
class DPOConfig(TrainingArguments):
    """Settings of `DPOTrainer`: those of `transformers.TrainingArguments`, TRL's settings for DPO, and a few of ours.

    Raises:
        ValueError: a setting is unknown, out of range or cannot be combined with another; the message names the field,
            its value and the fix. It is raised before anything is loaded.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    # Training, with other defaults than TrainingArguments
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of the schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    gradient_checkpointing: bool | str | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, for one more forward. `auto`, the "
            "default, recomputes those of as few layers as the memory allows; see docs/memory.md.",
            **{"action": Switch, "aliases": ["--no_gradient_checkpointing", "--no-gradient-checkpointing"], **SWITCH},
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision in bfloat16. Unset: on if a GPU supports it and fp16 is not set.", **SWITCH},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: fastdpo stops training at a loss that is not finite."}
    )

    # The objective; `fastdpo.loss.options.ObjectiveSettings` checks which of these fields go together
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Name of the objective, or several names whose losses are summed. For pairs: sigmoid (DPO), hinge, "
            "ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, "
            "sft, sigmoid_norm, simpo, cpo, orpo. For ranked responses: plackett_luce. For labelled responses: kto, "
            "apo_zero_unpaired. Formulas and papers are in fastdpo/loss/objectives.py."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each objective of `loss_type` in the sum. Unset: 1 each."}
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "How strongly the policy is held near the reference: larger is nearer. 0.1 to 0.5 is usual. "
            "With 0, a loss that it scales trains nothing. It is tau in `ipo` and lambda in `orpo`."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed probability that a preference label is wrong (cDPO), in [0, 0.5)."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence between policy and reference: reverse_kl (DPO), forward_kl, js_divergence or "
            "alpha_divergence."
        },
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "The alpha of `alpha_divergence`."})
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weight each pair by how likely the policy is to generate its responses."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: weight, in [0, 1], of the tokens of the longer response beyond the length of the shorter "
            "one. Unset: off."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "RPO: add the mean negative log-likelihood of the chosen tokens to the loss, with this weight. "
            "Unset: off."
        },
    )
    reference_free: bool = field(
        default=False,
        metadata={"help": "Load no reference model; treat all responses as equally likely under the reference."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of `discopop`."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of `simpo`."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the negative log-likelihood term of `cpo`."})
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of responses labelled true, in `kto` and `apo_zero_unpaired`."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of responses labelled false, in `kto` and `apo_zero_unpaired`."}
    )

    # The reference
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probs of the datasets before training, so that the reference need not "
            "stay in memory. Unset: only if the cache already holds all of them, as after `fastdpo precompute`. False: "
            "ignore the cache.",
            **SWITCH,
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Batch size, in examples, for precomputing the reference. Unset: batches of 16384 tokens, or of "
            "tokens_per_batch if that is more."
        },
    )
    ref_adapter_name: str | None = field(
        default=None,
        metadata={
            "help": "With PEFT: name of the adapter that serves as the reference. Unset: `ref` if the model has one, "
            "else the model with its adapters off."
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for precomputed log-probs. Unset: ~/.cache/fastdpo/reference."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "TR-DPO: move the reference towards the policy during training."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "TR-DPO: weight of the policy in each new reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "TR-DPO: optimizer steps between two updates of the reference."}
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained`, if the model is given as a name or path."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code in a model's repository. Switch it on only if you trust that code."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set all dropout of policy and reference to 0."})

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the load-balancing loss of a mixture-of-experts model, which is added to the "
            "objective as a mean over examples. Unset: the model config's coefficient. 0: no such loss."
        },
    )

    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep what the backward pass needs in the memory of the CPU: less memory of the GPU, and slower."
        },
    )

    # The data
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt + completion, in tokens; longer ones are cut. None: no limit."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What a row that is longer than max_length loses: `keep_start` cuts the end of completions, and "
            "`keep_end` the start of prompts. A row whose completion alone is too long for `keep_end` is malformed.",
            "choices": checks.TRUNCATION_MODES,
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; longer ones lose their start. None: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest completion, in tokens; longer ones lose their end. None: no limit."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenise the dataset. Unset: this process alone."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with a malformed dataset row: `error` stops and names it, `drop` logs it and leaves it "
            "out."
        },
    )

    show_example: bool = field(
        default=True, metadata={"help": "Log one training example, with the tokens that count in the loss marked."}
    )

    # Packing, attention and the head
    tokens_per_batch: int | str | None = field(
        default=None,
        metadata={
            "help": "Fill each device's batches with examples up to this many tokens, instead of a fixed "
            "per_device_train_batch_size. Tokens that responses share count once. `auto` takes as many as fit into "
            "the memory, up to 32768; see docs/memory.md. Unset: off."
        },
    )
    longest_first: bool = field(
        default=False,
        metadata={"help": "Begin with the largest batch, so that a lack of memory shows at the first step."},
    )
    group_by_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Put up to this many examples of one prompt into one batch, where the prompt and each of its "
            "responses are computed once; see docs/grouping.md. Unset: off."
        },
    )
    prefix_sharing: bool = field(
        default=True,
        metadata={"help": "Compute the tokens with which sequences of a batch begin once, not for each sequence."},
    )
    self_check: str = field(
        default="fallback",
        metadata={
            "help": "Before training, log-probs of packed batches are compared with the model's own. If only padded "
            "batches are exact, `fallback` warns and pads, and `error` stops."
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "Attention on packed batches: varlen (torch's FlashAttention), flash (the flash_attn package), "
            "grid (torch's SDPA on sequences of similar length) or auto (the first of these that can be used)."
        },
    )
    head_impl: str = field(
        default="auto",
        metadata={
            "help": "Implementation of the fused LM head: triton or blas (CUDA), torch (any device), eager (full "
            "logits, for tests) or auto (the fastest on this device)."
        },
    )
    head_backward: str = field(
        default="auto",
        metadata={
            "help": "Backward of the fused LM head: exact, sparse (skips logits of tiny probability; see "
            "docs/sparse_backward.md) or auto (sparse only for the hidden states' gradient of 16-bit inputs)."
        },
    )
    head_workspace: int | str | None = field(  # None is refused; with it, HfArgumentParser reads text
        default="256MiB",
        metadata={
            "help": "Largest memory in which the fused LM head works, and largest in which it keeps probabilities of a "
            "trained head for its backward, which computes the others again. In bytes, or with a unit such as 3GiB or "
            "500MB; at least 1MiB. `fastdpo plan` says what more of it would save."
        },
    )

    # Accepted for scripts written for TRL
    padding_free: bool = field(
        default=False, metadata={"help": "No effect: batches are without padding wherever the model allows it."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "No effect: packed batches have no padding."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Becomes the tokenizer's pad token, which is saved with it. Unset: its own."}
    )

    # Checkpoints
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Continue from a checkpoint: its folder, or true for the newest undamaged one of output_dir, or "
            "auto for that one if there is one, else from the beginning."
        },
    )
    resume_changed: bool = field(
        default=False,
        metadata={
            "help": "Continue from a checkpoint although it belongs to a run with other settings, data or models, or "
            "has no manifest to check it by."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start from the beginning although output_dir holds an earlier run: remove its checkpoints and "
            "replace its results."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        auto.resolve(self)
        settings = from_config(self)
        checks.check_reference(self, settings)
        checks.warn_of_no_effect(self, settings)
        checks.check_values(self, settings)
        self.bf16_is_default = self.bf16 is None
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate's YAML, for what is not set here
        if self.bf16 is None and not self.fp16:
            self.__dict__["fp16"] = launched == "fp16"
            default = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = launched == "bf16" or (launched == "no" and default)
        self.bf16 = bool(self.bf16)
        stay_on_cpu(self)
        given = self.accelerator_config
        super().__post_init__()
        if launched in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            self.mixed_precision = "no"
        leave_checkpointing_to_fsdp(self)
        if self.checkpointing_is_auto and getattr(self, "activation_checkpointing", self.gradient_checkpointing):
            self.gradient_checkpointing = AUTO
            checks.check_auto(self)
        load_once_with_fsdp(self)
        check_deepspeed(self)
        if self.activation_offloading and self.device.type == "cpu":
            logger.warning("activation_offloading has no effect, because the model is on the CPU")
        check_loading(self, given)
        self.model_init_kwargs = checks.checked_init_kwargs(self.model_init_kwargs)


# HfArgumentParser reads a word by calling the annotation, and can't call that of a bool or a text
DPOConfig.__annotations__["gradient_checkpointing"] = read_switch

"""`DPOTrainer`: transformers' Trainer with packed pairs, the fused head and the DPO objective wired in."""

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from fastdpo import data, metrics
from fastdpo.config import DPOConfig
from fastdpo.loading import disable_dropout, load_policy, wrap_adapter
from fastdpo.loss import LossOutput, compute, step_values
from fastdpo.model import TokenScores, patch_forward
from fastdpo.packing import shared_prefix_batch
from fastdpo.reference import policies
from fastdpo.sampler import rebatch
from fastdpo.settings import from_config
from fastdpo.step import step_context

logger = logging.getLogger("fastdpo")

EvalDataset: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class StepTotals(NamedTuple):
    """What the loss of an optimizer step is divided by, float32 scalars on the device, over all processes."""

    examples: Tensor
    chosen_tokens: Tensor


class DPOTrainer(Trainer):
    """Direct Preference Optimization of a causal language model, https://arxiv.org/abs/2305.18290.

    Args:
        model: a causal LM, a PEFT model, or a name or path for `from_pretrained` (float32 unless
            `args.model_init_kwargs` says otherwise).
        ref_model: the frozen reference. None: with PEFT the policy without its adapter, or with the adapter it came
            with; else a copy of the policy as passed.
        args: settings; `DPOConfig()` where None.
        data_collator: makes a packed batch of tokenised rows; `fastdpo.shared_prefix_batch` where None.
        train_dataset: preference rows, see `fastdpo.data`.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; loaded from the model's path where None.
        callbacks: as in `transformers.Trainer`.
        optimizers: (optimizer, scheduler), as in `transformers.Trainer`.
        peft_config: wraps `model` in a new adapter.

    Raises:
        ValueError: a dataset row, column or setting makes no sense, or the model has a head or attention that can't
            be computed exactly; the message names it and the fix. Nothing has been trained by then.
        FloatingPointError: a loss or gradient was not finite; training stops there.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole optimizer step

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any | None = None,
    ) -> None:
        args = DPOConfig() if args is None else args
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        self._settings = from_config(args)
        set_seed(args.seed)  # adapters start from random weights
        model = load_policy(model, args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                model.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        model = wrap_adapter(model, peft_config, ref_model)
        if self._settings.needs_reference:
            ref_model = policies.resolve_reference(model, ref_model)  # before the patch: a copy must not share it
        elif ref_model is not None:
            raise ValueError(f"ref_model has no effect: loss_type {args.loss_type} reads no reference; leave it out")
        if router_loss := getattr(model.config, "router_aux_loss_coef", 0):
            logger.warning(
                "the router's balancing loss (router_aux_loss_coef=%s) is not part of the objective", router_loss
            )
        for policy in filter(None, (model, ref_model)):
            if args.disable_dropout:
                disable_dropout(policy)
            patch_forward(policy, impl=args.head_impl, backward=args.head_backward)

        self._layout = "shared" if args.prefix_sharing else "packed"
        self._prepare_dataset = functools.partial(
            data.prepare_dataset,
            tokenizer=processing_class,
            max_length=args.max_length,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            on_bad_row=args.on_bad_row,
            num_proc=args.dataset_num_proc,
        )
        train_dataset = self._prepare_dataset(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_dataset(rows, name=name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, name="eval")

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or functools.partial(shared_prefix_batch, layout=self._layout),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # older transformers go by this flag instead
        _check_parallelism(self, ref_model)
        self.ref_model = None if ref_model is None else self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self._sums = metrics.RunningSums()
        self._guard = metrics.NonFiniteGuard()
        self._clock: float | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of `per_device_train_batch_size` examples, or filled up to `tokens_per_batch` rows."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        args = self.args
        if args.tokens_per_batch is None and not args.longest_first:
            return loader
        return rebatch(
            loader,
            layout=self._layout,
            tokens_per_batch=args.tokens_per_batch,
            batch_size=args.train_batch_size if args.tokens_per_batch is None else None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epochs=math.ceil(args.num_train_epochs),
            rank=args.process_index,
            world_size=args.world_size,
            longest_first=args.longest_first,
        )

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """This micro-batch's part of the loss of the whole optimizer step, over all processes."""
        training = self.model.training
        if training and self._clock is None:
            self._clock = time.perf_counter()
        context = inputs.pop("step_context", None)
        with_stats = not training or self._settings.needs_token_stats or self._is_logging_step()
        # before training the Trainer evaluates a policy that no wrapper casts, but our reference has one already
        with self.accelerator.autocast():
            scores: TokenScores = model(**inputs, with_stats=with_stats)
        ref_logps = self._reference_logps(inputs)
        out = compute(inputs, scores.logps, ref_logps, self._settings, stats=scores.stats, context=context)
        totals = num_items_in_batch or self._totals([inputs])
        # gradients are averaged over processes, so each contributes its share times their number
        processes = self.args.world_size if num_items_in_batch else 1
        loss = out.losses.sum() * processes / totals.examples
        if out.token_loss is not None:
            loss = loss + out.token_loss * processes / totals.chosen_tokens
        if training:
            pair_index = inputs["pair_index"]
            self._guard.watch(loss, lambda: f"the loss of dataset rows {pair_index.tolist()}")
        self._add_metrics(inputs, scores, out)
        return (loss, out) if return_outputs else loss

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """The reference's log-probs of the completion tokens `[M]`; None where none are read, or the batch has them."""
        if not self._settings.needs_reference or not {"ref_logps", "ref_token_logps"}.isdisjoint(inputs):
            return None
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                scores: TokenScores = self.ref_model(**inputs)
            else:
                with policies.as_reference(self.accelerator.unwrap_model(self.model)):
                    scores = self.model(**inputs)
        return scores.logps

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> StepTotals | None:
        """What the optimizer step's loss is divided by, over accumulation and processes.

        An objective that looks at the whole step gets what its micro-batches must know of each other, too.
        """
        if not batch_samples:
            return None
        totals = self._totals(batch_samples)
        if self.args.world_size > 1:
            sums: Any = self.accelerator.reduce(torch.stack(totals), reduction="sum")
            totals = StepTotals(*sums)
        if self._settings.needs_step_context and (len(batch_samples) > 1 or self.args.world_size > 1):
            self._exchange(batch_samples)
        return totals

    def _totals(self, batches: list[dict[str, Any]]) -> StepTotals:
        examples = sum(len(batch["pair_index"]) for batch in batches)
        bounds = [batch["cu_target"] for batch in batches]
        tokens = torch.stack([x[len(batch["pair_index"])] for x, batch in zip(bounds, batches, strict=True)]).sum()
        return StepTotals(torch.full_like(tokens, examples, dtype=torch.float32), tokens.float())

    def _exchange(self, batches: list[dict[str, Any]]) -> None:
        """Give each micro-batch what its loss needs of the others: one more pass, without gradients."""
        values = []
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast():
                scores: TokenScores = self.model_wrapped(**batch)
            if (ref_logps := self._reference_logps(batch)) is not None:
                batch["ref_token_logps"] = ref_logps
            values.append(step_values(batch, scores.logps, None, self._settings))
        args = self.args
        contexts = step_context(
            values,
            gather=(lambda x: self.accelerator.gather(x[None])) if args.world_size > 1 else None,
            rank=args.process_index,
            capacity=None if args.tokens_per_batch else args.train_batch_size * args.gradient_accumulation_steps,
        )
        for batch, context in zip(batches, contexts, strict=True):
            batch["step_context"] = context

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor) and not self.args.fp16:  # fp16's scaler skips steps that overflow
            step = self.state.global_step
            self._guard.watch(norm, lambda: f"the gradient norm of step {step + 1}")
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a loss or gradient was not finite since."""
        self._guard.check_now()
        super().save_model(output_dir, _internal_call)

    # Metrics

    def _is_logging_step(self) -> bool:
        step = self.state.global_step + 1
        if self.args.logging_strategy != "steps" or (step == 1 and self.args.logging_first_step):
            return True
        return bool(step % self.state.logging_steps == 0)

    def _add_metrics(self, inputs: dict[str, Any], scores: TokenScores, out: LossOutput) -> None:
        B, add, logps = len(out.losses), self._sums.add, out.sequence_logps
        keep = B if self.model.training else self._distinct_pairs(B)
        chosen_logps, rejected_logps = (side[:keep] for side in logps.chunk(2))
        losses, chosen_rewards, rejected_rewards = (
            values[:keep] for values in (out.losses, out.chosen_rewards, out.rejected_rewards)
        )
        margins = chosen_rewards - rejected_rewards
        add("rewards/chosen", chosen_rewards)
        add("rewards/rejected", rejected_rewards)
        add("rewards/margins", margins)
        add("rewards/accuracies", (margins.sign() + 1) / 2)  # a tie counts one half: policy = reference scores 0.5
        add("logps/chosen", chosen_logps)
        add("logps/rejected", rejected_logps)
        if scores.stats is not None:
            stats, bounds = scores.stats, inputs["cu_target"]
            token = torch.arange(len(scores.logps), device=bounds.device)
            chosen = token < bounds[keep]
            rejected = (token >= bounds[B]) & (token < bounds[B + keep])
            add("entropy", stats.entropy.where(chosen | rejected, 0.0), (chosen | rejected).sum())
            add("mean_token_accuracy", stats.is_top1 & chosen, chosen.sum())
            add("logits/chosen", stats.mean_logits.where(chosen, 0.0), chosen.sum())
            add("logits/rejected", stats.mean_logits.where(rejected, 0.0), rejected.sum())
            if stats.density is not None:
                add("head/density", stats.density)
        if not self.model.training:
            add("loss", losses)
            return
        tokens, padded, packed = (inputs[f"num_{kind}"] for kind in ("tokens", "padded_tokens", "packed_tokens"))
        self._sums.add_number("num_tokens", tokens)
        self._sums.add_number("padding_saved", padded - tokens, padded)
        self._sums.add_number("prompt_shared", tokens - packed, tokens)

    def _distinct_pairs(self, B: int) -> int:
        """How many of this evaluation batch's pairs are no repetitions that make the processes' last batches even."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return B
        before = self.accelerator.process_index * B
        return int(min(max(state.remainder - before, 0), B))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to the training step's."""
        if "loss" in logs:
            self._guard.check_now()
            sums = self._sums.read(self.accelerator)
            now, tokens = time.perf_counter(), sums.pop("num_tokens").total
            logs.update({name: entry.total / entry.weight for name, entry in sums.items()})
            logged = (entry["num_tokens"] for entry in reversed(self.state.log_history) if "num_tokens" in entry)
            logs["num_tokens"] = next(logged, 0.0) + tokens
            logs["tokens_per_second"] = tokens / (now - self._clock) if self._clock else 0.0
            self._clock = now
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: EvalDataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate; a dataset given here is tokenised as those given at construction."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self._prepare_dataset(eval_dataset, name=metric_key_prefix)
        result: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate with sums over pairs, so that a smaller last batch weighs what it holds."""
        training_sums, self._sums = self._sums, metrics.RunningSums()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        for name, entry in self._sums.read(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = entry.total / entry.weight
        self._sums, self._clock = training_sums, None
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of one batch; there are no logits to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*data.COLUMNS, "ref_chosen_logps", "ref_rejected_logps"]


def _check_parallelism(trainer: Trainer, ref_model: PreTrainedModel | None) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process, which DataParallel would drive; start the script with "
            "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("DeepSpeed and FSDP are not supported yet; use one process per GPU (DDP)")

"""The training step, evaluation and log of `DPOTrainer`: packed batches in, the loss of a whole step out."""

import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from fastdpo import checks, sharding
from fastdpo.config import DPOConfig
from fastdpo.config.auto import AUTO
from fastdpo.data import prepare
from fastdpo.data.grouping import in_groups
from fastdpo.data.sampler import planned
from fastdpo.loss.batch_loss import compute, step_mean, step_values
from fastdpo.loss.options import ObjectiveSettings
from fastdpo.loss.whole_step import StepTotals, step_context, step_totals
from fastdpo.model import adapters
from fastdpo.model.layout import Layout
from fastdpo.model.router import why_it_differs
from fastdpo.model.scoring_forward import TokenScores, evaluating
from fastdpo.reference.share import ReferenceTime
from fastdpo.report import metrics
from fastdpo.trainer.balance import add_balance, own_tokens
from fastdpo.trainer.memory_choice import MemoryChoice, leave_out_checkpointing
from fastdpo.trainer.offloading import offloading

EvalDataset: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class PackedTrainer(Trainer):
    """transformers' Trainer with the steps of DPO: it reads packed batches, and its models score them.

    Args:
        settings: the objectives and what they need.
        layout: the layout of packed batches.
        aux_coef: weight of a mixture-of-experts model's router loss; 0 leaves it out.
        others: the arguments of `transformers.Trainer`.
    """

    args: DPOConfig
    ref_model: nn.Module | None = None
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole optimizer step

    def __init__(self, *, settings: ObjectiveSettings, layout: Layout, aux_coef: float, **others: Any) -> None:
        self._settings, self._layout, self._aux_coef = settings, layout, aux_coef
        self._sums = metrics.RunningSums()
        self._guard = checks.NonFiniteGuard()
        self._clock: float | None = None
        self._reference_time = ReferenceTime(others["args"].device)
        self._of_whole_step: deque[tuple[Any, Tensor | None]] = deque()  # one entry per micro-batch of a step
        self._first_loss_is_known = False
        self._runs_cuda_graphs = False
        self._memory: MemoryChoice | None = None  # of a training with a setting that is auto
        self.histograms: dict[str, list[tuple[int, metrics.Histogram]]] = {}
        super().__init__(**others)
        self.model_accepts_loss_kwargs = True  # older transformers go by this flag instead

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, without gradient checkpointing if that is "auto" and the model can't do it."""
        leave_out_checkpointing(self)
        output: TrainOutput = super().train(*args, **kwargs)
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._reference_time, self._memory = ReferenceTime(self.args.device), None
        self._clock, self._sums = None, metrics.RunningSums()  # an earlier training may have left some
        output: TrainOutput = super()._inner_training_loop(*args, **kwargs)
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load batches of `per_device_train_batch_size` examples, or of up to `tokens_per_batch` tokens."""
        loader, args = super().get_train_dataloader(), self.args
        if args.dataloader_drop_last and isinstance(self.train_dataset, Dataset) and len(loader) == 0:
            raise ValueError(
                f"the train dataset has {len(self.train_dataset)} examples, which fill no batch, and "
                "dataloader_drop_last=True leaves out all others; leave it off, or lower per_device_train_batch_size"
            )
        # a callback may ask for another loader, which must not change the run
        if self._memory is None and AUTO in (args.gradient_checkpointing, args.tokens_per_batch):
            self._memory = MemoryChoice(self, loader)
        tokens: Any = args.tokens_per_batch if self._memory is None else self._memory.tokens
        return planned(loader, args, self._layout, tokens)

    def _earlier_tokens(self) -> int | None:
        """Return what `tokens_per_batch=auto` was before the checkpoint that is resumed, 0 for none; else None."""
        return None

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Evaluate the examples of one prompt together with `group_by_prompt`, else all in their order."""
        most = self.args.group_by_prompt
        if most is None or not isinstance(eval_dataset, Dataset):
            return super()._get_eval_sampler(eval_dataset)
        return in_groups(eval_dataset, most, self.args.eval_batch_size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the sharded weights, also where an evaluation has left some of them gathered."""
        sharding.reshard(self.model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*([] if model is None else [model]))
        return optimizer

    # One step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch forward and backward; its activations wait on the CPU with `activation_offloading`."""
        with offloading(self.model) if self.args.activation_offloading else nullcontext():
            if self._memory is None:
                return super().training_step(*args, **kwargs)  # type: ignore[no-any-return]
            run, (model, inputs, *others) = super().training_step, args
            return self._memory.step(lambda part: run(model, part, *others, **kwargs), inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """Return what this micro-batch adds to the loss, which is a mean over the whole optimizer step."""
        training = self.model.training
        with_stats = not training or self._settings.needs_token_stats or metrics.is_logging_step(self)
        if self._runs_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the micro-batch before are not needed any more
        # an evaluation before training runs a policy that accelerate has not wrapped in autocast yet
        with self.accelerator.autocast():
            scores: TokenScores = model(**inputs, with_stats=with_stats, with_aux_loss=self._aux_coef > 0)
        context, ref_logps = self._of_whole_step.popleft() if training and self._of_whole_step else (None, None)
        ref_logps = self._reference_logps(inputs) if ref_logps is None else ref_logps
        out = compute(inputs, scores.logps, ref_logps, self._settings, stats=scores.stats, context=context)
        totals = num_items_in_batch or step_totals([inputs])
        loss = step_mean(out, totals)
        if scores.aux_loss is not None:  # a mean over tokens: weighted by the micro-batch's share of examples
            loss = loss + self._aux_coef * scores.aux_loss * (len(out.losses) / totals.examples)
        if num_items_in_batch:  # DDP averages the gradients of processes, and they are to be summed
            loss = loss * self.args.world_size
        if training:
            if self._first_loss_is_known and self.state.global_step == 0:
                mixed = torch.get_autocast_dtype(self.args.device.type) if self.args.bf16 or self.args.fp16 else None
                dtype = mixed or next(self.model.parameters()).dtype
                beta = inputs["beta"].max() if "beta" in inputs else self._settings.beta
                known: dict[str, Any] = {"precomputed": ref_logps is None, "compiled": self.args.torch_compile}
                known["router"] = why_it_differs(self.model.config)
                checks.check_first_loss(out.losses, beta * out.sequence_logps, dtype, **known)
            self._first_loss_is_known = False
            pair_index = inputs["pair_index"]
            self._guard.watch(loss, lambda: f"the loss of dataset rows {pair_index.tolist()}")
        keep = None if training else metrics.distinct_examples(self.accelerator, len(out.losses))
        reference = inputs.get("ref_token_logps") if ref_logps is None else ref_logps
        log_ratios = None if reference is None else scores.logps - reference
        metrics.add_examples(self._sums, inputs, out, keep=keep, stats=scores.stats, log_ratios=log_ratios)
        if scores.aux_loss is not None:
            metrics.add_scalars(self._sums, {"aux_loss": scores.aux_loss}, len(out.losses) if keep is None else keep)
        if training:
            metrics.add_tokens(self._sums, inputs)
        return (loss, out) if return_outputs else loss

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the reference's log-probs `[M]`; None if the objective reads none or the batch has them."""
        if not self._settings.needs_reference or not {"ref_logps", "ref_token_logps"}.isdisjoint(inputs):
            return None
        measured = self._reference_time.measured(self.state.global_step)
        with measured, torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                scores: TokenScores = self.ref_model(**inputs)
                return scores.logps
            policy = self.accelerator.unwrap_model(self.model)
            if not adapters.is_peft_model(policy):
                raise ValueError(
                    "this dataset has no reference log-probs, and no reference model was kept to compute them: pass "
                    "all datasets to DPOTrainer(...), or set precompute_ref_log_probs=False"
                )
            with evaluating(policy), adapters.as_reference(policy, self.args.ref_adapter_name):
                return self.model(**inputs).logps  # type: ignore[no-any-return]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> StepTotals | None:
        """Return what the step's loss is divided by: counts over all its micro-batches and processes.

        For an objective that compares examples of the whole step, also exchange what its micro-batches need.
        """
        if not batch_samples:
            return None
        if self._clock is None:
            self._clock = time.perf_counter()
        totals = step_totals(batch_samples)
        if self.args.world_size > 1:
            tokens = own_tokens(batch_samples, self.args)
            sums: Any = self.accelerator.reduce(torch.cat((torch.stack(totals), tokens.flatten())), reduction="sum")
            totals = StepTotals(*sums[:2])
            add_balance(self._sums, sums[2:].view_as(tokens))
        self._prepare_whole_step(batch_samples if self._memory is None else self._memory.begin(batch_samples))
        return totals

    def _prepare_whole_step(self, batches: list[dict[str, Any]]) -> None:
        self._of_whole_step.clear()
        if self._settings.needs_step_context and (len(batches) > 1 or self.args.world_size > 1):
            self._of_whole_step.extend(self._exchange(batches))

    def _exchange(self, batches: list[dict[str, Any]]) -> Iterable[tuple[Any, Tensor | None]]:
        """Run all micro-batches without gradients; return what each loss needs of the others, and ref log-probs."""
        values, references = [], []
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast():
                scores: TokenScores = self.model_wrapped(**batch)
            references.append(self._reference_logps(batch))
            values.append(step_values(batch, scores.logps, references[-1], self._settings))
        args = self.args
        contexts = step_context(
            values,
            gather=(lambda x: self.accelerator.gather(x[None])) if args.world_size > 1 else None,
            rank=args.process_index,
            capacity=None if args.tokens_per_batch else args.train_batch_size * args.gradient_accumulation_steps,
        )
        return zip(contexts, references, strict=True)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, float):  # DeepSpeed's; it has skipped the step if this is not finite
            norm = torch.tensor(norm)
        if isinstance(norm, Tensor) and not self.args.fp16:  # with fp16 the scaler skips steps that overflow
            step = self.state.global_step
            self._guard.watch(norm, lambda: f"the gradient norm of step {step + 1}")
        return norm

    def _prepare_input(self, data: Any) -> Any:
        # with DeepSpeed, transformers would round the reference's log-probs to the dtype of the weights
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a record of training, and to the record that ends the run."""
        if "loss" in logs or ("train_loss" in logs and self._sums):
            now = time.perf_counter()
            seconds = self._clock and now - self._clock
            numbers, histograms = metrics.training_logs(
                self._sums, self.accelerator, seconds=seconds, log_history=self.state.log_history
            )
            # the metrics have just been read, so these two wait for nothing
            self._guard.check_now()
            logs.update(numbers, **self._reference_time.log(seconds or 0.0))
            self._keep_histograms(histograms)
            self._clock = now
        super().log(logs, start_time)
        self._advise(ends="train_loss" in logs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End the training; the loss since its last record becomes a mean over processes, as that of records is."""
        if self.args.world_size > 1:
            self._tr_loss: Any = self.accelerator.reduce(self._tr_loss, reduction="mean")
        return super()._finalize_training(*args, **kwargs)

    def _advise(self, *, ends: bool) -> None:
        """Say once when precomputing the reference would pay, where it can be precomputed."""
        state = self.state
        if self.args.sync_ref_model or not isinstance(self.train_dataset, Dataset) or not state.is_world_process_zero:
            return
        self._reference_time.advise(state.global_step, state.epoch or 0.0, state.max_steps, ends=ends)

    def _keep_histograms(self, histograms: dict[str, metrics.Histogram], prefix: str = "") -> None:
        """Keep the first and the last histogram of each name, for the report."""
        for name, histogram in histograms.items():
            kept = self.histograms.setdefault(prefix + name, [])
            kept[1:] = [(self.state.global_step, histogram)]

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate with means over all examples, so that a smaller last batch counts less than a full one."""
        started = time.perf_counter()
        training_sums, self._sums = self._sums, metrics.RunningSums()
        reference_time, self._reference_time = self._reference_time, ReferenceTime(self.args.device)
        logged = metrics.tokens_logged(self.state.log_history) if self.is_world_process_zero() else 0.0
        self._sums.add_numbers("num_tokens", logged + training_sums.tokens())  # of training so far, as in TRL's records
        with sharding.callable_policy(self):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        numbers, histograms = metrics.results(self._sums.read(self.accelerator))
        if "aux_loss" in numbers:
            numbers["loss"] += self._aux_coef * numbers["aux_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": number for name, number in numbers.items()})
        self._keep_histograms(histograms, f"{metric_key_prefix}_")
        self._sums, self._reference_time = training_sums, reference_time
        if self._clock is not None:  # tokens_per_second does not count the time of an evaluation
            self._clock += time.perf_counter() - started
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of one batch; there are no logits or labels to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*prepare.COLUMNS]

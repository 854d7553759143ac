"""`DPOTrainer`: transformers' Trainer with packed batches, the fused head and the DPO objectives."""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from fastdpo import checks
from fastdpo.compat import liger, trl
from fastdpo.config import DPOConfig
from fastdpo.data import prepare
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.sampler import planned
from fastdpo.loss.batch_loss import compute, step_mean, step_values
from fastdpo.loss.options import from_config
from fastdpo.loss.whole_step import StepTotals, step_context, step_totals
from fastdpo.model import adapters
from fastdpo.model.attention.backends import usable
from fastdpo.model.layout import Layout, choose_layout, unwrap
from fastdpo.model.policy import disable_dropout, load_policy, load_tokenizer, smallest_vocab
from fastdpo.model.router import coefficient
from fastdpo.model.scoring_forward import TokenScores, evaluating, patch_forward
from fastdpo.model.self_check import agreed_layout
from fastdpo.reference import columns as reference_columns
from fastdpo.reference.resolve import prepare_reference, resolve_reference
from fastdpo.reference.sync import sync_reference
from fastdpo.report import console, log_output, metrics

logger = logging.getLogger("fastdpo")

EvalDataset: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class DPOTrainer(Trainer):
    """Direct Preference Optimization of a causal language model, https://arxiv.org/abs/2305.18290.

    Args:
        model: a causal LM, a PEFT model, or a name or path for `from_pretrained` (float32 unless
            `args.model_init_kwargs` says otherwise).
        ref_model: the frozen reference, or a name or path as for `model`. None: with PEFT the policy without its
            adapter, or with a copy of the adapter that it came with; otherwise a copy of the policy as passed.
        args: settings; None means `DPOConfig()`. A `trl.DPOConfig` or `TrainingArguments` is read as a `DPOConfig`.
        data_collator: makes a packed batch of tokenised rows; None means `fastdpo.shared_prefix_batch`.
        train_dataset: preference rows, see `fastdpo.data.prepare`.
        eval_dataset: rows of the same format, or a dict from names to datasets of such rows.
        processing_class: the tokenizer; None loads the one at the model's path.
        compute_metrics: not supported; it is here because TRL's arguments are read in TRL's order.
        callbacks: as in `transformers.Trainer`.
        optimizers: (optimizer, scheduler), as in `transformers.Trainer`.
        quantization_config: not supported; see `model_init_kwargs`.
        peft_config: PEFT's config of a new adapter to train on `model`.
        others: `tokenizer`, the old name of `processing_class`; all other old arguments of TRL are refused by name.

    Raises:
        ValueError: a dataset row, column or setting makes no sense, or the model's head or attention can't be computed
            exactly; the message names it and the fix. It is raised before anything is trained.
        FloatingPointError: a loss or gradient was not finite, and training stopped there.
    """

    train_dataset: Any
    eval_dataset: Any
    _layout: Layout
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole optimizer step

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: None = None,
        peft_config: Any | None = None,
        **others: Any,
    ) -> None:
        log_output.show()
        others |= {"compute_metrics": compute_metrics, "quantization_config": quantization_config}
        args, processing_class = trl.resolve(args, processing_class, others)
        liger.prepare(args)
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        self._settings = from_config(args)
        usable(args.attention_backend, args.device)  # else the self-check would fall back to padded batches
        adapters.check_adapter(peft_config)
        set_seed(args.seed)  # adapters start from random weights
        model, ref_model, keeps_reference = self._prepare_models(model, ref_model, peft_config, args)
        if processing_class is None:
            processing_class = load_tokenizer(model, args)
        vocab_size = smallest_vocab(model, ref_model)
        train_dataset, eval_dataset = self._prepare_data(
            train_dataset, eval_dataset, processing_class, vocab_size, args
        )
        columns = prepare.columns_of(train_dataset, eval_dataset)
        has_logps = [not names.isdisjoint(prepare.REFERENCES) for names in columns]
        is_own_reference = keeps_reference and not any(has_logps)
        # before the models are patched, for a copy of the policy must not share its patch
        ref_model = resolve_reference(
            model,
            ref_model,
            ref_adapter_name=args.ref_adapter_name,
            needs_reference=self._settings.needs_reference,
            copies=not args.precompute_ref_log_probs and not all(has_logps),
        )
        if args.sync_ref_model:
            self._sync = sync_reference(model, ref_model, args, has_logps=has_logps[0])
            callbacks = [*(callbacks or ()), self._sync]
        self._patch(model, ref_model, args)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or shared_prefix_batch,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        console.replace_callback(self.callback_handler.callbacks)
        self.model_accepts_loss_kwargs = True  # older transformers go by this flag instead
        checks.check_parallelism(self)
        if data_collator is None:
            if self.is_fsdp_enabled:
                logger.warning("no self-check of the model, because its weights will be sharded")
            else:
                self._layout = agreed_layout(self, self._layout, None if is_own_reference else ref_model)
            self.data_collator = functools.partial(shared_prefix_batch, layout=self._layout)
        self._prepare_reference(ref_model, may_use_cache=is_own_reference and data_collator is None)
        is_random = not args.disable_dropout or args.neftune_noise_alpha is not None
        self._first_loss_is_known = not is_random and checks.first_loss_is_known(
            self._settings.loss_type,
            ref_is_policy=is_own_reference,
            loss_weights=self._settings.loss_weights,
            columns=sorted(columns[0]),
            use_weighting=args.use_weighting,
        )
        self._sums = metrics.RunningSums()
        self._guard = checks.NonFiniteGuard()
        self._clock: float | None = None
        self._of_whole_step: deque[tuple[Any, Tensor | None]] = deque()  # one entry per micro-batch of a step
        self.histograms: dict[str, list[tuple[int, metrics.Histogram]]] = {}

    # Steps of __init__

    def _prepare_models(self, model: Any, ref_model: Any, peft_config: Any, args: DPOConfig) -> tuple[Any, Any, bool]:
        """Load the policy with its adapter and the given reference; say whether the policy is its own reference."""
        model = load_policy(model, args)
        if isinstance(ref_model, str):
            ref_model = load_policy(ref_model, args)
        own_adapter = args.ref_adapter_name or adapters.has_ref_adapter(model)
        keeps_reference = self._settings.needs_reference and ref_model is None and not own_adapter
        model = adapters.wrap_adapter(model, peft_config, keeps_reference=keeps_reference)
        for each in filter(None, (model, ref_model)):
            liger.apply(each, args)
        return model, ref_model, keeps_reference

    def _prepare_data(
        self, train_dataset: Any, eval_dataset: Any, tokenizer: Any, vocab_size: int, args: DPOConfig
    ) -> tuple[Any, Any]:
        """Tokenise and check the datasets; make `_prepare_dataset`, with which `evaluate` tokenises another one."""
        self._prepare_dataset = prepare.preparer(args, self._settings, tokenizer, vocab_size)
        with args.main_process_first(desc="tokenising the datasets"):  # the other processes read its cache
            train_dataset = self._prepare_dataset(train_dataset)
            eval_dataset = prepare.each(eval_dataset, lambda rows, name: self._prepare_dataset(rows, name=name))
        for names in prepare.columns_of(train_dataset, eval_dataset):
            self._settings.check_columns(names)
            prepare.check_reference_columns(names, self._settings.kind, args.ld_alpha)
        return train_dataset, eval_dataset

    def _patch(self, model: Any, ref_model: Any, args: DPOConfig) -> None:
        """Let the models score packed batches, and choose a batch layout that is exact on all of them."""
        self._aux_coef = coefficient(unwrap(model), args.router_aux_loss_coef)
        models = [each for each in (model, ref_model) if each is not None]
        for each in models:
            if args.disable_dropout:
                disable_dropout(each)
            patch_forward(
                each, impl=args.head_impl, backward=args.head_backward, attention_backend=args.attention_backend
            )
        self._layout = choose_layout(models, args.prefix_sharing)

    def _prepare_reference(self, ref_model: Any, *, may_use_cache: bool) -> None:
        """Compute the reference's log-probs now, find them in the cache, or put the reference on its device."""
        self.ref_model = None
        precompute = self.args.precompute_ref_log_probs
        if precompute is None and may_use_cache:
            precompute = reference_columns.is_complete(self)
            ref_model = None if precompute else ref_model  # the copy's log-probs are in the cache
        if precompute:
            reference_columns.add(self, self.model if ref_model is None else ref_model, self._layout)
        elif ref_model is not None:
            self.ref_model = prepare_reference(self.accelerator, ref_model)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load batches of `per_device_train_batch_size` examples, or of up to `tokens_per_batch` tokens."""
        return planned(super().get_train_dataloader(), self.args, self._layout)

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """Return what this micro-batch adds to the loss, which is a mean over the whole optimizer step."""
        training = self.model.training
        if training and self._clock is None:
            self._clock = time.perf_counter()
        with_stats = not training or self._settings.needs_token_stats or metrics.is_logging_step(self)
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
                checks.check_first_loss(out.losses, beta * out.sequence_logps, dtype, precomputed=ref_logps is None)
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
        with torch.no_grad(), self.accelerator.autocast():
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
        totals = step_totals(batch_samples)
        if self.args.world_size > 1:
            sums: Any = self.accelerator.reduce(torch.stack(totals), reduction="sum")
            totals = StepTotals(*sums)
        self._of_whole_step.clear()
        if self._settings.needs_step_context and (len(batch_samples) > 1 or self.args.world_size > 1):
            self._of_whole_step.extend(self._exchange(batch_samples))
        return totals

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.sync_ref_model:
            self._sync.load(resume_from_checkpoint)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor) and not self.args.fp16:  # with fp16 the scaler skips steps that overflow
            step = self.state.global_step
            self._guard.watch(norm, lambda: f"the gradient norm of step {step + 1}")
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; raise FloatingPointError instead if a loss or gradient was not finite."""
        self._guard.check_now()
        super().save_model(output_dir, _internal_call)

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a record of training, and to the record that ends the run."""
        if "loss" in logs or ("train_loss" in logs and self._sums):
            now = time.perf_counter()
            numbers, histograms = metrics.training_logs(
                self._sums,
                self.accelerator,
                seconds=self._clock and now - self._clock,
                log_history=self.state.log_history,
            )
            self._guard.check_now()  # waits for nothing: the metrics have just been read
            logs.update(numbers)
            self._keep_histograms(histograms)
            self._clock = now
        super().log(logs, start_time)

    def _keep_histograms(self, histograms: dict[str, metrics.Histogram], prefix: str = "") -> None:
        """Keep the first and the last histogram of each name, for the report."""
        for name, histogram in histograms.items():
            kept = self.histograms.setdefault(prefix + name, [])
            kept[1:] = [(self.state.global_step, histogram)]

    # Evaluation

    def evaluate(
        self,
        eval_dataset: EvalDataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate; a dataset passed here is tokenised like those passed to the constructor."""
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
        """Evaluate with means over all examples, so that a smaller last batch counts less than a full one."""
        started = time.perf_counter()
        training_sums, self._sums = self._sums, metrics.RunningSums()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        numbers, histograms = metrics.results(self._sums.read(self.accelerator))
        if "aux_loss" in numbers:
            numbers["loss"] += self._aux_coef * numbers["aux_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": number for name, number in numbers.items()})
        self._keep_histograms(histograms, f"{metric_key_prefix}_")
        self._sums = training_sums
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

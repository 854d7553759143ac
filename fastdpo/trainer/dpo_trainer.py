"""`DPOTrainer`: transformers' Trainer with packed batches, the fused head and the DPO objectives."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fastdpo import checks, sharding
from fastdpo.compat import compiling, liger, trl
from fastdpo.compat.trl_objects import TRLAttributes, check_collator, resolve_collator
from fastdpo.config import DPOConfig
from fastdpo.config.checks import in_bytes
from fastdpo.data import prepare
from fastdpo.data.columns import with_raw_columns
from fastdpo.data.grouping import grouped_stream
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.vision.batch import check_all_have_images, collator_of
from fastdpo.data.vision.images import has_images, text_tokenizer
from fastdpo.loss.options import ObjectiveSettings, from_config
from fastdpo.model import adapters
from fastdpo.model.adapted_layers import adapted_modules, unwrap
from fastdpo.model.attention.backends import usable
from fastdpo.model.layout import Layout, check_images, check_sharded, choose_layout
from fastdpo.model.policy import align_pad_token, disable_dropout, load_policy, load_tokenizer, smallest_vocab
from fastdpo.model.router import coefficient
from fastdpo.model.scoring_forward import may_leave_unused, patch_forward
from fastdpo.model.self_check import agreed_layout
from fastdpo.reference import columns as reference_columns
from fastdpo.reference.resolve import prepare_reference, resolve_reference
from fastdpo.reference.sync import sync_reference
from fastdpo.report import console, log_output
from fastdpo.settings.failures import loading
from fastdpo.trainer.failing_together import failing_together
from fastdpo.trainer.packed_trainer import EvalDataset
from fastdpo.trainer.saving import SavingTrainer

logger = logging.getLogger("fastdpo")

TAGS = ("fastdpo", "dpo")
"""Tags of a trained model on the Hub."""


class DPOTrainer(TRLAttributes, SavingTrainer):
    """Direct Preference Optimization of a causal language model, https://arxiv.org/abs/2305.18290.

    Args:
        model: a causal LM, a PEFT model, or a name or path for `from_pretrained` (float32 unless
            `args.model_init_kwargs` says otherwise).
        ref_model: the frozen reference, or a name or path as for `model`. None: with PEFT the policy without its
            adapter, or with a copy of the adapter that it came with; otherwise a copy of the policy as passed.
        args: settings; a `trl.DPOConfig` or `TrainingArguments` is read as a `DPOConfig`. None means a `DPOConfig` with
            the model's name and `-DPO` as `output_dir`.
        data_collator: makes a packed batch of tokenised rows; None means `fastdpo.shared_prefix_batch`, which also
            replaces TRL's own collators; for rows with images, a `fastdpo.data.vision.batch.VisionCollator`.
        train_dataset: preference rows, see `fastdpo.data.prepare`. The trainer's datasets keep the raw columns too,
            unless they are streamed.
        eval_dataset: rows of the same format, or a dict from names to datasets of such rows.
        processing_class: the tokenizer, or for rows with images the processor; None loads the one at the model's path.
        compute_metrics: must be None, because packed batches have no logits to give to it; it is here because TRL's
            arguments are read in TRL's order. Evaluation logs the metrics of training.
        callbacks: as in `transformers.Trainer`.
        optimizers: (optimizer, scheduler), as in `transformers.Trainer`.
        quantization_config: transformers' config of the quantisation with which a model given by name is loaded.
        peft_config: PEFT's config of a new adapter to train on `model`.
        others: `tokenizer`, the old name of `processing_class`; all other old arguments of TRL are refused by name.

    Raises:
        ValueError: a dataset row, column or setting makes no sense, or the model's head or attention can't be computed
            exactly; the message names it and the fix. It is raised before anything is trained.
        FloatingPointError: a loss or gradient was not finite, and training stopped there.
    """

    train_dataset: Any
    eval_dataset: Any
    _dataset_name: str | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        **others: Any,
    ) -> None:
        log_output.show()
        others |= {"compute_metrics": compute_metrics, "quantization_config": quantization_config}
        args, processing_class = trl.resolve(model, args, processing_class, **others)
        args.output_dir = os.path.abspath(args.output_dir)  # wherever the process goes, checkpoints stay together
        data_collator = resolve_collator(data_collator, args)
        liger.prepare(args)
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        settings = from_config(args)
        usable(args.attention_backend, args.device)  # else the self-check would fall back to padded batches
        adapters.check_adapter(peft_config)
        set_seed(args.seed)  # adapters start from random weights
        model, ref_model, keeps_reference = _prepare_models(model, ref_model, peft_config, args, settings)
        if processing_class is None:
            with loading("processing_class", model.config._name_or_path):
                processing_class = load_tokenizer(model, args, images=has_images(train_dataset))
        trl.set_pad_token(text_tokenizer(processing_class), args.pad_token)
        align_pad_token(model, text_tokenizer(processing_class))
        vocab_size = smallest_vocab(model, ref_model)
        train_dataset, eval_dataset = self._prepare_data(
            train_dataset, eval_dataset, processing_class, vocab_size, args, settings
        )
        check_collator(data_collator, train_dataset)
        if args.group_by_prompt and data_collator is not None:
            logger.warning(
                "group_by_prompt brings examples of one prompt together, but what they share is computed once only if "
                "your data_collator calls fastdpo.shared_prefix_batch with across_examples=True"
            )
        columns = prepare.columns_of(train_dataset, eval_dataset)
        self.collate = collator_of(columns, processing_class, unwrap(model))
        has_pictures = any("images_key" in names for names in columns)
        if has_pictures:
            if args.group_by_prompt:
                raise ValueError(
                    f"group_by_prompt={args.group_by_prompt} can't be used with images, because prompts of equal "
                    "tokens may have different images; leave it out"
                )
            for each in filter(None, (model, ref_model)):
                check_images(each)
        has_logps = [not names.isdisjoint(prepare.REFERENCES) for names in columns]
        is_own_reference = keeps_reference and not any(has_logps)
        # before the models are patched, for a copy of the policy must not share its patch
        ref_model = resolve_reference(
            model,
            ref_model,
            ref_adapter_name=args.ref_adapter_name,
            needs_reference=settings.needs_reference,
            copies=not args.precompute_ref_log_probs and not all(has_logps),
        )
        if args.sync_ref_model:
            self._sync = sync_reference(model, ref_model, args, has_logps=has_logps[0])
            callbacks = [*(callbacks or ()), self._sync]
        layout = _patch(model, ref_model, args)

        super().__init__(
            settings=settings,
            layout=layout,
            aux_coef=coefficient(unwrap(model), args.router_aux_loss_coef),
            model=model,
            args=args,
            data_collator=data_collator or self.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        compile_options = compiling.take_over(self)
        self.model.add_model_tags(list(TAGS))
        console.replace_callback(self.callback_handler.callbacks)
        checks.check_parallelism(self)
        if self.is_fsdp_enabled or sharding.zero_stage(args) == 3:
            named = [("train", self.train_dataset)]
            prepare.each(self.eval_dataset, lambda rows, name: named.append((name, rows)))
            check_all_have_images(named, "FSDP" if self.is_fsdp_enabled else "ZeRO-3")
        in_ddp = args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        with failing_together(args):
            sharding.shard_policy(self.accelerator, self.model)
            with sharding.callable_policy(self):
                if sharding.is_sharded(self.model) and ref_model is not None:
                    ref_model = prepare_reference(self, ref_model)
                if in_ddp and args.ddp_find_unused_parameters is None:
                    with self.accelerator.autocast():
                        self.accelerator.ddp_handler.find_unused_parameters = may_leave_unused(unwrap(self.model))
                for each in filter(sharding.is_sharded, filter(None, (self.model, ref_model))):
                    check_sharded(each, args.max_length)
                if data_collator is None:
                    other = None if is_own_reference else ref_model
                    self._layout = agreed_layout(self, self._layout, other, self.collate)
                    self.data_collator = functools.partial(self.collate, layout=self._layout)
                    # examples with equal tokens may have other images
                    if self.collate is shared_prefix_batch and args.prefix_sharing and args.disable_dropout:
                        self.data_collator.keywords["across_examples"] = True
                    if self.collate is shared_prefix_batch and args.device.type == "cpu":
                        self.data_collator.keywords["pad_to_multiple_of"] = 8  # a CPU computes each filling row
                    if self.collate is shared_prefix_batch and compiling.wants_few_lengths(compile_options):
                        self.data_collator.keywords["few_lengths"] = True
                self._prepare_reference(ref_model, may_use_cache=is_own_reference and data_collator is None)
        if compile_options is not None:  # after the self-check, which runs batches of many sizes
            compiling.compile_models(self, compile_options)
            self._runs_cuda_graphs = self.args.device.type == "cuda" and compiling.wants_few_lengths(compile_options)
        is_random = not args.disable_dropout or args.neftune_noise_alpha is not None
        self._first_loss_is_known = not is_random and checks.first_loss_is_known(
            settings.loss_type,
            ref_is_policy=is_own_reference,
            loss_weights=settings.loss_weights,
            columns=sorted(columns[0]),
            use_weighting=args.use_weighting,
        )

    # Parts of __init__

    def _prepare_data(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        tokenizer: Any,
        vocab_size: int,
        args: DPOConfig,
        settings: ObjectiveSettings,
    ) -> tuple[Any, Any]:
        """Tokenise and check the datasets; make `_prepare_dataset`, with which `evaluate` tokenises another one."""
        tokenise = prepare.preparer(args, settings, tokenizer, vocab_size)

        def prepared(raw: Any, name: str) -> Any:
            rows = tokenise(raw, name=name)
            columns = set(rows.column_names or ())
            settings.check_columns(columns)
            prepare.check_reference_columns(columns, settings.kind, args.ld_alpha)
            if args.group_by_prompt and isinstance(rows, IterableDataset):
                count = args.train_batch_size if name == "train" else args.eval_batch_size
                rows = grouped_stream(rows, args.group_by_prompt, count)
            return with_raw_columns(rows, raw, wanted=not args.remove_unused_columns)

        self._prepare_dataset = prepared
        with args.main_process_first(desc="tokenising the datasets"):  # the other processes read its cache
            return prepared(train_dataset, "train"), prepare.each(eval_dataset, prepared)

    def _prepare_reference(self, ref_model: Any, *, may_use_cache: bool) -> None:
        """Compute the reference's log-probs now, find them in the cache, or put the reference on its device."""
        self.ref_model = None
        precompute = self.args.precompute_ref_log_probs
        if precompute is None and may_use_cache:
            precompute = reference_columns.is_complete(self)
            ref_model = None if precompute else ref_model  # the copy's log-probs are in the cache
        self._is_precomputed = bool(precompute)
        self._kept_reference = ref_model if precompute else None  # for a dataset that is passed to `evaluate`
        if precompute:
            reference_columns.add(self, self.model if ref_model is None else ref_model, self._layout)
        elif ref_model is not None:
            self.ref_model = ref_model if sharding.is_sharded(self.model) else prepare_reference(self, ref_model)

    def evaluate(
        self,
        eval_dataset: EvalDataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate; a dataset passed here is prepared like those passed to the constructor.

        Raises:
            ValueError: the reference's log-probs of this dataset are needed and can't be computed any more; or, in
                training, `metric_for_best_model` is none of the metrics.
        """
        is_whole = eval_dataset is None and metric_key_prefix == "eval"
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self._prepare_dataset(eval_dataset, metric_key_prefix)
            if self._is_precomputed:
                eval_dataset = self._with_reference(eval_dataset, metric_key_prefix)
        result: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if is_whole and self.is_in_train:
            checks.check_best_metric(self.args.metric_for_best_model, result)
        return result

    def _with_reference(self, rows: Any, name: str) -> Any:
        """Return a dataset with the log-probs of the reference, which is not in `ref_model`."""
        reference = self._kept_reference
        if reference is None:
            if adapters.is_peft_model(self.model):
                return rows  # the policy answers as the reference when a batch is evaluated
            if self.state.global_step > 0 and not prepare.REFERENCES.keys() & set(rows.column_names or ()):
                raise ValueError(
                    "evaluate(eval_dataset=...) needs the reference's log-probs of these rows, and the policy, which "
                    "was its own reference, has been trained since they were precomputed; pass the dataset to "
                    "DPOTrainer(eval_dataset=...), pass ref_model, or set precompute_ref_log_probs=False"
                )
        return reference_columns.with_logps(
            self, self.model if reference is None else reference, self._layout, rows, name
        )

    # The Hub

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Write the model card `README.md` into `args.output_dir`: data, settings, curves, table and citation.

        Args:
            model_name: the card's title; None: the end of `args.hub_model_id` or of `args.output_dir`.
            dataset_name: name of the dataset; a later card of this trainer names it too.
            tags: further tags for the Hub.
            **metadata: further entries of the card's metadata, such as `license` and `language`.
        """
        from fastdpo.report.model_card import write_model_card  # draws, which is slow to import

        self._dataset_name = dataset_name or self._dataset_name
        if self.is_world_process_zero():
            name = model_name or Path(self.args.hub_model_id or self.args.output_dir).name
            tags = [*TAGS, *([tags] if isinstance(tags, str) else tags or ())]
            write_model_card(self, name, self._dataset_name, tags, metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)


def _prepare_models(
    model: Any, ref_model: Any, peft_config: Any, args: DPOConfig, settings: ObjectiveSettings
) -> tuple[Any, Any, bool]:
    """Load the policy with its adapter and the given reference; say whether the policy is its own reference."""
    model = load_policy(model, args)
    if isinstance(ref_model, str):
        ref_model = load_policy(ref_model, args)
    own_adapter = args.ref_adapter_name or adapters.has_ref_adapter(model)
    keeps_reference = settings.needs_reference and ref_model is None and not own_adapter
    model = adapters.wrap_adapter(model, peft_config, keeps_reference=keeps_reference)
    for each in filter(None, (model, ref_model)):
        liger.apply(each, args)
        sharding.cast_for_deepspeed(each, args)
        if sharding.zero_stage(args) == 3:
            adapters.check_zero3(each)
        for _, module in adapted_modules(each):
            sharding.gather_together(module, args)
    return model, ref_model, keeps_reference


def _patch(model: Any, ref_model: Any, args: DPOConfig) -> Layout:
    """Let the models score packed batches, and return a batch layout that is exact on all of them."""
    models = [each for each in (model, ref_model) if each is not None]
    for each in models:
        if args.disable_dropout:
            disable_dropout(each)
        patch_forward(
            each,
            impl=args.head_impl,
            backward=args.head_backward,
            workspace=in_bytes("head_workspace", args.head_workspace),
            attention_backend=args.attention_backend,
        )
    return choose_layout(models, args.prefix_sharing)

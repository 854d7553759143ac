"""Sample generations before and after training, for the report.

Decoding is greedy, by the policy in memory, in eval mode. It draws no random numbers and changes nothing in the model,
so that a run trains the same, bit by bit, with and without samples. If generation fails, a log line says so, and only
the samples are missing.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig

from fastdpo.data.vision.batch import VisionCollator, image_token_of, kinds_of_tokens
from fastdpo.data.vision.images import text_tokenizer
from fastdpo.model.adapted_layers import unwrap
from fastdpo.model.scoring_forward import evaluating
from fastdpo.sharding import is_sharded

logger = logging.getLogger("fastdpo")

MAX_NEW_TOKENS = 64
_SEARCHED = 1000
"""Number of held-out rows that are searched for prompts."""
_RESPONSES = ("chosen_ids", "ranked_ids", "completion_ids")


class Sample(NamedTuple):
    """A held-out prompt with the dataset's response and the policy's."""

    prompt_ids: list[int]
    prompt: str
    chosen: str
    """The chosen, best or desirable response in the dataset."""
    before: str | None = None
    after: str | None = None
    seen: dict[str, Any] = {}  # noqa: RUF012 (it is never changed)
    """What the model takes of the prompt's images."""


def before_training(trainer: Any, count: int) -> list[Sample]:
    """Generate from the first distinct prompts of the evaluation dataset.

    Args:
        trainer: a `DPOTrainer` that has not trained yet.
        count: number of prompts; 0 switches samples off.

    Returns:
        An empty list if there is no evaluation dataset, if this is not the main process, if the model is sharded or
        if generation fails; a log line says so in the last two cases.
    """
    if not count or trainer.eval_dataset is None or not trainer.is_world_process_zero():
        return []
    if is_sharded(trainer.model):
        logger.info("no sample generations, because the model's weights are sharded")
        return []
    try:
        return _generate_all(trainer, _prompts(trainer, count), "before")
    except Exception as error:
        _say(error)
        return []


def after_training(trainer: Any, samples: list[Sample]) -> list[Sample]:
    """Generate again from the same prompts; on failure return the samples unchanged."""
    try:
        return _generate_all(trainer, samples, "after")
    except Exception as error:
        _say(error)
        return samples


def _say(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    logger.warning(
        "no sample generations: %s (report_samples=0 switches them off)",
        reason,
        exc_info=logger.isEnabledFor(logging.DEBUG),
    )


def _prompts(trainer: Any, count: int) -> list[Sample]:
    """Return the first distinct prompts with a chosen or desirable response."""
    dataset, tokenizer = trainer.eval_dataset, trainer.processing_class
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()))
    collate = trainer.collate
    found: dict[tuple[Any, ...], Sample] = {}
    for row in itertools.islice(dataset, _SEARCHED):
        ids = tuple(map(int, row["prompt_ids"]))
        key = (row.get("images_key"), *ids)
        if key in found or not row.get("label", True):  # an undesirable response
            continue
        response = next(row[column] for column in _RESPONSES if column in row)
        response = response[0] if "ranked_ids" in row else response
        seen = collate.inputs_of(row) if isinstance(collate, VisionCollator) else {}
        found[key] = Sample(list(ids), _text(tokenizer, ids), _text(tokenizer, response), seen=seen)
        if len(found) == count:
            break
    return list(found.values())


def _text(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def _generate_all(trainer: Any, samples: list[Sample], when: Literal["before", "after"]) -> list[Sample]:
    """Return the samples with `before` or `after` filled in."""
    if not samples:
        return []
    policy = trainer.model
    device = next(policy.parameters()).device
    # at most as long as the sequences of training, and as the model has positions
    limits = [trainer.args.max_length, getattr(policy.config.get_text_config(), "max_position_embeddings", None)]
    autocast = trainer.accelerator.autocast()
    done = []
    with evaluating(policy), _plain_generation(policy, text_tokenizer(trainer.processing_class)) as ends, autocast:
        for sample in samples:
            longest = min(limit for limit in (*limits, len(sample.prompt_ids) + MAX_NEW_TOKENS) if limit)
            new = longest - len(sample.prompt_ids)
            ids: list[int] = []
            if new > 0:
                prompt = torch.tensor([sample.prompt_ids], device=device)
                options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "use_cache": True}
                if sample.seen:
                    model = unwrap(policy)
                    options |= send_to_device(sample.seen, device)
                    options |= kinds_of_tokens(model, prompt, image_token_of(model.config))
                ids = policy.generate(input_ids=prompt, **options)[0, prompt.shape[1] :].tolist()
            text = _text(trainer.processing_class, ids)
            text = text if ids and ids[-1] in ends else f"{text} …"
            done.append(sample._replace(before=text) if when == "before" else sample._replace(after=text))
    return done


@contextmanager
def _plain_generation(policy: Any, tokenizer: Any) -> Iterator[set[int]]:
    """Inside the block, decode greedily, whatever the model's generation config says; yield the end tokens."""
    model = unwrap(policy)
    own = model.generation_config
    ends = own.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad, disable_compile=True
    )
    try:
        yield ends
    finally:
        model.generation_config = own

"""Packed batches of tiny pairs, and models to score them."""

from typing import Any

import peft
import torch
from torch import Tensor

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.scoring_forward import patch_forward
from tests.helpers.tiny import PAIRS, assert_same_gradients, gradients, make_model, sequences, stock, stock_logps

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def pack(pairs=PAIRS, **options):
    return shared_prefix_batch(pairs, **options)


def score(model, pairs=PAIRS, **options):
    return model(**pack(pairs, **options)).logps


def make_adapted(**options):
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**LORA, **options))
    with torch.no_grad():  # LoRA's B starts at 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_patched(family: str = "llama", **overrides: Any) -> tuple[Any, Any]:
    """A patched model and a stock copy of it."""
    model = make_model(family, **overrides)
    reference = stock(model)
    patch_forward(model)
    return model, reference


def scored_hidden(model: Any, **inputs: Any) -> Tensor:
    """What the head is given."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


def assert_equals_separate_sequences(model: Any, reference: Any, batch: dict[str, Any]) -> None:
    """Hidden states, log-probs and gradients of a batch of `PAIRS` are those of each sequence alone."""
    expected = [
        scored_hidden(reference, input_ids=torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        for prompt, response in sequences(PAIRS)
    ]
    torch.testing.assert_close(scored_hidden(model, **batch), torch.cat(expected), rtol=0, atol=1e-5)
    logps, alone = model(**batch).logps, stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, alone, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, alone))

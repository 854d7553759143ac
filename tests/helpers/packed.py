"""Packed batches of tiny pairs, and models to score them."""

import peft
import torch

from fastdpo.data.packing import shared_prefix_batch
from tests.helpers.tiny import PAIRS, make_model

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

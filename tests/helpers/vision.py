"""Tiny models for processors that need no network, rows with drawn images, and trainers of them by fastdpo and TRL."""

import copy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

import fastdpo
from benchmarks.studies.tiny_vision import QWEN_TOKENS, TEXT, llava_processor, qwen_processor

PROCESSORS = {"llava": llava_processor, "qwen2.5-vl": qwen_processor}


def make_model(name: str, processor: Any) -> Any:
    """A tiny model for one of `PROCESSORS`."""
    tokenizer, text = processor.tokenizer, TEXT | {"vocab_size": len(processor.tokenizer)}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 24, "intermediate_size": 32}
    torch.manual_seed(0)
    model: Any
    if name == "llava":
        tower |= {"model_type": "clip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2}
        tower |= {"image_size": 16, "patch_size": 4, "projection_dim": 16}
        token = {"image_token_id": processor.image_token_id, "image_token_index": processor.image_token_id}
        config: Any = transformers.LlavaConfig(
            vision_config=tower, text_config=text | {"model_type": "llama"}, vision_feature_layer=-2, **token
        )
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        tower |= {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
        tower |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))
        config = transformers.Qwen2_5_VLConfig(
            vision_config=tower, text_config=text | {"rope_parameters": rope}, tie_word_embeddings=False, **ids
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.float()


def picture(seed: int, size: tuple[int, int] = (24, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


_PARTS = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
MESSAGES = Features({"images": List(ImageFeature())} | {c: _PARTS for c in ("prompt", "chosen", "rejected")})


def said(text: str, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def rows(n: int = 4, *, mixed: bool = False) -> Dataset:
    """Pairs with one image and with two, of different sizes; with `mixed`, every third one has only text."""
    words = ["what", "is", "this", "picture", "a", "cat", "on", "mat", "the", "dog", "runs", "over", "and", "sleeps"]
    draw = np.random.default_rng(5)

    def say(k: int) -> str:
        return " ".join(draw.choice(words, k))

    image = {"type": "image"}
    made = []
    for i in range(n):
        images = [picture(10 * i + k, (28 + 8 * (i % 3), 24 + 8 * k)) for k in range(1 + i % 2)]
        content: list[dict[str, Any]] = [image, {"type": "text", "text": say(3)}]
        if len(images) == 2:
            content = [image, {"type": "text", "text": say(1)}, image, {"type": "text", "text": say(2)}]
        if mixed and i % 3 == 1:
            images, content = [], [{"type": "text", "text": say(3)}]
        prompt = [{"role": "user", "content": content}]
        pair = {"prompt": prompt, "chosen": said(say(2 + i % 3)), "rejected": said(say(1 + i % 4))}
        made.append(pair | {"images": images})
    return Dataset.from_list(made, features=MESSAGES)


def make_trainer(folder: Path, name: str, data: Any, *, trl: bool = False, **options: Any) -> Any:
    """A trainer of a tiny model with SGD and a reference of its own, by fastdpo or by TRL; `images` counts its images.

    Options that are arguments of the trainer go there, all others to its config.
    """
    processor = options.pop("processor", None) or PROCESSORS[name]()
    model = options.pop("model", None) or make_model(name, processor)
    of_trainer = {k: options.pop(k) for k in ("peft_config", "eval_dataset") if k in options}
    reference = None
    if options.pop("own_reference", "peft_config" not in of_trainer):
        reference = copy.deepcopy(model)
        torch.manual_seed(7)
        for parameter in reference.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    settings: dict[str, Any] = {
        "output_dir": str(folder / ("trl" if trl else "out")),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "beta": 0.5,
        "seed": 0,
    } | options
    if trl:
        from trl import DPOConfig, DPOTrainer
    else:
        DPOConfig, DPOTrainer = fastdpo.DPOConfig, fastdpo.DPOTrainer
    trainer: Any = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**settings),
        train_dataset=data,
        processing_class=processor,
        **of_trainer,
    )
    trainer.images = 0
    body = model.model
    tower = body.visual if hasattr(body, "visual") else body.vision_tower

    def count(_: Any, args: Any, kwargs: Any) -> None:
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        trainer.images += len(grid if grid is not None else args[0] if args else kwargs["pixel_values"])

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return trainer

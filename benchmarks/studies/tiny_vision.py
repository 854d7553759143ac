"""Tiny vision-language models with random weights, one for each family, made-up pixels, and two small processors.

The processors need neither a network nor torchvision.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLProcessor

from fastdpo.data.vision.batch import VisionCollator

VOCAB, IMAGE, START, END, VIDEO = 128, 120, 121, 122, 123

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = _TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "image_size": 32, "head_dim": 12}
_TOKEN = {"image_token_id": IMAGE, "image_token_index": IMAGE}
_TIES = {"tie_word_embeddings": False}
_WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_PINPOINTS = [[32, 16], [16, 32], [32, 32]]

Inputs = dict[str, Tensor]


class Family(NamedTuple):
    """A tiny model, the images that it is given, and how many tokens each of them has."""

    model: Any
    inputs: Inputs
    """What the model takes of `len(counts)` images together."""
    counts: list[int]


def _pixels(n: int, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size)


def _make(name: str, config: Mapping[str, Any], suffix: str = "ForConditionalGeneration", class_: str = "") -> Any:
    made = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{class_ or name}{suffix}")(made)


def _llava() -> Family:
    config = {"vision_config": CLIP, "text_config": TEXT | {"model_type": "llama"}, **_TOKEN}
    return Family(_make("Llava", config | {"vision_feature_layer": -2}), {"pixel_values": _pixels(3)}, [16] * 3)


def _llava_pixtral() -> Family:
    config = {"vision_config": _PIXTRAL, "text_config": TEXT | {"model_type": "mistral"}, **_TOKEN}
    config |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    sizes = torch.tensor([[16, 12], [8, 16], [12, 8]])
    return Family(_make("Llava", config), {"pixel_values": _pixels(3), "image_sizes": sizes}, [12, 8, 6])


def _llava_tiles(name: str, tower: Mapping[str, Any], text: str, more: Mapping[str, Any]) -> Family:
    config = {"vision_config": tower, "text_config": TEXT | {"model_type": text}, **_TOKEN, **more}
    config |= {"image_grid_pinpoints": _PINPOINTS}
    inputs = {"pixel_values": torch.randn(3, 3, 3, 16, 16), "image_sizes": torch.tensor([[32, 16], [16, 32], [32, 16]])}
    # a base image of 16 tokens, two tiles of 16, and a token at the end of each of their lines: 8 lines, or 4
    return Family(_make(name, config), inputs, [56, 52, 56])


def _qwen(
    name: str, tower: Mapping[str, Any], rope: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> Family:
    base = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **(rope or {})}
    config = {
        "vision_config": base | sizes | dict(tower),
        "text_config": TEXT | {"rope_parameters": rope} | dict(text or {}),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        **_TIES,
    }
    grid = torch.tensor([[1, 4, 8], [1, 8, 4], [1, 4, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 16)
    return Family(_make(name, config), {"pixel_values": pixels, "image_grid_thw": grid}, [8, 8, 4])


def _idefics(name: str) -> Family:
    config = {"vision_config": _TOWER, "text_config": TEXT | {"model_type": "llama"}, "image_token_id": IMAGE}
    model = _make(name, config | {"scale_factor": 2, "pad_token_id": 0, **_TIES})
    mask = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    return Family(model, {"pixel_values": _pixels(3)[:, None], "pixel_attention_mask": mask}, [4] * 3)


def _gemma3() -> Family:
    config = {"vision_config": _SIGLIP, "text_config": TEXT | {"head_dim": 8, **_WINDOWED}, **_TOKEN}
    model = _make("Gemma3", config | {"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END})
    return Family(model, {"pixel_values": _pixels(3)}, [4] * 3)


def _gemma4(window: int = 6) -> Family:
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 2}
    text = TEXT | {"head_dim": 8, "global_head_dim": 8, **_WINDOWED, "sliding_window": window}
    text |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    config = {"vision_config": tower | {"position_embedding_size": 64}, "text_config": text, "audio_config": None}
    config |= {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END}
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flip(-1)
    inputs = {"pixel_values": torch.rand(3, 16, 48), "image_position_ids": places.reshape(1, 16, 2).repeat(3, 1, 1)}
    return Family(_make("Gemma4", config), inputs, [4] * 3)


def _internvl() -> Family:
    config = {"vision_config": _TOWER, "text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE}
    model = _make("InternVL", config | {"downsample_ratio": 0.5, **_TIES})
    return Family(model, {"pixel_values": _pixels(3)}, [4] * 3)


def _mistral3() -> Family:
    config = {"vision_config": _PIXTRAL, "text_config": TEXT | {"model_type": "mistral", "head_dim": 8}, **_TOKEN}
    model = _make("Mistral3", config | {"vision_feature_layer": -1, "spatial_merge_size": 2})
    sizes = torch.tensor([[16, 8], [8, 16], [16, 16]])
    return Family(model, {"pixel_values": _pixels(3), "image_sizes": sizes}, [2, 2, 4])


def _cohere(name: str, more: dict[str, Any]) -> Family:
    text = TEXT | {"model_type": "cohere2", **_WINDOWED, "logit_scale": 0.25}
    config = {"vision_config": _SIGLIP, "text_config": text, **_TOKEN, "downsample_factor": 2} | more
    return Family(_make(name, config), {"pixel_values": _pixels(3)}, [4] * 3)


def _lfm2() -> Family:
    tower = {"model_type": "siglip2_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "patch_size": 4, "num_patches": 16, "vision_use_head": False}
    text = TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = {"vision_config": tower, "text_config": text, "image_token_id": IMAGE, "downsample_factor": 2}
    inputs = {
        "pixel_values": torch.randn(3, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]] * 3),
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
    }
    return Family(_make("Lfm2Vl", config | {"projector_hidden_size": 32}), inputs, [4] * 3)


def _paligemma() -> Family:
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    config = {"vision_config": _SIGLIP | {"projection_dim": 32}, "text_config": text, **_TOKEN, "projection_dim": 32}
    return Family(_make("PaliGemma", config | {"hidden_size": 32}), {"pixel_values": _pixels(3)}, [16] * 3)


def _llama4() -> Family:
    tower = _TOWER | {"hidden_size": 32, "intermediate_size": 128, "vision_output_dim": 32, "pixel_shuffle_ratio": 0.5}
    tower |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text = TEXT | {"intermediate_size_mlp": 48, "head_dim": 8, "moe_layers": [1], "num_local_experts": 2}
    text |= {"attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention"]}
    model = _make("Llama4", {"vision_config": tower, "text_config": text, **_TOKEN})
    return Family(model, {"pixel_values": _pixels(3)}, [4] * 3)


def _mllama() -> Family:
    tower: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    tower |= {"attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 48}
    tower |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = TEXT | {"cross_attention_layers": [1], "num_hidden_layers": 3}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = _make("Mllama", {"vision_config": tower, "text_config": text, "image_token_index": IMAGE})
    return Family(model, {"pixel_values": torch.randn(3, 1, 1, 3, 16, 16)}, [1] * 3)


_GLM: dict[str, Any] = {"image_size": 32, "attention_bias": False}
_OF_GLM4V: dict[str, Any] = {"model_type": "glm4v_vision"}
_ALL_ROTATED: dict[str, Any] = {"partial_rotary_factor": 1.0}
_INTERLEAVED: dict[str, Any] = {"mrope_interleaved": True}
_DEEP: dict[str, Any] = {"num_position_embeddings": 64}
_STACKED: dict[str, Any] = _DEEP | {"deepstack_visual_indexes": [0, 1]}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_LAST: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_VIDEO: dict[str, Any] = {"video_token_index": VIDEO, "video_token_id": VIDEO}

SHARED: dict[str, Callable[[], Family]] = {
    "llava": _llava,
    "llava-pixtral": _llava_pixtral,
    "llava-next": lambda: _llava_tiles("LlavaNext", CLIP, "llama", {"vision_feature_layer": -2}),
    "llava-onevision": lambda: _llava_tiles("LlavaOnevision", _SIGLIP, "qwen2", _LAST | _VIDEO),
    "qwen2-vl": lambda: _qwen("Qwen2VL", {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL", {"window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3-vl": lambda: _qwen("Qwen3VL", _STACKED, _INTERLEAVED, {"head_dim": 8}),
    "qwen3-vl-moe": lambda: _qwen("Qwen3VLMoe", _STACKED, _INTERLEAVED, _MOE | {"head_dim": 8}),
    "glm-4v": lambda: _qwen("Glm4v", _GLM, _ALL_ROTATED),
    "glm-4.6v": lambda: _qwen("Glm46V", _GLM | _OF_GLM4V, _ALL_ROTATED, {"model_type": "glm4v_text"}),
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "internvl": _internvl,
    "mistral3": _mistral3,
    "aya-vision": lambda: _cohere("AyaVision", _LAST),
    "cohere2-vision": lambda: _cohere("Cohere2Vision", {"alignment_intermediate_size": 64}),
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4-window-below-image": lambda: _gemma4(window=2),
}
"""Families whose batches share prompts."""
TREE: dict[str, Callable[[], Family]] = {
    "qwen3.5": lambda: _qwen("Qwen3_5", _DEEP, _INTERLEAVED | _ALL_ROTATED, _LINEAR | {"head_dim": 8}),
    "lfm2-vl": _lfm2,
}
"""Families with recurrent layers, which follow a tree with tree-recurrence."""
REFUSED: dict[str, Callable[[], Family]] = {"llama4": _llama4, "mllama": _mllama, "paligemma": _paligemma}
"""Families whose images can't be trained on."""


def build(name: str) -> Family:
    """Make a family's tiny model with weights large enough for every path through it to matter."""
    torch.manual_seed(0)
    family = (SHARED | TREE | REFUSED)[name]()
    for parameter in family.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter.numel() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    family.model.float().eval()
    return family


class MadeUpProcessor:
    """Stands for a processor: an image is its number among the family's inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, *, images: Sequence[Sequence[int]], **_: Any) -> Inputs:
        return self.of([i for row in images for i in row])

    def of(self, images: Sequence[int]) -> Inputs:
        """Inputs of these images together."""
        picked = {}
        for name, value in self.inputs.items():
            if name == "pixel_values" and "image_grid_thw" in self.inputs:  # patches of all images in one row
                value = value.split(self.inputs["image_grid_thw"].prod(1).tolist())
                picked[name] = torch.cat([value[i] for i in images])
            else:
                picked[name] = value[list(images)]
        return picked


class MadeUpCollator(VisionCollator):
    """The collator of `examples` of a family; each call makes a batch for `model`, which may be a copy of its own."""

    images_of = staticmethod(lambda example: example.get("images") or [])

    def __init__(self, family: Family, model: Any) -> None:
        super().__init__(MadeUpProcessor(family.inputs), model)


def examples(counts: Sequence[int]) -> list[dict[str, Any]]:
    """A pair with one image, one with text alone, and one with two images, whose responses share their start."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 100, (n,), generator=generator).tolist()

    def image(i: int) -> list[int]:
        return [START, *[IMAGE] * counts[i], END]

    start = ids(2)
    made = [
        {"prompt_ids": [1, *ids(2), *image(0), *ids(3)], "chosen_ids": [*ids(6), 2], "rejected_ids": [*ids(4), 2]},
        {"prompt_ids": [1, *ids(5)], "chosen_ids": [*ids(4), 2], "rejected_ids": [*ids(7), 2]},
        {
            "prompt_ids": [1, *ids(4), *image(1), *ids(1), *image(2), *ids(2)],
            "chosen_ids": [*start, *ids(3), 2],
            "rejected_ids": [*start, *ids(6), 2],
        },
    ]
    return [row | {"images": of, "prompt_text": ""} for row, of in zip(made, ([0], [], [1, 2]), strict=True)]


def own_logps(family: Family, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Log-probs by the model's own forward on each full sequence alone: all chosen ones, then all rejected ones."""
    processor = MadeUpProcessor(family.inputs)
    takes = inspect.signature(type(family.model).forward).parameters
    parts = []
    for field in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([[*row["prompt_ids"], *row[field][:-1]]])
            inputs = processor.of(row["images"]) if row["images"] else {}
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in takes:
                    inputs = inputs | {name: (ids == IMAGE).int()}
            logits = family.model(input_ids=ids, use_cache=False, **inputs).logits[0, len(row["prompt_ids"]) - 1 :]
            log_probs = logits.float().log_softmax(-1)
            parts.append(log_probs.gather(-1, torch.tensor(row[field])[:, None])[:, 0])
    return torch.cat(parts)


# Processors

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def _tokenizer(image: str, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per byte, and special tokens; an image is written as `image`."""
    own = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({token: i for i, token in enumerate([*own, *alphabet])}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<|im_end|>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": [*special, "<|im_start|>"]})
    fast.chat_template = _TEMPLATE.replace("IMAGE", image)
    return fast


def llava_processor(size: int = 16, patch: int = 4) -> Any:
    """Every image has (size / patch) ** 2 tokens."""
    tokenizer = _tokenizer("<image>", ["<image>"])
    crop = {"height": size, "width": size}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
    options = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=tokenizer.chat_template, **options)


class _QwenWithoutVideos(Qwen2_5_VLProcessor):
    """The part for videos needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = QWEN_TOKENS[:2]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS[:2]))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_processor(pixels: int | None = None) -> Any:
    """The tokens of an image are as many as its size makes them, 4 to 16; or one for each 64 of so many pixels."""
    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>", QWEN_TOKENS)
    sizes = {"min_pixels": pixels or 8 * 8 * 4, "max_pixels": pixels or 8 * 8 * 16}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, **sizes)
    return _QwenWithoutVideos(images, tokenizer, chat_template=tokenizer.chat_template)

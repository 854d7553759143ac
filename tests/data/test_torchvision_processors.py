"""Processors that exist only with torchvision, on rows with images; without it, these tests are skipped."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from benchmarks.studies.tiny_vision import QWEN_TOKENS, _tokenizer
from fastdpo.data.prepare import tokenize_row
from fastdpo.data.vision.batch import VisionCollator
from fastdpo.data.vision.images import images_of
from tests.helpers.vision import picture, said

pytest.importorskip("torchvision")


def qwen() -> Any:
    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>", QWEN_TOKENS)
    sizes = {"min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 16, "patch_size": 4}
    images = transformers.Qwen2VLImageProcessor(temporal_patch_size=2, merge_size=2, **sizes)
    videos = transformers.Qwen2VLVideoProcessor()
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def internvl() -> Any:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names["video_token"] = "<video>"
    tokenizer = _tokenizer("<IMG_CONTEXT>", list(names.values()))
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = transformers.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    videos = transformers.InternVLVideoProcessor()
    options = {"image_seq_length": 4, "chat_template": tokenizer.chat_template}
    return transformers.InternVLProcessor(images, tokenizer, videos, **options)


def smolvlm() -> Any:
    pytest.importorskip("num2words")
    tokenizer = _tokenizer("<image>", ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"])
    images = transformers.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    videos = transformers.SmolVLMVideoProcessor()
    options = {"image_seq_len": 4, "chat_template": tokenizer.chat_template}
    return transformers.SmolVLMProcessor(images, tokenizer, videos, **options)


def pixtral() -> Any:
    tokenizer = _tokenizer("[IMG]", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    images = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    options = {"patch_size": 8, "chat_template": tokenizer.chat_template}
    return transformers.PixtralProcessor(images, tokenizer, **options)


class Collator(VisionCollator):
    """Only asks for the images of a batch, so that no model is needed."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor


@pytest.mark.parametrize("make", [qwen, internvl, smolvlm, pixtral])
def test_rows_have_the_processors_tokens_and_batches_its_images(make: Callable[[], Any]) -> None:
    """One image and two of other sizes; the batch's images are those of the rows, in order, and nothing else."""
    processor = make()
    image, text = {"type": "image"}, {"type": "text", "text": "and what is this?"}
    contents = [[image, text], [image, text, image, text]]
    rows = []
    for i, content in enumerate(contents):
        images = [picture(10 * i + k, (40 - 8 * k, 24 + 8 * i)) for k in range(i + 1)]
        row = {"prompt": [{"role": "user", "content": content}], "chosen": said("a cat"), "rejected": said("a dog")}
        row |= {"images": images}
        done = tokenize_row(row, i, processor, max_length=None, vocab_size=10**6)
        assert done["problem"] == ""
        own = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert done["prompt_text"] == own
        ids = processor(text=[own], images=[images], add_special_tokens=False)["input_ids"][0]
        assert list(done["prompt_ids"]) == list(ids)
        assert done["prompt_ids"].count(processor.image_token_id) >= 4 * len(images)
        rows.append(row | done)
    assert rows[0]["images_key"] != rows[1]["images_key"]
    both = Collator(processor)._inputs(rows, [images_of(row) for row in rows], [0, 1])
    texts, images = [row["prompt_text"] for row in rows], [row["images"] for row in rows]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert {"pixel_values"} <= set(both) <= set(expected) - {"input_ids", "attention_mask"}
    for name, value in both.items():
        assert value.equal(expected[name]), name
    bare = {name: value for name, value in rows[1].items() if name in ("prompt", "chosen", "rejected")}
    problem = tokenize_row(bare | {"images": []}, 0, processor, max_length=None, vocab_size=10**6)["problem"]
    assert "places for 2 images" in problem

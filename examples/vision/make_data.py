"""Draws the pictures, and writes the preference pairs about them and the files of the model, beside this file.

A picture has one shape in one colour, at a place and of a size drawn at random, on a light ground. The chosen response
names both, and the rejected one has either another colour or another shape. Each picture has a pair for each such
mistake, and each caption is chosen as often as all others, so only the picture tells which response is right.

    python -m examples.vision.make_data

The files other than pictures are always the same bytes, and the pictures the same pixels.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from examples.quickstart.make_data import CONFIG as QUICKSTART
from examples.quickstart.make_data import tokenizer_files, write

COLOURS = {"red": (214, 40, 40), "green": (42, 157, 60), "blue": (38, 84, 200), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")
PICTURES = {"train": 6, "test": 2}  # of each colour and shape: 72 and 24
SIZE, PATCH = 32, 8  # pixels; a picture becomes 16 tokens
PROMPT = "<image>The picture shows "
IMAGE_TOKEN = 259  # after the 256 bytes and three special tokens of the quickstart's tokenizer

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE_TOKEN,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 64,
        "initializer_range": 0.05,
    },
    "text_config": QUICKSTART
    | {"vocab_size": IMAGE_TOKEN + 1, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16},
    "tie_word_embeddings": False,
    "dtype": "float32",
}

PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_processor": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
}


def captions() -> Iterator[tuple[str, str]]:
    """All colours with all shapes."""
    return ((colour, shape) for colour in COLOURS for shape in SHAPES)


def caption(colour: str, shape: str) -> str:
    return f"a {colour} {shape}."


def draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A picture of one shape of one colour."""
    ground = tuple(rng.randint(200, 255) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    side = rng.randint(16, 22)
    left, top = (rng.randint(2, SIZE - 3 - side) for _ in "xy")
    right, bottom = left + side, top + side
    pen = ImageDraw.Draw(picture)
    fill = tuple(value + rng.randint(-15, 15) for value in COLOURS[colour])
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    else:
        pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=fill)
    return picture


def mistakes(colour: str, shape: str) -> list[str]:
    """The captions that are wrong about either the colour or the shape."""
    return [caption(*other) for other in captions() if (other[0] == colour) != (other[1] == shape)]


def write_all(folder: Path) -> None:
    """Write data/train.jsonl and data/test.jsonl with their pictures, and model/, into `folder`."""
    rng = random.Random(0)
    for split, count in PICTURES.items():
        pairs = []
        for colour, shape in captions():
            for i in range(count):
                name = f"{split}/{colour}_{shape}_{i}.png"
                path = folder / "data" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(colour, shape, rng).save(path)
                right = {"image": name, "prompt": PROMPT, "chosen": caption(colour, shape)}
                pairs += [right | {"rejected": wrong} for wrong in mistakes(colour, shape)]
        rng.shuffle(pairs)
        write(folder / "data" / f"{split}.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, content in {"config.json": CONFIG, "processor_config.json": PROCESSOR, **tokenizer()}.items():
        write(folder / "model" / name, json.dumps(content, indent=2) + "\n")


def tokenizer() -> dict[str, dict[str, Any]]:
    """The files of the quickstart's tokenizer, with a token for a part of a picture."""
    files = tokenizer_files()
    added = files["tokenizer.json"]["added_tokens"]
    added.append(added[-1] | {"id": IMAGE_TOKEN, "content": "<image>"})
    files["tokenizer.json"]["model"]["vocab"]["<image>"] = IMAGE_TOKEN
    return files


if __name__ == "__main__":
    write_all(Path(__file__).parent)

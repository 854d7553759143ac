"""Read the images of a row, find their places in its prompt, and count the tokens that they become.

A row has its images in the column `images` (a list) or `image` (one image): PIL images, paths, bytes, or the dicts of
`datasets.Image`. They belong to the prompt, in which `{"type": "image"}` parts of messages, or the processor's image
token in text, say where. Only the number of an image's tokens and a key of its pixels are kept when a row is tokenised;
the collator reads the pixels again.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List
from PIL import Image as PIL
from PIL import ImageOps
from transformers import ProcessorMixin

from fastdpo.data.text.messages import BadRow, Message

COLUMNS = ("images", "image")
ADDED = ("prompt_text", "images_key")
"""What tokenising adds to a row with images: the prompt as the processor takes it, and a key of what the model sees."""
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
"""What a processor returns of the text; all else is of the images."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read; Pillow would start other programs for some of the others."""
_INSIDE = ("image", "url", "path", "base64", "image_url")


def column_of(columns: Collection[str], name: str = "train") -> str | None:
    """Return the column that holds a dataset's images, or None if there is none.

    Raises:
        ValueError: there are two such columns. The message calls the dataset `name`.
    """
    found = [column for column in COLUMNS if column in columns]
    if len(found) > 1:
        raise ValueError(f"{name} dataset has the columns 'images' and 'image', which mean the same; keep one")
    return found[0] if found else None


def has_images(dataset: Any) -> bool:
    """Whether a dataset, which need not be prepared, has a column of images."""
    columns = getattr(dataset, "column_names", None) or next(iter(dataset), ())
    return any(column in columns for column in COLUMNS)


def check_column(columns: Collection[str], processor: Any, name: str) -> str | None:
    """Return the column of a dataset's images, or None, after a check that they can be read.

    Raises:
        ValueError: as `column_of`; or there are videos, or images without a processor of images, or beside token ids.
    """
    column = column_of(columns, name)
    videos = [video for video in ("videos", "video") if video in columns]
    if videos and hasattr(processor, "image_processor"):
        raise ValueError(f"{name} dataset has a column {videos[0]!r}: videos are not supported; remove it")
    if column and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{name} dataset has a column {column!r}, but processing_class has no image processor; pass the model's "
            "processor, processing_class=AutoProcessor.from_pretrained(...)"
        )
    if column and "prompt_ids" in columns and "images_key" not in columns:
        raise ValueError(
            f"{name} dataset has token ids and a column {column!r}; rows with images must come as text or messages"
        )
    return column


def text_tokenizer(processing_class: Any) -> Any:
    """Return the tokenizer inside a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def feature(column: str) -> Any:
    """Return the type of the column in a tokenised dataset, whose images stay as they are encoded."""
    return List(Image(decode=False)) if column == "images" else Image(decode=False)


def undecoded(dataset: Any) -> Any:
    """Let a dataset give its images as bytes or paths, so that no URL is fetched and no pixels are stored."""
    features = dataset.features or {}
    changed = {column: feature(column) for column in COLUMNS if _decodes(features.get(column))}
    if not changed:
        return dataset
    if isinstance(dataset, Dataset):  # `cast_column` would copy the images of a list
        schema = Features(features | changed).arrow_schema
        options = {"indices_table": dataset._indices, "fingerprint": dataset._fingerprint}
        return Dataset(dataset.data.cast(schema), **options)
    for column, kind in changed.items():
        dataset = dataset.cast_column(column, kind)
    return dataset


def _decodes(kind: Any) -> bool:
    kind = getattr(kind, "feature", kind[0] if isinstance(kind, list) else kind)
    return isinstance(kind, Image) and kind.decode


def images_of(row: Mapping[str, Any]) -> list[PIL.Image]:
    """Open the images of a row.

    Raises:
        BadRow: one of them can't be read, or is a URL.
    """
    column = next((column for column in COLUMNS if row.get(column) is not None), None)
    if column is None:
        return []
    value = row[column]
    if column == "image":
        value = [value]
    elif not isinstance(value, (list, tuple)):
        raise BadRow(f"`images` must be a list of images, got {value!r:.80}; call a column of single images `image`")
    return [_open(image, column) for image in value]


def _open(image: Any, column: str) -> PIL.Image:
    if isinstance(image, PIL.Image):
        return _of_8_bits(image, column)
    source: Any = image
    if isinstance(image, Mapping):
        source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(source, (str, Path)):
        if "://" in str(source):
            raise BadRow(
                f"`{column}` is a URL, which is not fetched: {str(source)!r:.80}; give the image's path or bytes"
            )
    elif isinstance(source, (bytes, bytearray)):
        source = BytesIO(source)
    else:
        what = f"a dict of {', '.join(map(repr, image)) or 'nothing'}" if isinstance(image, Mapping) else repr(image)
        raise BadRow(f"`{column}` must be PIL images, paths, bytes or dicts of datasets.Image, got {what:.80}")
    try:
        with PIL.open(source, formats=_formats()) as opened:
            opened.load()
            upright: PIL.Image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow raises many kinds at a broken file
        told = " ".join(str(error).split())
        if "BytesIO" in told:  # "cannot identify image file <_io.BytesIO object at ...>"
            told = "its bytes are no image of a known format"
        raise BadRow(f"`{column}`: {type(error).__name__}: {told:.160}") from None
    return _of_8_bits(upright, column)


def _of_8_bits(image: PIL.Image, column: str) -> PIL.Image:
    """Return a grey image of 16 bits in 8, because processors would clip it to white.

    Raises:
        BadRow: its pixels are 32-bit integers or floats, of which it is not known what is black and white.
    """
    if image.mode.startswith("I;16"):
        return PIL.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise BadRow(f"`{column}` has pixels that are {kind} (mode {image.mode!r}); scale them to 0 to 255, mode 'L'")
    return image


@lru_cache
def _formats() -> tuple[str, ...]:
    PIL.init()
    return tuple(name for name in FORMATS if name in PIL.OPEN)  # Pillow may be built without some


# Places


def placed(prompt: list[Message], named: Sequence[tuple[str, list[Message]]], count: int) -> list[Message]:
    """Return the prompt's messages with a place for each image: those it has, or places before its first user's text.

    Args:
        prompt: the messages of the prompt.
        named: name and messages of each response.
        count: number of the row's images.

    Raises:
        BadRow: there are more or fewer places than images, or a response has one.
    """
    for name, response in named:
        if _places(response, name):
            raise BadRow(f"`{name}` has an image; images belong in the prompt")
    found = _places(prompt, "prompt")
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if not found and count and first is not None and isinstance(text := prompt[first].get("content"), str):
        parts = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": text}]
        return [*prompt[:first], prompt[first] | {"content": parts}, *prompt[first + 1 :]]
    if found != count:
        raise _misplaced(found, "{'type': 'image'}", count)
    return prompt


def in_parts(messages: list[Message]) -> list[Message]:
    """Return messages whose contents are lists of parts, as the templates of processors expect them."""
    return [
        message | {"content": [{"type": "text", "text": text}]}
        if isinstance(text := message.get("content"), str)
        else message
        for message in messages
    ]


def _places(messages: list[Message], name: str) -> int:
    count = 0
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if part.get("type") != "image":
                continue
            count += 1
            if inside := [key for key in _INSIDE if key in part]:
                raise BadRow(
                    f"`{name}` has an image inside a message ({inside[0]!r}); put it into a column `images`, and leave "
                    "{'type': 'image'} in its place"
                )
    return count


def _misplaced(found: int, place: str, count: int) -> BadRow:
    places = f"{found} image" + "s" * (found != 1)
    return BadRow(f"`prompt` has places for {places} ({place}), but the row has {count}")


# Tokens


def image_tokens(processor: Any) -> set[int]:
    """Return the ids of the tokens that stand for an image, in a prompt as written and as the model reads it."""
    if not hasattr(processor, "image_processor"):
        return set()
    written = [processor.tokenizer.convert_tokens_to_ids(str(token)) for token in _marks(processor)]
    found = {getattr(processor, "image_token_id", None), *written}
    return {token for token in found if isinstance(token, int)} - {processor.tokenizer.unk_token_id}


def _marks(processor: Any) -> list[str]:
    names = ("image_token", "boi_token")  # Gemma writes the second for a whole image
    return [str(token) for name in names if (token := getattr(processor, name, None))]


def check_text(named: Sequence[tuple[str, Sequence[int]]], processor: Any) -> None:
    """Check that ids of text hold no image token, for which there would be no image.

    Raises:
        BadRow: the ids of this name hold one.
    """
    tokens = image_tokens(processor)
    for name, ids in named:
        if tokens and not tokens.isdisjoint(ids):
            if name == "prompt":
                raise _misplaced(sum(i in tokens for i in ids), "its image token", 0)
            raise BadRow(f"`{name}` has an image, or spells out its token; images belong in the prompt")


def expand(
    text: str, images: list[PIL.Image], processor: Any, prompt_ids: list[int], start: int, *, adds_special: bool
) -> tuple[list[int], int, str]:
    """Return the ids of a prompt with all tokens of its images, where its responses start, and the images' key.

    Args:
        text: the prompt as the processor takes it.
        images: its images.
        processor: the model's processor.
        prompt_ids: ids of the text, in which an image is not expanded.
        start: the place in `prompt_ids` from which its responses differ from it.
        adds_special: whether the processor adds special tokens to the text.

    Raises:
        BadRow: the text has another number of images, ends with one, or the processor can't make sense of one.
    """
    counts = {mark: text.count(mark) for mark in _marks(processor)}
    if counts and max(counts.values()) != len(images):
        mark = max(counts, key=lambda each: counts[each])
        raise _misplaced(counts[mark], f"the token {mark!r}", len(images))
    try:
        inputs = processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=adds_special)
    except Exception as error:  # a processor may raise anything
        told = " ".join(str(error).split())
        raise BadRow(f"`images`: {type(error).__name__}: {told:.200}") from None
    ids: list[int] = inputs["input_ids"][0].tolist()
    tail = prompt_ids[start:]
    end = len(ids) - len(tail)
    if end < 1 or ids[end - 1] in image_tokens(processor) or ids[end:] != tail:
        raise BadRow("`prompt` ends with an image: put text after it")  # a branch repeats the trunk's last token
    seen = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs.keys() - set(TOKEN_INPUTS)):
        seen.update(name.encode())
        _hash(seen, inputs[name])
    return ids, end, seen.hexdigest()


def _hash(seen: Any, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for each in value:
            _hash(seen, each)
        return
    tensor = torch.as_tensor(value).cpu().contiguous()
    seen.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    seen.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def key_ids(key: str | None) -> list[int]:
    """Return the key of a row's images as two integers, to be put before the ids of its prompt; none without images."""
    digest = bytes.fromhex(key or "")
    return [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, len(digest), 8)]

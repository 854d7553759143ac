"""Rows with images: how they may be written, and what is wrong with those that can't be used."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as PIL

from benchmarks.studies.tiny_vision import llava_processor, qwen_processor
from fastdpo.data.prepare import prepare_dataset, tokenize_row
from fastdpo.data.vision.images import images_of
from tests.helpers.vision import picture, png, said

Row = dict[str, Any]


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_processor()


@pytest.fixture
def tokenise(processor: Any) -> Callable[..., Row]:
    def tokenise(row: Row, **options: Any) -> Row:
        return tokenize_row(row, 0, processor, vocab_size=300, **{"max_length": None} | options)

    return tokenise


def pair(content: Any = "what is this?", **more: Any) -> Row:
    return {"prompt": [{"role": "user", "content": content}], "chosen": said("a cat"), "rejected": said("a dog")} | more


def jpeg(image: PIL.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


IMAGE = {"type": "image"}


def test_an_image_may_come_in_many_forms(tokenise: Callable[..., Row], tmp_path: Path) -> None:
    image = picture(1)
    path = tmp_path / "a.png"
    path.write_bytes(png(image))
    forms: list[Any] = [image, str(path), path, png(image), {"bytes": png(image), "path": None}]
    forms.append({"bytes": None, "path": str(path)})
    found = [tokenise(pair(images=[form])) for form in forms] + [tokenise(pair(image=form)) for form in forms]
    assert all(row == found[0] for row in found)
    assert found[0]["problem"] == ""
    assert found[0]["prompt_ids"].count(llava_processor().image_token_id) == 16
    assert tokenise(pair(images=[picture(2)]))["images_key"] != found[0]["images_key"]


def test_a_photo_is_read_upright(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = BytesIO()
    picture(1, (24, 40)).save(file, "JPEG", exif=exif)
    assert images_of({"image": file.getvalue()})[0].size == (24, 40)


def test_grey_of_16_bits_is_not_clipped_to_white() -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = np.asarray(images_of({"image": png(PIL.fromarray(grey))})[0])
    assert found.dtype == np.uint8
    assert (found == grey >> 8).all()


def test_places_of_images(tokenise: Callable[..., Row], processor: Any) -> None:
    """Before the first user's text, or where the messages say; text spells them out."""
    two = {"images": [picture(1), picture(2)]}
    before = tokenise(pair("what is this?", **two))
    parts = [IMAGE, IMAGE, {"type": "text", "text": "what is this?"}]
    assert tokenise(pair(parts, **two)) == before
    between = tokenise(pair([IMAGE, {"type": "text", "text": "and"}, IMAGE, {"type": "text", "text": "?"}], **two))
    assert between["problem"] == ""
    text = before["prompt_text"]
    assert text.count("<image>") == 2
    row = {"prompt": text, "chosen": "a cat<|im_end|>\n", "rejected": "a dog<|im_end|>\n"} | two
    as_text = tokenise(row)
    assert as_text["problem"] == ""
    assert as_text["prompt_ids"] == before["prompt_ids"]
    assert as_text["images_key"] == before["images_key"]


def test_an_implicit_prompt_may_have_images(tokenise: Callable[..., Row]) -> None:
    row = pair([IMAGE, {"type": "text", "text": "what is this?"}], images=[picture(1)])
    prompt = row.pop("prompt")
    implicit = row | {name: prompt + row[name] for name in ("chosen", "rejected")}
    expected = tokenise(row | {"prompt": prompt})
    assert tokenise(implicit)["prompt_ids"] == expected["prompt_ids"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (pair([IMAGE, {"type": "text", "text": "?"}], images=[]), "places for 1 image .*, but the row has 0"),
        (pair([IMAGE, {"type": "text", "text": "?"}], images=[0, 1]), "places for 1 image .*, but the row has 2"),
        (pair(chosen=[{"role": "assistant", "content": [IMAGE]}], images=[0]), "`chosen` has an image; images belong"),
        ({"prompt": "see<image>", "chosen": "a", "rejected": "b", "images": [0]}, "ends with an image: put text after"),
        ({"prompt": "<image><image>?", "chosen": "a", "rejected": "b", "images": [0]}, "places for 2 images"),
        ({"prompt": "<image>?", "chosen": "a", "rejected": "b", "images": []}, "places for 1 image"),
        (
            {"prompt": "<image>?", "chosen": "<image>", "rejected": "b", "images": [0]},
            "`chosen` has an image, or spells",
        ),
        (pair([IMAGE | {"image": "a.png"}], images=[0]), "an image inside a message .'image'.; put it into a column"),
        (pair(images="a.png"), "`images` must be a list of images, got 'a.png'; call a column of single"),
        (pair(images=["https://x.org/a.png"]), "`images` is a URL, which is not fetched: 'https://x.org/a.png'"),
        (pair(images=["none.png"]), r"`images`: FileNotFoundError: .*none\.png"),
        (pair(image=b"no image"), "`image`: UnidentifiedImageError: its bytes are no image of a known format"),
        (pair(image=jpeg(picture(9))[:500]), "`image`: OSError: .*[Tt]runcated"),
        (pair(image=PIL.new("F", (8, 8))), "`image` has pixels that are floats .mode 'F'.; scale them to 0 to 255"),
        (pair(image=7), "`image` must be PIL images, paths, bytes or dicts of datasets.Image, got 7"),
    ],
)
def test_a_bad_row_is_named(row: Row, problem: str, processor: Any) -> None:
    if isinstance(row.get("images"), list):
        row = row | {"images": [picture(i) if isinstance(i, int) else i for i in row["images"]]}
    found = tokenize_row(row, 0, processor, max_length=None, vocab_size=300)["problem"]
    assert re.search(problem, found), found


def test_a_processor_that_fails_names_the_row(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("an image of\nno channels")

    monkeypatch.setattr(type(processor), "__call__", fail)
    found = tokenize_row(pair(images=[picture(1)]), 0, processor, max_length=None, vocab_size=300)
    assert found["problem"] == "`images`: RuntimeError: an image of no channels"


def test_images_are_never_cut(tokenise: Callable[..., Row]) -> None:
    row = pair(images=[picture(1)])
    whole = tokenise(row)
    n = len(whole["prompt_ids"])
    assert tokenise(row, max_prompt_length=n - 1)["problem"] == (
        f"dropped: its prompt of {n} tokens has images, which are not cut to max_prompt_length={n - 1}"
    )
    assert "has images, which are not cut" in tokenise(row, max_length=n + 2, truncation_mode="keep_end")["problem"]
    assert tokenise(row, max_length=n)["problem"] == f"dropped: its prompt of {n} tokens fills max_length={n}"
    cut = tokenise(row, max_length=n + 3)
    assert cut["prompt_ids"] == whole["prompt_ids"]
    assert cut["chosen_ids"] == whole["chosen_ids"][:3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": 0, "images": [0]}, "the columns 'images' and 'image', which mean the same; keep one"),
        ({"videos": "a.mp4"}, "a column 'videos': videos are not supported; remove it"),
    ],
)
def test_wrong_columns_are_refused(columns: Row, message: str, processor: Any) -> None:
    data = Dataset.from_list([pair(said("hello")[0]["content"]) | columns])
    with pytest.raises(ValueError, match=message):
        prepare_dataset(data, processor, max_length=None, vocab_size=300)


def test_token_ids_cannot_have_images(processor: Any) -> None:
    data = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "images": ["a.png"]}])
    with pytest.raises(ValueError, match="rows with images must come as text or messages"):
        prepare_dataset(data, processor, max_length=None, vocab_size=300)


def test_bytes_stay_encoded_and_rows_keep_their_images(processor: Any, tmp_path: Path) -> None:
    """Malformed rows are left out with their images, and nothing of them is decoded or copied into the result."""
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(3)))
    images: list[Any] = [{"path": str(path)}, {"path": f"{path}x"}, {"bytes": png(picture(4))}]
    made = [pair(images=[{"bytes": None, "path": None} | image]) for image in images]
    features = Features(Dataset.from_list([pair()]).features | {"images": List(Image())})
    data = Dataset.from_list(made, features=features)
    prepared = prepare_dataset(data, processor, max_length=None, vocab_size=300, on_bad_row="drop")
    assert prepared["pair_index"] == [0, 2]
    assert [row[0]["bytes"] is None for row in prepared["images"]] == [True, False]
    assert prepare_dataset(prepared, processor, max_length=None, vocab_size=300)[1]["images_key"]


def test_image_tokens_of_a_size(tmp_path: Path) -> None:
    """The tokens of Qwen's images follow their sizes, also of two in a prompt."""
    processor = qwen_processor()
    found = []
    for size in ((16, 16), (32, 24)):
        row = tokenize_row(pair(images=[picture(1, size)]), 0, processor, max_length=None, vocab_size=300)
        found.append(row["prompt_ids"].count(processor.image_token_id))
    assert found == [4, 12]

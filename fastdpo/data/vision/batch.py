"""Make a batch of examples with images: the packed or padded rows, and what the model takes beside the tokens.

The collator asks the processor for the images of a batch in the order of its rows; the images of a shared prompt come
once. The model's own body puts their features where the image tokens are, in the same order.

Shapes: T rows of a packed batch, B examples, L most tokens of a sequence.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from fastdpo.data.packing import RESPONSE_FIELDS, kind_of, rows_of, shared_prefix_batch
from fastdpo.data.text.messages import BadRow
from fastdpo.data.vision.images import COLUMNS, TOKEN_INPUTS, images_of

KEPT = (*COLUMNS, "prompt_text")
"""The columns of a tokenised row that its images are read from."""

Collate = Callable[..., dict[str, Any]]
"""`shared_prefix_batch`, or a `VisionCollator`: called with examples and `layout=`."""


class VisionCollator:
    """`shared_prefix_batch` of examples that may have images.

    A batch with images has two more fields: `image_inputs`, what the model takes beside the tokens, by name; and
    `image_blocks`, for each image token run of a packed batch (first row of its prompt, first row of the run, row after
    the run), as ints. Of a model whose positions are not the places in a row, `position_ids` is `[3, 1, T]`.

    Args:
        processor: the model's processor.
        model: the model, without PEFT's wrapper; only its config and its rule of positions are kept.
    """

    images_of: Callable[[Mapping[str, Any]], list[Any]] = staticmethod(images_of)

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.image_token = image_token_of(model.config)
        body = model.base_model
        self._rope_index: Callable[..., Any] | None = None
        if hasattr(body, "get_rope_index"):
            shell: Any = object.__new__(type(body))  # it has the model's own rule of positions, and no weights
            nn.Module.__init__(shell)
            shell.config = body.config
            self._rope_index = shell.get_rope_index

    def __call__(self, examples: Sequence[Mapping[str, Any]], *, layout: str = "shared") -> dict[str, Any]:
        """Make the batch; arguments and errors are those of `shared_prefix_batch`, and a file may be gone."""
        batch = shared_prefix_batch(examples, layout=layout)
        images = []
        for row, example in zip(batch["pair_index"].tolist(), examples, strict=True):
            try:
                images.append(self.images_of(example))
            except BadRow as error:
                raise ValueError(f"pair_index {row}: an image can't be read any more: {error}") from None
        if not any(images):
            return batch
        order = example_order(examples, layout)
        inputs = self._inputs(examples, images, order)
        if layout != "padded":
            if self._rope_index:
                owners = _example_of_rows(examples, layout, batch["input_ids"].shape[1])
                # in a packed batch an image comes once for each response, but a rule of positions wants it once
                once = inputs if layout != "packed" else self._inputs(examples, images, range(len(images)))
                positions = self._positions(examples, once)
                places = batch["position_ids"][0].clamp(max=positions.shape[2] - 1)  # of what fills the batch up
                batch["position_ids"] = positions[:, owners, places][:, None]
            batch["image_blocks"] = self._blocks(batch)
        batch["image_inputs"] = inputs
        return batch

    def inputs_of(self, example: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what the model takes of one example's images; nothing if it has none."""
        images = self.images_of(example)
        return self._inputs([example], [images], [0]) if images else {}

    def _inputs(
        self, examples: Sequence[Mapping[str, Any]], images: list[list[Any]], order: Iterable[int]
    ) -> dict[str, Tensor]:
        rows = [i for i in order if images[i]]
        inputs = self.processor(
            text=[examples[i]["prompt_text"] for i in rows],
            images=[images[i] for i in rows],
            padding=True,
            return_tensors="pt",
        )
        return {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS}

    def _positions(self, examples: Sequence[Mapping[str, Any]], inputs: dict[str, Tensor]) -> Tensor:
        """Return `[3, B, L]`: the positions of each place of an example, by the model's own rule."""
        assert self._rope_index is not None
        lengths = [len(e["prompt_ids"]) + max(map(len, _responses(e))) for e in examples]
        ids = torch.zeros(len(examples), max(lengths), dtype=torch.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: len(example["prompt_ids"])] = torch.tensor(example["prompt_ids"])
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        given = {"input_ids": ids, "attention_mask": mask.long(), **inputs}
        given["mm_token_type_ids"] = _is(ids, self.image_token)
        takes = inspect.signature(self._rope_index).parameters
        positions: Tensor = self._rope_index(**{name: x for name, x in given.items() if name in takes})[0]
        return positions

    def _blocks(self, batch: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Return (first row of the prompt, first row of the run, row after the run) of each run of image tokens."""
        is_image = _is(batch["input_ids"][0], self.image_token)
        change = torch.diff(is_image, prepend=is_image.new_zeros(1), append=is_image.new_zeros(1))
        starts, stops = (change == 1).nonzero()[:, 0], (change == -1).nonzero()[:, 0]
        # images are in prompts, and a prompt is a run of rows from the start of its segment on
        segments = batch["tree_cu_seqlens_q"].long()
        first = segments[torch.searchsorted(segments, starts, right=True) - 1]
        return list(zip(first.tolist(), starts.tolist(), stops.tolist(), strict=True))


def collator_of(columns: Iterable[Collection[str]], processor: Any, model: Any) -> Collate:
    """Return what makes batches of prepared datasets: a `VisionCollator` if one of them has images.

    Args:
        columns: the columns of each dataset.
        processor: as in `VisionCollator`.
        model: as in `VisionCollator`.
    """
    return VisionCollator(processor, model) if any("images_key" in each for each in columns) else shared_prefix_batch


def check_all_have_images(datasets: Iterable[tuple[str, Any]], sharding: str) -> None:
    """Check that each row has an image, for a model whose weights are sharded: all processes run the tower together.

    Args:
        datasets: name and rows of each prepared dataset.
        sharding: what errors call the way of sharding.

    Raises:
        ValueError: a dataset with images has a row without one, or is a stream, of which this is not known.
    """
    for name, rows in datasets:
        if "images_key" not in (rows.column_names or ()):
            continue
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"{name} dataset is a stream with images, which can't be used with {sharding}; load it whole"
            )
        bare = [i for i, key in zip(rows["pair_index"], rows["images_key"], strict=True) if not key]
        if bare:
            raise ValueError(
                f"{name} dataset: row {bare[0]} has no image, and with {sharding} every row needs one, because all "
                "processes gather the weights of the part that sees the images together; leave such rows out, or use "
                "DDP"
            )


def image_token_of(config: Any) -> int | None:
    """Return the id of the token that stands for a part of an image, or None for a model that has none."""
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    return token if isinstance(token, int) else None


def kinds_of_tokens(decoder: nn.Module, input_ids: Tensor, image_token: int | None) -> dict[str, Tensor]:
    """Return what a body wants to be told of which tokens are an image's (1) and which are text (0)."""
    takes = inspect.signature(decoder.forward).parameters
    names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
    return {name: _is(input_ids, image_token) for name in names}


def _is(ids: Tensor, token: int | None) -> Tensor:
    return torch.eq(ids, -1 if token is None else token).int()


def example_order(examples: Sequence[Mapping[str, Any]], layout: str = "padded") -> list[int]:
    """Return of which example each prompt in the rows of a batch is; of "padded" rows, of which example a row is."""
    counts = [len(_responses(example)) for example in examples]
    if layout == "padded":
        return [i for k in range(max(counts)) for i, n in enumerate(counts) if k < n]
    return [i for i, n in enumerate(counts) for _ in range(n if layout == "packed" else 1)]


def _responses(example: Mapping[str, Any]) -> list[Any]:
    found = [example[field] for field in RESPONSE_FIELDS[kind_of(example)] if example.get(field) is not None]
    return list(found[0]) if kind_of(example) == "ranked" else found


def _example_of_rows(examples: Sequence[Mapping[str, Any]], layout: str, rows: int) -> Tensor:
    """Return `[T]`: of which example each row is; what fills the batch up counts to the last one."""
    counts = [rows_of(example, layout) for example in examples]
    counts[-1] += rows - sum(counts)
    return torch.arange(len(examples)).repeat_interleave(torch.tensor(counts))

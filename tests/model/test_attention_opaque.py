"""The operation that torch.compile does not look into computes what attention computes, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.attention.backends import attend
from fastdpo.model.attention.key_paths import Paths
from fastdpo.model.attention.opaque import _attend, attend_opaquely
from fastdpo.model.attention.registered import layer_kwargs
from tests.helpers.tiny import make_pairs

PAIRS = make_pairs([(9, 0, 21, 4), (2, 3, 5, 40), (33, 1, 2, 7)], seed=4)
OPTIONS = [{}, {"window": 5}, {"softcap": 3.0, "scaling": 0.4}, {"sinks": True}]


def make(sinks: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Paths, list[Tensor]]:
    batch = shared_prefix_batch(PAIRS, layout="tree")
    g, T = torch.Generator().manual_seed(5), batch["input_ids"].shape[1]
    shapes = [(T, 4, 16), (T, 2, 16), (T, 2, 12), *([(4,)] if sinks else [])]
    inputs = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    return layer_kwargs(batch)["tree_paths"], inputs


def run(function: Any, paths: Paths, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    settings = {"scaling": None, "window": None, "softcap": None} | options
    settings["sinks"] = inputs[3] if len(inputs) > 3 else None
    out = function("grid", paths, *inputs[:3], **settings)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_attention_bit_by_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Gradients too: in a backward that turns autocast on, those of float32 would be off by a part in 300."""
    paths, inputs = make("sinks" in options, dtype)
    for actual, expected in zip(
        run(attend_opaquely, paths, inputs, options), run(attend, paths, inputs, options), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=str)
def test_torch_can_trace_it(options: dict[str, Any]) -> None:
    """It changes and returns none of its inputs, and its shapes and strides are those that it announces."""
    paths, inputs = make("sinks" in options)
    sinks = inputs[3] if len(inputs) > 3 else None
    arguments = (*inputs[:3], sinks, list(paths), "grid", None, options.get("window"), None)
    torch.library.opcheck(
        _attend, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )

"""Layers that torch.compile runs: the same gradients, and few compilations for batches of any lengths."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.scoring_forward import compile_layers, patch_forward
from tests.helpers.tiny import PAIRS, assert_same_gradients, gradients, make_model, make_pairs, stock, stock_logps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo does, to trace one
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # so does it
]
BATCHES = [PAIRS, *(make_pairs([(30 + n, 0, 9, 5 * n), (3, n, 4, 5)], seed=n) for n in (2, 40, 25))]


@pytest.fixture(autouse=True)
def _reset() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_two_compilations_serve_batches_of_all_lengths(checkpointed: bool) -> None:
    """One for the first number of rows and one for any other, without a break, in the layouts of packed batches."""
    model = make_model("llama")
    reference = stock(model)
    patch_forward(model)
    for layer in model.model.layers if checkpointed else ():
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    names = list(model.state_dict())
    assert compile_layers(model, backend="aot_eager", fullgraph=True) == 2
    assert list(model.state_dict()) == names
    for pairs, layout in zip(BATCHES, ("shared", "tree", "shared", "packed"), strict=True):
        logps, expected = model(**shared_prefix_batch(pairs, layout=layout)).logps, stock_logps(reference, pairs)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, logps), gradients(reference, expected))
    assert counters["stats"]["unique_graphs"] == 2


def test_padded_batches_of_all_lengths_too() -> None:
    model = make_model("llama", num_hidden_layers=1)
    reference = stock(model)
    patch_forward(model)
    compile_layers(model, backend="aot_eager")
    for pairs in BATCHES[1:]:  # as many rows each
        logps, expected = model(**shared_prefix_batch(pairs, layout="padded")).logps, stock_logps(reference, pairs)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, logps), gradients(reference, expected))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_decoder_has_the_same_gradients() -> None:
    """A user may compile all of the decoder, which has no break, not even for soft-caps."""
    model = make_model("gemma2", attn_logit_softcapping=2.0, num_hidden_layers=1)
    reference = stock(model)
    patch_forward(model)
    model.model.compile(backend="aot_eager", fullgraph=True)
    for pairs in BATCHES[:2]:
        logps, expected = model(**shared_prefix_batch(pairs)).logps, stock_logps(reference, pairs)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, logps), gradients(reference, expected))

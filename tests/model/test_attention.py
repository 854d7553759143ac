"""Registered attention on the grid against attention of every key path alone, and transformers' side of it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.attention import backends, registered
from tests.helpers.attention import (
    LAYER,
    OPTIONS,
    PLAIN,
    D,
    assert_exact,
    attend,
    make_qkv,
    with_gradients,
)
from tests.helpers.tiny import PAIRS, make_pairs


@pytest.mark.parametrize("layout", ["shared", "tree", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_grid_matches_each_path_alone(options, layout):
    batch = shared_prefix_batch(PAIRS, layout=layout)
    assert_exact(make_qkv(batch), batch, **options)


@pytest.mark.parametrize(
    ("heads", "groups", "D_value"), [(2, 2, D), (6, 2, D), (4, 1, D), (2, 2, 20)], ids=["mha", "gqa", "mqa", "mla"]
)
def test_grid_takes_any_heads(heads, groups, D_value):
    batch = shared_prefix_batch(PAIRS, pad_to_multiple_of=8)
    assert_exact(make_qkv(batch, heads, groups, D_value), batch)


def test_grid_takes_bfloat16():
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch, dtype=torch.bfloat16), batch)


def test_filling_and_other_pairs_change_nothing():
    alone = shared_prefix_batch(PAIRS[:1], pad_to_multiple_of=1)
    qkv = make_qkv(alone)
    T = qkv[0].shape[2]
    batch = shared_prefix_batch(PAIRS)
    more = [torch.cat((x, 9 * torch.randn(*x.shape[:2], batch["input_ids"].shape[1] - T, D)), dim=2) for x in qkv]
    torch.testing.assert_close(attend(more, batch)[:, :T], attend(qkv, alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scores", [2**24, 300], ids=["one-block", "blocks"])
@pytest.mark.parametrize(("options", "sinks"), PLAIN)
def test_softcap_and_sinks_match_each_path_alone(options, sinks, scores, monkeypatch):
    monkeypatch.setattr(backends, "SCORES", scores)
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch, sinks=sinks), batch, **options)


@pytest.mark.parametrize(("heads", "groups", "D_value"), [(2, 2, D), (6, 2, 20), (4, 1, D)], ids=["mha", "gqa", "mqa"])
def test_softcap_and_sinks_take_any_heads(heads, groups, D_value):
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch, heads, groups, D_value, sinks=True), batch, softcap=3.0)


def test_softcap_and_sinks_in_bfloat16():
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch, dtype=torch.bfloat16, sinks=True), batch, softcap=3.0)


def test_weights_beside_sinks_add_up_to_one_at_large_scores():
    batch = shared_prefix_batch(make_pairs([(9, 2, 31, 14), (4, 0, 6, 20)]))
    query, key, value, sinks = make_qkv(batch, sinks=True)
    out = attend([query, key, torch.ones_like(value), torch.full_like(sinks, -1e4)], batch, scaling=10.0)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)  # a score rounds by 1e-5


def test_the_gradient_of_sinks_adds_up_many_blocks_without_rounding_each_sum(monkeypatch):
    monkeypatch.setattr(backends, "SCORES", 20_000)  # blocks of several queries
    batch = shared_prefix_batch(make_pairs([(31, 0, 80, 47), (3, 2, 45, 9)]))
    qkv = make_qkv(batch, heads=6, groups=3, dtype=torch.bfloat16, sinks=True)
    assert_exact(qkv, batch, sliding_window=20)
    rounded = with_gradients(attend, qkv, batch, sliding_window=20)[4]
    unrounded = with_gradients(attend, [*qkv[:3], qkv[3].float()], batch, sliding_window=20)[4]
    assert torch.equal(rounded, unrounded.bfloat16())


# transformers' side


def test_without_metadata_it_is_sdpa():
    qkv = [torch.randn(2, h, 7, D) for h in (4, 2, 2)]
    mask = torch.rand(2, 1, 7, 7) < 0.7
    for attention_mask in (None, mask | torch.eye(7, dtype=torch.bool)):
        actual, _ = registered.attention(LAYER, *qkv, attention_mask, scaling=0.3, sliding_window=None, is_causal=True)
        expected, _ = sdpa_attention_forward(LAYER, *qkv, attention_mask, scaling=0.3, is_causal=True)
        assert torch.equal(actual, expected)


def test_masks_are_sdpas_and_windows_while_packing():
    padding = torch.tensor([[False, True, True]])
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 3, "attention_mask": padding, "use_vmap": False}
    assert torch.equal(registered.mask(**arguments), sdpa_mask(**arguments))
    with registered.packing():
        assert registered.mask(**arguments) is None
        assert registered.mask(**arguments, local_size=4096) == 4096
    assert registered.mask(**arguments) is not None


def test_packing_ends_with_an_exception():
    with pytest.raises(KeyError), registered.packing():
        raise KeyError
    assert not registered._PACKING.get()


@pytest.mark.parametrize(
    "unusual", [{"use_vmap": True}, {"allow_is_bidirectional_skip": True}], ids=lambda u: next(iter(u))
)
def test_refuses_to_pack_under_any_other_mask(unusual):
    with registered.packing(), pytest.raises(ValueError, match="not plain causal or sliding"):
        registered.mask(batch_size=1, q_length=3, kv_length=3, **unusual)


@pytest.mark.parametrize("sinks", [False, True], ids=["softcap", "sinks"])
@pytest.mark.parametrize("attention_mask", ["bool", "float", None])
def test_without_metadata_softcap_and_sinks_are_eager(attention_mask, sinks):
    query, key, value = (torch.randn(2, h, 7, D) for h in (4, 2, 2))
    layer = SimpleNamespace(num_key_value_groups=2, training=False)
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    seen[1, :, :, :2] = False  # left padding: two rows see nothing
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = {"bool": seen, "float": added, None: None}[attention_mask]
    eager_mask = added[:1] if attention_mask is None else added
    if sinks:
        layer.sinks = torch.randn(4)
        options = {"s_aux": layer.sinks}
        expected, _ = modeling_gpt_oss.eager_attention_forward(layer, query, key, value, eager_mask, 0.3)
    else:
        options = {"softcap": 3.0}
        expected, _ = modeling_gemma2.eager_attention_forward(
            layer, query, key, value, eager_mask, scaling=0.3, softcap=3.0
        )
    actual, _ = registered.attention(layer, query, key, value, given, scaling=0.3, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_without_metadata_a_cached_row_sees_all():
    """One query and a cache: transformers gives no mask."""
    query, key, value = (torch.randn(1, h, n, D) for h, n in ((4, 1), (2, 7), (2, 7)))
    sinks = torch.full((4,), -1e4)  # as if there were none
    actual, _ = registered.attention(LAYER, query, key, value, None, s_aux=sinks, scaling=0.3)
    expected, _ = sdpa_attention_forward(LAYER, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_sinks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"sinks of shape \(2,\), not one for each of the 4 heads"):
        registered.attention(LAYER, *make_qkv(shared_prefix_batch(PAIRS)), None, s_aux=torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "attention dropout must be 0 with packed batches, .* has 0.1"),
        ({"attention_mask": torch.ones(1, 1, 1, 1)}, "adds a mask or bias of its own"),
        ({"sliding_window": 9, "attention_mask": 8}, "has sliding_window=9, but its mask is for 8"),
        ({"sliding_window": 9}, "has sliding_window=9, but its mask is for None"),
        ({"position_bias": torch.ones(1, 1, 1, 1)}, "adds a mask or bias of its own"),
        ({"is_causal": False}, "is not causal"),
        ({"module": SimpleNamespace(is_causal=False)}, "is not causal"),
    ],
    ids=["dropout", "mask", "other-window", "window-in-no-mask", "bias", "call-not-causal", "layer-not-causal"],
)
def test_refuses_a_packed_layer_that_is_not_exact(arguments, message):
    batch = shared_prefix_batch(PAIRS)
    query, key, value = make_qkv(batch)
    arguments = {"module": LAYER, "attention_mask": None} | registered.layer_kwargs(batch) | arguments
    with pytest.raises(ValueError, match=message):
        registered.attention(query=query, key=key, value=value, **arguments)


def test_missing_metadata_raises_while_packing():
    qkv = make_qkv(shared_prefix_batch(PAIRS))
    with registered.packing(), pytest.raises(ValueError, match="got no packing metadata"):
        registered.attention(LAYER, *qkv, None)


def test_half_the_metadata_raises_anywhere():
    batch = shared_prefix_batch(PAIRS)
    with pytest.raises(ValueError, match="got no packing metadata"):
        registered.attention(LAYER, *make_qkv(batch), None, **{name: batch[name] for name in registered.METADATA})

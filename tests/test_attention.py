"""fastdpo.attention: both backends against attention of every key path alone."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdpo import attention
from fastdpo.packing import shared_prefix_batch
from tests.accuracy import assert_as_accurate
from tests.tiny import PAIRS

D = 12
LAYER = SimpleNamespace(num_key_value_groups=2)


def make_qkv(batch, heads=4, groups=2, D_value=D, dtype=torch.float32):
    T = batch["input_ids"].shape[1]
    sizes = ((heads, D), (groups, D), (groups, D_value))
    return [(2 * torch.randn(1, h, T, d)).to(dtype).requires_grad_() for h, d in sizes]


def attend(qkv, batch, sliding_window=None, **options):
    out, weights = attention.attention(LAYER, *qkv, sliding_window, **options, **attention.layer_kwargs(batch))
    assert weights is None
    return out


def reference(qkv, batch, scaling=None, sliding_window=None):
    """Segment by segment, by the book."""
    cu_q, cu_k = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
    query, key, value = (x[0] for x in qkv)
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
    parts = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        path = batch["tree_kv_index"][c:d]
        scores = query[:, a:b] @ key[:, path].transpose(1, 2) * (scaling or D**-0.5)
        age = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (age >= 0) & (age < (sliding_window or d))
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, path])
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


def with_gradients(fn, qkv, *args, **options):
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = fn(qkv, *args, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return out, *torch.autograd.grad(out, qkv, weights.to(out.dtype))


def assert_exact(qkv, batch, **options):
    actual = with_gradients(attend, qkv, batch, **options)
    same_dtype = with_gradients(reference, qkv, batch, **options)
    exact = with_gradients(reference, [x.double() for x in qkv], batch, **options)
    assert_all_accurate(actual, same_dtype, exact)


def assert_all_accurate(*results):
    for name, *tensors in zip(("out", "dquery", "dkey", "dvalue"), *results, strict=True):
        assert_as_accurate(*(x.flatten() for x in tensors), name)  # as a whole: dquery of a path's first row is 0


OPTIONS = [
    pytest.param({}, id="full"),
    pytest.param({"scaling": 0.4}, id="scaling"),
    pytest.param({"sliding_window": 5}, id="window"),
    pytest.param({"sliding_window": 2}, id="smallest-window"),
    pytest.param({"sliding_window": 500}, id="window-beyond-all"),
]


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("options", OPTIONS)
def test_grid_matches_each_path_alone(options, prefix_sharing):
    batch = shared_prefix_batch(PAIRS, prefix_sharing=prefix_sharing)
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


def test_grid_indices_are_inverse_and_stay_inside():
    batch = shared_prefix_batch(PAIRS)
    made = attention.layer_kwargs(batch)
    T = batch["input_ids"].shape[1]
    S, L = len(batch["tree_cu_seqlens_q"]) - 1, batch["tree_max_seqlen_k"]
    assert made["tree_grid"].shape == (S, L)
    assert made["tree_grid"].min() >= 0
    assert made["tree_grid"].max() < T
    assert made["tree_grid"].flatten()[made["tree_grid_back"]].tolist() == list(range(T))


# varlen runs on CUDA alone: these look at what it is given


def varlen_in_pytorch(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """What varlen_attn computes, from its documentation: causal with the diagonal at the bottom right."""
    assert window_size[1] == 0
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    assert (q_bounds[-1], k_bounds[-1]) == (len(query), len(key))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    parts = []
    for a, b, c, d in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        age = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (age >= 0) & (age <= (window_size[0] if window_size[0] >= 0 else d))
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat([part.transpose(0, 1) for part in parts])


def varlen_2_12(query, key, *args, enable_gqa=False, **kwargs):
    assert enable_gqa or query.shape[1] == key.shape[1]  # otherwise the real one raises
    return varlen_in_pytorch(query, key, *args, **kwargs)


@pytest.fixture(params=["torch-2.11", "torch-2.12"])
def varlen(request, monkeypatch):
    old = request.param == "torch-2.11"
    monkeypatch.setattr(attention, "varlen_attn", varlen_in_pytorch if old else varlen_2_12)
    monkeypatch.setattr(attention, "_GQA", {} if old else {"enable_gqa": True})
    monkeypatch.setattr(attention, "_fits_varlen", lambda *qkv: True)
    monkeypatch.setattr(attention, "_grid", None)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("options", OPTIONS)
def test_varlen_matches_each_path_alone(options, prefix_sharing):
    batch = shared_prefix_batch(PAIRS, prefix_sharing=prefix_sharing)
    assert_exact(make_qkv(batch), batch, **options)


def test_varlen_is_called_as_the_installed_torch_declares_it():
    arguments = inspect.signature(varlen_attn).bind(
        *"qkv", 0, 0, 0, 0, scale=None, window_size=(-1, 0), **attention._GQA
    )
    assert arguments.args == ("q", "k", "v", 0, 0, 0, 0)
    assert ("enable_gqa" in inspect.signature(varlen_attn).parameters) == bool(attention._GQA)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_varlen_on_cuda_matches_the_grid(options, device):
    batch = shared_prefix_batch(PAIRS)
    qkv = [torch.randn(1, h, batch["input_ids"].shape[1], 16) for h in (4, 2, 2)]
    exact = with_gradients(attend, [x.bfloat16().double() for x in qkv], batch, **options)
    same_dtype = with_gradients(attend, [x.bfloat16() for x in qkv], batch, **options)
    batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    qkv = [x.bfloat16().to(device) for x in qkv]
    assert attention._fits_varlen(*(x[0].transpose(0, 1) for x in qkv))
    actual = with_gradients(attend, qkv, batch, **options)
    assert_all_accurate([x.cpu() for x in actual], same_dtype, exact)


# transformers' side


def test_without_metadata_it_is_sdpa():
    qkv = [torch.randn(2, h, 7, D) for h in (4, 2, 2)]
    mask = torch.rand(2, 1, 7, 7) < 0.7
    for attention_mask in (None, mask | torch.eye(7, dtype=torch.bool)):
        actual, _ = attention.attention(LAYER, *qkv, attention_mask, scaling=0.3, sliding_window=None, is_causal=True)
        expected, _ = sdpa_attention_forward(LAYER, *qkv, attention_mask, scaling=0.3, is_causal=True)
        assert torch.equal(actual, expected)


def test_masks_are_sdpas_and_windows_while_packing():
    padding = torch.tensor([[False, True, True]])
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 3, "attention_mask": padding, "use_vmap": False}
    assert torch.equal(attention.mask(**arguments), sdpa_mask(**arguments))
    with attention.packing():
        assert attention.mask(**arguments) is None
        assert attention.mask(**arguments, local_size=4096) == 4096
    assert attention.mask(**arguments) is not None


def test_packing_ends_with_an_exception():
    with pytest.raises(KeyError), attention.packing():
        raise KeyError
    assert not attention._PACKING.get()


@pytest.mark.parametrize(
    "unusual", [{"use_vmap": True}, {"allow_is_bidirectional_skip": True}], ids=lambda u: next(iter(u))
)
def test_refuses_to_pack_under_any_other_mask(unusual):
    with attention.packing(), pytest.raises(ValueError, match="not plain causal or sliding"):
        attention.mask(batch_size=1, q_length=3, kv_length=3, **unusual)


@pytest.mark.parametrize("feature", ["softcap", "s_aux"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_refuses_what_it_does_not_compute(feature, packed):
    batch = shared_prefix_batch(PAIRS)
    metadata = attention.layer_kwargs(batch) if packed else {}
    with pytest.raises(ValueError, match=f"uses {feature}, which"):
        attention.attention(LAYER, *make_qkv(batch), None, **{feature: 50.0}, **metadata)


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
    arguments = {"module": LAYER, "attention_mask": None} | attention.layer_kwargs(batch) | arguments
    with pytest.raises(ValueError, match=message):
        attention.attention(query=query, key=key, value=value, **arguments)


def test_missing_metadata_raises_while_packing():
    qkv = make_qkv(shared_prefix_batch(PAIRS))
    with attention.packing(), pytest.raises(ValueError, match="got no packing metadata"):
        attention.attention(LAYER, *qkv, None)


def test_half_the_metadata_raises_anywhere():
    batch = shared_prefix_batch(PAIRS)
    with pytest.raises(ValueError, match="got no packing metadata"):
        attention.attention(LAYER, *make_qkv(batch), None, **{name: batch[name] for name in attention.METADATA})

"""Attention of every key path alone, by the book, and the registered one against it."""

from types import SimpleNamespace

import pytest
import torch

from fastdpo.model.attention import registered
from tests.helpers.accuracy import assert_as_accurate

D = 12


LAYER = SimpleNamespace(num_key_value_groups=2)


def make_qkv(batch, heads=4, groups=2, D_value=D, dtype=torch.float32, sinks=False):
    """Query, key, value and, with sinks, those."""
    T = batch["input_ids"].shape[1]
    sizes = ((heads, D), (groups, D), (groups, D_value))
    made = [2 * torch.randn(1, h, T, d) for h, d in sizes] + [torch.randn(heads)] * sinks
    return [x.to(dtype).requires_grad_() for x in made]


def attend(qkv, batch, sliding_window=None, backend="auto", **options):
    *qkv, sinks = qkv if len(qkv) == 4 else (*qkv, None)
    made = registered.layer_kwargs(batch, backend)
    out, weights = registered.attention(LAYER, *qkv, sliding_window, s_aux=sinks, **options, **made)
    assert weights is None
    return out


def reference(qkv, batch, scaling=None, sliding_window=None, softcap=None):
    """Segment by segment, by the book."""
    cu_q, cu_k = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
    query, key, value = (x[0] for x in qkv[:3])
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
    parts = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        path = batch["tree_kv_index"][c:d]
        scores = query[:, a:b] @ key[:, path].transpose(1, 2) * (scaling or D**-0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (age >= 0) & (age < (sliding_window or d))
        scores = scores.masked_fill(~seen, -torch.inf)
        if len(qkv) == 4:
            scores = torch.cat((scores, qkv[3][:, None, None].expand(-1, b - a, 1)), dim=2)
        parts.append(scores.softmax(-1)[..., : d - c] @ value[:, path])
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


def with_gradients(fn, qkv, *args, **options):
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = fn(qkv, *args, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return out, *torch.autograd.grad(out, qkv, weights.to(out.dtype))


def assert_exact(qkv, batch, backend="auto", **options):
    actual = with_gradients(attend, qkv, batch, backend=backend, **options)
    same_dtype = with_gradients(reference, qkv, batch, **options)
    exact = with_gradients(reference, [x.double() for x in qkv], batch, **options)
    assert_all_accurate(actual, same_dtype, exact)


def assert_all_accurate(*results):
    for name, *tensors in zip(("out", "dquery", "dkey", "dvalue", "dsinks")[: len(results[0])], *results, strict=True):
        assert_as_accurate(*(x.flatten() for x in tensors), name)  # as a whole: dquery of a path's first row is 0


OPTIONS = [
    pytest.param({}, id="full"),
    pytest.param({"scaling": 0.4}, id="scaling"),
    pytest.param({"sliding_window": 5}, id="window"),
    pytest.param({"sliding_window": 2}, id="smallest-window"),
    pytest.param({"sliding_window": 500}, id="window-beyond-all"),
]


PLAIN = [
    pytest.param({"softcap": 3.0}, False, id="softcap"),
    pytest.param({"softcap": 3.0, "sliding_window": 5, "scaling": 0.4}, False, id="softcap-window"),
    pytest.param({}, True, id="sinks"),
    pytest.param({"sliding_window": 5}, True, id="sinks-window"),
    pytest.param({"softcap": 3.0, "sliding_window": 2}, True, id="all"),
]

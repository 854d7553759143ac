"""fastdpo.model.attention.backends and attention_paths: what each backend is given, and which one a layer gets.

varlen and flash run on CUDA alone; here stand-ins with the signatures of their versions compute what they document.
"""

import inspect
import logging
from itertools import pairwise

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.attention import backends, key_paths, registered
from fastdpo.model.attention.key_paths import _buckets, gather
from tests.helpers.attention import (
    OPTIONS,
    D,
    assert_all_accurate,
    assert_exact,
    attend,
    make_qkv,
    reference,
    with_gradients,
)
from tests.helpers.tiny import PAIRS, make_pairs

CUDA = torch.device("cuda")


def by_the_book(query, key, value, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, 0), softcap=0.0):
    """Causal with the diagonal at the bottom right, as both packages document it."""
    assert window_size[1] == 0
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    assert (q_bounds[-1], k_bounds[-1]) == (len(query), len(key))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = []
    for a, b, c, d in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        age = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (age >= 0) & (age <= (window_size[0] if window_size[0] >= 0 else d))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * (scale or query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value[c:d]))
    return torch.cat(parts)


def first_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return by_the_book(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    assert is_causal
    return by_the_book(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return by_the_book(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]  # otherwise the real one raises
    return by_the_book(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def flash(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return by_the_book(q, k, v, *bounds, softmax_scale, window_size, softcap)


def flash_2_5(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return by_the_book(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size)


def install(monkeypatch, varlen=None, flash=None):
    """Have these, on a machine with a GPU, instead of what is there."""
    for name, function in (("varlen", varlen), ("flash", flash)):
        monkeypatch.setattr(backends, f"_{name}_attn", function)
        monkeypatch.setattr(backends, f"_{name.upper()}", backends._parameters(function))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def force(monkeypatch, name):
    monkeypatch.setattr(backends, "choose_backend", lambda *args, **kwargs: (name, ""))
    monkeypatch.setattr(backends, "_grid", None)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_varlen_matches_each_path_alone(options, layout, monkeypatch):
    install(monkeypatch, varlen=varlen_2_12)
    force(monkeypatch, "varlen")
    batch = shared_prefix_batch(PAIRS, layout=layout)
    assert_exact(make_qkv(batch), batch, **options)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (first_varlen, {}),
        (varlen_2_10, {"scaling": 0.4}),
        (varlen_2_11, {"scaling": 0.4, "sliding_window": 5}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_older_varlen_matches_each_path_alone(function, options, monkeypatch):
    install(monkeypatch, varlen=function)
    force(monkeypatch, "varlen")
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch), batch, **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "sliding_window": 5, "scaling": 0.4}], ids=["full", "all"])
def test_flash_matches_each_path_alone(options, monkeypatch):
    install(monkeypatch, flash=flash)
    force(monkeypatch, "flash")
    batch = shared_prefix_batch(PAIRS)
    assert_exact(make_qkv(batch), batch, **options)


def test_varlen_is_called_as_the_installed_torch_declares_it():
    declared = inspect.signature(varlen_attn)
    assert list(declared.parameters)[:7] == list(inspect.signature(varlen_2_12).parameters)[:7]
    bound = declared.bind("q", "k", "v", 0, 1, 2, 3, **backends._varlen_options(0.5, (4, 0))).arguments
    assert (bound["scale"], bound["window_size"]) == (0.5, (4, 0))


# One call computes a layer: parts merged by their log-sum-exp would have a wrong gradient, for the backward of
# varlen_attn ignores the one of the log-sum-exp.


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_a_layer_is_one_call_that_is_asked_for_no_lse(name, monkeypatch):
    calls = []

    def varlen(*args, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
        calls.append(return_aux)
        return varlen_2_12(*args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    def flash_once(*args, return_attn_probs=None, **options):
        calls.append(return_attn_probs)
        return flash(*args, **options)

    install(monkeypatch, varlen=varlen, flash=flash_once)
    force(monkeypatch, name)
    batch = shared_prefix_batch(PAIRS)
    attend(make_qkv(batch), batch)
    assert calls == [None]


# The choice

BF16 = torch.bfloat16


def choice(backend="auto", device=CUDA, heads=4, D=16, D_value=None, dtype=BF16, **options):
    query, value = (torch.zeros(5, heads, d, dtype=dtype) for d in (D, D_value or D))
    options = {"scaling": None, "window": None, "softcap": None, "sinks": None} | options
    return backends.choose_backend(backends.usable(backend, device), query, value, **options)


@pytest.mark.parametrize(
    ("case", "expected", "against"),
    [
        ({}, "varlen", ""),
        ({"window": 4, "scaling": 0.3, "D": 256}, "varlen", ""),
        ({"dtype": torch.float16}, "varlen", ""),
        ({"softcap": 30.0}, "flash", "not varlen: it does not know soft-caps"),
        ({"sinks": torch.zeros(4)}, "grid", "not flash: it does not know attention sinks"),
        (
            {"dtype": torch.float32},
            "grid",
            "not varlen: it takes bfloat16 or float16 (bf16=True), not float32; not flash: it takes",
        ),
        ({"D": 264}, "grid", "heads of 264 and 264 are not of one size, a multiple of 8 and at most 256"),
        ({"D": 12}, "grid", "heads of 12 and 12"),
        ({"D": 192, "D_value": 128}, "grid", "heads of 192 and 128"),
        ({"device": torch.device("cpu")}, "grid", "not varlen: it runs on CUDA, not on cpu; not flash: it runs on"),
        ({"backend": "flash"}, "flash", ""),
        ({"backend": "grid"}, "grid", ""),
    ],
    ids=lambda x: "-".join(map(str, x)) or "plain" if isinstance(x, dict) else "",
)
def test_auto_takes_the_first_that_can(case, expected, against, monkeypatch):
    install(monkeypatch, varlen=varlen_2_12, flash=flash)
    name, reasons = choice(**case)
    assert name == expected
    assert against in reasons


@pytest.mark.parametrize(
    ("installed", "case", "expected", "against"),
    [
        ({}, {}, "grid", "this torch has no torch.nn.attention.varlen; not flash: the flash_attn package is not inst"),
        ({"flash": flash}, {}, "flash", "this torch has no torch.nn.attention.varlen"),
        ({"flash": flash_2_5}, {"softcap": 30.0}, "grid", "not flash: it does not know soft-caps"),
        ({"varlen": varlen_2_10}, {}, "varlen", ""),
        ({"varlen": varlen_2_10}, {"scaling": 0.3}, "varlen", ""),
        ({"varlen": varlen_2_10}, {"window": 4}, "grid", "not varlen: this version does not know windows"),
        ({"varlen": first_varlen}, {"scaling": 0.25}, "varlen", ""),
        ({"varlen": first_varlen}, {"scaling": 0.3}, "grid", "not varlen: this version does not know a scale"),
    ],
    ids=["none", "flash-alone", "old-flash", "2.10", "2.10-scale", "2.10-window", "first-scale", "first-other-scale"],
)
def test_auto_knows_what_the_installed_versions_can(installed, case, expected, against, monkeypatch):
    install(monkeypatch, **installed)
    name, reasons = choice(**case)
    assert name == expected
    assert against in reasons


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"backend": "flex"}, "attention_backend must be one of auto, varlen, flash, grid, got 'flex'"),
        ({"backend": "varlen", "device": torch.device("cpu")}, "'varlen' cannot be used: it runs on CUDA, not on cpu"),
        ({"backend": "flash"}, "'flash' cannot be used: the flash_attn package is not installed"),
        ({"backend": "varlen", "softcap": 30.0}, "'varlen' cannot be used: it does not know soft-caps"),
        (
            {"backend": "varlen", "dtype": torch.float32},
            "'varlen' cannot be used: it takes bfloat16 or float16 .*, not float32",
        ),
    ],
    ids=["unknown", "cpu", "not-installed", "softcap", "float32"],
)
def test_a_backend_that_cannot_be_had_raises(case, message, monkeypatch):
    install(monkeypatch, varlen=varlen_2_12)
    with pytest.raises(ValueError, match=message):
        choice(**case)


def test_old_gpus_and_rocm_have_no_varlen(monkeypatch):
    install(monkeypatch, varlen=varlen_2_12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice()[1].startswith("not varlen: the GPU is older than Ampere")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert choice()[1].startswith("not varlen: it runs on CUDA, not on ROCm")


def test_the_choice_travels_with_the_batch():
    batch = shared_prefix_batch(PAIRS)
    with pytest.raises(ValueError, match="'varlen' cannot be used"):
        registered.layer_kwargs(batch, "varlen")
    assert registered.layer_kwargs(batch, "grid")["tree_backends"].backend == "grid"


def test_each_choice_is_logged_once(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fastdpo")
    registered._say.cache_clear()
    install(monkeypatch, varlen=varlen_2_12)
    batch = shared_prefix_batch(PAIRS)
    qkv = make_qkv(batch)
    for _ in range(3):
        attend(qkv, batch)
    ours = "attention of SimpleNamespace: torch's scaled_dot_product_attention, on sequences of similar length together"
    assert caplog.messages == [ours]  # on a CPU nothing else could be had, so nothing is said of it
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    force(monkeypatch, "varlen")
    attend(qkv, batch)
    assert caplog.messages[1:] == [
        "attention of SimpleNamespace: torch's FlashAttention, on sequences of any length (FA3)"
    ]
    registered._say("Layer", "grid", "not varlen: it takes no float32; not flash: it is not installed")
    assert caplog.messages[2].endswith(
        "; not torch's FlashAttention: it takes no float32; not flash_attn's: it is not installed"
    )


# What is gathered


def paths_of(batch):
    return registered.layer_kwargs(batch)["tree_paths"]


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_gathers_are_index_select_and_their_backwards_index_add(layout):
    paths = paths_of(shared_prefix_batch(PAIRS, layout=layout))
    T = len(paths.grid_back)
    x = torch.randn(T, 2, 3, dtype=torch.float64, requires_grad=True)
    used = torch.zeros(len(paths.grid), dtype=torch.bool)
    used[paths.grid_order] = True  # the rest is padding, without a gradient
    own = torch.zeros(len(paths.query_grid), dtype=torch.bool)
    own[paths.query_back] = True
    for index, order, bounds, mask in (
        (paths.kv_index, paths.order, paths.bounds, None),
        (paths.grid, paths.grid_order, paths.bounds, used),
        (paths.query_grid, paths.query_back, None, own),
    ):
        out = gather(x, index, order, bounds)
        assert torch.equal(out, x[index])
        upstream = torch.randn(out.shape, dtype=torch.float64)
        if mask is not None:
            upstream *= mask[:, None, None]
        (actual,) = torch.autograd.grad(out, x, upstream)
        expected = torch.zeros_like(x).index_add(0, index, upstream)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def nodes_of(grad_fn):
    seen, waiting = {grad_fn}, [grad_fn]
    while waiting:
        further = {node for node, _ in waiting.pop().next_functions if node} - seen
        seen |= further
        waiting += further
    return [node.name() for node in seen]


@pytest.mark.parametrize("backend", ["varlen", "grid"])
def test_no_backward_adds_where_rows_meet(backend, monkeypatch):
    """index_select's backward is index_add, atomic on CUDA; the grid's output is selected by distinct places."""
    if backend == "varlen":
        install(monkeypatch, varlen=lambda q, k, v, *bounds, **options: k.sum(0) + v.sum(0) + q[:, :2])
        force(monkeypatch, backend)
    batch = shared_prefix_batch(PAIRS)
    names = nodes_of(attend(make_qkv(batch), batch).grad_fn)
    assert sum("_Gather" in name for name in names) == {"varlen": 2, "grid": 3}[backend]
    assert sum("IndexSelect" in name for name in names) == {"varlen": 0, "grid": 1}[backend]
    assert not [name for name in names if "IndexPut" in name or "IndexBackward" in name or "Embedding" in name]


# The grid


@pytest.mark.parametrize("seed", range(4))
def test_buckets_hold_every_path_once(seed):
    lengths = torch.randint(1, 40, (4, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = shared_prefix_batch(make_pairs([(a, 0, b, c) for a, b, c in lengths]))
    paths = paths_of(batch)
    assert len({(length, q) for (_, length), q in zip(paths.shapes, paths.queries, strict=True)}) == len(paths.shapes)
    assert sum(s for s, _ in paths.shapes) == len(batch["tree_cu_seqlens_q"]) - 1
    assert len(set(paths.grid_order.tolist())) == len(paths.kv_index)
    assert torch.equal(paths.grid[paths.grid_order], paths.kv_index[paths.order])
    assert paths.grid[paths.grid_back].tolist() == list(range(len(paths.grid_back)))
    # a path is in one row of its bucket, from the row's first place on
    starts, first = [], 0
    for s, length in paths.shapes:
        starts += [(first + i * length, length) for i in range(s)]
        first += s * length
    bounds = batch["tree_cu_seqlens_k"].tolist()
    expected = sorted(tuple(batch["tree_kv_index"][a:b].tolist()) for a, b in pairwise(bounds))
    rows = [paths.grid[a : a + length].tolist() for a, length in starts]
    assert sorted(tuple(r[: len(p)]) for p in expected for r in rows if tuple(r[: len(p)]) == p) == expected


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([7, 7, 7], ((3, 7),)),
        ([5, 1000, 5, 5], ((1, 1000), (3, 5))),
        ([100, 99, 98, 97], ((4, 100),)),
        ([1], ((1, 1),)),
        ([10, 400, 90, 11, 400, 2000, 95], ((1, 2000), (2, 400), (4, 95))),
    ],
)
def test_buckets_are_few_and_of_like_length(lengths, shapes):
    assert _buckets(lengths)[0] == shapes


def test_lengths_in_the_batch_make_buckets_on_any_device():
    """Without them a device other than the CPU gets one bucket; meta stands for it."""
    batch = shared_prefix_batch(make_pairs([(5, 0, 90, 3), (4, 0, 3, 9)]))
    lengths = batch.pop("tree_seqlens_k")
    assert lengths == batch["tree_cu_seqlens_k"].diff().tolist()
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    assert paths_of(on_meta).shapes == ((len(lengths), max(lengths)),)
    assert paths_of(on_meta | {"tree_seqlens_k": lengths}).shapes == ((1, 95), (4, 13))


@pytest.mark.parametrize(("softcap", "backend"), [(None, "grid"), (3.0, "grid"), (None, "varlen")])
def test_nothing_waits_for_the_device(softcap, backend, monkeypatch):
    """On the meta device a number that the host asks for raises."""
    if backend == "varlen":
        install(
            monkeypatch, varlen=lambda q, k, v, *bounds, **options: q + k.sum(0).repeat(2, 1) + v.sum(0).repeat(2, 1)
        )
        force(monkeypatch, backend)
    batch = shared_prefix_batch(PAIRS)
    qkv = [x.detach().to("meta").requires_grad_() for x in make_qkv(batch, sinks=softcap is not None)]
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    out = attend(qkv, on_meta, softcap=softcap)
    assert [x.shape for x in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]


def test_one_bucket_computes_the_same(monkeypatch):
    batch = shared_prefix_batch(make_pairs([(5, 0, 90, 3), (4, 0, 3, 9)]))
    qkv = make_qkv(batch)
    bucketed = with_gradients(attend, qkv, batch)
    assert len(paths_of(batch).shapes) > 1

    def one(lengths, own):
        starts = [i * max(lengths) for i in range(len(lengths))]
        firsts = [start + n - q for start, n, q in zip(starts, lengths, own, strict=True)]
        return ((len(lengths), max(lengths)),), starts, (max(lengths),), firsts

    monkeypatch.setattr("fastdpo.model.attention.key_paths._own_buckets", one)
    assert len(paths_of(batch).shapes) == 1
    for a, b in zip(bucketed, with_gradients(attend, qkv, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 7}, {"softcap": 3.0}, {"sliding_window": 7, "sinks": True}], ids=str
)
@pytest.mark.parametrize("layout", ["shared", "tree"])
def test_a_short_branch_of_a_long_prompt_computes_its_own_queries_alone(layout, options):
    """The prompt's queries are the trunk's; two branches of a bucket begin at different places of their paths."""
    options = dict(options)
    batch = shared_prefix_batch(make_pairs([(90, 0, 9, 4), (84, 3, 5, 21), (5, 0, 2, 3)]), layout=layout)
    qkv = make_qkv(batch, sinks=options.pop("sinks", False))
    paths = paths_of(batch)
    shares = [q / length for q, (_, length) in zip(paths.queries, paths.shapes, strict=True)]
    assert min(shares) < 0.5
    assert max(shares) == 1
    assert torch.equal(paths.query_grid[paths.query_back], torch.arange(len(paths.query_back)))
    assert_exact(qkv, batch, **options)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 19}, {"softcap": 3.0}, {"sliding_window": 19, "sinks": True}], ids=str
)
@pytest.mark.parametrize("layout", ["shared", "tree", "packed"])
def test_few_queries_at_a_time_see_the_same(layout, options, monkeypatch):
    """Trunks of 67 and 52 rows, and branches of 38 and 3; of the scores, few are computed that nobody needs."""
    options = dict(options)
    batch = shared_prefix_batch(make_pairs([(41, 2, 25, 36), (50, 0, 3, 3)]), layout=layout, pad_to_multiple_of=1)
    qkv = make_qkv(batch, sinks=options.pop("sinks", False))
    monkeypatch.setattr(backends, "MOST_QUERIES", 16)
    for module in (backends, key_paths):  # these paths are so short that filling them would add most of the scores
        monkeypatch.setattr(module, "ROUNDING", 8)
    computed = []

    def counted(query, key, value, **kwargs):
        computed.append(query.shape[0] * query.shape[2] * key.shape[2])
        return sdpa(query, key, value, **kwargs)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    assert_exact(qkv, batch, **options)
    if not options:
        computed.clear()
        attend(qkv, batch)
        paths, own = (batch[f"tree_cu_seqlens_{x}"].diff() for x in "kq")
        assert sum(computed) < 0.8 * (paths * own).sum() + 16 * own.sum()


def test_scores_are_never_all_there_at_once(monkeypatch):
    """Neither in the forward nor in the backward, and nothing of their size is kept in between."""
    monkeypatch.setattr(backends, "SCORES", 4000)
    batch = shared_prefix_batch(make_pairs([(40, 0, 60, 50)]))
    qkv = make_qkv(batch, sinks=True)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Sizes():
        with_gradients(attend, qkv, batch, softcap=3.0)
    rows = sum(s * length for s, length in paths_of(batch).shapes)
    assert largest <= max(4000, rows * 4 * D)


def test_head_sizes_beyond_256_are_exact():
    batch = shared_prefix_batch(PAIRS)
    T = batch["input_ids"].shape[1]
    query, key, value = (torch.randn(1, h, T, 320) for h in (2, 1, 1))
    scaling = 320**-0.5
    out = attend((query, key, value), batch, scaling=scaling)
    exact = reference([x.double() for x in (query, key, value)], batch, scaling=scaling)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_varlen_on_cuda_matches_the_grid(options, device):
    batch = shared_prefix_batch(PAIRS)
    qkv = [torch.randn(1, h, batch["input_ids"].shape[1], 16) for h in (4, 2, 2)]
    exact = with_gradients(reference, [x.bfloat16().double() for x in qkv], batch, scaling=0.25, **options)
    same_dtype = with_gradients(attend, [x.bfloat16() for x in qkv], batch, **options)
    batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    actual = with_gradients(attend, [x.bfloat16().to(device) for x in qkv], batch, "varlen", **options)
    assert_all_accurate([x.cpu() for x in actual], same_dtype, exact)


@pytest.mark.gpu
def test_gradients_on_cuda_are_the_same_every_time(device):
    batch = shared_prefix_batch(PAIRS)
    batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    qkv = [x.detach().to(device) for x in make_qkv(batch)]
    first = with_gradients(attend, qkv, batch)
    for _ in range(5):
        assert all(map(torch.equal, first, with_gradients(attend, qkv, batch)))

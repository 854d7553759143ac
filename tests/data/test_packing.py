"""fastdpo.data.packing: the rows of a batch against the sequences it was made of."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdpo.data.packing import LAYOUTS, rows_of, shared_prefix_batch

TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
token_ids = st.lists(st.integers(0, 3), min_size=1, max_size=9)  # few values: common starts of all lengths
ids_of = {name: token_ids for name in ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "kl_ids")}


def fields(*names, **others):
    return st.fixed_dictionaries({name: ids_of[name] for name in names} | others)


KINDS = {
    "preference": fields("prompt_ids", "chosen_ids", "rejected_ids"),
    "ranked": fields("prompt_ids", ranked_ids=st.lists(token_ids, min_size=2, max_size=4)),
    "unpaired": fields("prompt_ids", "completion_ids", label=st.booleans()),
    "unpaired-kl": fields("prompt_ids", "completion_ids", "kl_ids", label=st.booleans()),
}
batches_of = {kind: st.lists(example, min_size=1, max_size=5) for kind, example in KINDS.items()}
examples_of_any_kind = st.one_of(*batches_of.values())
PACKED = [layout for layout in LAYOUTS if layout != "padded"]


def pair(prompt, chosen, rejected, **extra):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **extra}


def responses_of(example):
    if "ranked_ids" in example:
        return example["ranked_ids"]
    return [example[name] for name in ("chosen_ids", "rejected_ids", "completion_ids", "kl_ids") if name in example]


def slots(examples):
    """(example, rank) in the order of the batch's responses: all first ones, then all second ones, ..."""
    ranks = [(k, i) for i, example in enumerate(examples) for k in range(len(responses_of(example)))]
    return [(i, k) for k, i in sorted(ranks)]


def paths(batch):
    """Per segment: the rows of its key path, and how many of them are its own."""
    cu_q, cu_k = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
    kv_index = batch["tree_kv_index"].tolist()
    return [(kv_index[a:b], d - c) for a, b, c, d in zip(cu_k[:-1], cu_k[1:], cu_q[:-1], cu_q[1:], strict=True)]


def tokens_and_positions(batch):
    return batch["input_ids"].flatten().tolist(), batch["position_ids"].flatten().tolist()


def trunk_of(example):
    """Length of the common prefix of the full sequences, such that each keeps a token; 1 if there is but one."""
    prompt, responses = example["prompt_ids"], responses_of(example)
    shortest = min(map(len, responses)) - 1
    common = next((n for n in range(shortest) if len({response[n] for response in responses}) > 1), shortest)
    return len(prompt) + common if len(responses) > 1 else 1


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind, layout=st.sampled_from(PACKED))
def test_every_sequence_can_be_rebuilt(examples, layout):
    batch = shared_prefix_batch(examples, layout=layout)
    tokens, positions = tokens_and_positions(batch)
    by_last_row = {path[-1]: path for path, _ in paths(batch)}
    seen = []
    for r, (i, k) in enumerate(slots(examples)):
        prompt, response = examples[i]["prompt_ids"], responses_of(examples[i])[k]
        start, end = batch["cu_target"][r : r + 2].tolist()
        assert batch["target_ids"][start:end].tolist() == response
        rows = batch["logit_index"][start:end].tolist()
        path = by_last_row[rows[-1]]
        assert rows == path[len(prompt) - 1 :]
        assert [tokens[row] for row in path] == (prompt + response)[:-1]
        assert [positions[row] for row in path] == list(range(len(path)))
        seen += path
    assert r + 2 == len(batch["cu_target"])
    assert set(seen) == set(range(batch["num_packed_tokens"]))  # every row serves a sequence


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind, multiple=st.sampled_from([1, 4, 64]))
def test_padded_rows_are_the_sequences(examples, multiple):
    batch = shared_prefix_batch(examples, layout="padded", pad_to_multiple_of=multiple)
    L = batch["input_ids"].shape[1]
    lengths = []
    for r, (i, k) in enumerate(slots(examples)):
        prompt, response = examples[i]["prompt_ids"], responses_of(examples[i])[k]
        full = (prompt + response)[:-1]
        filling = [0] * (L - len(full))
        assert batch["input_ids"][r].tolist() == full + filling
        assert batch["position_ids"][r].tolist() == list(range(len(full))) + filling
        assert batch["attention_mask"][r].tolist() == [1] * len(full) + filling
        start, end = batch["cu_target"][r : r + 2].tolist()
        assert batch["target_ids"][start:end].tolist() == response
        assert batch["logit_index"][start:end].tolist() == [r * L + p for p in range(len(prompt) - 1, len(full))]
        lengths.append(len(full))
    assert len(batch["input_ids"]) == len(lengths)
    assert math.ceil(max(lengths) / min(multiple, 8)) * min(multiple, 8) == L
    assert batch["num_packed_tokens"] == sum(lengths)
    assert not [name for name in batch if name.startswith("tree_")]


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind, layout=st.sampled_from(PACKED), multiple=st.sampled_from([1, 8, 64]))
def test_bounds_fit_together(examples, layout, multiple):
    batch = shared_prefix_batch(examples, layout=layout, pad_to_multiple_of=multiple)
    segments = paths(batch)
    row = 0
    for path, own in segments:
        assert own > 0
        assert path[len(path) - own :] == list(range(row, row + own))  # own rows end the path, in order
        row += own
    T = row
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, T)
    assert T % multiple == 0
    assert T - batch["num_packed_tokens"] == -batch["num_packed_tokens"] % multiple
    assert batch["tree_max_seqlen_q"] == max(own for _, own in segments)
    assert batch["tree_max_seqlen_k"] == max(len(path) for path, _ in segments)
    assert batch["logit_index"].max() < batch["num_packed_tokens"]  # nothing is scored from the filling


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind)
def test_paths_of_a_tree_are_chains_of_whole_segments(examples):
    """What layers with a state need: a segment begins in the state that the segment before it in its path ends in."""
    batch = shared_prefix_batch(examples, layout="tree", pad_to_multiple_of=1)
    bounds = batch["tree_cu_seqlens_q"].tolist()
    segments = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    whole = {tuple(segment) for segment in segments}
    for segment, (path, own) in zip(segments, paths(batch), strict=True):
        before = tuple(path[: len(path) - own])
        assert not before or before in whole
        assert not before or before[-1] < segment[0]  # parents come first
    branches = sum(len(responses_of(example)) for example in examples)
    trunks = sum(trunk_of(example) > 1 for example in examples)
    assert len(segments) == branches + trunks


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind)
def test_shares_the_longest_common_prefix(examples):
    expected = 0
    for example in examples:
        responses = responses_of(example)
        branch = trunk_of(example) - 1
        own = [len(example["prompt_ids"]) + len(response) - 1 - branch for response in responses]
        expected += branch + sum(own)
    for layout in ("shared", "tree"):
        assert shared_prefix_batch(examples, layout=layout)["num_packed_tokens"] == expected


@settings(TIMELESS, max_examples=50)
@given(examples=examples_of_any_kind, layout=st.sampled_from(PACKED))
def test_rows_of_an_example_are_those_it_takes(examples, layout):
    arrays = [
        {name: ids if name in ("label", "ranked_ids") else np.array(ids) for name, ids in example.items()}
        for example in examples
    ]
    rows = [rows_of(example, layout) for example in examples]
    assert sum(rows) == shared_prefix_batch(examples, layout=layout)["num_packed_tokens"]
    assert rows == [rows_of(example, layout) for example in arrays]


def test_rows_of_a_padded_example_are_those_it_takes_alone():
    example = pair([1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12])
    assert rows_of(example, "padded") == 2 * 16
    assert shared_prefix_batch([example], layout="padded")["input_ids"].numel() == 2 * 16


def test_the_picture_in_the_docstring():
    batch = shared_prefix_batch([pair([10, 11, 12], [20, 21, 22, 23], [30, 31, 32])], pad_to_multiple_of=1)
    assert tokens_and_positions(batch) == ([10, 11, 12, 20, 21, 22, 12, 30, 31], [0, 1, 2, 3, 4, 5, 2, 3, 4])
    assert batch["tree_kv_index"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 8]
    assert batch["tree_cu_seqlens_q"].tolist() == [0, 6, 9]
    assert batch["tree_cu_seqlens_k"].tolist() == [0, 6, 11]
    assert batch["logit_index"].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch["target_ids"].tolist() == [20, 21, 22, 23, 30, 31, 32]
    assert batch["num_packed_tokens"] == 3 + 4 + 3 - 1


def test_a_common_start_of_the_responses_is_computed_once_and_scored_twice():
    batch = shared_prefix_batch([pair([10, 11], [20, 21, 22], [20, 21, 32, 33])], pad_to_multiple_of=1)
    assert tokens_and_positions(batch) == ([10, 11, 20, 21, 21, 32], [0, 1, 2, 3, 3, 4])
    assert batch["logit_index"].tolist() == [1, 2, 3, 1, 2, 4, 5]
    assert batch["target_ids"].tolist() == [20, 21, 22, 20, 21, 32, 33]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [([7, 8], [7, 8]), ([7], [7, 8, 9]), ([7, 8, 9], [7])],
    ids=["equal", "chosen-begins-rejected", "rejected-begins-chosen"],
)
def test_each_response_keeps_a_token_of_its_own(chosen, rejected):
    batch = shared_prefix_batch([pair([5], chosen, rejected)])
    own = [own for _, own in paths(batch)]
    assert min(own[:2]) >= 1
    assert batch["target_ids"].tolist() == chosen + rejected


def test_the_tree_in_the_docstring():
    pairs = [pair([10, 11, 12], [20, 21, 22, 23], [30, 31, 32])]
    batch = shared_prefix_batch(pairs, layout="tree", pad_to_multiple_of=1)
    assert tokens_and_positions(batch) == ([10, 11, 12, 20, 21, 22, 12, 30, 31], [0, 1, 2, 3, 4, 5, 2, 3, 4])
    assert batch["tree_kv_index"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 8]
    assert batch["tree_cu_seqlens_q"].tolist() == [0, 2, 6, 9]
    assert batch["tree_cu_seqlens_k"].tolist() == [0, 2, 8, 13]
    assert batch["logit_index"].tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_ranked_responses_share_one_trunk():
    example = {"prompt_ids": [1, 2, 3], "ranked_ids": [[4, 5], [4, 6, 7], [4, 8]]}
    batch = shared_prefix_batch([example], pad_to_multiple_of=1)
    tokens, _ = tokens_and_positions(batch)
    rebuilt = [[tokens[row] for row in path] for path, _ in paths(batch)]
    assert rebuilt == [[1, 2, 3, 4], [1, 2, 3, 4, 6], [1, 2, 3, 4]]
    assert batch["num_packed_tokens"] == 4 + 2 + 1


def test_ranked_examples_say_where_their_responses_are():
    examples = [
        {"prompt_ids": [1], "ranked_ids": [[10], [11]]},
        {"prompt_ids": [2], "ranked_ids": [[20], [21], [22], [23]]},
        {"prompt_ids": [3], "ranked_ids": [[30], [31], [32]]},
    ]
    batch = shared_prefix_batch(examples)
    assert batch["target_ids"].tolist() == [10, 20, 30, 11, 21, 31, 22, 32, 23]
    assert batch["response_index"].tolist() == [[0, 3, 9, 9], [1, 4, 6, 8], [2, 5, 7, 9]]
    assert batch["response_index"].dtype == torch.int64


def test_unpaired_examples_have_labels_and_kl_completions_last():
    examples = [
        {"prompt_ids": [1], "completion_ids": [10, 11], "kl_ids": [20], "label": True},
        {"prompt_ids": [2], "completion_ids": [20], "kl_ids": [10, 11], "label": False},
    ]
    batch = shared_prefix_batch(examples)
    assert batch["target_ids"].tolist() == [10, 11, 20, 20, 10, 11]
    assert batch["label"].tolist() == [True, False]
    assert batch["label"].dtype == torch.bool
    alone = shared_prefix_batch([{key: ids for key, ids in e.items() if key != "kl_ids"} for e in examples])
    assert alone["target_ids"].tolist() == [10, 11, 20]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_the_examples_are_carried(layout):
    numbers = [{"weight": 0.0, "margin": -1.5, "beta": 0.1}, {"weight": 2, "margin": 0.5, "beta": 0.2}]
    batch = shared_prefix_batch([pair([1], [2], [3], **each) for each in numbers], layout=layout)
    for field in ("weight", "margin", "beta"):
        assert batch[field].dtype == torch.float32
        assert batch[field].tolist() == pytest.approx([each[field] for each in numbers])
    assert not {"weight", "margin", "beta"} & set(shared_prefix_batch([pair([1], [2], [3])]))


def test_token_counts_are_of_full_sequences():
    batch = shared_prefix_batch([pair([1, 2, 3], [4, 5], [6]), pair([1], [2], [3])])
    assert batch["num_tokens"] == 5 + 4 + 2 + 2
    assert batch["num_padded_tokens"] == 4 * 5


def test_references_are_ordered_as_the_responses():
    pairs = [pair([1], [2], [3], ref_chosen_logps=-float(i), ref_rejected_logps=-10.0 - i) for i in range(3)]
    batch = shared_prefix_batch(pairs)
    assert batch["ref_logps"].tolist() == [0, -1, -2, -10, -11, -12]
    assert batch["ref_logps"].dtype == torch.float32
    assert "ref_logps" not in shared_prefix_batch([pair([1], [2], [3])])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_references_are_in_the_order_of_the_targets(layout):
    """They lie beside the tokens they belong to, whatever the kind."""

    def logp(token):
        return -token - 0.5

    ranked = [
        {"prompt_ids": [1], "ranked_ids": [[10, 11], [12]]},
        {"prompt_ids": [2], "ranked_ids": [[20], [21, 22], [23]]},
    ]
    unpaired = [{"prompt_ids": [1], "completion_ids": [10, 11], "label": True}]
    for examples in (ranked, unpaired, [pair([1], [10], [11, 12]), pair([1], [13, 14], [15])]):
        for example in examples:
            example["ref_token_logps"] = [[logp(token) for token in ids] for ids in responses_of(example)]
        batch = shared_prefix_batch(examples, layout=layout)
        assert batch["ref_token_logps"].tolist() == [logp(token) for token in batch["target_ids"].tolist()]
        assert batch["ref_token_logps"].dtype == torch.float32


def test_pair_index_is_given_or_counted():
    assert shared_prefix_batch([pair([1], [2], [3], pair_index=17)])["pair_index"].tolist() == [17]
    assert shared_prefix_batch([pair([1], [2], [3])] * 2)["pair_index"].tolist() == [0, 1]


def test_dtypes_are_what_the_kernels_take():
    batch = shared_prefix_batch([pair([1], [2], [3], ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)])
    dtypes = {name: value.dtype if isinstance(value, torch.Tensor) else type(value) for name, value in batch.items()}
    assert dtypes == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "tree_cu_seqlens_q": torch.int32,
        "tree_cu_seqlens_k": torch.int32,
        "tree_kv_index": torch.int64,
        "tree_seqlens_k": list,
        "tree_max_seqlen_q": int,
        "tree_max_seqlen_k": int,
        "logit_index": torch.int64,
        "target_ids": torch.int64,
        "cu_target": torch.int64,
        "ref_logps": torch.float32,
        "pair_index": torch.int64,
        "chosen": torch.int64,
        "rejected": torch.int64,
        "num_sequences": int,
        "num_targets": int,
        "num_tokens": int,
        "num_padded_tokens": int,
        "num_packed_tokens": int,
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param({"prompt_ids": []}, "pair_index 7: prompt_ids must not be empty", id="empty-prompt"),
        pytest.param({"chosen_ids": []}, "pair_index 7: chosen_ids must not be empty", id="empty-completion"),
        pytest.param({"rejected_ids": [1, 2.5]}, "pair_index 7: rejected_ids must be a list of ints", id="float"),
        pytest.param({"rejected_ids": [1, None]}, "pair_index 7: rejected_ids must be a list of ints", id="none"),
        pytest.param({"chosen_ids": "text"}, "pair_index 7: chosen_ids must be a list of ints", id="text"),
        pytest.param({"chosen_ids": None}, "pair_index 7: chosen_ids must be a list of ints", id="no-list"),
        pytest.param({"chosen_ids": [2**63]}, "pair_index 7: chosen_ids must be a list of ints", id="too-large"),
        pytest.param({"prompt_ids": [4, -100]}, "pair_index 7: prompt_ids must not be negative, got -100", id="label"),
        pytest.param({"ref_chosen_logps": -1.0}, "pair_index 7: ref_chosen_logps is given", id="ref-of-some"),
        pytest.param({"ref_token_logps": [[-1.0], [-1.0]]}, "pair_index 7: ref_token_logps is given", id="tokens-some"),
        pytest.param({"weight": 1.0}, "pair_index 7: weight is given, but the first example lacks it", id="weight"),
        pytest.param({"pair_index": "7"}, "example 1: pair_index must be an int, got '7'", id="pair-index"),
    ],
)
def test_names_the_bad_example_and_field(bad, message):
    with pytest.raises(ValueError, match=message):
        shared_prefix_batch([pair([1], [2], [3]), pair([1], [2], [3], pair_index=7) | bad])


def test_names_a_missing_field():
    with pytest.raises(
        ValueError, match="pair_index 0: rejected_ids is missing; the example has 'prompt_ids', 'chosen_"
    ):
        shared_prefix_batch([{"prompt_ids": [1], "chosen_ids": [2]}])


@pytest.mark.parametrize(
    ("rejected", "message"),
    [(None, "ref_rejected_logps is missing"), (float("nan"), "ref_rejected_logps must be finite, got nan")],
    ids=["missing", "nan"],
)
def test_refuses_half_a_reference(rejected, message):
    with pytest.raises(ValueError, match=message):
        shared_prefix_batch([pair([1], [2], [3], ref_chosen_logps=-1.0, ref_rejected_logps=rejected)])


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("weight", -1.0, "finite and at least 0"),
        ("weight", math.inf, "finite and at least 0"),
        ("weight", "1", "finite and at least 0"),
        ("margin", math.nan, "finite"),
        ("margin", True, "finite"),
        ("beta", 0.0, "finite and above 0"),
        ("beta", math.nan, "finite and above 0"),
    ],
)
def test_refuses_a_number_out_of_range(field, value, wanted):
    pairs = [pair([1], [2], [3], **{field: 1.0}), pair([1], [2], [3], pair_index=7, **{field: value})]
    with pytest.raises(ValueError, match=f"pair_index 7: {field} must be {wanted}, got {value!r}"):
        shared_prefix_batch(pairs)


@pytest.mark.parametrize(
    ("logps", "message"),
    [
        ([[-1.0, -2.0]], r"has lists of \[2\] values, but responses have \[2, 1\] tokens"),
        ([[-1.0], [-2.0]], r"has lists of \[1, 1\] values, but responses have \[2, 1\] tokens"),
        ([[-1.0, -2.0], []], r"has lists of \[2, 0\] values, but responses have \[2, 1\] tokens"),
        ([[-1.0, math.nan], [-3.0]], "must be finite"),
        ([[-1.0, 1e300], [-3.0]], "must be finite"),
        ([-1.0, -2.0], "must be a list of floats for each response"),
        ([[-1.0, None], [-3.0]], "must be a list of floats for each response"),
    ],
    ids=["responses", "short", "empty", "nan", "overflow", "flat", "none"],
)
def test_refuses_token_references_that_do_not_fit(logps, message):
    with pytest.raises(ValueError, match=f"pair_index 7: ref_token_logps {message}"):
        shared_prefix_batch([pair([1], [2, 4], [3], pair_index=7, ref_token_logps=logps)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ranked_ids": [[1]]}, "ranked_ids must be a list of at least two lists of ids"),
        ({"ranked_ids": "text"}, "ranked_ids must be a list of at least two lists of ids, got 'text'"),
        ({"ranked_ids": [[1], []]}, r"ranked_ids\[1\] must not be empty"),
        ({"ranked_ids": [[1], [-2]]}, r"ranked_ids\[1\] must not be negative, got -2"),
        ({"completion_ids": [1]}, "label is missing"),
        ({"completion_ids": [1], "label": 1}, r"label must be True \(desirable\) or False, got 1"),
        ({"completion_ids": [], "label": True}, "completion_ids must not be empty"),
        ({"completion_ids": [1], "label": True, "kl_ids": []}, "kl_ids must not be empty"),
    ],
)
def test_names_the_bad_field_of_other_kinds(bad, message):
    with pytest.raises(ValueError, match=f"pair_index 7: {message}"):
        shared_prefix_batch([{"prompt_ids": [1], "pair_index": 7, **bad}])


def test_refuses_a_mixture_of_kinds():
    unpaired = {"prompt_ids": [1], "completion_ids": [2], "label": True}
    with pytest.raises(ValueError, match="pair_index 1: rejected_ids is missing"):
        shared_prefix_batch([pair([1], [2], [3]), unpaired | {"chosen_ids": [2]}])
    with pytest.raises(ValueError, match="pair_index 1: kl_ids is missing, but the first example has it"):
        shared_prefix_batch([unpaired | {"kl_ids": [3]}, unpaired])


def test_refuses_an_unknown_layout():
    with pytest.raises(ValueError, match="layout must be one of shared, tree, packed, padded, got 'flat'"):
        shared_prefix_batch([pair([1], [2], [3])], layout="flat")


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one example, got none"):
        shared_prefix_batch([])


def test_refuses_a_multiple_of_zero():
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        shared_prefix_batch([pair([1], [2], [3])], pad_to_multiple_of=0)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_few_lengths_are_eight_between_powers_of_two(layout):
    lengths = set()
    for n in range(260, 2000, 37):
        plain = shared_prefix_batch([pair(range(n), [1, 2, 3], [4, 5])], layout=layout)
        batch = shared_prefix_batch([pair(range(n), [1, 2, 3], [4, 5])], layout=layout, few_lengths=True)
        rows = batch["input_ids"].shape[1]
        lengths.add(rows)
        assert plain["input_ids"].shape[1] <= rows <= 1.125 * plain["input_ids"].shape[1]
        for name in ("logit_index", "target_ids", "num_packed_tokens"):
            same = batch[name] == plain[name]
            assert same if name.startswith("num") else same.all() or layout == "padded"
    assert lengths <= {m * 2**k for m in range(8, 17) for k in (5, 6, 7)}


def test_few_lengths_keep_a_larger_multiple():
    for n, rows in ((100, 128), (130, 192), (1030, 1152)):
        batch = shared_prefix_batch([pair(range(n), [1, 2], [4, 5])], few_lengths=True)
        assert batch["input_ids"].shape[1] == rows

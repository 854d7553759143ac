"""fastdpo.packing: the row of tokens against the sequences it was made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.packing import _pack, shared_prefix_batch

token_ids = st.lists(st.integers(0, 3), min_size=1, max_size=9)  # few values: common starts of all lengths
pairs_of_ids = st.lists(
    st.fixed_dictionaries({"prompt_ids": token_ids, "chosen_ids": token_ids, "rejected_ids": token_ids}),
    min_size=1,
    max_size=5,
)


def pair(prompt, chosen, rejected, **extra):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **extra}


def paths(batch):
    """Per segment: the rows of its key path, and how many of them are its own."""
    cu_q, cu_k = batch["tree_cu_seqlens_q"].tolist(), batch["tree_cu_seqlens_k"].tolist()
    kv_index = batch["tree_kv_index"].tolist()
    return [(kv_index[a:b], d - c) for a, b, c, d in zip(cu_k[:-1], cu_k[1:], cu_q[:-1], cu_q[1:], strict=True)]


def rows_of(batch):
    return batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()


@settings(deadline=None)
@given(pairs=pairs_of_ids, prefix_sharing=st.booleans())
def test_every_sequence_can_be_rebuilt(pairs, prefix_sharing):
    batch = shared_prefix_batch(pairs, prefix_sharing=prefix_sharing)
    tokens, positions = rows_of(batch)
    segments = paths(batch)
    sequences = [
        (p["prompt_ids"], p[name]) for name in ("chosen_ids", "rejected_ids") for p in pairs
    ]  # the order of the responses

    seen = []
    for i, (prompt, response) in enumerate(sequences):
        full = prompt + response
        place, example = divmod(i, len(pairs))
        path, _ = segments[2 * example + place]
        assert [tokens[row] for row in path] == full[:-1]
        assert [positions[row] for row in path] == list(range(len(full) - 1))

        start, end = batch["cu_target"][i : i + 2].tolist()
        assert batch["target_ids"][start:end].tolist() == response
        assert batch["logit_index"][start:end].tolist() == path[len(prompt) - 1 :]
        seen += path
    assert set(seen) == set(range(batch["num_packed_tokens"]))  # every row serves a sequence


@settings(deadline=None)
@given(pairs=pairs_of_ids, prefix_sharing=st.booleans(), multiple=st.sampled_from([1, 8, 64]))
def test_bounds_fit_together(pairs, prefix_sharing, multiple):
    batch = shared_prefix_batch(pairs, prefix_sharing=prefix_sharing, pad_to_multiple_of=multiple)
    segments = paths(batch)
    row = 0
    for path, own in segments:
        assert path[len(path) - own :] == list(range(row, row + own))  # own rows end the path, in order
        row += own
    T = row
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, T)
    assert T % multiple == 0
    assert T - batch["num_packed_tokens"] == -batch["num_packed_tokens"] % multiple
    assert batch["tree_max_seqlen_q"] == max(own for _, own in segments)
    assert batch["tree_max_seqlen_k"] == max(len(path) for path, _ in segments)
    assert batch["logit_index"].max() < batch["num_packed_tokens"]  # nothing is scored from the filling


@settings(deadline=None)
@given(pairs=pairs_of_ids)
def test_shares_the_longest_common_prefix(pairs):
    batch = shared_prefix_batch(pairs, pad_to_multiple_of=1)
    expected = 0
    for p in pairs:
        chosen, rejected = (p["prompt_ids"] + p[name] for name in ("chosen_ids", "rejected_ids"))
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        expected += len(chosen) - 1 + len(rejected) - shared
    assert batch["num_packed_tokens"] == expected


def test_the_picture_in_the_docstring():
    batch = shared_prefix_batch([pair([10, 11, 12], [20, 21, 22, 23], [30, 31, 32])], pad_to_multiple_of=1)
    assert rows_of(batch) == ([10, 11, 12, 20, 21, 22, 12, 30, 31], [0, 1, 2, 3, 4, 5, 2, 3, 4])
    assert batch["tree_kv_index"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 8]
    assert batch["tree_cu_seqlens_q"].tolist() == [0, 6, 9]
    assert batch["tree_cu_seqlens_k"].tolist() == [0, 6, 11]
    assert batch["logit_index"].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch["target_ids"].tolist() == [20, 21, 22, 23, 30, 31, 32]
    assert batch["num_packed_tokens"] == 3 + 4 + 3 - 1


def test_a_common_start_of_the_responses_is_computed_once_and_scored_twice():
    batch = shared_prefix_batch([pair([10, 11], [20, 21, 22], [20, 21, 32, 33])], pad_to_multiple_of=1)
    assert rows_of(batch) == ([10, 11, 20, 21, 21, 32], [0, 1, 2, 3, 3, 4])
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


def test_more_responses_than_two_share_the_same_layout():
    prompt, responses = torch.tensor([1, 2, 3]), [torch.tensor(r) for r in ([4, 5], [4, 6, 7], [4, 8])]
    batch = _pack([prompt], [responses], True, 1)
    tokens, _ = rows_of(batch)
    rebuilt = [[tokens[row] for row in path] for path, _ in paths(batch)]
    assert rebuilt == [[1, 2, 3, 4], [1, 2, 3, 4, 6], [1, 2, 3, 4]]
    assert batch["num_packed_tokens"] == 4 + 2 + 1


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
        "tree_max_seqlen_q": int,
        "tree_max_seqlen_k": int,
        "logit_index": torch.int64,
        "target_ids": torch.int64,
        "cu_target": torch.int64,
        "ref_logps": torch.float32,
        "pair_index": torch.int64,
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


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one pair, got none"):
        shared_prefix_batch([])


def test_refuses_a_multiple_of_zero():
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        shared_prefix_batch([pair([1], [2], [3])], pad_to_multiple_of=0)

"""benchmarks.studies.step_profile: what was removed changes no result, and all time of a step belongs to a part."""

import pytest

from benchmarks.studies import step_profile
from fastdpo.data.packing import shared_prefix_batch
from tests.helpers.attention import assert_exact, make_qkv
from tests.helpers.tiny import make_pairs


@pytest.mark.parametrize("layout", ["shared", "tree", "packed"])
def test_attention_computes_fewer_scores_and_the_same(layout: str) -> None:
    batch = shared_prefix_batch(make_pairs([(150, 4, 37, 130), (6, 0, 290, 11)]), layout=layout)
    qkv = make_qkv(batch)
    now, _ = step_profile.attention(batch)
    assert_exact(qkv, batch)
    with step_profile.before():
        before, _ = step_profile.attention(batch)
        assert_exact(qkv, batch)
    own, path = (batch[f"tree_cu_seqlens_{x}"].diff() for x in "qk")
    assert int((own * path - own * (own - 1) // 2).sum()) < now < 0.8 * before


@pytest.mark.slow
def test_the_parts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in step_profile.SHARED:  # the profile wraps these for good
        monkeypatch.setattr(owner, name, getattr(owner, name))
    measured = step_profile.parts("toy", "toy")
    found = measured["parts"]
    assert measured["plain_seconds"] > 0
    once = {"data", "optimizer", "others", "loss and metrics"}
    assert (
        found.keys()
        == {*step_profile.MODULES.values(), "attention, scores", "attention, gathers", "head", "residuals"} | once
    )
    assert sum(each["reads"] for part, row in found.items() if part not in once for each in row.values()) == 0
    flops = {part: sum(each["flops"] for each in row.values()) for part, row in found.items()}
    assert flops["head"] == flops["norms"] == 0 < flops["MLP"]
    assert found["MLP"].keys() == {"forward", "recomputed", "backward", "reference"}

"""Vision-language models on batches with images, against their own forward on each sequence alone."""

import copy
import logging
from typing import Any

import pytest
import torch

from benchmarks.studies.tiny_vision import IMAGE, REFUSED, SHARED, TREE, MadeUpCollator, build, examples, own_logps
from fastdpo.model import scoring_forward
from fastdpo.model.layout import check_images, layout_of
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.model.self_check import checked_layout
from tests.helpers.tiny import gradients

QUICK = ("llava", "qwen2.5-vl", "gemma3")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHARED | TREE]


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    return {name: build(name) for name in QUICK}


def patched(family: Any) -> tuple[Any, MadeUpCollator]:
    """A patched copy of the model, and the collator of its batches."""
    model = copy.deepcopy(family.model)
    patch_forward(model, impl="torch")
    return model, MadeUpCollator(family, model)


def assert_same_gradients(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, grad in expected.items():
        if name.endswith("k_proj.bias"):  # a softmax does not see it, so both are rounding
            continue
        error = float((actual[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6))
        assert error <= 1e-5, (name, error)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_the_models_own(name: str) -> None:
    """Images of one and of two to a prompt, a row of text between them, and the tower's gradients too."""
    if name in TREE:
        pytest.importorskip("tree_recurrence")
    family, layout = build(name), "tree" if name in TREE else "shared"
    rows = examples(family.counts)
    expected = own_logps(family, rows)
    weights = torch.linspace(-1, 1, len(expected))
    expected_gradients = gradients(family.model, expected * weights)
    assert layout_of(family.model)[0] == layout
    check_images(family.model)

    patch_forward(family.model, impl="torch")
    assert vars(family.model)["_fastdpo"].own is None  # the head is fused
    collate = MadeUpCollator(family, family.model)
    logps = family.model(**collate(rows, layout=layout)).logps
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(family.model, logps * weights), expected_gradients)
    with torch.no_grad():
        torch.testing.assert_close(family.model(**collate(rows, layout="padded")).logps, expected, rtol=0, atol=1e-5)
        alone = family.model(**collate(rows[1:2], layout=layout)).logps
    chosen = len(rows[0]["chosen_ids"])
    torch.testing.assert_close(alone[:5], expected[chosen : chosen + 5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_images_are_not_swapped(name: str, families: dict[str, Any]) -> None:
    """Two images of one prompt that change places change its log-probs, and those of no other row."""
    family = families[name]
    model, collate = patched(family)
    rows = examples([family.counts[0]] * 3 if "qwen" not in name else [8, 8, 8])
    swapped = [*rows[:2], rows[2] | {"images": [0, 1]}], [*rows[:2], rows[2] | {"images": [1, 0]}]
    with torch.no_grad():
        first, second = (model(**collate(each)).logps for each in swapped)
    others = len(rows[0]["chosen_ids"]) + len(rows[1]["chosen_ids"])
    assert torch.equal(first[:others], second[:others])
    assert float((first[others : others + 3] - second[others : others + 3]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("kind", ["ranked", "unpaired"])
def test_other_kinds_of_rows_in_all_layouts(name: str, kind: str, families: dict[str, Any]) -> None:
    family = families[name]
    model, collate = patched(family)
    rows = []
    for i, row in enumerate(examples(family.counts)):
        chosen, rejected = row.pop("chosen_ids"), row.pop("rejected_ids")
        if kind == "ranked":
            rows.append(row | {"ranked_ids": [chosen, rejected, [7, 8, 2]][: 2 + i % 2]})
        else:
            rows.append(row | {"completion_ids": chosen, "label": bool(i % 2), "kl_ids": rejected})
    with torch.no_grad():
        padded = model(**collate(rows, layout="padded")).logps
        for layout in ("shared", "tree", "packed"):
            torch.testing.assert_close(model(**collate(rows, layout=layout)).logps, padded, rtol=0, atol=5e-6)


def test_image_blocks_survive_gradient_checkpointing(families: dict[str, Any]) -> None:
    family = families["gemma3"]
    rows = examples(family.counts)
    found = []
    for checkpointing in (False, True):
        model, collate = patched(family)
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        found.append(gradients(model, model(**collate(rows)).logps))
    assert_same_gradients(*found)


@pytest.mark.parametrize("forgotten", ["blocks", "positions"])
def test_the_self_check_sees_the_images(
    forgotten: str, families: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its image blocks Gemma 3 is padded, and so is Qwen2.5-VL with the places of tokens as positions."""
    family = families["gemma3" if forgotten == "blocks" else "qwen2.5-vl"]
    model, collate = patched(family)
    rows = examples(family.counts)
    caplog.set_level(logging.INFO, "fastdpo")
    assert checked_layout([model], rows, "shared", collate=collate) == "shared"
    if forgotten == "blocks":
        monkeypatch.setattr(scoring_forward, "image_blocks", lambda model: None)
    else:
        collate._rope_index = None
    assert checked_layout([model], rows, "shared", collate=collate) == "padded"
    assert "differ from those of padded rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4", "Llama4ForConditionalGeneration cannot run these batches: its images do not become tokens inside"),
        ("mllama", "its layers look at the images by cross-attention"),
        ("paligemma", "its prompt is read in both directions; train it on text alone"),
    ],
)
def test_models_whose_images_cannot_be_shared_are_refused(name: str, reason: str) -> None:
    assert name in REFUSED
    with pytest.raises(ValueError, match=reason):
        check_images(build(name).model)


def test_a_batch_without_images_is_that_of_text(families: dict[str, Any]) -> None:
    family = families["qwen2.5-vl"]
    model, collate = patched(family)
    batch = collate(examples(family.counts)[1:2])
    assert batch.keys().isdisjoint({"image_inputs", "image_blocks"})
    assert batch["position_ids"].ndim == 2
    assert torch.isfinite(model(**batch).logps).all()


@pytest.mark.slow
def test_the_balancing_loss_is_the_models_own() -> None:
    """Of a mixture of experts that sees images; TRL's default adds it to the loss."""
    family = build("qwen3-vl-moe")
    model, collate = patched(family)
    row = examples(family.counts)[0]
    shared = {name: row[name] for name in ("prompt_ids", "images", "prompt_text")}
    batch = collate([shared | {"completion_ids": row["chosen_ids"], "label": True}])
    ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"][:-1]]])
    seen = collate.inputs_of(row) | {"mm_token_type_ids": (ids == IMAGE).int()}
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True, use_cache=False, **seen)
    torch.testing.assert_close(model(**batch, with_aux_loss=True).aux_loss, own.aux_loss, rtol=1e-6, atol=0)

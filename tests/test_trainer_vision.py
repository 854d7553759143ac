"""`DPOTrainer` on rows with images, beside TRL's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from benchmarks.studies.tiny_vision import llava_processor
from fastdpo.data.vision.batch import check_all_have_images
from tests.helpers.trainers import losses
from tests.helpers.vision import make_model, make_trainer, picture, png, rows

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(make_trainer, tmp_path)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("default")  # those of TRL
@pytest.mark.parametrize(
    ("name", "mixed"),
    [
        ("llava", False),
        ("qwen2.5-vl", True),
        pytest.param("llava", True, marks=pytest.mark.slow),
        pytest.param("qwen2.5-vl", False, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_trls_with_half_the_images(name: str, mixed: bool, make: Make) -> None:
    pytest.importorskip("trl")
    data = rows(4, mixed=mixed)
    theirs, ours = (make(name, data, trl=trl) for trl in (True, False))
    assert ours._layout == "shared"
    before, ours.images = weights(ours), 0
    theirs.train()
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert ours.images * 2 == theirs.images
    moved = max(float((before[n] - p).abs().max()) for n, p in weights(theirs).items())
    after = weights(ours)
    for n, p in weights(theirs).items():
        assert float((after[n] - p).abs().max()) <= 1e-5 * max(moved, 1), n
    tokens = [t.state.log_history[0]["num_tokens"] for t in (theirs, ours)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_precomputed_reference_is_bit_equal(name: str, make: Make, tmp_path: Path) -> None:
    cache = {"reference_cache_dir": str(tmp_path / "cache")}
    trainers = [make(name, rows(4, mixed=True), precompute_ref_log_probs=on, **cache) for on in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == losses(trainers[1])
    a, b = map(weights, trainers)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_cache_knows_the_images(make: Make, tmp_path: Path) -> None:
    """The same rows are found, also as files; another image of the same size is computed anew."""
    from fastdpo.reference import precompute

    scored: list[int] = []
    own = precompute.score_batch

    def score(model: Any, items: Any, *args: Any, **kwargs: Any) -> Any:
        scored.extend(item.row for item in items)
        return own(model, items, *args, **kwargs)

    options = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    data = rows(4)
    make("llava", data, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "score_batch", score)
        patch.setattr(precompute, "_check", lambda *args: None)
        make("llava", data, **options)
        assert scored == []
        changed = data.to_list()
        changed[2]["images"] = [rows(6)[5]["images"][0].resize(data[2]["images"][0].size)]
        make("llava", Dataset.from_list(changed, features=data.features), **options)
        assert scored == [2]


def test_lora_with_a_frozen_tower_and_evaluation(make: Make) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj")
    trainer = make("qwen2.5-vl", rows(4, mixed=True), peft_config=config, eval_dataset=rows(3), max_steps=2)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(trainer)[1] != losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_one_that_never_stopped(make: Make, tmp_path: Path, adapter: bool) -> None:
    """Its weights lie in the checkpoint under names that the model does not use."""
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "own_reference": False}
    options |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    if adapter:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], lora_dropout=0.1)
    through, resumed = (make("llava", rows(5, mixed=True), **options) for _ in range(2))
    start = weights(through)
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(through)
    after = weights(through)
    assert not all(torch.equal(after[n], start[n]) for n in after)
    assert all(torch.equal(after[n], p) for n, p in weights(resumed).items())


def test_an_adapter_whose_modules_peft_does_not_know_needs_their_names(make: Make) -> None:
    peft = pytest.importorskip("peft")
    message = "^PEFT does not know which modules .* 'llava' .* name them in target_modules .*lora_target_modules"
    with pytest.raises(ValueError, match=message):
        make("llava", rows(2), peft_config=peft.LoraConfig())


def test_a_stream_is_the_dataset(make: Make) -> None:
    data = rows(4, mixed=True).select([0, 2, 1, 3])
    whole = make("llava", data)
    whole.train()
    stream = IterableDataset.from_generator(lambda: iter(data.with_format(None)), features=data.features)
    streamed = make("llava", stream)
    streamed.train()
    assert losses(streamed) == pytest.approx(losses(whole), abs=1e-6)


def test_unpaired_and_ranked_rows(make: Make) -> None:
    unpaired = make("llava", rows(5), loss_type="kto", per_device_train_batch_size=5)
    at = [(i, label) for label in (True, False) for i in range(5)]
    assert list(zip(unpaired.train_dataset["pair_index"], unpaired.train_dataset["label"], strict=True)) == at
    images = unpaired.train_dataset["images"]
    assert images[:5] == images[5:]
    unpaired.train()
    ranked = make("llava", rows(4), loss_type="plackett_luce")
    ranked.train()
    assert losses(ranked)[0] > 0


def test_a_batch_counts_image_tokens(make: Make) -> None:
    """A budget of tokens and `num_tokens` see the tokens that an image becomes."""
    trainer = make("llava", rows(4), tokens_per_batch=200)
    for row in trainer.train_dataset:
        assert row["prompt_ids"].count(trainer.processing_class.image_token_id) == 16 * len(row["images"])
    from fastdpo.data.sampler import example_sizes

    sizes = example_sizes(trainer.train_dataset, "shared").prod(1)
    assert max(sizes) <= 200 < sum(sizes)
    assert all(batch["num_packed_tokens"] <= 200 for batch in trainer.get_train_dataloader())


def test_a_processor_trains_on_text_alone(make: Make) -> None:
    data = rows(4).remove_columns("images")
    plain = data.map(lambda row: {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]})
    trainer = make("llava", plain)
    trainer.train()
    assert trainer.images == 0


def test_images_are_refused_at_construction(make: Make) -> None:
    processor = llava_processor()
    with pytest.raises(ValueError, match="'images', but processing_class has no image processor"):
        make("llava", rows(2), processor=processor.tokenizer, model=make_model("llava", processor))
    with pytest.raises(ValueError, match="group_by_prompt=4 can't be used with images"):
        make("llava", rows(2), group_by_prompt=4)
    from tests.helpers.trainers import tiny_llama

    with pytest.raises(ValueError, match="LlamaForCausalLM cannot run these batches: its images do not become"):
        make("llava", rows(2), model=tiny_llama(vocab_size=300))


def test_equal_texts_with_different_images_share_nothing(make: Make) -> None:
    """Each image of such rows passes the tower, and the loss is the mean of the rows' own losses."""
    one = rows(1)
    data = Dataset.from_list(
        [one[0] | {"images": [picture(60 + i, (28, 24))]} for i in range(3)], features=one.features
    )
    together = make("llava", data, per_device_train_batch_size=3)
    together.train()
    assert together.images == 3
    alone = []
    for i in range(3):
        trainer = make("llava", data.select([i]), per_device_train_batch_size=1)
        trainer.train()
        alone += losses(trainer)
    assert len(set(alone)) == 3
    assert losses(together) == pytest.approx([sum(alone) / 3], abs=1e-6)


@pytest.mark.slow
def test_a_worker_reads_the_images(make: Make) -> None:
    here, there = (make("qwen2.5-vl", rows(4), dataloader_num_workers=workers) for workers in (0, 1))
    here.train()
    there.train()
    assert losses(here) == losses(there)


def test_an_image_that_is_gone_is_named(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(1)))
    data = [rows(1).remove_columns("images")[0] | {"images": [str(path)]}]
    trainer = make("llava", Dataset.from_list(data))
    path.unlink()
    with pytest.raises(ValueError, match="pair_index 0: an image can't be read any more: `images`: FileNotFoundError"):
        trainer.train()


def test_with_sharded_weights_each_row_needs_an_image(make: Make) -> None:
    """All processes gather the tower's weights together, so a batch without images would make them wait."""
    prepared = make("llava", rows(4, mixed=True)).train_dataset
    check_all_have_images([("train", prepared.select([0, 2]))], "FSDP")
    with pytest.raises(ValueError, match="train dataset: row 1 has no image, and with ZeRO-3 every row needs one"):
        check_all_have_images([("train", prepared)], "ZeRO-3")
    with pytest.raises(ValueError, match="eval dataset is a stream with images"):
        check_all_have_images([("eval", prepared.to_iterable_dataset())], "FSDP")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of TRL
def test_mpo_is_trls(make: Make) -> None:
    """Mixed preference optimisation, https://arxiv.org/abs/2411.10442, with three losses and their weights."""
    pytest.importorskip("trl")
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "max_steps": 2}
    found = []
    for trl in (True, False):
        trainer = make("qwen2.5-vl", rows(4, mixed=True), trl=trl, learning_rate=0.01, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], abs=1e-4)

"""What a cached reference log-prob depends on: each edit that changes a number misses it, no other does."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import fastdpo
from fastdpo.checkpoint.identity import weights_digest
from fastdpo.checks import first_not_finite
from fastdpo.model import adapters
from fastdpo.reference import precompute
from fastdpo.reference.fingerprint import fingerprint
from fastdpo.sharding import plain_parts
from tests.helpers.trainers import rows, tiny_llama

ROWS = 6


class Setup(NamedTuple):
    """All that a run's reference log-probs could depend on."""

    model: Any
    dataset: Dataset
    args: dict[str, Any]
    """Of DPOConfig."""


def setup() -> Setup:
    return Setup(tiny_llama(), rows(ROWS), {})


def reference_of(made: Setup, folder: Path) -> tuple[Any, int]:
    """The column, and how many tokens had to be computed for it."""
    computed = 0
    original = precompute._fill

    def counting(cache: Any, batches: Any, *rest: Any) -> None:
        nonlocal computed
        computed += sum(len(response) for batch in batches for item in batch for response in item.responses)
        original(cache, batches, *rest)

    defaults = {"output_dir": str(folder.parent / "out"), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    objective = {name: made.args[name] for name in ("loss_type", "ld_alpha") if name in made.args}
    args = fastdpo.DPOConfig(**defaults | {name: x for name, x in made.args.items() if name not in objective})
    vars(args).update(objective)  # whatever objectives there are
    options = precompute.options_of(args) | {
        "layout": "shared" if args.prefix_sharing else "packed",
        "folder": folder,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "_fill", counting)
        if adapters.is_peft_model(made.model):
            with adapters.as_reference(made.model):
                column = precompute.with_reference(made.dataset, made.model, **options)[precompute.COLUMN]
        else:
            column = precompute.with_reference(made.dataset, made.model, **options)[precompute.COLUMN]
    return column, computed


def tokens(dataset: Any) -> int:
    return sum(len(row[name]) for row in dataset for name in ("chosen_ids", "rejected_ids"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "reference"
    _, computed = reference_of(setup(), folder)
    assert computed == tokens(rows(ROWS))
    return folder


def weight(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Setup], Setup]:
    def edit(made: Setup) -> Setup:
        with torch.no_grad():
            change(made.model.get_parameter(name))
        return made

    return edit


def config(**changes: Any) -> Callable[[Setup], Setup]:
    """The same weights in a model of another config."""

    def edit(made: Setup) -> Setup:
        model = tiny_llama(**changes)
        model.load_state_dict(made.model.state_dict())
        return made._replace(model=model)

    return edit


def named(**changes: Any) -> Callable[[Setup], Setup]:
    """Entries of the config that are for people and tools."""

    def edit(made: Setup) -> Setup:
        for name, value in changes.items():
            setattr(made.model.config, name, value)
        return made

    return edit


def args(**changes: Any) -> Callable[[Setup], Setup]:
    return lambda made: made._replace(args=changes)


def data(change: Callable[[Dataset], Dataset]) -> Callable[[Setup], Setup]:
    return lambda made: made._replace(dataset=change(made.dataset))


def column(name: str, change: Callable[[list[int]], list[int]]) -> Callable[[Setup], Setup]:
    return data(lambda dataset: dataset.map(lambda row: {name: change(row[name])}))


def flip_one_bit(x: torch.Tensor) -> None:
    x.view(torch.int32).view(-1)[5] ^= 1


MISSES: dict[str, Callable[[Setup], Setup]] = {
    "one bit of an embedding": weight("model.embed_tokens.weight", flip_one_bit),
    "one bit of a norm": weight("model.layers.1.input_layernorm.weight", flip_one_bit),
    "one bit of the head": weight("lm_head.weight", flip_one_bit),
    "two rows of the head swapped": weight("lm_head.weight", lambda w: w.copy_(w[[1, 0, *range(2, len(w))]])),
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "rope_theta": config(rope_parameters={"rope_theta": 1000.0, "rope_type": "default"}),
    "hidden_act": config(hidden_act="gelu"),
    "dtype of the weights": lambda made: made._replace(model=made.model.to(torch.bfloat16)),
    "autocast": args(bf16=True),
    "a prompt token": column("prompt_ids", lambda ids: [*ids[:-1], ids[-1] % 300 + 1]),
    "a completion token": column("chosen_ids", lambda ids: [ids[0] % 300 + 1, *ids[1:]]),
    "the prompt cut": column("prompt_ids", lambda ids: ids[1:]),
    "the completion cut": column("chosen_ids", lambda ids: ids[: len(ids) // 2]),
    "the bound between prompt and completion": data(
        lambda dataset: dataset.map(
            lambda row: {"prompt_ids": [*row["prompt_ids"], 7], "chosen_ids": [8, *row["chosen_ids"]]}
        )
    ),
}

HITS: dict[str, Callable[[Setup], Setup]] = {
    "nothing": lambda made: made,
    "beta": args(beta=0.5),
    "label_smoothing": args(label_smoothing=0.1),
    "loss_type": args(loss_type=["ipo"]),
    "ld_alpha": args(ld_alpha=0.2),
    "learning_rate": args(learning_rate=1e-3),
    "logging_steps": args(logging_steps=3),
    "num_train_epochs": args(num_train_epochs=7),
    "batch size and accumulation": args(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "seed": args(seed=5),
    "max_length that cuts nothing": args(max_length=777),
    "prefix_sharing": args(prefix_sharing=False),
    "gradient_checkpointing": args(gradient_checkpointing=False),
    "_name_or_path": named(_name_or_path="elsewhere/model"),
    "architectures and version": named(architectures=["LlamaForCausalLM"], transformers_version="4.0.0"),
    "use_cache": named(use_cache=False),
    "dropout, which is off in a reference": named(attention_dropout=0.1),
    "special tokens, which are in the ids": named(eos_token_id=9, pad_token_id=8),
    "reordered": data(lambda dataset: dataset.shuffle(seed=1)),
    "rows removed": data(lambda dataset: dataset.select([4, 1])),
    "a row twice": data(lambda dataset: dataset.select([0, 0, 1, 2])),
    "chosen and rejected exchanged": data(
        lambda dataset: dataset.rename_columns({"chosen_ids": "x", "rejected_ids": "chosen_ids"}).rename_column(
            "x", "rejected_ids"
        )
    ),
    "other columns": data(lambda dataset: dataset.add_column("weight", [2.0] * len(dataset))),
    "as ranked rows": data(
        lambda dataset: dataset.map(
            lambda row: {"prompt_ids": row["prompt_ids"], "ranked_ids": [row["chosen_ids"], row["rejected_ids"]]},
            remove_columns=dataset.column_names,
        )
    ),
    "as single completions": data(
        lambda dataset: dataset.rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")
    ),
    "a frozen copy in train mode": lambda made: made._replace(model=copy.deepcopy(made.model).train()),
    "a new adapter, switched off": lambda made: made._replace(
        model=get_peft_model(made.model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    ),
}


def test_the_table_has_its_size() -> None:
    assert len(MISSES) + len(HITS) >= 24


@pytest.mark.parametrize("edit", MISSES)
def test_what_changes_a_number_misses(edit: str, filled: Path) -> None:
    """Every token it can concern is computed: all of the model's, or those of the edited responses."""
    made = MISSES[edit](setup())
    values, computed = reference_of(made, filled)
    edited_data = made.dataset.to_dict() != rows(ROWS).to_dict()
    touches_all = not edited_data or made.dataset["prompt_ids"] != rows(ROWS)["prompt_ids"]
    if touches_all:
        assert computed == tokens(made.dataset)
    else:
        assert computed == sum(map(len, made.dataset["chosen_ids"]))
    for row, logps in zip(made.dataset, values, strict=True):
        assert [len(x) for x in logps] == [len(row["chosen_ids"]), len(row["rejected_ids"])]


@pytest.mark.parametrize("edit", HITS)
def test_what_changes_no_number_hits(edit: str, filled: Path) -> None:
    made = HITS[edit](setup())
    _, computed = reference_of(made, filled)
    assert computed == 0


def test_appended_rows_are_computed_alone(tmp_path: Path) -> None:
    before, _ = reference_of(setup(), tmp_path / "cache")
    longer = rows(ROWS + 3)
    after, computed = reference_of(setup()._replace(dataset=longer), tmp_path / "cache")
    assert computed == tokens(list(longer)[ROWS:])
    assert list(after)[:ROWS] == list(before)


def test_shards_of_another_size_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "TOKENS_PER_SHARD", 10)
    monkeypatch.setattr(precompute, "TOKENS_PER_BATCH", 20)
    small, _ = reference_of(setup()._replace(args={}), tmp_path / "small")
    monkeypatch.undo()
    large, _ = reference_of(setup(), tmp_path / "large")
    assert list(small) == list(large)
    _, computed = reference_of(setup(), tmp_path / "small")
    assert computed == 0


def peft(model: nn.Module, **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options))


def test_adapters_count_as_they_are_at_the_moment() -> None:
    """Off they are not there; on, their weights and factors count, and their names do not."""
    plain, _ = fingerprint(tiny_llama())
    model = peft(tiny_llama(), modules_to_save=["lm_head"])
    with model.disable_adapter():
        assert fingerprint(model)[0] == plain
    on, _ = fingerprint(model)
    assert on != plain
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(torch.int32).view(-1)[0] ^= 1
    changed, _ = fingerprint(model)
    assert changed not in (on, plain)
    with model.disable_adapter():
        assert fingerprint(model)[0] == plain

    scaled = peft(tiny_llama(), lora_alpha=16)
    torch.manual_seed(0)
    keys = {fingerprint(scaled)[0]}
    for layer in scaled.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
            layer.scaling["default"] *= 2
    keys.add(fingerprint(scaled)[0])
    assert len(keys) == 2


def test_the_ref_adapter_counts_and_the_trained_one_does_not() -> None:
    model = peft(tiny_llama())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1.0)
    trained, _ = fingerprint(model)
    adapters.keep_ref_adapter(model)
    with adapters.as_reference(model):
        ref, _ = fingerprint(model)
    assert ref == trained  # a copy: same numbers, another name
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.add_(1.0)
    with adapters.as_reference(model):
        assert fingerprint(model)[0] == ref
    assert fingerprint(model)[0] != ref


def test_what_the_key_cannot_see_is_found_by_computing_some_values_again(tmp_path: Path) -> None:
    """A module whose code changed, as with another version of a library."""
    reference_of(setup(), tmp_path / "cache")
    made = setup()
    made.model.model.norm.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(ValueError, match=r"nats per token from what the model says now.*Remove that folder"):
        reference_of(made, tmp_path / "cache")


def test_a_flipped_bit_costs_its_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "TOKENS_PER_SHARD", 5)
    few = {"args": {"per_device_train_batch_size": 1}}
    original = precompute.options_of
    monkeypatch.setattr(precompute, "options_of", lambda *a, **k: original(*a, **k) | {"examples_per_batch": 2})
    values, _ = reference_of(setup()._replace(**few), tmp_path / "cache")
    shards = sorted((tmp_path / "cache").glob("*/shard-*.safetensors"))
    assert len(shards) >= 3
    raw = bytearray(shards[1].read_bytes())
    raw[-2] ^= 1
    shards[1].write_bytes(raw)
    from safetensors.numpy import load

    again, computed = reference_of(setup()._replace(**few), tmp_path / "cache")
    assert computed == len(load(bytes(raw))["logps"])
    assert list(again) == list(values)


def test_values_are_float32_and_exact_in_the_column(tmp_path: Path) -> None:
    made = setup()
    values = precompute.token_logps(made.dataset, made.model, folder=None, disable_tqdm=True)
    table = precompute.with_reference(made.dataset, made.model, folder=tmp_path, disable_tqdm=True)
    for row, expected in zip(table, values, strict=True):
        for got, want in zip(row[precompute.COLUMN], expected, strict=True):
            assert np.array_equal(np.array(got, np.float32), want)
    batch = fastdpo.shared_prefix_batch(list(table))
    assert batch["ref_token_logps"].dtype == torch.float32
    chosen, rejected = ([row[k] for row in values] for k in (0, 1))
    assert np.array_equal(batch["ref_token_logps"].numpy(), np.concatenate([*chosen, *rejected]))


class Quantised(torch.Tensor):
    """A weight made of two tensors, which knows no operation but `detach`, as torchao's know only few."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (3, 4), dtype=torch.float32)

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["whole", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], *_: Any) -> Any:
        return cls(**parts)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(func)
        return cls(args[0].whole, args[0].scale)


def test_quantised_weights_are_read_by_the_tensors_that_they_are_made_of() -> None:
    def digests(scale: float) -> tuple[str, str]:
        model = tiny_llama(num_hidden_layers=1)
        weight = Quantised(torch.arange(12, dtype=torch.int8).view(3, 4), torch.full((3,), scale))
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        return fingerprint(model)[0], weights_digest(model.named_parameters())

    assert digests(0.5) == digests(0.5)
    assert all(one != other for one, other in zip(digests(0.5), digests(0.75), strict=True))
    broken = Quantised(torch.ones(2, dtype=torch.int8), torch.tensor([1.0, math.nan]))
    assert first_not_finite(("w", part) for part in plain_parts(broken)) == "w"

"""fastdpo.run under TRL's names: quantised weights, adapters, revisions, streams and mixtures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from fastdpo.run import RunConfig, load_datasets, lora, make_configs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two folders: nine rows and two held out, three rows with another column."""
    for folder, split, count in (("a", "train", 9), ("a", "test", 2), ("b", "train", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [{"prompt": f"{folder}{i}", "chosen": " y", "rejected": " n"} for i in range(count)]
        extra: dict[str, Any] = {"score": 1} if folder == "b" else {}
        text = "".join(json.dumps(row | extra) + "\n" for row in rows)
        (tmp_path / folder / f"{split}.jsonl").write_text(text)
    return tmp_path


def configs(tmp_path: Path, **settings: Any) -> Any:
    given = {"dataset_name": "d", "model_name_or_path": "m", "output_dir": str(tmp_path), "use_cpu": True}
    return make_configs(given | settings)


def test_quantised_weights_are_asked_for_as_trl_does(tmp_path: Path) -> None:
    options = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    _, args = configs(tmp_path, use_peft=True, load_in_4bit=True, dtype="bfloat16", model_revision="v1", **options)
    assert args.model_init_kwargs["revision"] == "v1"
    from transformers import BitsAndBytesConfig

    trls = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage="bfloat16",
    )
    ours = {k: v for k, v in args.model_init_kwargs["quantization_config"].items() if k != "quant_method"}
    assert BitsAndBytesConfig(**ours).to_dict() == trls.to_dict()
    _, args = configs(tmp_path, use_peft=True, load_in_8bit=True, torch_dtype="float16", attn_implementation="eager")
    assert args.model_init_kwargs == {
        **{"dtype": "float16", "attn_implementation": "eager"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit needs use_peft: true"),
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "exclude each other"),
        ({"use_peft": True, "lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant has no effect without load_in_4bit"),
        ({"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_type": "int4"}, "must be one of nf4, fp4, got"),
        ({"test_split_size": 0.1}, "test_split_size is for a mixture in `datasets`; for dataset_name set dataset_test"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype='float32' and torch_dtype='float16' differ"),
        (
            {"model_revision": "a", "model_init_kwargs": {"revision": "b"}},
            "model_revision='a' and revision='b' in model_init_kwargs differ",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs(tmp_path, **settings)


def test_the_adapter_has_all_that_was_set() -> None:
    pytest.importorskip("peft")
    run = RunConfig(use_peft=True, use_dora=True, use_rslora=True, lora_modules_to_save=["lm_head"])
    adapter: Any = lora(run)
    assert adapter.use_dora
    assert adapter.use_rslora
    assert adapter.modules_to_save == ["lm_head"]
    assert lora(RunConfig(use_peft=True, lora_target_parameters=["mlp.experts"])).target_parameters == ["mlp.experts"]


def test_a_stream_has_the_same_rows(data: Path) -> None:
    train, held_out = load_datasets(RunConfig(dataset_name=str(data / "a"), dataset_streaming=True))
    assert isinstance(train, IterableDataset)
    whole, _ = load_datasets(RunConfig(dataset_name=str(data / "a")))
    assert list(train) == whole.to_list()
    assert len(list(held_out)) == 2


def test_a_mixture_has_the_shares_asked_for(data: Path) -> None:
    columns = ["prompt", "chosen", "rejected"]
    entries = [
        {"path": str(data / "a"), "fraction": 2},
        {"path": "json", "data_files": str(data / "b" / "train.jsonl"), "columns": columns, "fraction": 1},
    ]
    train, held_out = load_datasets(RunConfig(datasets=entries))
    assert train["prompt"][:] == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "b2"]
    assert held_out is None
    train, held_out = load_datasets(RunConfig(datasets=entries, test_split_size=2), seed=1)
    assert held_out is not None
    assert (len(train), len(held_out)) == (7, 2)
    assert sorted([*train["prompt"], *held_out["prompt"]]) == [*(f"a{i}" for i in range(6)), "b0", "b1", "b2"]


def test_a_mixture_may_have_files_of_several_kinds(data: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\nthe name?,Ann,Bob\n")
    entries = [
        {"path": str(tmp_path / "train.csv")},
        {"path": str(data / "a"), "columns": ["prompt", "chosen", "rejected"]},
    ]
    train, _ = load_datasets(RunConfig(datasets=entries))
    assert train["prompt"][:2] == ["the name?", "a0"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "x"}, r"datasets\[1\] must be a mapping with a path"),
        ({"path": "a", "fractoin": 1}, r"datasets\[1\] has an unknown entry 'fractoin'; did you mean 'fraction'"),
        ({"path": "a", "split": "tset"}, r"datasets\[1\]: .* has no split 'tset'; it has .*did you mean 'test'"),
        ({"path": "a", "columns": ["promt"]}, r"datasets\[1\]: .* has no column 'promt'; did you mean 'prompt'"),
        ({"path": "a", "fraction": 0.5}, "in all entries or in none"),
        ({"path": "a", "name": "x"}, "has no configurations; leave it out"),
    ],
    ids=str,
)
def test_a_wrong_entry_of_a_mixture_is_named(data: Path, entry: dict[str, Any], message: str) -> None:
    entry = entry | ({"path": str(data / entry["path"])} if "path" in entry else {})
    with pytest.raises(ValueError, match=message):
        load_datasets(RunConfig(datasets=[{"path": str(data / "a")}, entry]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "p", "chosen": "c", "rejected": ' + "[" * 700 + "]" * 700 + "}\n",
            ", line 2: JSON nested more than",
        ),
        ('{"prompt": "p",\n', " can't be read: JSON parse error"),
    ],
)
def test_the_files_of_an_entry_are_checked_as_a_dataset_is(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.txt").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' + text)
    with pytest.raises(ValueError, match=rf"datasets\[0\]: '.*rows.txt'{message}"):
        load_datasets(RunConfig(datasets=[{"path": "json", "data_files": [str(tmp_path / "*.txt")]}]))

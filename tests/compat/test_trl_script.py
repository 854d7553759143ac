"""TRL's own script for DPO with only its imports swapped: the same losses, the same metrics, whatever its flags."""

import inspect
import json
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import load_dataset
from transformers.models.llama import modeling_llama

import fastdpo
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import tiny_llama

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.skipif(not trl.__version__.startswith("1."), reason="TRL's script of another era"),
]

COMMON = [
    *("--max_steps", "3", "--logging_steps", "1", "--learning_rate", "2e-4", "--per_device_train_batch_size", "3"),
    *("--max_length", "44", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"),
    *("--report_to", "none", "--use_cpu", "--bf16", "false", "--disable_tqdm", "true"),
]
LORA = ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
FLAGS = {
    "plain": ("text", []),
    "chat": ("chat", []),
    "lora": ("chat", LORA),
    "streamed": ("text", ["--dataset_streaming"]),
    "precompute": ("chat", ["--precompute_ref_log_probs"]),
    "no-checkpointing": ("text", ["--no_gradient_checkpointing"]),
    "keep-start": ("chat", ["--truncation_mode", "keep_start"]),
    "padding-free": ("text", ["--padding_free"]),
    "all-columns": ("chat", ["--no_remove_unused_columns"]),
    "hub": ("text", ["--push_to_hub", "--save_strategy", "steps", "--save_steps", "2"]),
    "liger": ("text", ["--use_liger_kernel"]),
    "4-bit": ("chat", [*LORA, "--load_in_4bit", "--eval_strategy", "no"]),
}
NEEDS = {"liger": "liger_kernel", "4-bit": "bitsandbytes", "lora": "peft"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and one dataset of text and one of messages, as they lie on a disk."""
    folder = tmp_path_factory.mktemp("files")
    # 4-bit layers on a CPU need sizes that 32 divides
    tiny_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    pairs = [(f"Name {i} fruits.", " fig" * (i % 4 + 1), " Why" + "?" * (i % 5)) for i in range(16)]
    for name in ("text", "chat"):
        rows: list[dict[str, Any]] = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
        if name == "chat":
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            rows = [{key: [{"role": roles[key], "content": row[key]}] for key in row} for row in rows]
        (folder / name).mkdir()
        for split, part in (("train", rows[:12]), ("test", rows[12:])):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        load_dataset(str(folder / name))  # once, so that both scripts find it in the cache
    return folder


def script(*, swapped: bool) -> types.ModuleType:
    """TRL's script as a module; swapped: with `DPOConfig` and `DPOTrainer` of fastdpo."""
    import trl.scripts.dpo

    source = inspect.getsource(trl.scripts.dpo)
    for name in ("DPOTrainer", "DPOConfig") if swapped else ():
        lines = [line for line in source.splitlines() if line.lstrip().startswith("from trl import") and name in line]
        assert len(lines) == 1, f"the script imports {name} in another way"
        indent = lines[0].partition("from")[0]
        names = [each.strip() for each in lines[0].partition("import")[2].split(",")]
        others = ", ".join(each for each in names if each != name)
        source = source.replace(lines[0], f"{indent}from fastdpo import {name}\n{indent}from trl import {others}")
    module = types.ModuleType("script")
    exec(compile(source, "trl/scripts/dpo.py", "exec"), vars(module))
    return module


class Hub:
    """The part of the Hub that a Trainer uploads to."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, str]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **_: Any) -> Any:
        self.uploads.append((commit_message, (Path(folder_path) / "README.md").read_text()))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict[str, Any]], Any, Hub]]:
    """Run the script; return the log of its trainer, the trainer and what it uploaded."""
    trainers: list[Any] = []
    train = transformers.Trainer.train

    def kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        if "bitsandbytes" in str(getattr(self.model.config, "quantization_config", "")):
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # TRL rounds an adapter of 4-bit weights to bfloat16
                    parameter.data = parameter.data.bfloat16().float()
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", kept)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    name = "apply_rotary_pos_emb"  # which Liger replaces for all models
    monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))

    def run(data: str, flags: list[str], *, swapped: bool) -> tuple[list[dict[str, Any]], Any, Hub]:
        hub = Hub()
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
        module = script(swapped=swapped)
        places = {
            "model_name_or_path": files / "model",
            "dataset_name": files / data,
            "output_dir": tmp_path / f"out-{len(trainers)}",
        }
        words = [f"--{name}={place}" for name, place in places.items()]
        parsed = module.make_parser().parse_args_and_config([*words, *COMMON, *flags], fail_with_unknown_args=False)
        if "--use_liger_kernel" in flags:  # in Triton's interpreter only its kernel of positions runs
            parsed[1].liger_kernel_config = {"rms_norm": False, "swiglu": False}
        module.main(*parsed)
        return trainers[-1].state.log_history, trainers[-1], hub

    return run


@pytest.mark.parametrize("case", FLAGS)
def test_only_the_imports_are_swapped(case: str, run: Callable[..., Any]) -> None:
    if case in NEEDS:
        pytest.importorskip(NEEDS[case])
    data, flags = FLAGS[case]
    theirs, _, _ = run(data, flags, swapped=False)
    ours, trainer, hub = run(data, flags, swapped=True)
    assert type(trainer) is fastdpo.DPOTrainer
    assert len(ours) == len(theirs) == (4 if "no" in flags else 6)
    for mine, other in zip(ours, theirs, strict=True):  # the last one, of the whole run, included
        assert set(other) <= set(mine), "a metric of TRL's is missing"
        for name in ("loss", "eval_loss", "train_loss"):
            assert mine.get(name, 0.0) == pytest.approx(other.get(name, 0.0), abs=1e-5), name
        for name in ("step", "num_tokens", "eval_num_tokens"):
            assert mine.get(name) == other.get(name), name
    assert 0.05 < ours[1]["loss"] < 0.69
    if case == "hub":
        messages = [message for message, _ in hub.uploads]
        assert messages == [
            *("Training in progress, step 2", "Training in progress, step 3", "Model save", "End of training")
        ]
        assert "the dataset `text`" in hub.uploads[-1][1]


def test_a_4_bit_model_needs_no_package_to_be_refused_in_words(run: Callable[..., Any]) -> None:
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ImportError, match="bitsandbytes"):
        run("text", [*LORA, "--load_in_4bit"], swapped=True)


def test_lora_and_full_differ(run: Callable[..., Any]) -> None:
    """So that the flags of the table are known to have an effect."""
    full, lora = (run("text", flags, swapped=True)[0] for flags in ([], LORA))
    assert abs(full[1]["loss"] - lora[1]["loss"]) > 1e-3
    assert torch.isfinite(torch.tensor([full[1]["loss"], lora[1]["loss"]])).all()

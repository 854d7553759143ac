"""`fastdpo merge` on adapters of tiny models, in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.helpers.command import Ended, Run, command
from tests.helpers.tiny import make_model

peft = pytest.importorskip("peft")

VOCAB = 264
IDS = torch.tensor([[7, 100, 31, 250, 9, 64, 64, 3]])


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model = make_model(family, vocab_size=VOCAB, **options).to(dtype)
    model.tie_weights()
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Base models whose embeddings are tied, or not."""
    folder = tmp_path_factory.mktemp("bases")
    return {tied: save_base(folder / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


def trained(base: Path, config: Any, folder: Path, std: float = 0.05) -> Path:
    """Save an adapter as if trained, with noise on all that it trains."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(std * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=3, **options)


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        log_probs: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.double().log_softmax(-1)
    return log_probs


def with_adapter(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """The command in this process; what it logs counts as said on stderr."""
    merge = command(capsys, "merge")

    def run(*words: object) -> Ended:
        ended = merge(*words)
        return ended._replace(err=caplog.text + ended.err)

    return run


ADAPTERS = {
    "lora": lora,
    "rslora-dora": lambda: lora(use_rslora=True, use_dora=True),
    "lora-of-head": lambda: lora(target_modules=["v_proj", "lm_head"]),
    "lora-of-embeddings": lambda: lora(target_modules=["v_proj", "embed_tokens"]),
    "lora-of-both": lambda: lora(target_modules=["v_proj", "embed_tokens"], ensure_weight_tying=True),
    "whole-head": lambda: lora(modules_to_save=["lm_head"]),
    "trained-tokens": lambda: lora(trainable_token_indices=[9, 64, 100]),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
}
UNTIES = {"lora-of-head", "lora-of-embeddings", "lora-of-both", "whole-head"}


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_the_saved_model_answers_as_base_and_adapter(
    merge: Run, bases: dict[bool, Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    adapter = trained(bases[tied], ADAPTERS[kind](), tmp_path / "adapter")
    out = tmp_path / "merged"
    ended = merge(adapter, "--output_dir", out)
    assert ended.code == 0, ended.err
    expected = logps(with_adapter(bases[tied], adapter))
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert (logps(saved) - expected).abs().max() < 2e-5
    assert (expected - logps(AutoModelForCausalLM.from_pretrained(bases[tied]))).abs().max() > 1e-2
    assert saved.config.tie_word_embeddings is (tied and kind not in UNTIES)
    assert ("has the two apart" in ended.err) is (tied and kind in UNTIES)


def test_the_saved_model_has_all_that_a_deployment_reads(merge: Run, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", torch.bfloat16)
    out = tmp_path / "new" / "merged"
    adapter = trained(base, lora(modules_to_save=["lm_head"]), tmp_path / "adapter")
    ended = merge(adapter, "--output_dir", out)
    assert ended.code == 0, ended.err
    assert "merged in bfloat16" in ended.out
    assert max(len(line) for line in ended.out.splitlines() if str(out) not in line) <= 80
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out, dtype="auto").parameters()} == {torch.bfloat16}
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 17
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("ab").input_ids == byte_tokenizer()("ab").input_ids
    assert list(out.glob("*.safetensors"))
    assert not list(out.glob("adapter*"))


def test_the_tokenizer_of_the_adapter_comes_first(merge: Run, bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = trained(bases[False], lora(), tmp_path / "adapter")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(adapter)
    assert merge(adapter, "--output_dir", tmp_path / "merged").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_tokens_that_were_added_before_training_are_merged(merge: Run, tmp_path: Path) -> None:
    base, tokenizer = save_base(tmp_path / "base"), byte_tokenizer()
    tokenizer.add_tokens([f"<{name}>" for name in "abcdefgh"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = peft.get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter) * parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ended = merge(tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert ended.code == 0, ended.err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(saved.get_input_embeddings().weight) == len(tokenizer) > VOCAB
    assert (logps(saved) - logps(model)).abs().max() < 2e-5


def test_the_policy_is_merged_and_not_the_reference_beside_it(
    merge: Run, bases: dict[bool, Path], tmp_path: Path
) -> None:
    adapter = trained(bases[False], lora(), tmp_path / "adapter")
    trained(bases[False], lora(), adapter / "ref", std=0.5)
    ended = merge(adapter, "--output_dir", tmp_path / "merged")
    assert ended.code == 0
    assert "is left out" in ended.err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logps(saved) - logps(with_adapter(bases[False], adapter))).abs().max() < 2e-5


def test_a_base_that_has_moved_is_given_by_name(merge: Run, tmp_path: Path) -> None:
    adapter = trained(save_base(tmp_path / "old"), lora(), tmp_path / "adapter")
    (tmp_path / "old").rename(tmp_path / "moved")
    ended = merge(adapter, "--output_dir", tmp_path / "merged")
    assert ended.code == 1
    assert ended.err.rstrip().endswith("; if it is elsewhere, give it as --model_name_or_path")
    assert merge(adapter, "--output_dir", tmp_path / "merged", "--model_name_or_path", tmp_path / "moved").code == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logps(saved) - logps(with_adapter(tmp_path / "moved", adapter))).abs().max() < 2e-5


def test_an_adapter_that_rounding_hides_is_told(merge: Run, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    faint = merge(trained(base, lora(), tmp_path / "faint", std=0.001), "--output_dir", tmp_path / "one")
    assert faint.code == 0
    assert "rounding to bfloat16 changes the log-probs by" in faint.err
    new = merge(trained(base, lora(), tmp_path / "new", std=0.0), "--output_dir", tmp_path / "two")
    assert "it may never have been trained" in new.err


# Refusals


def spoiled(adapter: Path, copy: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its config."""
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.fixture(scope="module")
def adapter(bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(bases[False], lora(), tmp_path_factory.mktemp("adapters") / "sorts")


def no_adapter(adapter: Path, folder: Path) -> Path:
    shutil.copytree(adapter, folder / "policy")
    return folder


def no_weights(adapter: Path, folder: Path) -> Path:
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    return spoiled(adapter, folder / "adapter", base_model_name_or_path=str(folder / "base"))


def broken(adapter: Path, folder: Path) -> Path:
    spoiled(adapter, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    return folder


def stacked(adapter: Path, folder: Path) -> Path:
    return spoiled(adapter, folder, base_model_name_or_path=str(adapter))


def virtual_tokens(adapter: Path, folder: Path) -> Path:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return trained(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), folder)


def wider(adapter: Path, folder: Path) -> Path:
    return spoiled(adapter, folder, r=5)


def other_layers(adapter: Path, folder: Path) -> Path:
    return spoiled(adapter, folder, target_modules=["down_proj"])


def nameless(adapter: Path, folder: Path) -> Path:
    return spoiled(adapter, folder, base_model_name_or_path=None)


def copied_layers(adapter: Path, folder: Path) -> Path:
    return spoiled(adapter, folder, layer_replication=[[0, 2], [1, 2]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda adapter, folder: folder / "sorst", "adapter: there is no "),
        (lambda adapter, folder: adapter / "adapter_config.json", "is a file; give the folder that holds adapter_conf"),
        (no_adapter, "holds no adapter_config.json, so no adapter; did you mean "),
        (lambda adapter, folder: save_base(folder), "holds a whole model, which needs no merging"),
        (no_weights, "(config_name) has not saved them, and its adapter can't be used without them"),
        (broken, "adapter_config.json' is broken: Expecting value"),
        (stacked, "is an adapter itself; merge that one first, and give the result here"),
        (
            lambda adapter, folder: spoiled(adapter, folder, base_model_name_or_path=None),
            "names no base model; give it",
        ),
        (virtual_tokens, "is a PromptTuningConfig, which has no weights of layers that could be merged"),
        (copied_layers, "copies layers of its base model (layer_replication)"),
        (wider, "does not fit "),
        (other_layers, "does not fit "),
    ],
    ids=range(12),
)
def test_what_cannot_be_merged_is_refused_in_one_line(
    merge: Run, adapter: Path, tmp_path: Path, spoil: Callable[[Path, Path], Path], message: str
) -> None:
    given = spoil(adapter, tmp_path / "given")
    ended = merge(given, "--output_dir", tmp_path / "merged")
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert message in last
    assert last.startswith("fastdpo: ")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_folder_with_files_in_it_is_never_written_to(merge: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = merge(adapter, "--output_dir", tmp_path)
    assert ended.code == 1
    assert ended.err.rstrip().endswith("has files in it; give a new folder, or empty this one")
    ended = merge(adapter, "--output_dir", tmp_path / "notes.txt" / "merged")
    assert "is a file" in ended.err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "ADAPTER must come first: fastdpo merge ADAPTER --output_dir FOLDER"),
        (("--output_dir", "out"), "ADAPTER must come first"),
        (("runs/lora",), "--output_dir is missing: fastdpo merge ADAPTER"),
        (("runs/lora", "--out_dir", "out"), "unknown setting --out_dir; did you mean 'output_dir'?"),
        (("runs/lora", "--beta", "2"), "unknown setting --beta"),
        (("runs/lora", "runs/merged"), "expected --setting value, got 'runs/merged'"),
    ],
    ids=range(6),
)
def test_mistyped_commands(merge: Run, words: tuple[str, ...], message: str) -> None:
    ended = merge(*words)
    assert ended.code == 2
    assert message in ended.err


def test_a_merge_that_changes_the_model_saves_nothing(
    merge: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a PEFT that merges wrongly, here by leaving out one layer's adapter."""
    from peft.tuners.lora import Linear

    merged: list[Any] = []
    merge_layer = Linear.merge

    def skip_the_second(self: Any, *args: Any, **kwargs: Any) -> None:
        merged.append(self)
        if len(merged) != 2:
            merge_layer(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "merge", skip_the_second)
    ended = merge(adapter, "--output_dir", tmp_path / "merged")
    assert ended.code == 1
    assert "merging changed the log-probs by up to" in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_model_that_is_saved_wrongly_is_removed(
    merge: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def save_wrongly(self: Any, folder: Any, **options: Any) -> None:
        self.model.norm.weight.data.mul_(1.5)
        save(self, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_wrongly)
    ended = merge(adapter, "--output_dir", tmp_path / "merged")
    assert ended.code == 1
    assert "saving and loading changed the log-probs by up to" in ended.err
    assert not list((tmp_path / "merged").iterdir())


def test_help_names_the_options(merge: Run) -> None:
    ended = merge("--help")
    assert ended.code == 0
    for words in ("usage: fastdpo merge ADAPTER --output_dir FOLDER", "--model_name_or_path str", "exit codes:"):
        assert words in ended.out
    assert "--beta" not in ended.out


def test_a_quantised_base_is_merged_with_plain_weights(merge: Run, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    save_base(tmp_path / "plain", hidden_size=64, intermediate_size=64)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapter = trained(tmp_path / "base", lora(), tmp_path / "adapter")
    ended = merge(adapter, "--output_dir", tmp_path / "merged")
    assert ended.code == 0, ended.err
    assert "is quantised: its weights are made plain ones" in ended.err
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    quantised = with_adapter(tmp_path / "base", adapter)
    for module in quantised.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or it would round to bfloat16
    assert (logps(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logps(quantised)).abs().max() < 1e-4

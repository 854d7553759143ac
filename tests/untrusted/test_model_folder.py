"""fastdpo.untrusted.model_folder: files stay in their folder and have a sensible size."""

import json
import os
from pathlib import Path

import pytest

from fastdpo.untrusted import model_folder
from fastdpo.untrusted.model_folder import check_model_folder, is_kernel_on_hub
from fastdpo.untrusted.text import printable


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_plain_folder_and_names_on_the_hub_pass(tmp_path: Path) -> None:
    write(tmp_path, config={"a": [{"b": 1}]}, tokenizer={})
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "here.txt").symlink_to("config.json")
    check_model_folder("model", tmp_path)
    check_model_folder("model", "someone/something")


def test_shards_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    write(tmp_path, config={})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "parts/1.safetensors"}}))
    check_model_folder("model", tmp_path)


@pytest.mark.parametrize("shard", ["../1.safetensors", "/tmp/1.safetensors", "parts/../1.safetensors"])
def test_shards_elsewhere_are_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=f"names the shard '{shard}', which is not in the model's folder"):
        check_model_folder("model", tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", config={})
    (tmp_path / "model" / "vocab.txt").symlink_to("../private.txt")
    with pytest.raises(ValueError, match=r"vocab.txt' is a link to '.*private.txt', which is not in the model's"):
        check_model_folder("model", tmp_path / "model")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "merges.txt")
    with pytest.raises(ValueError, match=r"merges.txt' is not a regular file; remove it"):
        check_model_folder("model", tmp_path)


def test_a_link_in_a_cache_of_the_hub_may_not_leave_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--a" / "snapshots" / "1"
    write(folder, config={})
    (tmp_path / "other").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model: .*tokenizer.json' is a link to '.*other', which is not in the model"):
        check_model_folder("model", folder)


def test_links_of_the_hub_s_cache_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blobs may lie on another disk, and older downloads left links to them in folders of their own."""
    blobs, repository, own = tmp_path / "disk", tmp_path / "hub" / "models--a", tmp_path / "own"
    write(blobs, abc={})
    for folder in (repository / "snapshots" / "1", own):
        folder.mkdir(parents=True)
        (folder / "config.json").symlink_to(repository / "blobs" / "abc.json")
    (repository / "blobs").symlink_to(blobs)
    check_model_folder("model", repository / "snapshots" / "1")
    with pytest.raises(ValueError, match="which is not in the model's folder"):
        check_model_folder("model", own)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    check_model_folder("model", own)


def test_the_base_of_an_adapter_is_checked_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write(base, config={})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    write(adapter, adapter_config={"base_model_name_or_path": str(base)})
    with pytest.raises(ValueError, match="names the shard '/etc/passwd'"):
        check_model_folder("model", adapter)


def test_sizes_and_depths_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 101 + "]" * 101 + "}")
    with pytest.raises(ValueError, match=r"config.json' can't be read: it is nested more than 100 levels deep"):
        check_model_folder("model", tmp_path)
    write(tmp_path, config={"a": 1})
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(ValueError, match=r"chat_template.jinja' has 1,048,577 bytes, more than the 1,048,576"):
        check_model_folder("model", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    monkeypatch.setattr(model_folder, "_LARGE", 5)
    with pytest.raises(ValueError, match=r"config.json' has 8 bytes, more than the 5"):
        check_model_folder("model", tmp_path)


def test_a_kernel_on_the_hub_is_told_from_a_name() -> None:
    assert is_kernel_on_hub("_attn_implementation", "a/b")
    assert is_kernel_on_hub("attn_implementation", {"text_config": "flash|a/b:c"})
    assert not is_kernel_on_hub("attn_implementation", "flash_attention_2")
    assert not is_kernel_on_hub("_name_or_path", "a/b")


def test_code_may_be_allowed(tmp_path: Path) -> None:
    write(tmp_path, config={"text_config": {"_attn_implementation": "a/b"}})
    with pytest.raises(ValueError, match="names the kernel 'a/b'"):
        check_model_folder("model", tmp_path)
    check_model_folder("model", tmp_path, trusts_code=True)


def test_control_characters_are_escaped_and_letters_kept() -> None:
    assert printable("é\n\t中\x1b[2J\u202e\x07") == "é\n\t中\\x1b[2J\\u202e\\x07"
    assert printable("a\nb", "") == "a\\nb"


def test_files_of_a_tokenizer_lie_in_its_folder(tmp_path: Path) -> None:
    """transformers reads the file of this list that fits its version."""
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.4.json", "tokenizer.json"]}))
    check_model_folder("model", tmp_path)
    config.write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.json", "../x/tokenizer.1.json"]}))
    with pytest.raises(ValueError, match=r"names '../x/tokenizer.1.json', which is not in the model's folder"):
        check_model_folder("model", tmp_path)

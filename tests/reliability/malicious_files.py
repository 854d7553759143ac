"""Files that a stranger wrote: none is executed, and none leads out of its folder.

Each case plants code that would create a file, or a path to a file outside, and loads it as a user would.
"""

import functools
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fastdpo.config import DPOConfig
from fastdpo.data.prepare import prepare_dataset
from fastdpo.model.policy import build_policy, load_policy, load_tokenizer
from fastdpo.reference.cache import TokenCache
from fastdpo.report.page import write_report
from fastdpo.report.samples import Sample
from fastdpo.settings.config_file import read_settings
from fastdpo.settings.dataset_files import load_splits
from fastdpo.settings.flags import overrides_of
from fastdpo.untrusted import chat_template
from tests.helpers.byte_tokenizer import byte_tokenizer, messages
from tests.helpers.trainers import make_trainer, rows, tiny_llama

Case = tuple[str, Callable[[Path], bool]]
ROW = {"prompt": "What is 2 + 2?", "chosen": "It is four.", "rejected": "five"}
REFUSALS = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, pickle.UnpicklingError)


@cache
def _model() -> Path:
    """A saved model with its tokenizer, of which each case gets a copy."""
    folder = Path(tempfile.mkdtemp()) / "model"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(_model(), folder / "model"))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _code(folder: Path) -> str:
    return f"import os\nos.mkdir({str(folder / 'ran')!r})\n"


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _config(folder: Path, **fields: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(folder / "out"), use_cpu=True, report_to="none", **fields)


def _nothing_ran(folder: Path, load: Callable[[], Any], *, refused: bool = False) -> bool:
    """Whether loading runs no code; with `refused`, also whether it fails with an error that is meant for a user."""
    try:
        load()
    except REFUSALS:
        return not (folder / "ran").exists()
    return not refused and not (folder / "ran").exists()


def _refused(load: Callable[[], Any], words: str) -> bool:
    try:
        load()
    except ValueError as error:
        return words in str(error)
    return False


# Pickles


def _pickled(name: str, raw: bool) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        (model / "model.safetensors").unlink()
        bomb = {"model.embed_tokens.weight": Bomb(folder / "ran")}
        (model / name).write_bytes(pickle.dumps(bomb)) if raw else torch.save(bomb, model / name)
        if name != "pytorch_model.bin":
            index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
            (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return _nothing_ran(folder, lambda: load_policy(str(model), _config(folder)), refused=True)

    return case


def _pickled_adapter(folder: Path) -> bool:
    model, adapter = _copy(folder), _adapter(folder)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Bomb(folder / "ran")}, adapter / "adapter_model.bin")
    return _nothing_ran(folder, lambda: load_policy(str(adapter), _config(folder)), refused=True) and model.exists()


def _adapter(folder: Path, **fields: Any) -> Path:
    """A LoRA adapter of the model in the folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    _change(folder / "adapter" / "adapter_config.json", **fields)
    return folder / "adapter"


def _pickled_checkpoint(name: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "data": rows(8)}
        make_trainer(folder, **options).train()
        checkpoint = folder / "out" / "checkpoint-2"
        torch.save(Bomb(folder / "ran"), checkpoint / name)
        trainer = make_trainer(folder, **options | {"max_steps": 3})
        return _nothing_ran(folder, lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))

    return case


# Code beside a model


def _auto_map(which: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        (model / "evil.py").write_text(_code(folder))
        names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
        _change(model / "tokenizer_config.json", auto_map=names, tokenizer_class="T")
        _change(model / "config.json", auto_map=names, model_type="strange", architectures=["M"])
        if which == "adapter":
            plain = Path(shutil.copytree(_model(), folder / "plain"))
            shutil.move(model, folder / "evil")
            shutil.move(plain, model)
            model = _adapter(folder, base_model_name_or_path=str(folder / "evil"))
        args = _config(folder)
        loads: dict[str, Callable[[], Any]] = {
            "tokenizer": lambda: load_tokenizer(tiny_llama_at(model), args),
            "config": lambda: build_policy(str(model), args),
        }
        return _nothing_ran(folder, loads.get(which, lambda: load_policy(str(model), args)), refused=True)

    return case


def tiny_llama_at(model: Path) -> Any:
    """A loaded model that says that it was loaded from a folder."""
    policy = tiny_llama()
    policy.config._name_or_path = str(model)
    return policy


def _custom_generate(folder: Path) -> bool:
    model = _copy(folder)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(_code(folder))
    return _nothing_ran(folder, lambda: load_policy(str(model), _config(folder)))


def _kernel(field: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        _change(model / "config.json", **{field: "stranger/kernel"})
        return _refused(lambda: load_policy(str(model), _config(folder)), "names the kernel 'stranger/kernel'")

    return case


def _imports(**fields: Any) -> Callable[[Path], bool]:
    """Fields of an adapter's config that name a module to import, which lies in the working folder."""

    def case(folder: Path) -> bool:
        _copy(folder)
        adapter = _adapter(folder, **fields)
        (folder / "stranger.py").write_text(_code(folder))
        import sys

        sys.path.insert(0, str(folder))
        try:
            return _nothing_ran(folder, lambda: load_policy(str(adapter), _config(folder)))
        finally:
            sys.path.remove(str(folder))

    return case


# Config files


def _yaml(line: str, words: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        (model / "evil.py").write_text(_code(folder))
        (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        path = folder / "run.yaml"
        path.write_text(
            f"dataset_name: {folder}/rows.jsonl\nmodel_name_or_path: {model}\n{line.format(folder=folder)}\n"
        )
        typed = overrides_of(["--trust_remote_code"], {})
        allows = "trust_remote_code" not in line or "{" in line or read_settings(path, typed)["trust_remote_code"]
        return bool(allows) and _refused(lambda: read_settings(path, {}), words) and not (folder / "ran").exists()

    return case


# Templates


def _template(text: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = text.replace("MARKER", str(folder / "ran"))
        chat = {
            "prompt": messages(("user", "Hi")),
            "chosen": messages(("assistant", "Hello")),
            "rejected": messages(("assistant", "No")),
        }
        data = Dataset.from_list([chat])
        seconds, chat_template.SECONDS = chat_template.SECONDS, 0.5
        try:
            load = functools.partial(prepare_dataset, data, tokenizer, max_length=None, vocab_size=300)
            return _nothing_ran(folder, load, refused=True)
        finally:
            chat_template.SECONDS = seconds

    return case


def _template_of_a_row(folder: Path) -> bool:
    chat: dict[str, Any] = {"prompt": messages(("user", "Hi")), "chosen": messages(("assistant", "Hello"))}
    chat |= {"rejected": messages(("assistant", "No")), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    data = Dataset.from_list([chat])
    load = functools.partial(prepare_dataset, data, byte_tokenizer(), max_length=None, vocab_size=300)
    return _refused(load, "brings a chat template of the row's own")


# Paths


def _shard(name: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        shutil.move(model / "model.safetensors", folder / "outside.safetensors")
        where = name.format(folder=folder)
        weights = {"metadata": {}, "weight_map": dict.fromkeys(tiny_llama().state_dict(), where)}
        (model / "model.safetensors.index.json").write_text(json.dumps(weights))
        words = "names the shard"
        return _refused(lambda: load_policy(str(model), _config(folder)), words)

    return case


def _link(file: str, via_folder: bool = False) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        model = _copy(folder)
        (folder / "outside").mkdir()
        shutil.move(model / file, folder / "outside" / file)
        if via_folder:
            (model / "inner").symlink_to(folder / "outside")
            (model / file).symlink_to(Path("inner") / file)
        else:
            (model / file).symlink_to(folder / "outside" / file)
        return _refused(lambda: load_policy(str(model), _config(folder)), "not in the model's folder")

    return case


def _linked_adapter(folder: Path) -> bool:
    _copy(folder)
    adapter = _adapter(folder)
    shutil.move(adapter / "adapter_model.safetensors", folder / "outside.safetensors")
    (adapter / "adapter_model.safetensors").symlink_to(folder / "outside.safetensors")
    return _refused(lambda: load_policy(str(adapter), _config(folder)), "not in the model's folder")


def _links_of_a_hub_cache(folder: Path) -> bool:
    """The layout of a Hub's cache, which is made of links, loads."""
    repo = folder / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(_model().iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return load_policy(str(snapshot), _config(folder)) is not None


def _pipe(folder: Path) -> bool:
    model = _copy(folder)
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    return _refused(lambda: load_policy(str(model), _config(folder)), "is not a regular file")


# Datasets


@contextmanager
def _own_dataset_cache(folder: Path) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    level = logging.getLogger("datasets").level
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        logging.getLogger("datasets").setLevel(level)


def _dataset(write: Callable[[Path, Path], None], words: str) -> Callable[[Path], bool]:
    def case(folder: Path) -> bool:
        data = folder / "data"
        data.mkdir()
        (folder / "outside.jsonl").write_text(json.dumps(ROW) + "\n")
        write(data, folder)
        with _own_dataset_cache(folder):
            return _refused(lambda: load_splits(str(data)), words) and not (folder / "ran").exists()

    return case


def _script(data: Path, folder: Path) -> None:
    (data / "data.py").write_text(_code(folder))
    (data / "train.jsonl").write_text(json.dumps(ROW) + "\n")


def _readme(data: Path, folder: Path) -> None:
    (data / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../outside.jsonl\n---\n")


def _saved(data: Path, folder: Path) -> None:
    for name in (data, folder / "other"):
        Dataset.from_list([ROW]).save_to_disk(str(name))
    _change(data / "state.json", _data_files=[{"filename": "../other/data-00000-of-00001.arrow"}])


# Caches and reports


def _linked_shard(folder: Path) -> bool:
    import numpy as np

    TokenCache(folder / "a").add({b"0" * 32: np.zeros(3, np.float32)})
    (folder / "b").mkdir()
    for file in (folder / "a").glob("shard-*"):
        (folder / "b" / file.name).symlink_to(file)
    return len(TokenCache(folder / "b")) == 0 and len(TokenCache(folder / "a")) == 1


def _report(folder: Path) -> bool:
    script = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    log = [{"step": 1, "loss": 0.5, script: 1.0}]
    sample = Sample([1], script, script, script, script)
    about = {script: script}
    page = write_report(
        folder, log, title=script, about=about, config=about, given=about, samples=[sample], failure=script
    )
    text = "" if page is None else page.read_text()
    return bool(text) and "<script" not in text and "<img src=x" not in text and "default-src 'none'" in text


def cases() -> list[Case]:
    """Return the names of the cases, and functions that return whether nothing ran or left its folder."""
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    by_format = "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ raise_exception('x') }}"
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    stranger = {"base_model_class": "M", "parent_library": "stranger"}
    found: list[Case] = [
        ("a pickled model", _pickled("pytorch_model.bin", raw=False)),
        ("a pickle in the old format", _pickled("pytorch_model.bin", raw=True)),
        ("a pickled shard", _pickled("shard.bin", raw=False)),
        ("a pickled adapter", _pickled_adapter),
        *((f"a pickled {name} in a checkpoint", _pickled_checkpoint(name)) for name in _CHECKPOINT_FILES),
        ("code of a model", _auto_map("model")),
        ("code of a config", _auto_map("config")),
        ("code of a tokenizer", _auto_map("tokenizer")),
        ("code of an adapter's base model", _auto_map("adapter")),
        ("code that generates", _custom_generate),
        ("a kernel in a config", _kernel("_attn_implementation")),
        ("a kernel in a config, by its newer name", _kernel("attn_implementation")),
        ("a module named by an adapter", _imports(auto_mapping=stranger, task_type=None)),
        ("Megatron named by an adapter", _imports(megatron_core="stranger", megatron_config={"a": 1})),
        ("trust_remote_code in a file", _yaml("trust_remote_code: true", "sets trust_remote_code")),
        ("trust_remote_code in arguments", _yaml("model_init_kwargs: {{trust_remote_code: true}}", "may not hold")),
        ("pickles allowed in a file", _yaml("model_init_kwargs: {{weights_only: false}}", "may not hold")),
        ("a kernel in a file", _yaml("model_init_kwargs: {{attn_implementation: a/b}}", "runs a kernel from the Hub")),
        ("kernels in a file", _yaml("model_init_kwargs: {{use_kernels: true}}", "may not hold")),
        ("a Python tag in a file", _yaml("seed: !!python/object/apply:os.mkdir ['{folder}/ran']", "not valid YAML")),
        ("a path out of the model in a file", _yaml("model_init_kwargs: {{gguf_file: ../a.gguf}}", "must lie in")),
        ("a subfolder out of the model in a file", _yaml("model_init_kwargs: {{subfolder: /etc}}", "must lie in")),
        ("a template that walks classes", _template(escape)),
        ("a template that reaches globals", _template("{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}")),
        ("a template that includes a file", _template("{% include '/etc/passwd' %}")),
        ("a template that formats attributes", _template(by_format)),
        ("a template that loops for hours", _template(loops)),
        ("a template that takes all memory", _template("{{ 'a' * 10**12 }}")),
        ("a template of a row", _template_of_a_row),
        ("a shard beside the folder", _shard("../outside.safetensors")),
        ("a shard by an absolute path", _shard("{folder}/outside.safetensors")),
        ("a link as weights", _link("model.safetensors")),
        ("a link through a linked folder", _link("model.safetensors", via_folder=True)),
        ("a link as a tokenizer", _link("tokenizer.json")),
        ("a link as an adapter", _linked_adapter),
        ("a pipe as weights", _pipe),
        ("the links of a Hub's cache", _links_of_a_hub_cache),
        ("a script of a dataset", _dataset(_script, "Dataset scripts are no longer supported")),
        ("data outside, named by a README", _dataset(_readme, "which is not in the folder")),
        ("data outside, named by a state", _dataset(_saved, "which is not in the folder")),
        ("a link as a cache's shard", _linked_shard),
        ("HTML in every field of a report", _report),
    ]  # fmt: skip
    return found


_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")

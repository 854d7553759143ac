"""Refuse a model folder whose files lead out of it, or are too large or too deep to be what their names say.

Weights, adapters and tokenizers are read by transformers, PEFT and tokenizers, none of which checks this. Pickled
weights are left to torch, which builds nothing but tensors of them.
"""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdpo.untrusted.json_files import read_json

MIB = 2**20
_LARGE = 1024 * MIB
"""Most bytes of files that list a vocabulary or all weights; the largest in use have about 40 MiB."""
_SMALL = 16 * MIB
_TEMPLATE = MIB
_READ = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".gguf", ".model", ".txt", ".tiktoken", ".py")
"""Suffixes of the files that a loader may open."""
_PARSED_IN_RUST = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Their parser bounds the depth itself."""


def check_model_folder(setting: str, folder: str | Path, *, trusts_code: bool = False) -> None:
    """Check the files that loading a model, an adapter or a tokenizer from a local folder would open.

    A symbolic link must lead to a file in the folder, or into the user's cache of the Hub, as those of older versions
    of `huggingface_hub` do. In a cache of the Hub, where all files are links, it must lead to a file of the same
    repository.

    Args:
        setting: what an error calls the folder.
        folder: anything but a local folder passes, such as a name on the Hub.
        trusts_code: whether the user typed `trust_remote_code`. Without it, a config may not name a kernel on the Hub,
            which transformers would download and run.

    Raises:
        ValueError: a file breaks a rule; the message begins with `setting`, and names the file and the fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    home = folder.resolve()
    repository = home.parent.parent
    # the folder of blobs may itself be a link, to another disk
    is_cached = home.parent.name == "snapshots"
    roots = (repository, (repository / "blobs").resolve()) if is_cached else (home, *_blobs_of_cache())
    for path in _files(folder):
        problem = _problem(path, roots)
        if problem:
            raise ValueError(f"{setting}: {str(path)!r} {problem}")
        if path.name == "adapter_config.json":
            base = _json(setting, path).get("base_model_name_or_path")
            if isinstance(base, str) and base and Path(base).is_dir() and Path(base).resolve() != home:
                check_model_folder(setting, base, trusts_code=trusts_code)
        elif path.name.endswith(".index.json"):
            _check_index(setting, path, roots)
        elif path.suffix == ".json" and path.name not in _PARSED_IN_RUST and path.stat().st_size <= _SMALL:
            found = _json(setting, path, wanted=None)
            files = (
                found.get("fast_tokenizer_files")
                if path.name == "tokenizer_config.json" and isinstance(found, dict)
                else None
            )
            for file in files if isinstance(files, list) else ():
                if not _is_inside(path.parent / str(file), roots):
                    raise ValueError(f"{setting}: {str(path)!r} names {file!r}, which is not in the model's folder")
            for name, value in items(found):
                if not trusts_code and is_kernel_on_hub(name, value):
                    raise ValueError(
                        f"{setting}: {str(path)!r} names the kernel {value!r}, whose code would come from the Hub; set "
                        f"{name} in it to sdpa, or allow code with --trust_remote_code"
                    )


def is_kernel_on_hub(name: str, value: Any) -> bool:
    """Return whether a field of a model's config, or an argument of `from_pretrained`, names a kernel on the Hub."""
    return name.lstrip("_").startswith(_KERNELS) and any("/" in text for text in _texts(value))


_KERNELS = ("attn_implementation", "experts_implementation", "attention_implementation")


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a mapping, and those of all mappings and lists in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield str(key), each
        yield from items(each)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for _, each in items(value) if isinstance(each, str)]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that loaders may open, and those of adapters and templates in its folders."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            yield path
        elif path.is_dir() and (path.name == "additional_chat_templates" or (path / "adapter_config.json").exists()):
            yield from (each for each in sorted(path.iterdir()) if each.suffix in _READ)


def _blobs_of_cache() -> list[Path]:
    """Return the folders of model files in the user's cache of the Hub, without importing its library."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return [blobs.resolve() for blobs in cache.glob("models--*/blobs")]


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    real = path.resolve()
    return any(real.is_relative_to(root) for root in roots)


def _problem(path: Path, roots: Sequence[Path]) -> str | None:
    real = path.resolve()
    if not _is_inside(path, roots):
        return f"is a link to {str(real)!r}, which is not in the model's folder; copy that file there"
    if not real.exists():
        return None  # a dangling link, which its reader reports if it needs it
    info = real.stat()
    if stat.S_ISDIR(info.st_mode):
        return None
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file; remove it"
    most = _TEMPLATE if path.suffix == ".jinja" else _LARGE if path.suffix == ".json" else None
    if most is not None and info.st_size > most:
        return f"has {info.st_size:,} bytes, more than the {most:,} that such a file may have"
    return None


def _json(setting: str, path: Path, wanted: type | None = dict, most: int = _SMALL) -> Any:
    try:
        found = read_json(path, most)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}  # its reader says what is wrong with it
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{setting}: {str(path)!r} can't be read: {error}") from None
    if wanted is not None and not isinstance(found, wanted):
        raise ValueError(f"{setting}: {str(path)!r} must hold a JSON object, got {type(found).__name__}")
    return found


def _check_index(setting: str, path: Path, roots: Sequence[Path]) -> None:
    """Check that the shards that an index names are files of the folder."""
    shards = _json(setting, path, most=_LARGE).get("weight_map")
    for shard in sorted({str(name) for name in shards.values()} if isinstance(shards, dict) else ()):
        if not _is_inside(path.parent / shard, roots) or ".." in Path(shard).parts:
            raise ValueError(
                f"{setting}: {str(path)!r} names the shard {shard!r}, which is not in the model's folder; an index may "
                "only name files beside it"
            )

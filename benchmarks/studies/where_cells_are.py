"""Measure where the active cells of a pretrained model are, for `head_time_model` and docs/sparse_backward.md.

    python -m benchmarks.studies.where_cells_are MODEL --gguf FILE --out benchmarks/results/cpu-2-cores/cells.json

It takes ten minutes on 2 cores, and no GPU. MODEL is a folder or a name that transformers loads, FILE a quantised file
in it. The model answers questions by
sampling, so the rows are those of responses that a preference model would judge. Its logits, multiplied by a factor,
stand in for those of a model that is surer of itself: with a factor of 1, the rows have the density that the model has.

Rows are sorted by their number of active cells and cut into blocks of BLOCK rows, so that there are about as many
blocks as `kernels.row_lists` makes of 8192 rows. The table has, by density: the share of active cells in rows of which
more than a third is active, the share of all cells in dense blocks, and the share of active cells elsewhere. The last
two are `ROWS` of the time model.

Shapes: N rows, D hidden size, V vocabulary, T = 128 columns of a tile, J = V / T tiles.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.benchmarks.harness import save
from fastdpo.head.impl import sparsity

T, BLOCK, TOKENS = 128, 64, 56
DENSITIES = (None, 0.35, 0.18, 0.05)
QUESTIONS = (
    "Explain how a rainbow forms.", "Write a short story about a lighthouse keeper.",
    "How do I cook rice so that it does not stick?", "What are the main causes of inflation?",
    "Summarize the plot of Romeo and Juliet.", "Give me three tips for learning to play the guitar.",
    "Why is the sky blue during the day and red at sunset?", "Write a polite email that declines a meeting.",
    "What is the difference between a virus and a bacterium?", "Describe the water cycle to a ten-year-old.",
    "How does a binary search work? Show Python code.", "What should I see in Lisbon in two days?",
    "Explain the rules of chess briefly.", "Write a poem about autumn.", "How can I sleep better at night?",
    "What did the Treaty of Westphalia change?", "Why do cats purr?", "Explain compound interest with an example.",
    "How do vaccines work?", "Write a product description for a steel water bottle.",
)  # fmt: skip


@torch.no_grad()
def respond(name: str, gguf: str | None) -> tuple[Tensor, Tensor]:
    """Return the logits `[N, V]` of sampled responses, from inputs rounded to bfloat16, and the targets `[N]`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **options)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options).eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    rows = []
    for ids, mask in zip(sampled, inputs.attention_mask, strict=True):
        hidden = model.model(ids[int(mask.argmax()) :][None]).last_hidden_state[0]
        rows.append(hidden[-TOKENS - 1 : -1])
    weight = model.get_output_embeddings().weight
    logits = torch.cat(rows).bfloat16().float() @ weight.bfloat16().float().T
    return logits, sampled[:, -TOKENS:].flatten()


def active_cells(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cells `[N, J]` that a backward computes when all |dlogps| are the same."""
    probs = torch.softmax(logits, 1).scatter_(1, targets[:, None], 0.0)
    mass = torch.nn.functional.pad(probs, (0, -probs.shape[1] % T)).unflatten(1, (-1, T)).sum(2)
    rest = mass.sum(1)
    shares = mass / rest[:, None]
    every = torch.ones_like(targets, dtype=torch.bool)
    return sparsity.active_cells(shares, sparsity.select(shares, rest).threshold, targets // T, every)


def where(active: Tensor, least: float) -> tuple[float, float, float]:
    """Return the shares that the table has; a block is dense from the share `least` of its rows on."""
    of_row = active.float().mean(1)
    blocks = active[of_row.argsort(descending=True, stable=True)].split(BLOCK)
    counts = torch.stack([block.sum(0) for block in blocks if len(block) == BLOCK])
    dense, cells = counts >= least * BLOCK, counts.numel() * BLOCK
    return (
        float(active[of_row > 1 / 3].sum() / active.sum()),
        float(dense.float().mean()),
        float((counts * ~dense).sum() / cells),
    )


def sharpen(logits: Tensor, targets: Tensor, density: float) -> float:
    """Find the factor of the logits at which so many cells are active."""
    low, high = 0.5, 4.0
    for _ in range(9):
        middle = (low + high) / 2
        denser = active_cells(middle * logits, targets).float().mean() > density
        low, high = (middle, high) if denser else (low, middle)
    return (low + high) / 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or repository of a causal LM.")
    parser.add_argument("--gguf", help="Name of the GGUF file in that folder that holds the weights (default: none).")
    parser.add_argument("--out", type=Path, help="JSON file to which the table's rows are written (default: none).")
    args = parser.parse_args(argv)
    logits, targets = respond(args.model, args.gguf)
    least = sparsity.dense_block(sparsity.CHIPS[9, 0])
    rows = []
    for density in DENSITIES:
        factor = 1.0 if density is None else sharpen(logits, targets, density)
        active = active_cells(factor * logits, targets)
        full, dense, others = where(active, least)
        row = {"factor": factor, "density": float(active.float().mean())}
        rows.append(row | {"in_full_rows": full, "in_dense_blocks": dense, "elsewhere": others})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if args.out:
        nll = float(torch.nn.functional.cross_entropy(logits, targets))
        save(args.out, {"responses": len(QUESTIONS), "vocab": logits.shape[1], "nll": nll, "rows": rows})


if __name__ == "__main__":
    main()

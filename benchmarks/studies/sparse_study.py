"""Study what a sparse backward costs in accuracy, for docs/sparse_backward.md with its tables and figures.

    python -m benchmarks.studies.sparse_study         # half an hour on 2 cores, no GPU; rewrites docs/sparse_backward*

The truth is float64 on the same rounded inputs. A sweep isolates the effect of skipping cells: if E is the sparse minus
the exact gradient of the logits, the errors of dhidden and dweight are E @ weight and E.T @ hidden. The study also
measures what fastdpo computes, rounding included, and the effect on a training run. Rows skip their smallest cells by
the rule of `fastdpo.head.impl.sparsity`, which also defines cells, masses and limits.

Shapes: N rows, D hidden size, V vocabulary, T columns of a tile, J = V / T tiles.
"""

import argparse
import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studies.rows import KINDS, Exact, Rows, error, exact, make_rows
from benchmarks.studies.sparse_report import draw, fill
from fastdpo import linear_logprobs
from fastdpo.benchmarks import small_lm
from fastdpo.benchmarks.harness import provenance
from fastdpo.head.impl import sparsity
from fastdpo.head.impl import torch as torch_impl
from fastdpo.head.op import density_key

DOCS = Path(__file__).parents[2] / "docs"
Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the study."""

    N: int = 128
    D: int = 256
    V: int = 32768
    lm_V: int = 16384
    lm_D: int = 256
    lm_layers: int = 4
    lm_steps: int = 2000
    lm_rows: int = 512
    characters: int = 8_000_000
    """Characters of text."""
    limits: tuple[float, ...] = (0.04, 0.02, 0.01, 0.005, 0.0025)
    """Limits of the mass that a row may skip, in units of the root mean square of the rows' gradients."""
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    steps: int = 30


SMOKE = Sizes(
    N=24, D=32, V=1024, lm_V=512, lm_D=32, lm_layers=1, lm_steps=3, lm_rows=64, characters=60_000,
    limits=(0.02, 0.005), seeds=(1, 2), steps=2,
)  # fmt: skip
LM = ("LM, held out", "LM, seen")
SMALL = 16
"""Columns of a small tile, for the LM: V = 16384 then has 1024 cells, as V = 131072 has with tiles of 128."""
TILES = dict.fromkeys(LM, (SMALL, 64, 128))
"""Tile sizes of the rows that are not studied with 64 and 128."""
NO_LIMIT = {"row": 1e9, "cell": 2.0**-4}
"""Limits that never bind: the limit of a row already forces a cell of 2^-4 to be computed."""


class Cells(NamedTuple):
    """Masses `[N, J]` of the cells of a tile size, and which of them are computed."""

    mass: Tensor
    active: Tensor


def probabilities(rows: Rows) -> Tensor:
    return torch.softmax(rows.hidden.double() @ rows.weight.double().T, -1)


def cells(
    rows: Rows, probs: Tensor, T: int, row: float = sparsity.MAX_ROW_MASS, cell: float = sparsity.MAX_CELL_MASS
) -> Cells:
    """Let `sparsity.select` choose the cells."""
    index = rows.targets[:, None]
    mass = probs.scatter(1, index, 0.0).unflatten(1, (-1, T)).sum(2)
    rest = mass.sum(1)
    shares = mass / rest[:, None]
    selection = sparsity.select(shares, rest * rows.dlogps.abs(), row, cell)
    return Cells(mass, (shares > selection.threshold[:, None]).scatter_(1, index // T, True))


def skip(rows: Rows, probs: Tensor, chosen: Cells, *, conserve: bool) -> Tensor:
    """Return the sparse minus the exact gradient of the logits, `[N, V]` float32."""
    T = probs.shape[1] // chosen.mass.shape[1]
    lost = probs.unflatten(1, (-1, T))
    if conserve:
        lost = lost - chosen.mass.unsqueeze(2) / T
    lost = lost.masked_fill(chosen.active.unsqueeze(2), 0).flatten(1)
    difference: Tensor = (lost * rows.dlogps.double()[:, None]).float()
    return difference


def distances(weight: Tensor, T: int) -> Tensor:
    """Return the distance `[V / T, T]` of each embedding from the mean of its tile."""
    tiles = weight.unflatten(0, (-1, T))
    away: Tensor = (tiles - tiles.mean(1, keepdim=True)).norm(dim=2)
    return away


def predictions(rows: Rows, chosen: Cells, difference: Tensor) -> dict[str, dict[str, float]]:
    """Divide the error of dhidden by three candidates for its bound, over all rows and in the worst row.

    Let r be the distances of embeddings from their tile's mean. "sum", of mass * max r, holds whatever the directions.
    "squares", the root of the sum of squares of mass * max r, holds if the errors of cells are orthogonal. "residual",
    the root of the sum of squares of each logit gradient's loss times r, holds if the errors of tokens are orthogonal.
    """
    J = chosen.mass.shape[1]
    r = distances(rows.weight.float(), difference.shape[1] // J)
    spread = chosen.mass.masked_fill(chosen.active, 0).float() * r.amax(1) * rows.dlogps.abs()[:, None]
    bounds = {
        "sum": spread.sum(1), "squares": spread.norm(dim=1), "residual": (difference * r.flatten()).norm(dim=1),
    }  # fmt: skip
    found = (difference @ rows.weight.float()).norm(dim=1)
    return {
        name: {
            "all": float(found.norm() / bound.norm()) if bound.any() else 0.0,
            "worst": float((found / bound.clamp(min=1e-30)).max()),
        }
        for name, bound in bounds.items()
    }


def sweep(kind: str, rows: Rows, true: Exact, limits: tuple[float, ...]) -> Table:
    """Return errors and density for every tile and row limit, with the mass of skipped cells conserved and dropped."""
    hidden, weight = rows.hidden.float(), rows.weight.float()
    probs = probabilities(rows)
    rare = torch.ones(weight.shape[0], dtype=torch.bool)
    rare[rows.targets] = False
    table: Table = []
    for T in TILES.get(kind, (64, 128)):
        for limit in limits:
            chosen = cells(rows, probs, T, limit)
            row: dict[str, Any] = {
                "kind": kind, "tile": T, "limit": limit, "density": float(chosen.active.double().mean()),
            }  # fmt: skip
            for scheme in ("dropped", "conserved"):
                difference = skip(rows, probs, chosen, conserve=scheme == "conserved")
                dhidden, dweight = difference @ weight, difference.T @ hidden
                ours, theirs = (true.dweight.float() + dweight)[rare], true.dweight.float()[rare]
                cosine = F.cosine_similarity(ours, theirs)
                row[scheme] = {
                    "dhidden": float(dhidden.norm() / true.dhidden.norm()),
                    "dweight": float(dweight.norm() / true.dweight.norm()),
                    "rare_cosine": float(cosine.median()),
                    "rare_cosine_5": float(cosine.quantile(0.05)),
                    "rare_norm": float((ours.norm(dim=1) / theirs.norm(dim=1)).median()),
                }
            table.append(row | {"predicted": predictions(rows, chosen, difference)})
    return table


RULES = {
    "both limits": (sparsity.MAX_ROW_MASS, sparsity.MAX_CELL_MASS),
    "row alone": (sparsity.MAX_ROW_MASS, NO_LIMIT["cell"]),
    "row alone, half": (sparsity.MAX_ROW_MASS / 2, NO_LIMIT["cell"]),
    "cell alone": (NO_LIMIT["row"], sparsity.MAX_CELL_MASS),
}
"""Limits of the mass that a row may skip, in total and in one cell."""


def compared(kind: str, rows: Rows, true: Exact) -> Table:
    """Return density and errors under every rule, with the smallest tile."""
    probs, T = probabilities(rows), TILES.get(kind, (64,))[0]
    table: Table = []
    for name, limits in RULES.items():
        chosen = cells(rows, probs, T, *limits)
        difference = skip(rows, probs, chosen, conserve=True)
        table.append({
            "kind": kind, "tile": T, "rule": name, "density": float(chosen.active.double().mean()),
            "dhidden": float((difference @ rows.weight.float()).norm() / true.dhidden.norm()),
            "dweight": float((difference.T @ rows.hidden.float()).norm() / true.dweight.norm()),
        })  # fmt: skip
    return table


@contextmanager
def setting(T: int, dense: float) -> Iterator[None]:
    """Inside the block, fastdpo's cells have T columns, and it computes all of them above the density `dense`."""
    saved = torch_impl.CELL, sparsity.DENSE
    torch_impl.CELL, sparsity.DENSE = T, dense
    sparsity._densities.clear()
    sparsity._calls.clear()
    try:
        yield
    finally:
        torch_impl.CELL, sparsity.DENSE = saved


def grads(rows: Rows, backward: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = (t.to(dtype).detach().requires_grad_() for t in (rows.hidden, rows.weight))
    logps = linear_logprobs(hidden, weight, rows.targets, impl="torch", backward=backward)
    return torch.autograd.grad(logps, [hidden, weight], rows.dlogps)


def shipped(kind: str, rows: Rows, true: Exact, T: int) -> dict[str, Any]:
    """Return the errors of what fastdpo computes, and of plain PyTorch with bfloat16 logits."""
    hidden, weight = rows.hidden.detach().requires_grad_(), rows.weight.detach().requires_grad_()
    logps = F.linear(hidden, weight).float().log_softmax(-1).gather(1, rows.targets[:, None]).squeeze(1)
    variants = {"bf16 logits": torch.autograd.grad(logps, [hidden, weight], rows.dlogps)}
    for backward in ("exact", "auto", "sparse"):
        with setting(T, sparsity.DENSE):
            variants[backward] = grads(rows, backward, torch.bfloat16)
            history = sparsity._densities.get(density_key(rows.hidden, rows.weight))
    assert history is not None
    return {
        "kind": kind,
        "tile": T,
        "nll": float(-true.logps.mean()),
        "confident": float((true.logps > math.log(0.9)).double().mean()),
        "density": float(history[-1].found[0]),
        "dhidden": {name: error(g[0], true.dhidden) for name, g in variants.items()},
        "dweight": {name: error(g[1], true.dweight) for name, g in variants.items()},
    }


RUNS: dict[str, Literal["auto", "exact", "sparse"]] = {
    "exact": "exact", "noise": "exact", "auto": "auto", "sparse": "sparse",
}  # fmt: skip


def training(base: Any, text: small_lm.Text, sizes: Sizes, T: int, noise: float) -> Table:
    """Train copies of `base` with every backward, without the fallback; a seed gives all of them the same batches.

    "noise" has the exact backward, and adds noise of the relative size `noise` to dhidden.
    """
    table: Table = []
    for seed in sizes.seeds:
        for name, backward in RUNS.items():
            with setting(T, 1.0):
                run = small_lm.train(
                    copy.deepcopy(base), text, sizes.steps, seed=100 + seed, lr=1e-3, dtype=torch.bfloat16,
                    backward=backward, noise=noise if name == "noise" else 0.0,
                )  # fmt: skip
            table.append({"seed": seed, "backward": name, **run._asdict()})
            print(f"seed {seed}, {name}: {run.held_out:.5f}, density {mean(run.densities or [1]):.2f}", flush=True)
    return table


def lm_rows(model: Any, tokens: Tensor, most: int) -> Rows:
    """Return at most `most` rows of one batch of text."""
    with torch.no_grad():
        hidden, targets = (x[:most] for x in small_lm.rows(model, next(small_lm.batches(tokens, seed=0))))
    weight = model.lm_head.weight.detach()
    return Rows(hidden.bfloat16(), weight.bfloat16(), targets, torch.randn(len(targets)))


def rounded(value: Any) -> Any:
    """Keep 6 digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def study(sizes: Sizes) -> dict[str, Any]:
    device = torch.device("cpu")
    torch.manual_seed(0)
    text = small_lm.tokenize(sizes.lm_V, sizes.characters)
    model = small_lm.make_model(sizes.lm_V, sizes.lm_D, sizes.lm_layers)
    base = small_lm.train(model, text, sizes.lm_steps, seed=1, lr=3e-3)
    print(f"small LM: {base.held_out:.3f} nats per token on held-out text", flush=True)

    swept: Table = []
    rules: Table = []
    as_shipped: Table = []
    for kind in (*KINDS, *LM):
        torch.manual_seed(0)
        if kind in LM:
            rows = lm_rows(model, text.held_out if kind == LM[0] else text.train, sizes.lm_rows)
        else:
            rows = make_rows(kind, sizes.N, sizes.D, sizes.V, torch.bfloat16, device)
        true = exact(rows)
        swept += sweep(kind, rows, true, sizes.limits)
        rules += compared(kind, rows, true)
        as_shipped += [shipped(kind, rows, true, T) for T in TILES.get(kind, (64,)) if T <= 64]
        print(f"{kind} rows: done", flush=True)
    noise = next(row["dhidden"]["sparse"] for row in as_shipped if (row["kind"], row["tile"]) == (LM[1], SMALL))
    return {
        "provenance": provenance() | {name: version(name) for name in ("numpy", "tokenizers", "transformers")},
        "sizes": sizes.__dict__,
        "lm": {"train_tokens": len(text.train), "held_out": base.held_out},
        "cells": swept,
        "rules": rules,
        "shipped": as_shipped,
        "noise": noise,
        "training": training(model, text, sizes, SMALL, noise),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="Measure toy sizes, to see that it runs.")
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="Folder for the document, its data and its figures (default: docs/)."
    )
    args = parser.parse_args(argv)

    results = rounded(study(SMOKE if args.smoke else Sizes()))
    folder = args.out / "sparse_backward"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads((folder / "study.json").read_text())
    draw(results, folder)
    document = (DOCS / "sparse_backward.md").read_text()
    (args.out / "sparse_backward.md").write_text(fill(document, results))


if __name__ == "__main__":
    main()

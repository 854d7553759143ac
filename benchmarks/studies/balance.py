"""Compute how evenly batches divide an epoch over processes, and write the table of docs/scaling.md.

    python -m benchmarks.studies.balance            # plan the batches again (seconds), and write both files
    python -m benchmarks.studies.balance --table    # write the table from the numbers in the repository

Processes wait for each other after each micro-batch, or after each optimizer step. If a micro-batch takes time in
proportion to its tokens, then 1 - mean / max over the processes is the share of the time that is lost, and the mean is
over all micro-batches, weighted by their time. Lengths are drawn as `fastdpo.benchmarks.lengths` describes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.benchmarks.lengths import LENGTHS
from fastdpo.benchmarks.report import replace
from fastdpo.data.sampler import BudgetSampler

ROOT = Path(__file__).parents[2]
PAGE, NUMBERS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/computed/balance.json"
MARK = "<!-- python -m benchmarks.studies.balance {} the table of balance -->\n"

PROFILES = ("ultrafeedback", "hh", "tldr")
PROCESSES = (2, 8, 64, 256, 1024)
PAIRS, MAX_LENGTH, ACCUMULATION = 240_000, 2048, 4
WAYS = {
    "random": "`per_device_train_batch_size=8`, in random order",
    "budget": "`tokens_per_batch=16384`",
}


def lengths_of(profile: str, pairs: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the tokens of prompts, chosen and rejected responses, `[pairs]` each."""
    rng, lengths = np.random.default_rng(seed), LENGTHS[profile]

    def draw(median: float, spread: float, most: Any) -> np.ndarray[Any, Any]:
        return np.clip(np.rint(rng.lognormal(np.log(median), spread, pairs)), 1, most).astype(np.int64)

    prompt = draw(lengths.prompt, lengths.prompt_spread, 3 * MAX_LENGTH // 4)
    return prompt, *(draw(lengths.response, lengths.response_spread, MAX_LENGTH - prompt) for _ in range(2))


def sizes_of(profile: str, pairs: int = PAIRS, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return the tokens that are computed for each pair, as `fastdpo.data.sampler.example_sizes` does."""
    return np.stack([sum(lengths_of(profile, pairs, seed)) - 1, np.ones(pairs, np.int64)], 1)


def rows_of(way: str, sizes: np.ndarray[Any, Any], processes: int) -> np.ndarray[Any, Any]:
    """Return the tokens of each micro-batch of an epoch, `[micro-batches of a process, processes]`."""
    if way == "random":
        order = np.random.default_rng(1).permutation(len(sizes))
        whole = order[: len(order) // (8 * processes) * 8 * processes]
        rows: np.ndarray[Any, Any] = sizes[whole, 0].reshape(-1, processes, 8).sum(2)
        return rows
    plan = BudgetSampler(sizes, tokens_per_batch=16384, world_size=processes).plan(0)
    return np.array([sizes[batch, 0].sum() for batch in plan]).reshape(-1, processes)


def lost(rows: np.ndarray[Any, Any]) -> float:
    """Return the share of the time in which processes wait for the one with most tokens."""
    return float(1 - rows.mean(1).sum() / rows.max(1).sum())


def numbers() -> dict[str, Any]:
    """Return the shares lost, by profile, way and number of processes: after each micro-batch, and after each step."""
    found: dict[str, Any] = {}
    for profile in PROFILES:
        sizes = sizes_of(profile)
        for way in WAYS:
            for processes in PROCESSES:
                rows = rows_of(way, sizes, processes)
                whole = rows[: len(rows) // ACCUMULATION * ACCUMULATION]
                steps = whole.reshape(-1, ACCUMULATION, processes).sum(1)
                shares = {"micro_batches": lost(rows), "steps": lost(steps), "per_process": len(rows)}
                found.setdefault(profile, {}).setdefault(way, {})[str(processes)] = shares
    return found


def table(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""

    def lines() -> Iterator[tuple[str, ...]]:
        yield ("lengths like", "batches", *(f"{n} processes" for n in PROCESSES))
        yield ("---",) * (2 + len(PROCESSES))
        for profile, ways in found.items():
            for way, shares in ways.items():
                cells = (f"{each['micro_batches']:.1%} ({each['steps']:.1%})" for each in shares.values())
                yield (profile, WAYS[way], *cells)

    return "".join("| " + " | ".join(line) + " |\n" for line in lines())


def write(found: dict[str, Any]) -> None:
    """Replace the table in the page."""
    replace(PAGE, MARK.format("writes"), MARK.format("has written"), f"\n{table(found)}\n")


def main() -> None:
    """Compute the numbers, or read them, and write the page."""
    parser = argparse.ArgumentParser(description="Write the table of balance in docs/scaling.md.")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    if not parser.parse_args().table:
        NUMBERS.parent.mkdir(parents=True, exist_ok=True)
        NUMBERS.write_text(json.dumps(numbers(), indent=1) + "\n")
    write(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    main()

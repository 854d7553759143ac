"""Times of small shapes, for pytest-benchmark: whether a change has made something slower.

    pytest benchmarks --benchmark-only --benchmark-autosave                              # before the change
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=min:25%  # after it

An error of the head beyond twice plain PyTorch's fails, however fast it is; the report's `extra_info` has it.
"""

from typing import Any

import pytest

from fastdpo import shared_prefix_batch
from fastdpo.benchmarks import lengths
from fastdpo.benchmarks.head import cases
from fastdpo.benchmarks.head.compare import Variant, errors, ours, step
from fastdpo.benchmarks.head.rows import exact_results, make_inputs
from fastdpo.benchmarks.peers import pytorch
from fastdpo.benchmarks.training import turn
from fastdpo.benchmarks.training_cases import VARIANTS, Case

pytest.importorskip("pytest_benchmark", reason="pip install 'fastdpo[bench]'")

HEADS = [cases.Case(512, 256, 8192, dtype, frozen) for dtype in ("float32", "bfloat16") for frozen in (True, False)]


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_head(case: cases.Case, benchmark: Any) -> None:
    inputs = make_inputs(case)
    exact = exact_results(inputs)
    variant = next(v for v in ours(case) if v.backward == ("exact" if case.dtype == "float32" else "auto"))
    plain = errors(Variant("PyTorch", pytorch), inputs, exact)
    for name, error in errors(variant, inputs, exact).items():
        if error is not None:
            benchmark.extra_info[f"error of {name}"] = error
            assert error <= 2 * (plain[name] or 0.0) + 1e-6
    benchmark(step, variant, inputs)


def test_packing(benchmark: Any) -> None:
    tokenizer, names = lengths.tokenizer(200), ("prompt", "chosen", "rejected")
    examples = [
        {f"{name}_ids": tokenizer(row[name])["input_ids"] for name in names}
        for row in lengths.pairs("toy", 64, 200, 64)
    ]
    batch = benchmark(shared_prefix_batch, examples)
    assert batch["input_ids"].shape[1] < sum(len(ids) for example in examples for ids in example.values())


def test_training(benchmark: Any) -> None:
    """Make a trainer, and train three steps of a tiny model."""
    case = Case("toy", "toy", 2, 2, 32)
    plain = turn(case, VARIANTS["fastdpo, no fused head"])
    ours = benchmark.pedantic(turn, (case, VARIANTS["fastdpo"]), rounds=3, warmup_rounds=1)
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)

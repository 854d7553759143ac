"""The study of the sparse backward runs, models what fastdpo computes, and its document says what its data say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import sparse_report, sparse_study
from benchmarks.studies.rows import exact, make_rows
from fastdpo.head.impl import sparsity

DOCUMENT = sparse_study.DOCS / "sparse_backward.md"
STUDY = json.loads((sparse_study.DOCS / "sparse_backward" / "study.json").read_text())


@pytest.mark.parametrize("name", sparse_report.TABLES)
def test_the_document_says_what_the_data_say(name: str) -> None:
    document = DOCUMENT.read_text()
    assert sparse_report.TABLES[name](STUDY) in document, "rerun python -m benchmarks.studies.sparse_study"


def test_another_study_changes_every_table() -> None:
    """The markers are all there, and no table is written by hand."""
    other = json.loads(json.dumps(STUDY), parse_float=lambda number: 1.5 * float(number))
    before, after = DOCUMENT.read_text(), sparse_report.fill(DOCUMENT.read_text(), other)
    for table in sparse_report.TABLES.values():
        assert table(STUDY) in before
        assert table(other) in after
    assert sparse_report.fill(after, STUDY) == before


def test_the_constants_are_the_studied_ones() -> None:
    assert sparsity.MAX_ROW_MASS in {row["limit"] for row in STUDY["cells"]}
    assert STUDY["sizes"] == json.loads(json.dumps(sparse_study.Sizes().__dict__))


def test_runs(tmp_path: Path) -> None:
    sparse_study.main(["--smoke", "--out", str(tmp_path)])
    study = json.loads((tmp_path / "sparse_backward" / "study.json").read_text())
    assert study.keys() == STUDY.keys()
    assert sparse_report.fill(DOCUMENT.read_text(), study) == (tmp_path / "sparse_backward.md").read_text()
    for name in ("errors", "training"):
        assert (tmp_path / "sparse_backward" / f"{name}.png").stat().st_size > 10_000


def test_the_error_is_bounded() -> None:
    """By mass times radius, in every row that was studied, up to float32 rounding."""
    assert all(row["predicted"]["sum"]["worst"] <= 1 + 1e-3 for row in STUDY["cells"])


def test_the_sweep_is_what_fastdpo_computes() -> None:
    """Up to float32 rounding: the sweep's gradients and those of `backward="sparse"`."""
    rows, T = make_rows("sharp", 48, 64, 2048, torch.bfloat16, torch.device("cpu")), 32
    true, probs = exact(rows), sparse_study.probabilities(rows)
    chosen = sparse_study.cells(rows, probs, T)
    difference = sparse_study.skip(rows, probs, chosen, conserve=True).double()
    with sparse_study.setting(T, 1.0):
        ours = sparse_study.grads(rows, "sparse", torch.float32)
    pairs = zip(
        ours,
        (true.dhidden, true.dweight),
        (difference @ rows.weight.double(), difference.T @ rows.hidden.double()),
        strict=True,
    )
    for gradient, truth, away in pairs:
        assert away.norm() > 1e-4 * truth.norm()
        assert (gradient.double() - truth - away).norm() <= 1e-2 * away.norm()

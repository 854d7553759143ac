"""Nothing in a step on a packed batch waits for the device, so nothing of it keeps the host from running ahead."""

import pytest
import torch
from torch import Tensor

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.loss.batch_loss import compute, step_mean
from fastdpo.loss.options import ObjectiveSettings
from fastdpo.loss.whole_step import step_totals
from fastdpo.model.scoring_forward import patch_forward
from fastdpo.report import metrics
from tests.helpers.tiny import make_model, make_pairs

PAIRS = make_pairs([(8, 2, 30, 4), (2, 0, 3, 17)], seed=8)


@pytest.mark.parametrize(("family", "layout"), [("llama", "shared"), ("gemma2", "tree"), ("mistral-window", "packed")])
def test_a_whole_step_on_the_meta_device(family: str, layout: str) -> None:
    """Which has shapes but no numbers: reading one, or a shape that depends on one, raises."""
    model = make_model(family).to("meta")
    patch_forward(model)
    batch = shared_prefix_batch(PAIRS, layout=layout, few_lengths=True)
    batch = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in batch.items()}
    with torch.no_grad():
        ref_logps = model(**batch).logps
    scores = model(**batch, with_stats=True)
    out = compute(batch, scores.logps, ref_logps, ObjectiveSettings(), stats=scores.stats)
    loss = step_mean(out, step_totals([batch]))
    loss.backward()
    sums, log_ratios = metrics.RunningSums(), scores.logps - ref_logps
    metrics.add_examples(sums, batch, out, keep=None, stats=scores.stats, log_ratios=log_ratios)
    metrics.add_tokens(sums, batch)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        float(loss)

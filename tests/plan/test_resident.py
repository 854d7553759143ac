"""What a device holds and sends, against numbers that were worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo import DPOConfig
from fastdpo.model.adapters import with_adapter
from fastdpo.plan import plan
from fastdpo.plan.memory import memory_model
from fastdpo.plan.resident import BUCKET, LIVE, STRATEGIES, Job, Weight, quantised, resident, units_of
from fastdpo.plan.tracing.trace import Precision, Ratios
from tests.helpers.trainers import lora, tiny_llama

EMBEDDING, LAYER, HEAD = Weight((30, 4), 4, True), Weight((10, 8), 4, True), Weight((30, 4), 4, True)
POLICY = [[EMBEDDING], [LAYER], [LAYER], [HEAD]]
REFERENCE = [[w._replace(trained=False) for w in unit] for unit in POLICY]
NUMEL = 2 * 120 + 2 * 80


def of(strategy: str, processes: int = 4, policy: Any = POLICY, reference: Any = REFERENCE, **options: Any) -> Any:
    job = Job(strategy, processes, options.pop("micro_batches", 1), options.pop("syncs_each", False))
    options = {"optimizer": "adamw_torch", "compute": torch.bfloat16, "upcasts": True} | options
    return resident(policy, reference, job=job, **options)


def test_ddp_keeps_everything_and_sends_each_gradient_twice() -> None:
    found = of("ddp")
    assert (found.weights, found.reference, found.gradients) == (4 * NUMEL,) * 3
    assert (found.optimizer, found.buffers) == (8 * NUMEL, 4 * NUMEL)
    assert found.sent == 2 * 3 / 4 * 4 * NUMEL
    assert (of("ddp", 1).buffers, of("ddp", 1).sent) == (0, 0)


def test_fsdp_rounds_rows_up_and_gathers_two_units() -> None:
    found = of("fsdp2")
    kept = 2 * 8 * 4 + 2 * 3 * 8  # 30 rows over 4 processes are 8, and 10 are 3
    assert (found.weights, found.gradients, found.optimizer) == (4 * kept, 4 * kept, 8 * kept)
    assert found.reference == 4 * kept
    # the reference's head stays gathered; the policy's head with its gradients, or two units with those of one layer
    assert found.buffers == 2 * 120 + max(2 * (120 + 120 + 80), 2 * 120 + 6 * 120, 2 * (120 + 80) + 6 * 120)
    # the policy in forward and backward, but for its head, the reference but for its head, and the float32 gradients
    assert found.sent == round(3 / 4 * (2 * (NUMEL + (NUMEL - 120) + (NUMEL - 120)) + 4 * NUMEL))
    in_16_bits = of("fsdp2", upcasts=False)
    assert found.sent - in_16_bits.sent == round(3 / 4 * 2 * NUMEL)
    assert found.buffers - in_16_bits.buffers == 2 * 120
    adds_up = of("fsdp2", micro_batches=3)
    assert adds_up.gradients == 4 * NUMEL > found.gradients
    assert of("fsdp2", micro_batches=3, upcasts=False).gradients == max(in_16_bits.gradients, 2 * NUMEL)
    assert of("fsdp2", micro_batches=3, syncs_each=True).gradients == found.gradients
    assert of("fsdp2", micro_batches=3, syncs_each=True).sent == 3 * found.sent > adds_up.sent > found.sent
    assert of("fsdp2", upcasts=False, policy=[[w._replace(itemsize=2) for w in unit] for unit in POLICY]).weights == (
        2 * kept
    )


def test_zero_keeps_a_float32_copy_in_the_optimizer() -> None:
    one, two, three = (of(f"zero{stage}") for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == three.optimizer == 12 * NUMEL // 4
    assert (one.weights, two.weights, three.weights) == (2 * NUMEL, 2 * NUMEL, 2 * NUMEL // 4)
    assert (one.reference, three.reference) == (2 * NUMEL, 2 * NUMEL // 4)
    assert (one.gradients, two.gradients) == (2 * NUMEL, 2 * NUMEL // 4)
    assert one.sent == two.sent == 3 / 4 * 2 * 2 * NUMEL
    assert three.sent == 3 / 4 * 2 * (3 * NUMEL + NUMEL)
    assert of("zero2", micro_batches=3).sent == 3 / 4 * 2 * (3 + 1) * NUMEL
    large = [[Weight((4 * BUCKET, 1), 2, True)]]
    assert of("zero2", policy=large, reference=[]).buffers == 2 * BUCKET
    assert of("zero3", policy=large, reference=[]).buffers == 2 * (2 * BUCKET + LIVE)


def test_frozen_weights_have_no_gradients() -> None:
    policy = [[w._replace(trained=w is HEAD) for w in unit] for unit in [[EMBEDDING], [LAYER], [HEAD]]]
    for strategy in STRATEGIES:
        found = of(strategy, 1, policy, [])
        assert found.gradients == 120 * (2 if "zero" in strategy else 4)
        assert found.reference == 0
    # the policy answers as its own reference, so its weights are gathered once more
    assert of("zero3", 4, policy, []).sent - of("zero3", 4, policy, [], runs_reference=False).sent == 3 / 4 * 2 * 320


def test_units_are_those_that_fsdp_gathers() -> None:
    model = tiny_llama()
    units = units_of(model)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert [sum(w.numel for w in unit) for unit in units] == [331 * 48, layer, layer, 331 * 48 + 48]
    tied = units_of(tiny_llama(tie_word_embeddings=True))
    assert [sum(w.numel for w in unit) for unit in tied] == [layer, layer, 331 * 48 + 48]
    adapted = units_of(with_adapter(model, lora()))
    assert len(adapted) == 4
    assert sum(w.numel for unit in adapted for w in unit if w.trained) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_quantised_weights_are_those_of_linear_layers_below_the_head() -> None:
    model = tiny_llama()
    linears = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
    others = sum(p.numel() for p in model.parameters()) - linears
    for options, size in (
        ({"load_in_4bit": True}, 0.5 + 4 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 1 / 4096),
        ({"load_in_8bit": True}, 1.0),
    ):
        units = units_of(model.requires_grad_(False), quantised(model, options))
        assert of("ddp", 1, units, []).weights == pytest.approx(size * linears + 4 * others, abs=1)
        # integers can't be sharded
        whole = of("fsdp2", 2, units, []).weights
        assert size * linears < whole < size * linears + 4 * others
    in_4_bits = quantised(model, {"load_in_4bit": True})
    alone, shared = (units_of(model, in_4_bits, shards_quantised=shards) for shards in (False, True))
    saved = of("fsdp2", 2, alone, []).weights - of("fsdp2", 2, shared, []).weights
    assert saved == pytest.approx((0.5 + 4 / 64) * linears / 2, rel=1e-3)


def test_4_bit_weights_are_counted_by_a_plan() -> None:
    config, ratios = tiny_llama().config, Ratios(1.4, 0.5, 1.6)
    options: Any = {"peft_config": lora(), "has_reference": False, "precision": Precision(torch.bfloat16)}
    plain = memory_model(config, ratios, **options)
    small = memory_model(config, ratios, quantization={"load_in_4bit": True}, **options)
    assert small.weights < plain.weights
    assert small.gradients == plain.gradients
    assert small.peak(2048) < plain.peak(2048)


def test_the_peak_of_a_sharded_step_has_its_gradients() -> None:
    """A trace has whole gradients, which the shards of this process replace."""
    config, ratios = tiny_llama().config, Ratios(1.4, 0.5, 1.6)
    peaks = {}
    for processes in (1, 2):
        memory = memory_model(config, ratios, job=Job("fsdp2", processes))
        rows = 64
        alive = max(m.fixed + m.per_row * rows + m.workspaces * memory.workspace(rows) for m in memory.timeline)
        assert memory.peak(rows) == memory.persistent + round(alive)
        peaks[processes] = memory, alive
    (one, of_one), (two, of_two) = peaks[1], peaks[2]
    assert of_one - one.gradients == of_two - two.gradients
    assert two.buffers > one.buffers == 0


def test_a_plan_reads_the_strategy_of_the_config(tmp_path: Path) -> None:
    def args(**options: Any) -> DPOConfig:
        return DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)

    assert plan._strategy(args()) == "ddp"
    assert plan._strategy(args(fsdp=True, fsdp_config={"version": 2})) == "fsdp2"
    given = args()
    given.deepspeed = str(tmp_path / "zero.json")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert plan._strategy(given) == "zero2"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"strategy": "zero4"}, "strategy must be one of ddp, fsdp2, zero1, zero2, zero3, got 'zero4'"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
    ],
    ids=["strategy", "processes"],
)
def test_a_job_that_does_not_exist_is_refused(job: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Job(**job)

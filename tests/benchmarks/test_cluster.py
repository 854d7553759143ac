"""The formulas by which docs/scaling.md extrapolates are those of counted operations, bytes and batches."""

from typing import Any

import pytest
import torch

from benchmarks.studies import cluster, two_processes
from benchmarks.studies.cluster import Collective, Work, seconds
from fastdpo.plan.resident import Job, resident, units_of
from tests.helpers.trainers import tiny_llama


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("reference", ["a copy", "precomputed", "adapter off"])
def test_the_collectives_send_what_a_plan_says(strategy: str, reference: str) -> None:
    model: Any = tiny_llama()
    if reference == "adapter off":
        model.to(torch.bfloat16)
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
    policy = units_of(model)
    others = units_of(tiny_llama().requires_grad_(False)) if reference == "a copy" else []
    runs = reference != "precomputed"
    found = cluster.collectives(strategy, policy, others, runs_reference=runs)
    options: dict[str, Any] = {"optimizer": "adamw_torch", "compute": torch.bfloat16, "upcasts": True}
    said = resident(policy, others, job=Job(strategy, 16), runs_reference=runs, **options)
    assert sum(each.size for each in found) * 15 / 16 == pytest.approx(said.sent, abs=1)


def test_a_ring_leaves_each_machine_once() -> None:
    start, hop, far = cluster.START, cluster.HOP, cluster.FAR_HOP
    size = 1e9
    near = seconds(Collective(size), 8)
    assert near == pytest.approx(start + 7 * hop + 7 / 8 * size / (0.8 * 450e9))
    assert seconds(Collective(size), 24) == pytest.approx(start + 21 * hop + 2 * far + 23 / 24 * size / (0.8 * 400e9))
    assert seconds(Collective(size, across=True), 24) == pytest.approx(start + 2 * far + 2 / 3 * size / (0.8 * 50e9))
    assert seconds(Collective(size, across=True), 8) == seconds(Collective(size), 1) == 0
    # with HSDP the weights stay in a machine, and each of its 8 GPUs sends its own share of the gradients
    assert cluster.communicating("hsdp", [Collective(size), Collective(size, across=True)], 24) == pytest.approx(
        near + seconds(Collective(size, across=True), 24)
    )


def test_operations_are_those_of_a_step() -> None:
    def tiny() -> Any:
        return two_processes.make_model(layers=3, D=128, V=301)

    found = two_processes.counted(tiny)
    assert found["computed"] == found["counted"]
    config, work = tiny().config, Work(tokens=70, targets=20, keys=1000)
    whole = cluster.operations(config, work, trained=True, runs_reference=True)
    assert whole.head == 4 * 2 * 20 * 128 * 301
    adapter = cluster.operations(config, work, trained=False, runs_reference=True)
    attention = 4 * 3 * 128 * 1000  # scores and values of 3 layers
    assert whole.reference == adapter.reference == (whole.body - 4 * attention) / 4 + attention + whole.head / 4
    assert whole.body - adapter.body == (whole.body - 4 * attention) / 4


def test_a_pair_attends_to_its_prompt_and_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tuple(map(torch.tensor, ([2, 4], [3, 1], [1, 1])))
    monkeypatch.setattr(cluster.balance, "lengths_of", lambda *_: tuple(x.numpy() for x in lengths))
    keys = [(1 + 2) + (3 + 4 + 5) + 3, (1 + 2 + 3 + 4) + 5 + 5]
    assert cluster.work_per_pair(2) == Work(tokens=6, targets=3, keys=sum(keys) / 2)


@pytest.mark.slow
def test_two_processes_send_what_the_formulas_say() -> None:
    def tiny() -> Any:
        return two_processes.make_model(layers=2, D=128, V=2000)

    found = two_processes.in_two_processes(1, tiny)
    for name, said in two_processes.predicted(found, tiny).items():
        assert found["sent"][name] == pytest.approx(said["sent"], rel=0.02), name

"""fastdpo.report.metrics: sums on the device, and what is made of them."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.head.eager import Stats
from fastdpo.loss.batch_loss import LossOutput
from fastdpo.report import metrics
from fastdpo.report.metrics import RunningSums
from tests.helpers.tiny import make_pairs


class Example(NamedTuple):
    """One example as a list of responses, each a dict of numpy values: the truth is taken from these."""

    responses: list[dict[str, Any]]
    loss: float
    rewards: tuple[float, float]
    label: bool = True


class Ranks:
    """Stands for `Accelerator`: its reduce adds what other processes' sums hold, and counts collectives."""

    device = torch.device("cpu")

    def __init__(self, process_index: int = 0, num_processes: int = 1) -> None:
        self.process_index, self.num_processes, self.collectives = process_index, num_processes, 0
        self.sent: Tensor | float = 0.0

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.collectives += 1
        self.sent = self.sent + tensor
        return self.sent


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=not torch.cuda.is_available())


def make_examples(kind: str, n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def response(length: int) -> dict[str, Any]:
        return {
            "length": length,
            "logp": -float(rng.gamma(4, 3)),
            "ref": -float(rng.gamma(4, 3)),
            "entropy": rng.gamma(2, 1, length),
            "top1": rng.random(length) < 0.5,
            "logits": rng.normal(size=length),
            "log_ratio": rng.normal(0, 2, length),
        }

    sizes = {"preference": lambda i: 2, "ranked": lambda i: 2 + i % 3, "unpaired": lambda i: 1}
    return [
        Example(
            [response(int(rng.integers(1, 9))) for _ in range(sizes[kind](i))],
            float(rng.random()),
            (float(rng.normal()), float(rng.normal())),
            bool(i % 3),
        )
        for i in range(n)
    ]


def batch_of(kind: str, examples: list[Example], *, ref: bool = True) -> tuple[dict[str, Any], LossOutput, Stats]:
    """What packing and loss would hand over, slot-major; `log_ratios` of the tokens stand beside the batch's fields."""
    K = max(len(example.responses) for example in examples)
    order = [(i, k) for k in range(K) for i, example in enumerate(examples) if k < len(example.responses)]
    responses = [examples[i].responses[k] for i, k in order]
    if kind == "unpaired":  # responses for the KL term come last, and are nobody's
        responses += [
            {**each, "logp": -1e4, "entropy": each["entropy"] + 1e4, "log_ratio": each["log_ratio"] + 10}
            for each in responses
        ]
    lengths = [response["length"] for response in responses]
    batch: dict[str, Any] = {"cu_target": torch.tensor([0, *np.cumsum(lengths)])}
    if kind == "ranked":
        batch["response_index"] = torch.full((len(examples), K), len(order))
        for r, (i, k) in enumerate(order):
            batch["response_index"][i, k] = r
    rewards = torch.tensor([example.rewards for example in examples], dtype=torch.float32)
    if kind == "unpaired":
        batch["label"] = torch.tensor([example.label for example in examples])
        rewards = torch.stack([rewards[:, 0] * batch["label"], rewards[:, 0] * ~batch["label"]], 1)

    def tokens(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([response[name] for response in responses]))

    logps, ref_logps = (torch.tensor([response[name] for response in responses]) for name in ("logp", "ref"))
    losses = torch.tensor([example.loss for example in examples])
    out = LossOutput(losses, None, rewards[:, 0], rewards[:, 1], logps, ref_logps if ref else None)
    entropy = tokens("entropy").float()
    batch["log_ratios"] = tokens("log_ratio").float()
    return batch, out, Stats(entropy, torch.zeros_like(entropy), tokens("logits").float(), tokens("top1"))


def counted(kind: str, batches: list[list[Example]], **options: Any) -> dict[str, float]:
    sums = RunningSums()
    for examples in batches:
        batch, out, stats = batch_of(kind, examples)
        metrics.add_examples(sums, batch, out, stats=stats, log_ratios=batch["log_ratios"], **options)
    return metrics.results(sums.read(Ranks()))[0]  # type: ignore[arg-type]


def truth(kind: str, examples: list[Example]) -> dict[str, float]:
    """The metrics from the examples one by one, in float64."""
    paired = kind != "unpaired"
    chosen = [example.responses[0] for example in examples if paired or example.label]
    rejected = [example.responses[1:] if paired else example.responses for example in examples]
    rejected = [each for each, example in zip(rejected, examples, strict=True) if paired or not example.label]
    flat = [response for each in rejected for response in each]
    rewards = np.array([example.rewards for example in examples], np.float32).astype(float)
    margins = rewards[:, 0] - rewards[:, 1]

    def over_tokens(responses: list[dict[str, Any]], name: str) -> float:
        return float(np.concatenate([response[name] for response in responses]).mean())

    def mean(responses: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([response[name] for response in responses]))

    numbers = {
        "loss": float(np.mean([example.loss for example in examples])),
        "logps/chosen": mean(chosen, "logp"),
        "logps/rejected": float(np.mean([mean(each, "logp") for each in rejected])),
        "logps/chosen_below_ref": float(np.mean([response["logp"] < response["ref"] for response in chosen])),
        "kl_per_token": float(np.mean([math.exp(x) - 1 - x for r in chosen + flat for x in r["log_ratio"]])),
        "entropy": over_tokens(chosen + flat, "entropy"),
        "mean_token_accuracy": over_tokens(chosen, "top1"),
        "logits/chosen": over_tokens(chosen, "logits"),
        "logits/rejected": over_tokens(flat, "logits"),
    }
    if paired:
        longer = [r[0]["length"] - mean(r[1:], "length") for r in (example.responses for example in examples)]
        numbers |= {
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).mean(),
            "rewards/length_correlation": np.corrcoef(margins, longer)[0, 1],
        }
    else:
        label = np.array([example.label for example in examples])
        numbers |= {"rewards/chosen": rewards[label, 0].mean(), "rewards/rejected": rewards[~label, 0].mean()}
        numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
        numbers |= {"count/chosen": label.sum(), "count/rejected": (~label).sum()}
    return numbers


KINDS = ("preference", "ranked", "unpaired")


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_ragged_micro_batches_are_those_of_the_examples(kind: str) -> None:
    examples = make_examples(kind, 11)
    numbers = counted(kind, [examples[:4], examples[4:5], examples[5:]])
    assert numbers == pytest.approx(truth(kind, examples), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_read_what_one_does_with_one_collective_and_one_synchronisation(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(kind, 9)
    accelerators = [Ranks(index, 2) for index in range(2)]
    syncs = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, method=method: syncs.append(0) or method(self))
    for accelerator, part in zip(accelerators, (examples[:6], examples[6:]), strict=True):
        sums = RunningSums()
        for example in part:  # a micro-batch each
            batch, out, stats = batch_of(kind, [example])
            before = len(syncs)
            metrics.add_examples(sums, batch, out, stats=stats, log_ratios=batch["log_ratios"])
            metrics.add_scalars(sums, {"aux_loss": torch.tensor(0.5)})
            assert len(syncs) == before
        accelerator.sent = accelerators[0].sent if accelerator.process_index else 0.0
        before = len(syncs)
        numbers, _ = metrics.training_logs(sums, accelerator, seconds=1.0, log_history=[])  # type: ignore[arg-type]
        assert (accelerator.collectives, len(syncs) - before) == (1, 1)
    expected = truth(kind, examples) | {"aux_loss": 0.5}
    del expected["loss"]  # the Trainer's own is logged
    assert numbers == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_asks_the_device_nothing(kind: str) -> None:
    """Tensors on `meta` have no values: whatever would wait for one raises."""
    batch, out, stats = batch_of(kind, make_examples(kind, 3))
    metrics.add_examples(
        RunningSums(),
        {name: field.to("meta") for name, field in batch.items()},
        LossOutput(*(None if x is None else x.to("meta") for x in out)),  # type: ignore[arg-type]
        keep=2,
        stats=Stats(*(None if x is None else x.to("meta") for x in stats)),  # type: ignore[arg-type]
        log_ratios=batch["log_ratios"].to("meta"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_examples_do_not_count(kind: str) -> None:
    examples = make_examples(kind, 7)
    assert counted(kind, [examples], keep=4) == pytest.approx(truth(kind, examples[:4]), rel=1e-6, abs=1e-6)


def test_without_reference_or_statistics_what_they_would_tell_is_left_out() -> None:
    sums = RunningSums()
    batch, out, _ = batch_of("preference", make_examples("preference", 5), ref=False)
    metrics.add_examples(sums, batch, out)
    numbers, histograms = metrics.results(sums.read(Ranks()))  # type: ignore[arg-type]
    per_pair = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert set(numbers) == {"loss", "logps/chosen", "logps/rejected", "rewards/length_correlation"} | per_pair
    assert not histograms


@pytest.mark.parametrize("kl", [0.0, 1.5])
def test_the_estimate_of_the_kl_is_unbiased_on_tokens_of_the_reference(kl: float) -> None:
    """On every token of a vocabulary once, each weighing its probability under the reference."""
    rng = np.random.default_rng(0)
    ref = rng.dirichlet(np.ones(50))
    policy = ref if kl == 0 else rng.dirichlet(np.ones(50))
    counts = np.round(ref * 20000).astype(int)
    ref = counts / counts.sum()  # so that the counts are exact
    policy = np.where(ref > 0, policy, 0) / policy[ref > 0].sum()
    log_ratio = np.log(np.where(ref > 0, policy, 1)) - np.log(np.where(ref > 0, ref, 1))
    tokens = np.repeat(log_ratio, counts)
    example = make_examples("preference", 1)[0]
    zeros = {name: np.zeros(len(tokens)) for name in ("entropy", "top1", "logits")}
    response = {**example.responses[0], **zeros, "length": len(tokens), "log_ratio": tokens}
    measured = counted("preference", [[example._replace(responses=[response, response])]])["kl_per_token"]
    exact = float((ref[ref > 0] * -log_ratio[ref > 0]).sum())
    assert measured == pytest.approx(exact, rel=1e-5, abs=1e-9)
    assert exact == pytest.approx(kl, abs=0.6)


def test_the_estimate_of_the_kl_is_never_negative_and_always_finite() -> None:
    example = make_examples("preference", 1)[0]
    for ratio in (0.0, 1e-4, -1e-4, 3e-8, -700.0, 90.0, 1e4):
        response = {**example.responses[0], "log_ratio": np.full(example.responses[0]["length"], ratio)}
        measured = counted("preference", [[example._replace(responses=[response, response])]])["kl_per_token"]
        assert 0 <= measured < math.inf
        assert measured == pytest.approx(math.exp(min(ratio, 20)) - 1 - ratio, rel=1e-3, abs=1e-12)


def test_a_side_without_examples_is_left_out() -> None:
    examples = [example for example in make_examples("unpaired", 9) if example.label]
    numbers = counted("unpaired", [examples])
    assert numbers["count/rejected"] == 0
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected", "logits/rejected"} & set(numbers)


def test_a_tie_counts_one_half() -> None:
    example = make_examples("preference", 1)[0]
    examples = [example._replace(rewards=rewards) for rewards in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
    assert counted("preference", [examples])["rewards/accuracies"] == 0.5


def test_correlation_is_left_out_where_nothing_varies() -> None:
    example = make_examples("preference", 1)[0]
    same_length = [example._replace(rewards=(float(i), 0.0)) for i in range(5)]
    assert "rewards/length_correlation" not in counted("preference", [same_length])


def test_correlation_of_margins_far_from_zero() -> None:
    examples = [
        example._replace(rewards=(1000 + example.rewards[0], 0.0)) for example in make_examples("preference", 50)
    ]
    expected = truth("preference", examples)["rewards/length_correlation"]
    assert counted("preference", [examples])["rewards/length_correlation"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("keep", [None, 2])
def test_the_loss_contains_its_mean_over_chosen_tokens(keep: int | None) -> None:
    """A likelihood term is divided by chosen tokens; repeated examples are in neither side of the fraction."""
    examples, weight = make_examples("preference", 3), torch.tensor([1.0, 2.0, 0.5])
    batch, out, _ = batch_of("preference", examples)
    nll = [-0.7 * float(w) * example.responses[0]["logp"] for w, example in zip(weight, examples, strict=True)]
    sums = RunningSums()
    metrics.add_examples(sums, batch, out._replace(token_loss=torch.tensor(sum(nll)), weights=weight), keep=keep)
    numbers = metrics.results(sums.read(Ranks()))[0]  # type: ignore[arg-type]
    expected = sum(nll[:keep]) / sum(example.responses[0]["length"] for example in examples[:keep])
    assert numbers["nll_loss"] == pytest.approx(expected, rel=1e-6)
    mean = np.mean([example.loss for example in examples[:keep]])
    assert numbers["loss"] == pytest.approx(mean + expected, rel=1e-6)


@pytest.mark.parametrize("keep", [None, 2, 3])
def test_the_loss_of_examples_that_weigh_nothing_is_zero(keep: int | None) -> None:
    examples = make_examples("preference", 3)
    batch, out, _ = batch_of("preference", examples)
    none = torch.zeros(3)
    sums = RunningSums()
    metrics.add_examples(sums, batch, out._replace(losses=none, token_loss=torch.tensor(0.0), weights=none), keep=keep)
    numbers = metrics.results(sums.read(Ranks()))[0]  # type: ignore[arg-type]
    assert (numbers["nll_loss"], numbers["loss"]) == (0.0, 0.0)


def test_the_estimate_of_the_divergence_is_its_mean_over_micro_batches() -> None:
    sums = RunningSums()
    for kl in (0.5, 1.5):
        batch, out, _ = batch_of("unpaired", make_examples("unpaired", 3))
        metrics.add_examples(sums, batch, out._replace(kl=torch.tensor(kl)))
    assert metrics.results(sums.read(Ranks()))[0]["kl"] == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_the_mean_over_the_tokens_of_sparse_micro_batches(kind: str) -> None:
    """Neither repeated examples count nor, where examples are unpaired, the responses of the KL term."""
    sums, tokens = RunningSums(), []
    for seed, is_sparse in ((1, True), (2, False), (3, True)):
        examples = make_examples(kind, 4, seed)
        batch, out, stats = batch_of(kind, examples)
        density = torch.full_like(stats.entropy, math.inf)
        for r, k in enumerate(_slots(kind, examples)):
            rows = slice(batch["cu_target"][r], batch["cu_target"][r + 1])
            density[rows] = torch.rand(density[rows].shape)
            if is_sparse and k < 3:  # the example's number
                tokens += density[rows].tolist()
        density.nan_to_num_(posinf=1e6)
        metrics.add_examples(sums, batch, out, stats=stats._replace(density=density if is_sparse else None), keep=3)
    numbers = metrics.results(sums.read(Ranks()))[0]  # type: ignore[arg-type]
    assert numbers["head/density"] == pytest.approx(np.mean(tokens), rel=1e-6)


def _slots(kind: str, examples: list[Example]) -> list[int]:
    """The example of each response, in the order of `batch_of`; the KL responses are left out."""
    K = max(len(example.responses) for example in examples)
    return [i for k in range(K) for i, example in enumerate(examples) if k < len(example.responses)]


def test_density_is_left_out_where_no_process_skipped_anything() -> None:
    assert "head/density" not in counted("preference", [make_examples("preference", 2)])


# Histograms


def test_histograms_count_every_kept_example_in_its_bin() -> None:
    rewards = [0.0, 0.004, -0.004, 3.0, 3.01, -250.0, 1e9, math.nan]
    example = make_examples("preference", 1)[0]
    examples = [example._replace(rewards=(reward, 0.0)) for reward in rewards]
    sums = RunningSums()
    batch, out, stats = batch_of("preference", examples)
    metrics.add_examples(sums, batch, out, stats=stats, keep=7)
    histogram = metrics.results(sums.read(Ranks()))[1]["rewards/chosen"]  # type: ignore[arg-type]
    assert sum(histogram.counts) == 7
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.edges == sorted(histogram.edges)
    for count, low, high in list(zip(histogram.counts, histogram.edges[:-1], histogram.edges[1:], strict=True))[:-1]:
        assert count == sum(low <= reward < high for reward in rewards)
        assert high - low < 0.0006 + 0.06 * abs(low)
    assert histogram.edges[-1] > 1000  # what is beyond is in the last bin
    assert histogram.counts[-1] == 1


def test_profile_tells_the_mean_margin_by_difference_of_lengths() -> None:
    example = make_examples("preference", 1)[0]
    zeros = {n: {name: np.zeros(n) for name in ("entropy", "top1", "logits", "log_ratio")} for n in (1, 40)}
    short, long = ({**example.responses[0], "length": n, **zeros[n]} for n in (1, 40))
    examples = [Example([long, short], 0.0, (reward, 0.0)) for reward in (1.0, 2.0)]
    examples += [Example([short, long], 0.0, (-4.0, 0.0))]
    sums = RunningSums()
    batch, out, stats = batch_of("preference", examples)
    metrics.add_examples(sums, batch, out, stats=stats)
    profile = metrics.results(sums.read(Ranks()))[1]["length"]  # type: ignore[arg-type]
    assert profile.means is not None
    assert (profile.counts[0], profile.counts[-1], sum(profile.counts)) == (1, 2, 3)
    assert (profile.means[0], profile.means[-1]) == (-4.0, 1.5)
    assert profile.edges[0] <= -39 < profile.edges[1]
    assert profile.edges[-2] <= 39 < profile.edges[-1]


def test_not_a_number_does_not_leave_the_bins() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    half = metrics.REWARDS.bins // 2
    assert metrics.REWARDS.bin_of(values).tolist() == [half, metrics.REWARDS.bins - 1, 0, half]


# Numbers of the run


def test_tokens_count_on_and_their_savings_weigh_by_tokens() -> None:
    sums = RunningSums()
    for tokens, padded, packed in ((100, 200, 50), (300, 300, 290)):
        numbers = {"num_tokens": tokens, "num_padded_tokens": padded, "num_packed_tokens": packed}
        metrics.add_tokens(sums, numbers | {"cu_target": torch.zeros(5)})  # of four sequences
    history: list[dict[str, float]] = [{"num_tokens": 1000.0}, {"eval_loss": 0.3}]
    numbers, _ = metrics.training_logs(sums, Ranks(), seconds=8.0, log_history=history)  # type: ignore[arg-type]
    expected = {"num_tokens": 1400, "tokens_per_second": 50, "padding_saved": 100 / 500, "prompt_shared": 52 / 392}
    assert numbers == pytest.approx(expected)


def test_padded_batches_save_no_padding() -> None:
    sums = RunningSums()
    metrics.add_tokens(sums, shared_prefix_batch(make_pairs([(5, 1, 2, 3), (4, 0, 1, 1)]), layout="padded"))
    numbers, _ = metrics.training_logs(sums, Ranks(), seconds=None, log_history=[])  # type: ignore[arg-type]
    assert numbers["padding_saved"] == 0
    assert numbers["prompt_shared"] == 0
    assert "tokens_per_second" not in numbers


def test_where_nothing_is_shared_no_share_is_logged() -> None:
    for layout, shared in (("packed", 0.0), ("shared", 5 / (8 + 9))):
        sums = RunningSums()
        batch = shared_prefix_batch(make_pairs([(5, 1, 2, 3)]), layout=layout)
        metrics.add_tokens(sums, batch)
        numbers, _ = metrics.training_logs(sums, Ranks(), seconds=None, log_history=[])  # type: ignore[arg-type]
        assert (layout, numbers["prompt_shared"]) == (layout, pytest.approx(shared))


def test_peak_memory_is_that_of_the_process_that_needed_most(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Tensor | float = 0.0
    for index, peak in enumerate((3, 5, 4)):
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device, peak=peak: peak * 2**30)
        sums, accelerator = RunningSums(), Ranks(index, 3)
        accelerator.device, accelerator.sent = torch.device("meta"), sent
        metrics._add_peak_memory(sums, accelerator)  # type: ignore[arg-type]
        accelerator.device = torch.device("cpu")
        rows = sums.read(accelerator)  # type: ignore[arg-type]
        sent = accelerator.sent
    assert metrics.results(rows)[0] == {"peak_memory_gib": 5}


# Sums


def test_sums_start_afresh_when_read(accelerator: Accelerator, device: torch.device) -> None:
    sums = RunningSums()
    for _ in range(2):
        sums.add(("a", "b"), torch.tensor([[1, 2, 3], [4, 5, 6]], device=device))
        sums.add_numbers("tokens", 5)
    assert sums.read(accelerator) == {"a": [2, 4, 6], "b": [8, 10, 12], "tokens": [10]}
    assert sums.read(accelerator) == {}


def test_counts_beyond_float32_are_exact(accelerator: Accelerator) -> None:
    sums = RunningSums()
    sums.add_numbers("tokens", 2**24)
    sums.add_numbers("tokens", 1)
    assert sums.read(accelerator)["tokens"] == [2**24 + 1]


def test_sums_of_16_bit_values_are_exact(accelerator: Accelerator, device: torch.device) -> None:
    sums = RunningSums()
    for _ in range(2):
        metrics.add_scalars(sums, {"x": torch.tensor(257.0, dtype=torch.bfloat16, device=device)})
        sums.add(("n",), torch.full((1, 1), 256.0, dtype=torch.bfloat16, device=device))
    assert sums.read(accelerator)["n"] == [512.0]


def test_scalars_are_means_by_weight(accelerator: Accelerator, device: torch.device) -> None:
    sums = RunningSums()
    for value, weight in ((2.0, 3), (7.0, 1), (100.0, 0)):
        metrics.add_scalars(sums, {"x": torch.tensor(value, device=device)}, weight)
    assert metrics.results(sums.read(accelerator))[0] == {"x": 13 / 4}


def test_sums_hold_no_graph() -> None:
    batch, out, stats = batch_of("preference", make_examples("preference", 3))
    sums = RunningSums()
    grown = LossOutput(*(None if x is None else x.clone().requires_grad_() for x in out))  # type: ignore[arg-type]
    metrics.add_examples(sums, batch, grown, stats=stats)
    assert not any(table.requires_grad for table in sums._on_device.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_adding_and_reading_wait_once(kind: str, accelerator: Accelerator, device: torch.device) -> None:
    batch, out, stats = batch_of(kind, make_examples(kind, 3))
    moved = {name: field.to(device) for name, field in batch.items()}
    result = LossOutput(*(None if x is None else x.to(device) for x in out))  # type: ignore[arg-type]
    stats = Stats(*(None if x is None else x.to(device) for x in stats))  # type: ignore[arg-type]
    tokens = {"num_tokens": 9, "num_padded_tokens": 12, "num_packed_tokens": 7, "cu_target": moved["cu_target"]}
    sums = RunningSums()
    try:
        torch.cuda.set_sync_debug_mode("error")
        metrics.add_examples(sums, moved, result, stats=stats, log_ratios=moved["log_ratios"])
        metrics.add_tokens(sums, tokens)
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as warned:
            metrics.training_logs(sums, accelerator, seconds=1.0, log_history=[])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == 1

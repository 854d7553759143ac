"""Metrics under TRL's names, summed on the device and read once per logging step.

Until it is read, every metric is a sum over examples, responses or tokens, so that the sums of micro-batches and
processes add up to those of one large batch. These metrics are not TRL's:

- `logps/chosen_below_ref`: share of chosen responses that are less likely under the policy than under the reference
  (likelihood displacement, https://arxiv.org/abs/2410.08847).
- `kl_per_token`: mean of exp(r) - 1 - r over the completion tokens, chosen and rejected, where r is log pi - log pi_ref
  of a token, and at most 20 in exp(r): k3 of http://joschu.net/blog/kl-approx.html. It is never negative, and 0 if the
  policy is the reference. It is an unbiased estimate of KL(pi_ref || pi) if the reference wrote the responses.
  Otherwise it says how far the policy has moved on their tokens, most of all on those that became likelier. It is
  omitted if the dataset has the reference's log-probs only as sums over responses.
- `rewards/length_correlation`: Pearson correlation of a pair's reward margin with its length difference, chosen -
  rejected.
- `kl`: KTO's estimate of the KL divergence from the reference, averaged over micro-batches.
- `aux_loss`: load-balancing loss of a mixture of experts, before its coefficient, if it is part of the objective.
- `nll_loss`: the part of the loss that is a mean over chosen tokens.
- `tokens_per_second`: tokens of full sequences, in which a prompt counts once for each of its responses.
- `padding_saved`: share of the padded batch that is padding and was not computed.
- `prompt_shared`: share of the unpadded batch that was not computed, because responses share it.
- `peak_memory_gib`: peak since the start, of the process that needed most.
- `head/density`: see `fastdpo.head.eager.Stats`.
- `count/chosen`, `count/rejected`: numbers of desirable and undesirable responses, if examples are unpaired.

Shapes: B examples, R responses, M completion tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from torch import Tensor
from transformers import Trainer

from fastdpo.data.packing import edges
from fastdpo.head.eager import Stats
from fastdpo.loss.batch_loss import LossOutput
from fastdpo.loss.sequences import along_edges, sum_tokens


class RunningSums:
    """Named rows of numbers. Adding needs no synchronisation; reading needs one collective and one synchronisation.

    A row of two numbers is a mean (total, weight); `results` knows the other kinds of rows by their names.
    """

    def __init__(self) -> None:
        self._on_device: dict[tuple[str, ...], Tensor] = {}
        self._on_host: dict[str, list[float]] = {}

    def copy(self) -> "RunningSums":
        """Return the same sums in a new object, without waiting for anything; adding to one leaves the other alone."""
        other = RunningSums()
        other._on_device, other._on_host = dict(self._on_device), dict(self._on_host)
        return other

    def state(self) -> dict[str, Any]:
        """Return this process's sums as JSON values, from which `restore` makes them again; waits for the device."""
        return {"host": self._on_host, "device": [[names, table.tolist()] for names, table in self._on_device.items()]}

    def add(self, names: tuple[str, ...], table: Tensor) -> None:
        """Add row i of `table` `[names, numbers]` to the row of `names[i]`."""
        table = table.detach().to(_exact_dtype(table.device))
        self._on_device[names] = self._on_device[names] + table if names in self._on_device else table

    def add_ratios(self, columns: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add to means by name; each has totals and weights, all of one shape `[X]`, which are summed here."""
        totals, weights = (torch.stack([x.detach() for x in side]) for side in zip(*columns.values(), strict=True))
        self.add(tuple(columns), torch.stack([totals.sum(1), weights.sum(1)], 1))

    def add_numbers(self, name: str, *numbers: float) -> None:
        """Add numbers that are on the host to the row of `name`."""
        old = self._on_host.get(name, [0.0] * len(numbers))
        self._on_host[name] = [a + b for a, b in zip(old, numbers, strict=True)]

    def tokens(self) -> float:
        """Return the tokens that this process added with `add_tokens`, without reading anything."""
        return self._on_host.get("num_tokens", [0.0])[0]

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace the sums by those of an earlier process, on `device`."""
        self._on_host = dict(state["host"])
        self._on_device.clear()
        for names, table in state["device"]:
            self.add(tuple(names), torch.tensor(table, dtype=_exact_dtype(device), device=device))

    def __len__(self) -> int:
        return len(self._on_device) + len(self._on_host)

    def read(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Return the sums over all processes, which must have added the same names, and start again from 0."""
        device = accelerator.device
        tables = [(names, table) for names, table in sorted(self._on_device.items(), key=lambda item: item[0])]
        if self._on_host:
            names, rows = zip(*sorted(self._on_host.items()), strict=True)
            numbers = torch.tensor([x for row in rows for x in row], dtype=_exact_dtype(device))
            if device.type == "cuda":  # a copy from other memory would wait for the device
                numbers = numbers.pin_memory()
            numbers = numbers.to(device, non_blocking=True)
            tables += [((name,), row) for name, row in zip(names, numbers.split([len(r) for r in rows]), strict=True)]
        self._on_device.clear()
        self._on_host.clear()
        if not tables:
            return {}
        total: Any = accelerator.reduce(torch.cat([table.flatten() for _, table in tables]), reduction="sum")
        values = iter(total.tolist())
        return {
            name: [next(values) for _ in range(table.numel() // len(names))]
            for names, table in tables
            for name in names
        }


def _exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, in which counts of tokens are exact; float32 if the device has no float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


class Bins(NamedTuple):
    """Bins with edges scale * sinh(step * k): of equal width near 0, of width in proportion to the value far from 0."""

    bins: int
    scale: float
    step: float

    def bin_of(self, values: Tensor) -> Tensor:
        """Return each value's bin, int64; the outermost bins take values beyond them, the middle one takes NaN."""
        place = (torch.asinh(values / self.scale) / self.step).floor() + self.bins // 2
        return place.nan_to_num(self.bins // 2).clamp(0, self.bins - 1).long()

    def edge(self, i: int) -> float:
        """Return the lower edge of bin i."""
        return self.scale * math.sinh(self.step * (i - self.bins // 2))


REWARDS = Bins(512, 0.01, 0.05)
"""Rewards from -1800 to 1800 nats; far from 0 a bin is as wide as 5 % of the value."""
LENGTHS = Bins(64, 16.0, 0.2)
"""Length differences from -4800 to 4800 tokens, in bins as wide as three tokens or a fifth of the value."""


class Histogram(NamedTuple):
    """Counts per bin, from the first to the last bin that is not empty."""

    edges: list[float]
    counts: list[float]
    means: list[float] | None = None
    """Mean of another quantity in each bin; NaN for an empty bin."""


def add_examples(
    sums: RunningSums,
    batch: Mapping[str, Any],
    out: LossOutput,
    *,
    keep: int | None = None,
    stats: Stats | None = None,
    log_ratios: Tensor | None = None,
) -> None:
    """Add a micro-batch's examples to the sums, without a synchronisation.

    Args:
        sums: the sums to add to.
        batch: from `fastdpo.shared_prefix_batch`, on the device of `out`. A ranked example counts as its best response
            against the mean of the others. Of unpaired examples, desirable responses count as chosen and undesirable
            ones as rejected, and there are no margins.
        out: the micro-batch's losses, rewards and log-probs.
        keep: only this many examples count, from the first on; None: all.
        stats: statistics of the completion tokens, `[M]` each. None omits them and the histograms.
        log_ratios: log pi - log pi_ref of the completion tokens, `[M]`. None omits `kl_per_token`.
    """
    B, lengths = len(out.chosen_rewards), batch["cu_target"].diff()
    kept = torch.arange(B, device=lengths.device) < (B if keep is None else keep)
    kept = kept.to(_exact_dtype(lengths.device))
    chosen, rejected = (kept * batch["label"], kept * ~batch["label"]) if "label" in batch else (kept, kept)
    chosen_logps, rejected_logps = _sides(batch, out.sequence_logps)
    examples = {
        "loss": (out.losses * kept, kept),
        "rewards/chosen": (out.chosen_rewards * chosen, chosen),
        "rewards/rejected": (out.rejected_rewards * rejected, rejected),
        "logps/chosen": (chosen_logps * chosen, chosen),
        "logps/rejected": (rejected_logps * rejected, rejected),
    }
    margins, longer = out.chosen_rewards - out.rejected_rewards, torch.sub(*_sides(batch, lengths))
    if "label" in batch:
        sums.add(("count/chosen", "count/rejected"), torch.stack([chosen.sum(), rejected.sum()])[:, None])
    else:
        examples["rewards/margins"] = (margins * kept, kept)
        examples["rewards/accuracies"] = ((margins.sign() + 1) / 2 * kept, kept)  # a tie counts one half
        x, y = longer.to(kept.dtype), margins.to(kept.dtype)
        moments = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y])
        sums.add(("rewards/length_correlation",), (moments * kept).sum(1)[None])
    if out.token_loss is not None:  # of all examples: the kept ones get their share of the weighted log-probs
        total = out.token_loss
        if keep is not None:
            nll = chosen_logps if out.weights is None else chosen_logps * out.weights
            share = (nll * kept).sum() / nll.sum()
            total = (total * share).where(nll.sum() != 0, 0.0)  # if all weights are 0, the share is 0 / 0
        sums.add_ratios({"nll_loss": (total[None], (_sides(batch, lengths)[0] * kept).sum()[None])})
    if out.ref_sequence_logps is not None:
        below = chosen_logps < _sides(batch, out.ref_sequence_logps)[0]
        examples["logps/chosen_below_ref"] = (below * chosen, chosen)
    sums.add_ratios(examples)
    if out.kl is not None:
        add_scalars(sums, {"kl": out.kl})
    _add_responses(sums, batch, kept, stats, log_ratios)
    if stats is not None:
        rewards = {"chosen": (out.chosen_rewards, chosen), "rejected": (out.rejected_rewards, rejected)}
        if "label" not in batch:
            rewards["margins"] = (margins, kept)
            counts = torch.stack([kept, kept * margins])
            profile = counts.new_zeros(2, LENGTHS.bins).scatter_add(1, LENGTHS.bin_of(longer).expand(2, -1), counts)
            sums.add(("profile/length",), profile.view(1, -1))
        values, weights = (torch.stack(side) for side in zip(*rewards.values(), strict=True))
        bins = weights.new_zeros(len(rewards), REWARDS.bins).scatter_add(1, REWARDS.bin_of(values), weights)
        sums.add(tuple(f"histogram/rewards/{name}" for name in rewards), bins)


def _add_responses(
    sums: RunningSums, batch: Mapping[str, Any], kept: Tensor, stats: Stats | None, log_ratios: Tensor | None
) -> None:
    """Add to the means over completion tokens."""
    lengths = batch["cu_target"].diff()
    chosen, rejected = _responses(batch, kept, len(lengths))
    both = chosen + rejected
    responses = {}
    if log_ratios is not None:
        r = log_ratios.detach().to(kept.dtype)
        kl = r.clamp(max=20).expm1() - r  # or a single token could dominate the mean
        responses["kl_per_token"] = (sum_tokens(kl.clamp(min=0), batch["cu_target"]) * both, lengths * both)
    if stats is not None:
        tokens = torch.stack([stats.entropy.float(), stats.is_top1.float(), stats.mean_logits.float()], 1)
        totals = sum_tokens(tokens, batch["cu_target"])
        entropy, is_top1, mean_logits = totals.unbind(1)
        responses["entropy"] = (entropy * both, lengths * both)
        responses["mean_token_accuracy"] = (is_top1 * chosen, lengths * chosen)
        responses["logits/chosen"] = (mean_logits * chosen, lengths * chosen)
        responses["logits/rejected"] = (mean_logits * rejected, lengths * rejected)
        # each process and micro-batch chooses its own backward, so the name is added even if there is no density
        density = torch.zeros_like(entropy) if stats.density is None else sum_tokens(stats.density, batch["cu_target"])
        responses["head/density"] = (density * both, lengths * both * (stats.density is not None))
    if responses:
        sums.add_ratios(responses)


def _sides(batch: Mapping[str, Any], values: Tensor) -> tuple[Tensor, Tensor]:
    """From `[R]` values of responses, return each example's chosen value and rejected value, `[B]` each."""
    index = edges(batch)
    own = along_edges(values, index)
    if "label" in batch:
        return own[0], own[0]
    return own[0], own[1:].sum(0) / (index[1:] < len(values)).sum(0)


def _responses(batch: Mapping[str, Any], kept: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Return `[R]` how many kept examples have a response as their chosen one, and how many as a rejected one."""
    index, nothing = edges(batch), kept.new_zeros(R + 1)
    if "label" in batch:  # KL responses are neither
        index, sides = index[:1], (kept * batch["label"], kept * ~batch["label"])
        chosen, rejected = (nothing.scatter_add(0, index[0], side) for side in sides)
    else:
        chosen = nothing.scatter_add(0, index[0], kept)
        rejected = nothing.scatter_add(0, index[1:].flatten(), kept.repeat(len(index) - 1))
    return chosen[:R], rejected[:R]


def add_scalars(sums: RunningSums, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
    """Add numbers of which a micro-batch has one each, such as `aux_loss`, to weighted means over micro-batches."""
    sums.add_ratios({name: (weight * x.detach()[None], torch.full_like(x[None], weight)) for name, x in values.items()})


def add_tokens(sums: RunningSums, batch: Mapping[str, Any]) -> None:
    """Add the tokens of a training batch, and those that packing and sharing saved."""
    tokens, padded, packed = (batch[f"num_{kind}"] for kind in ("tokens", "padded_tokens", "packed_tokens"))
    computed = tokens - batch.get(
        "num_sequences", len(batch["cu_target"]) - 1
    )  # the last token of a sequence predicts nothing
    sums.add_numbers("num_tokens", tokens)
    sums.add_numbers("padding_saved", 0 if "attention_mask" in batch else padded - tokens, padded)
    sums.add_numbers("prompt_shared", computed - packed, computed)


def distinct_examples(accelerator: Accelerator, B: int) -> int:
    """Return how many of an evaluation batch's B examples count; accelerate repeats examples to fill the last batch."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return B
    before = accelerator.process_index * B
    return int(min(max(state.remainder - before, 0), B))


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether the current step is the last one before a log, as far as that can be known.

    All batches of the step have been read by now, so the last step of an epoch is known. But a stream may end within a
    step, which is then not made, so if epochs are logged, every step of a stream counts as a logging step.
    """
    args, state = trainer.args, trainer.state
    step, is_stream = state.global_step + 1, isinstance(trainer.train_dataset, IterableDataset)
    ends = trainer.accelerator.gradient_state.end_of_dataloader
    if step == state.max_steps or (step == 1 and args.logging_first_step) or (ends and is_stream):
        return True
    if args.logging_strategy == "epoch":
        return ends or is_stream
    return bool(args.logging_strategy == "steps" and step % state.logging_steps == 0)


def training_logs(
    sums: RunningSums,
    accelerator: Accelerator,
    *,
    seconds: float | None,
    log_history: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Return the `results` of the sums, with the number of tokens so far, their rate and the peak memory added.

    All processes must call it.

    Args:
        sums: sums over the training steps since the last call.
        accelerator: the Trainer's accelerator.
        seconds: time since the last call; None if that is unknown.
        log_history: earlier records, which hold the number of tokens so far.
    """
    _add_peak_memory(sums, accelerator)
    numbers, histograms = results(sums.read(accelerator))
    numbers.pop("loss", None)  # the Trainer logs its own
    if (tokens := numbers.get("num_tokens")) is not None:
        numbers["num_tokens"] = tokens_logged(log_history) + tokens
        if seconds:
            numbers["tokens_per_second"] = tokens / seconds
    return numbers, histograms


def tokens_logged(log_history: Sequence[Mapping[str, Any]]) -> float:
    """Return the number of tokens trained on until the last record of training."""
    return next((float(entry["num_tokens"]) for entry in reversed(log_history) if "num_tokens" in entry), 0.0)


def _add_peak_memory(sums: RunningSums, accelerator: Accelerator) -> None:
    """Add each process's peak in a column of its own, so that the maximum is known after a sum over processes."""
    if accelerator.device.type in ("cpu", "mps"):
        return
    peaks = [0.0] * accelerator.num_processes
    peaks[accelerator.process_index] = torch.accelerator.max_memory_allocated(accelerator.device) / 2**30
    sums.add_numbers("peak_memory_gib", *peaks)


def results(rows: Mapping[str, list[float]]) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Return metrics and histograms from the sums of `RunningSums.read`; metrics without observations are omitted."""
    numbers: dict[str, float] = {}
    histograms = {}
    for name, row in rows.items():
        if name.startswith("histogram/"):
            if any(row):
                histograms[name.removeprefix("histogram/")] = _histogram(REWARDS, row)
        elif name.startswith("profile/"):
            if any(row):
                counts, totals = row[: len(row) // 2], row[len(row) // 2 :]
                histograms[name.removeprefix("profile/")] = _histogram(LENGTHS, counts, totals)
        elif (number := _FINISH.get(name, _mean)(row)) is not None:
            numbers[name] = number
    if "loss" in numbers:
        numbers["loss"] += numbers.get("nll_loss", 0.0)
    if "count/chosen" in numbers and {"rewards/chosen", "rewards/rejected"} <= numbers.keys():
        numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
    return numbers, histograms


def _mean(row: list[float]) -> float | None:
    total, weight = row
    return total / weight if weight else None


def _correlation(row: list[float]) -> float | None:
    """Return Pearson's r from the sums of 1, x, y, xx, yy and xy; None if x or y is constant."""
    n, x, y, xx, yy, xy = row
    var_x, var_y = n * xx - x * x, n * yy - y * y
    if var_x <= 1e-12 * n * xx or var_y <= 1e-12 * n * yy:  # the variance of a constant, after rounding
        return None
    return max(-1.0, min(1.0, (n * xy - x * y) / math.sqrt(var_x * var_y)))


_FINISH: dict[str, Callable[[list[float]], float | None]] = {
    "rewards/length_correlation": _correlation,
    "peak_memory_gib": max,
    "num_tokens": sum,
    "count/chosen": sum,
    "count/rejected": sum,
}


def _histogram(bins_of: Bins, counts: list[float], totals: list[float] | None = None) -> Histogram:
    filled = [i for i, count in enumerate(counts) if count]
    bins = range(filled[0], filled[-1] + 1)
    means = totals and [totals[i] / counts[i] if counts[i] else math.nan for i in bins]
    return Histogram([bins_of.edge(i) for i in (*bins, bins.stop)], [counts[i] for i in bins], means)

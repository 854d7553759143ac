"""Tables of docs/ from what the studies in benchmarks/studies/ have found and written to benchmarks/results/."""

import json
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from docs.step_tables import markdown
from fastdpo.benchmarks.harness import ROOT
from fastdpo.benchmarks.report import LENGTHS, RESULTS, machine

PASSES = ("forward", "recomputed", "backward", "reference", "once")
METRICS = {
    "rewards/accuracies": "accuracy",
    "loss": "loss",
    "rewards/margins": "margin of rewards",
    "logps/chosen_below_ref": "chosen below reference",
}


def study(name: str) -> dict[str, Any]:
    """Return what a study has found, with its provenance."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _with_machine(lines: list[tuple[str, ...]], *studies: dict[str, Any]) -> str:
    return f"{markdown(lines)}\n{machine(list(studies))}\n"


def step_parts(name: str = "tldr") -> str:
    """Return where the time of a step goes, by the part of the model and the pass over it."""
    found = study("step_parts")
    parts = {
        part: {where: each["seconds"] for where, each in passes.items()}
        for part, passes in found["lengths"][name]["parts"].items()
    }
    whole = sum(sum(passes.values()) for passes in parts.values())
    lines = [("part", "share", *(f"{each}, ms" for each in PASSES))]
    for part, passes in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        cells = (f"{1e3 * passes[each]:.0f}" if each in passes else "" for each in PASSES)
        lines.append((part, f"{sum(passes.values()) / whole:.1%}", *cells))
    return _with_machine(lines, found)


def step_removed() -> str:
    """Return what is no longer computed, and the time of attention."""
    found = study("step_removed")
    heads = ("rows computed, times those needed", "scores, times those needed", "time of attention")
    lines = [("lengths like", *heads)]
    for name, ways in found["lengths"].items():
        before, now = ways["before"], ways["now"]
        cells = (f"{before[key]:.{n}f}, now {now[key]:.{n}f}" for key, n in (("rows", 3), ("scores", 2), ("time", 2)))
        lines.append((LENGTHS[name], *cells))
    return _with_machine(lines, found)


def compiled() -> str:
    """Return how many graphs were compiled, by what is compiled."""
    found = study("compiled_count")
    lines = [("what is compiled", "graphs", "batches that compiled")]
    lines += [(way, str(x["graphs"]), str(x["batches_that_compiled"])) for way, x in found["ways"].items()]
    lengths = max(x["lengths"] for x in found["ways"].values())
    told = f"{found['batches']} batches with {lengths} different numbers of rows, with gradients. "
    return f"{markdown(lines)}\n{told}{machine([found])}\n"


def liger() -> str:
    """Return the largest errors of tiny models with Liger's kernels in their layers."""
    found = study("liger_families")
    tried = [row for row in found["rows"] if "error" not in row]
    largest = {key: max(tried, key=lambda row: row[key]) for key in ("logps", "gradients")}
    lines = [("of Liger's kernels", "largest error", "in")]
    for key, told in (("logps", "log-probs, nats"), ("gradients", "gradients, of the largest entry of a weight's")):
        lines.append((told, f"{largest[key][key]:.0e}", f"`{largest[key]['class']}`"))
    told = f"{len(tried)} classes with Liger {found['provenance']['liger-kernel']}. {machine([found])}"
    return f"{markdown(lines)}\n{told}\n"


def vision_steps() -> str:
    """Return the steps on images beside TRL's."""
    found = study("vision_steps")
    heads = ("model", "tokens of a response", "TRL, s", "fastdpo", "reference cached", "memory, TRL, MiB", "fastdpo")
    lines = [heads]
    for row in found["rows"]:
        seconds, memory = row["seconds"], row["mib"]
        ratios = (f"{seconds['TRL'] / seconds[way]:.2f}x" for way in ("fastdpo", "fastdpo, cached"))
        cells = (f"{seconds['TRL']:.2f}", *ratios, *(f"{memory[way]:.0f}" for way in ("TRL", "fastdpo")))
        lines.append((row["model"], str(row["tokens"]), *cells))
    return _with_machine(lines, found)


def vision_families() -> str:
    """Return the layout of each family that sees images, and its errors or why it is refused."""
    found = study("vision_families")
    lines = [("family", "layout", "log-probs", "gradients", "why")]
    for row in found["rows"]:
        errors = (f"{row[key]:.1e}" if key in row else "" for key in ("logps", "gradients"))
        lines.append((row["family"], row["layout"], *errors, row.get("why", "")))
    return _with_machine(lines, found)


def grouped_trainings() -> str:
    """Return the held-out metrics of trainings with and without grouping: the accuracy, and at the end all others."""
    studies = [study(name) for name in ("grouping", "grouping-32")]
    lines = [("pairs a step", "after steps", "held out", "not grouped", "grouped", "difference")]
    for each in studies:
        seeds = sorted({run["seed"] for run in each["runs"]})
        runs = {(run["seed"], run["group_by_prompt"] is not None): run["evaluations"] for run in each["runs"]}
        evaluations = each["runs"][0]["evaluations"]
        for at, evaluation in enumerate(evaluations):
            for key, name in METRICS.items():
                if key != "rewards/accuracies" and at < len(evaluations) - 1:
                    continue
                off, on = ([runs[seed, grouped][at][key] for seed in seeds] for grouped in (False, True))
                differ = [b - a for a, b in zip(off, on, strict=True)]
                cells = [f"{mean(x):.3f} ± {stdev(x):.3f}" for x in (off, on)]
                cells.append(f"{mean(differ):+.3f} ± {stdev(differ) / len(seeds) ** 0.5:.3f}")
                lines.append((str(each["pairs_a_step"]), str(evaluation["step"]), name, *cells))
    return _with_machine(lines, *studies)


def patched() -> str:
    """Return the steps of TRL's trainers with and without `patch_trl`."""
    from benchmarks.studies import patch_trl

    rows = [json.loads(line) for line in (RESULTS / "patch_trl.jsonl").read_text().splitlines()]
    return f"{patch_trl.table(RESULTS / 'patch_trl.jsonl')}\n\n{machine(rows)}\n"


def cells() -> str:
    """Return where the active cells of a pretrained model are."""
    found = study("cells")
    keys = {"in_full_rows": ".0%", "in_dense_blocks": ".3f", "elsewhere": ".4f"}
    lines = [("logits times", "density", "active in full rows", "cells in dense blocks", "active elsewhere")]
    for row in found["rows"]:
        shown = (f"{row[key]:{form}}" for key, form in keys.items())
        lines.append((f"{row['factor']:.2f}", f"{row['density']:.3f}", *shown))
    return _with_machine(lines, found)


def head_times() -> str:
    """Return the computed times of the head on an H200, by where the active cells are and by their density."""
    found = json.loads((RESULTS.parent / "computed" / "head_time.json").read_text())
    names = {
        "frozen": "frozen",
        "trained auto": "trained, `auto`",
        "trained auto, 3 GiB": "the same with a workspace of 3 GiB",
        "sparse": "trained, `sparse`",
    }
    places = {"spread evenly": "evenly spread", "where a model has them": "as in the table"}
    densities = [(place, each) for place in places for each in found[place]["ms"]["frozen"]]
    lines = [("", *(f"{places[place]}, {each}" for place, each in densities), "nothing skipped")]
    for key, name in names.items():
        ms = (f"{found[place]['ms'][key][each]:.1f}" for place, each in densities)
        lines.append((name, *ms, f"{found['dense_ms'][key]:.1f}"))
    limits = [("all cells are computed above a density of", *found["spread evenly"]["limits"])]
    limits += [(told, *(f"{x:.2f}" for x in found[place]["limits"].values())) for place, told in places.items()]
    return f"{markdown(lines)}\n{markdown(limits)}"


def frontier() -> str:
    """Return the frontier of examples/frontier, as means over the draws of the pairs with their standard errors."""
    found = json.loads((ROOT / "examples" / "frontier" / "frontier.json").read_text())
    rivals = [(found["optimum"], "kl"), (found["best_of"], "kl"), (found["best_of"], "kl_bound")]
    heads = ("the optimum's reward at this KL", "best of n's, exact KL", "best of n's, KL as the bound")
    sft = f"{found['sft']['reward']:.3f}"
    lines = [("beta", "reward", "KL, nats", *heads), ("SFT", sft, "0", sft, sft, sft)]
    for beta in found["settings"]["betas"]:
        runs = [run["fused"] for run in found["runs"] if run["beta"] == beta]
        means = {key: mean(run[key] for run in runs) for key in ("reward", "kl")}
        errors = {key: stdev(run[key] for run in runs) / len(runs) ** 0.5 for key in means}
        cells = [f"{means[key]:.3f} ± {errors[key]:.3f}" for key in means]
        lines.append((f"{beta:g}", *cells, *(f"{_between(points, key, means['kl']):.3f}" for points, key in rivals)))
    return markdown(lines)


def _between(points: list[dict[str, float]], key: str, kl: float) -> float:
    """Return the reward at a KL, on straight lines between points."""
    points = sorted(points, key=lambda point: point[key])
    below, above = next((a, b) for a, b in pairwise(points) if a[key] <= kl <= b[key])
    return below["reward"] + (above["reward"] - below["reward"]) * (kl - below[key]) / (above[key] - below[key])

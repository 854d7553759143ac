"""Figures that sentences of the pages repeat are those of the results in the repository."""

import json
import math
import re
from collections import Counter
from typing import Any

from fastdpo.benchmarks.harness import ROOT
from fastdpo.benchmarks.report import RESULTS, rows_of, step_cases
from fastdpo.head.impl.sparsity import MAX_ROW_MASS


def of_study(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def says(page: str, *sentences: str) -> None:
    text = re.sub(r"\s+", " ", (ROOT / page).read_text())
    for sentence in sentences:
        assert sentence in text, f"{page} must say: {sentence}"


def test_the_readme_counts_the_models() -> None:
    rows = of_study("models")["rows"]
    n = Counter(row["verdict"] for row in rows)
    assert n["wrong"] == n["crash"] == n["packed"] == 0
    says(
        "README.md",
        f"Of {len(rows)} classes, {n['shared'] + n['tree']} share prefixes ({n['tree']} of them, with",
        f"), {n['padded']} are padded, {n['refused']} are refused and {n['not buildable']} could not be built",
    )


def test_the_readme_has_the_ratios_to_trl() -> None:
    steps = [1 / rows["fastdpo"]["ratio_to_trl"] for rows in step_cases(RESULTS).values()]
    (real,) = (
        1 / row["ratio_to_trl"] for row in rows_of("smollm2.jsonl") if row["impl"] == "fastdpo, checkpointing auto"
    )
    words = dict(enumerate(("no", "once", "two", "three", "four", "five", "six")))
    most, least = words[round(max(steps))], words[round(real)]
    says("README.md", f"{least} to {most} times as fast as TRL", "SmolLM2-135M, is twice as fast as TRL's")
    assert round(real) == 2
    assert min(steps) > real
    grouped = [
        1 / row["ratio_to_trl"]
        for row in rows_of("grouped.jsonl")
        if row["impl"] == "fastdpo" and row["pairs_per_prompt"] == 10
    ]
    assert len(grouped) == 3
    ratios = f"with ten pairs of a prompt, a step was {int(min(grouped))} to {int(max(grouped))} times as fast as TRL's"
    says("README.md", ratios)


def test_the_errors_in_bfloat16() -> None:
    found = {
        row["impl"]: row["errors"]["logps"]
        for row in rows_of("head.jsonl")
        if row.get("model") == "llama-3-8b" and row["dtype"] == "bfloat16" and row["frozen"] and "errors" in row
    }
    ours, theirs = found["fastdpo torch, exact"], found["TRL"]
    says("README.md", f"error in nats | {ours:.0e} | {theirs:.2f} |".replace("e-0", "e-"))
    says("docs/faq.md", f"moves log-probs by up to {theirs:.2f} nats")


def test_attention_takes_an_eighth_less_time() -> None:
    ways = of_study("step_removed")["lengths"].values()
    assert all(1 / 16 < 1 - each["now"]["time"] < 3 / 16 for each in ways)
    says("CHANGELOG.md", "attention takes an eighth less time")


def test_the_example_of_the_frontier() -> None:
    found = json.loads((ROOT / "examples/frontier/frontier.json").read_text())
    runs, apart = found["runs"], found["largest_difference"]
    errors = [
        abs(run["fused_sampled"][key] - run["fused"][key]) / run["fused_sampled"][f"{key}_se"]
        for run in runs
        for key in ("reward", "kl")
    ]
    says(
        "examples/frontier/README.md",
        f"the losses of a step differ by at most {apart['loss']:.0e} nats, the final weights by {apart['weights']:.0e} "
        f"of the distance that training moved them, reward by {apart['reward']:.0e} and KL by {apart['kl']:.0e} nats",
        f"Over all {len(runs)} trainings",
        f"of {len(errors)} estimates from them, none differs",
        f"from the exact sums by more than {math.ceil(10 * max(errors)) / 10} standard errors",
    )


def test_what_the_sparse_backward_skips() -> None:
    study = json.loads((ROOT / "docs/sparse_backward/study.json").read_text())
    swept = [row for row in study["cells"] if row["limit"] == MAX_ROW_MASS and row["density"] < 1]
    held_out, seen = (
        sorted(100 * row["density"] for row in swept if row["kind"] == f"LM, {kind}") for kind in ("held out", "seen")
    )
    better = sorted(
        row["dhidden"]["bf16 logits"] / row["dhidden"]["auto"] for row in study["shipped"] if "LM" in row["kind"]
    )
    bounds = [row["predicted"]["sum"] for row in swept]
    least, most = (end(each["all"] for each in bounds) for end in (min, max))
    says(
        "docs/sparse_backward.md",
        f"{held_out[0]:.0f} to {held_out[-1]:.0f} % of the cells are computed on held-out text, and {seen[0]:.0f} to "
        f"{seen[-1]:.0f} % on text seen",
        f"dhidden is {better[0]:.1f} to {better[-1]:.1f} times more accurate than from bfloat16 logits",
        f"at most {max(each['worst'] for each in bounds):.2f} of the bound in a row",
        f"{least:.2f} to {most:.2f} of it over all rows of a setting",
    )


def test_the_example_with_images() -> None:
    found = json.loads((ROOT / "examples/vision/before_after.json").read_text())
    before, after = found["before"], found["after"]
    says(
        "examples/vision/README.md",
        f"| right captions, of {found['pictures']} | {before['right captions']} | {after['right captions']} |",
        *(
            f"| {what} | {before[name]:.{digits}f} | {after[name]:.{digits}f} |"
            for what, name, digits in (
                ("reward accuracy", "eval_rewards/accuracies", 3),
                ("log-prob of the right caption", "eval_logps/chosen", 1),
                ("log-prob of the wrong caption", "eval_logps/rejected", 1),
            )
        ),
    )

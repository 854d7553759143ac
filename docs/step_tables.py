"""Tables of docs/ about whole training steps, from the measurements in benchmarks/results/."""

import textwrap

from fastdpo.benchmarks.report import LENGTHS, RESULTS, machine, rows_of, step_cases
from fastdpo.benchmarks.training import PHASES
from fastdpo.benchmarks.training_cases import VARIANTS

BY_DEFAULT = "fastdpo, checkpointing auto"
"""The variant with the trainer's own default of checkpointing."""


def summary() -> str:
    """Return what the measurements say, in a few sentences: steps, a real model's steps, and the head alone."""
    cases = [rows for rows in step_cases(RESULTS).values() if {"fastdpo", "TRL"} <= rows.keys()]
    speeds = [1 / rows["fastdpo"]["ratio_to_trl"] for rows in cases]
    memory = [rows["fastdpo"]["peak_mib"] / rows["TRL"]["peak_mib"] for rows in cases]
    real = next(1 / row["ratio_to_trl"] for row in rows_of("smollm2.jsonl") if row["impl"] == BY_DEFAULT)
    text = (
        f"A training step of a Llama of 20 million parameters took fastdpo {1 / max(speeds):.0%} to "
        f"{1 / min(speeds):.0%} of the time and {min(memory):.0%} to {max(memory):.0%} of the memory that TRL 1.16 "
        f"took, on pairs with lengths like those of {len(cases)} datasets. A step of SmolLM2-135M on real pairs took "
        f"{1 / real:.0%} of TRL's time. All of it was measured in float32 on one core of a CPU; nothing has been timed "
        "on a GPU so far."
    )
    return "\n".join(textwrap.wrap(text, 120)) + "\n"


def ratios() -> str:
    """Return how many times as fast as TRL each variant is, by case."""
    cases = step_cases(RESULTS)
    lines = [("variant", *cases)]
    for impl in VARIANTS:
        found = [rows.get(impl) for rows in cases.values()]
        if any(found):
            lines.append((impl, *(f"{1 / row['ratio_to_trl']:.2f}" if row else "" for row in found)))
    return markdown(lines)


def splits() -> str:
    """Return where the time of a step goes, of fastdpo and of TRL, by case."""
    lines = [("lengths like", "", *(f"{phase}, ms" for phase in PHASES))]
    for title, rows in step_cases(RESULTS).items():
        for impl in ("fastdpo", "TRL"):
            lines.append((title, impl, *(f"{rows[impl]['split_ms'][phase]:.0f}" for phase in PHASES)))
    return markdown(lines)


def real_model() -> str:
    """Return the steps of a real model on real pairs."""
    head = ("pairs", "trained", "variant", "seconds per step", "times TRL", "memory, MiB", *PHASES, "loss of step 2")
    lines, rows = [head], rows_of("smollm2.jsonl")
    for row in rows:
        data = {"natural": "cut at 384 tokens", "full": "all rows of 384 tokens"}[row["lengths"]]
        lines.append(
            (
                *(data, f"LoRA, r={row['lora_r']}" if "lora_r" in row else "all weights", row["impl"]),
                *(f"{row['ms'] / 1e3 / row['steps']:.1f}", f"{1 / row['ratio_to_trl']:.2f}", f"{row['peak_mib']:.0f}"),
                *(f"{row['split_ms'][phase] / 1e3:.1f}" for phase in PHASES),
                f"{row['loss']:.5f}",
            )
        )
    return f"{markdown(lines)}\n{machine(rows)}\n"


def grouped() -> str:
    """Return the steps whose batches have all pairs of their prompts, by lengths and pairs of a prompt."""
    head = ("lengths like", "pairs of a prompt", "over responses", "pairs per second", "TRL's", "ratio")
    lines = [(*head, "without graphs", "peak memory, MiB", "TRL's", "difference of losses")]
    rows = rows_of("grouped.jsonl")
    cases = {key: {} for key in sorted({(row["pairs_per_prompt"], row["lengths"], row["responses"]) for row in rows})}
    for row in rows:
        cases[row["pairs_per_prompt"], row["lengths"], row["responses"]][row["impl"]] = row
    for (pairs, lengths, responses), found in cases.items():
        ours, without, trl = (found[name] for name in ("fastdpo", "fastdpo, no graphs", "TRL"))
        speeds = (f"{ours['pairs_per_second']:.2f}", f"{trl['pairs_per_second']:.2f}")
        ratios = (f"**{1 / ours['ratio_to_trl']:.1f}**", f"{1 / without['ratio_to_trl']:.1f}")
        memory = (f"{ours['peak_mib']:.0f}", f"{trl['peak_mib']:.0f}")
        differs = f"{abs(ours['loss'] - trl['loss']):.0e}"
        lines.append((LENGTHS[lengths], str(pairs), str(responses), *speeds, *ratios, *memory, differs))
    return f"{markdown(lines)}\n{machine(rows)}\n"


def markdown(lines: list[tuple[str, ...]]) -> str:
    """Return a table, whose first line is its head."""
    head, *rows = lines
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ("---",) * len(head), *rows))

"""Try a tiny model of every causal-LM class of transformers: which layout of a batch is exact on it, and how exact.

    python -m benchmarks.studies.model_sweep            # all of them; writes the numbers and docs/models.md
    python -m benchmarks.studies.model_sweep CLASS ...  # writes nothing
    python -m benchmarks.studies.model_sweep --table    # writes docs/models.md from the numbers in the repository

Scores and all parameter gradients are compared, in
float32, with each sequence alone through the class's own, unpatched forward.
"""

import argparse
import copy
import json
import logging
import signal
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks.studies.tiny_configs import VOCAB, NotBuildableError, class_names, make_tiny
from fastdpo import shared_prefix_batch
from fastdpo.benchmarks.harness import save
from fastdpo.benchmarks.report import RESULTS
from fastdpo.model.layout import layout_of
from fastdpo.model.scoring_forward import find_head, patch_forward
from fastdpo.model.self_check import self_check

DOCUMENT, NUMBERS = Path(__file__).parents[2] / "docs" / "models.md", RESULTS / "models.json"
LOGPS_BOUND, GRADIENT_BOUND = 5e-5, 5e-5
SECONDS = 120


class Row(NamedTuple):
    """The result for one class."""

    name: str
    verdict: str
    """One of shared, tree, packed, padded, refused, not buildable, or wrong and crash, which are faults of fastdpo."""
    head: str = ""
    logps_error: float | None = None
    """Largest error of a log-prob, nats."""
    gradient_error: float | None = None
    """Largest error of a parameter's gradient, relative to its largest entry."""
    reason: str = ""


def make_pairs() -> list[dict[str, list[int]]]:
    """Return pairs of many lengths, longer than attention windows, with and without a common start of the responses."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        drawn: list[int] = torch.randint(5, VOCAB - 4, (n,), generator=generator).tolist()
        return drawn

    pairs = []
    for prompt, common, chosen, rejected in [(5, 0, 7, 3), (12, 4, 2, 6), (3, 0, 1, 9)]:
        start = ids(common)
        chosen_ids, rejected_ids = ([*start, first, *ids(n)] for first, n in ((3, chosen), (4, rejected)))
        pairs.append({"prompt_ids": ids(prompt), "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    return pairs


def own_logps(model: Any, pairs: list[dict[str, list[int]]]) -> Tensor:
    """Score each sequence alone through the class's own forward, `[M]`."""
    parts = []
    for field in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            prompt, response = pair["prompt_ids"], pair[field]
            ids = torch.tensor([prompt + response])
            # the last token predicts nothing, so the model does not get it
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
            log_probs = logits[len(prompt) - 1 :].float().log_softmax(-1)
            parts.append(log_probs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(parts)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of a parameter's gradient, relative to its largest entry.

    If that entry is only rounding error (the bias of keys shifts all scores alike), the model's largest serves instead.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    worst = 0.0
    for name in actual.keys() | expected.keys():
        a, e = (gradients.get(name, torch.zeros(())) for gradients in (actual, expected))
        scale = float(e.abs().max())
        worst = max(worst, float((a - e).abs().max()) / (scale if scale > 1e-5 * largest else largest))
    return worst


def sweep_class(name: str) -> Row:
    """Try one class."""
    pairs = make_pairs()
    try:
        reference = make_tiny(name)
        model = copy.deepcopy(reference)
        try:
            expected = own_logps(reference, pairs)
            if not torch.equal(expected, own_logps(reference, pairs)):
                expected = own_logps(reference.eval(), pairs)  # its routing is random in training
            expected_gradients = gradients(reference, expected)
        except Exception as error:
            raise NotBuildableError(f"its own forward fails: {type(error).__name__}: {first_line(error)}") from error
        if not bool(expected.isfinite().all()):
            raise NotBuildableError("its own log-probs are not finite")
    except NotBuildableError as error:
        return Row(name, "not buildable", reason=str(error))
    model.train(reference.training)
    try:
        layout, reason = layout_of(model)
        patch_forward(model)
        head = find_head(model).own or "fused"
        batch = shared_prefix_batch(pairs, layout=layout)
        checked = self_check(model, batch, layout=layout, fallback=True)
        if checked.layout != layout:
            layout, reason = checked.layout, checked.reason
            batch = shared_prefix_batch(pairs, layout=layout)
    except ValueError as error:
        return Row(name, "refused", reason=first_line(error))
    logps = model(**batch).logps
    logps_error = float((logps - expected).abs().max())
    gradient_error = worst_gradient(gradients(model, logps), expected_gradients)
    exact = logps_error <= LOGPS_BOUND and gradient_error <= GRADIENT_BOUND
    return Row(name, layout if exact else "wrong", head, logps_error, gradient_error, reason)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def sweep(names: list[str]) -> list[Row]:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    rows = []
    for name in names:
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            row = sweep_class(name)
        except TimeoutError as error:
            row = Row(name, "not buildable", reason=str(error))
        except Exception as error:
            row = Row(name, "crash", reason=f"{type(error).__name__}: {first_line(error)}")
        finally:
            signal.alarm(0)
        seconds = time.perf_counter() - start
        errors = "".join(f"{x or float('nan'):9.1e}" for x in (row.logps_error, row.gradient_error))
        print(f"{row.verdict:14}{name:36}{errors} {seconds:5.1f} s  {row.head}  {row.reason}", flush=True)
        rows.append(row)
    return rows


def main(words: list[str]) -> None:
    if words != ["--table"]:
        measure(words)
    if words in ([], ["--table"]):
        DOCUMENT.write_text(render(json.loads(NUMBERS.read_text())))


def measure(names: list[str]) -> None:
    """Try classes; without names try all, and keep the numbers."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastdpo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = sweep(names or class_names())
    if not names:
        tree = find_spec("tree_recurrence") is not None
        save(NUMBERS, {"tree_recurrence": tree, "rows": [row._asdict() for row in rows]})


def render(found: dict[str, Any]) -> str:
    """Return the document with the table of what was found."""
    rows = [Row(**row) for row in found["rows"]]
    count = Counter(row.verdict for row in rows)
    version, tree = found["provenance"]["transformers"], found["tree_recurrence"]
    lines = [
        "# Models",
        "",
        "`python -m benchmarks.studies.model_sweep` generates this page. It builds a tiny model of every causal-LM "
        f"class of transformers {version}{' (with tree-recurrence installed)' if tree else ''}, with "
        "random weights, in float32 on the CPU. It compares the log-probs of a batch and the gradients of all "
        "parameters with those of each sequence alone through the class's own forward.",
        "",
        f"Of {len(rows)} classes, {count['shared']} are exact with shared prefixes. {count['tree']} more are exact "
        "with shared prefixes through tree-recurrence, and are padded without it. "
        f"{count['packed']} are exact without sharing, and {count['padded']} as padded rows. "
        f"{count['refused']} are refused with an error, and {count['not buildable']} could not be built or run here. "
        f"{count['wrong']} give wrong results, and {count['crash']} crash.",
        "",
        "The columns log-probs and gradients have the largest errors: of a log-prob in nats, and of a parameter's "
        "gradient relative to its largest entry. The column head says `fused`, or why the model's own head computes "
        "the logits, in chunks of rows. The column why says what keeps a class from the layout `shared`.",
        "",
        "| class | layout | log-probs | gradients | head | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = ["" if x is None else f"{x:.1e}" for x in (row.logps_error, row.gradient_error)]
        reason = row.reason.replace("|", "/").split(" (a state-space")[0]
        reason = "" if row.verdict == "shared" else reason[:230] + "..." * (len(reason) > 230)
        lines.append(f"| {row.name} | {row.verdict} | {errors[0]} | {errors[1]} | {row.head} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="Classes to try (default: all).")
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the page from the numbers kept."
    )
    args = parser.parse_args()
    main(["--table"] if args.table else args.classes)

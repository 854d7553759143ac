"""Time and memory of a training step of TRL's trainers, without and with `fastdpo.patch_trl()`.

    python -m benchmarks.studies.patch_trl --out runs/patch_trl.jsonl
    python -m benchmarks.studies.patch_trl --table runs/patch_trl.jsonl

The two take turns in one process, on the same trainer and batch, and must agree on the loss and on the norm of its
gradient. Memory is what a step needs in addition to weights and gradients. The steps of GRPO and RLOO are measured on
completions that were generated before.
"""

import argparse
import copy
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastdpo
from fastdpo.benchmarks import lengths
from fastdpo.benchmarks.harness import Measured, milliseconds, peak_memory, provenance, record

TRAINERS = ("DPO", "KTO", "SFT", "GRPO", "RLOO")
SAME = {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}


def make(kind: str, folder: Path, vocab: int, max_length: int) -> Any:
    """Return one of TRL's trainers of a small Llama, with 4 rows (DPO: 4 pairs) of random words in a batch."""
    import trl

    tokenizer = lengths.tokenizer(vocab)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # transformers 4 adds what models do not take
    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": vocab, "bos_token_id": None},
        **{"eos_token_id": lengths.EOS, "pad_token_id": lengths.PAD},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")  # TRL loads a reference from where a model came from
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows: list[dict[str, Any]] = [*lengths.pairs("ultrafeedback", 8, vocab, max_length)]
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {"max_length": max_length}
    if kind == "KTO":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
    elif kind == "SFT":
        rows = [{"text": r["prompt"] + r["chosen"]} for r in rows]
    elif kind in ("GRPO", "RLOO"):
        rows = [{"prompt": r["prompt"]} for r in rows]
        settings = {"num_generations": 2, "max_completion_length": max_length // 2, "beta": 0.0}
        settings["steps_per_generation"] = 1
        options["reward_funcs"] = lambda completions, **_: [float(len(str(text)) % 5) for text in completions]
    if kind in ("DPO", "KTO"):
        options["ref_model"] = copy.deepcopy(model)
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=1, **SAME, **settings
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )


def compare(kind: str, vocab: int, max_length: int, repetitions: int) -> list[dict[str, Any]]:
    """Return a row of what TRL's step costs, and one of what it costs with `patch_trl`."""
    import trl

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, Path(folder), vocab, max_length)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        found: dict[str, torch.Tensor] = {}

        def step() -> None:
            trainer.model.zero_grad(set_to_none=False)
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            found[name] = loss.detach()

        norms, peaks, times = {}, {}, defaultdict(list)
        for repetition in range(-1, repetitions):
            for name, switch in (("TRL", fastdpo.unpatch_trl), ("TRL with patch_trl", fastdpo.patch_trl)):
                switch()  # takes time of its own, because it looks for names in all modules
                if repetition < 0:
                    step()  # fill caches
                    norms[name] = torch.nn.utils.get_total_norm(p.grad for p in trainer.model.parameters()).item()
                    peaks[name] = peak_memory(step)
                else:
                    times[name].append(milliseconds(step))
        fastdpo.unpatch_trl()
    losses = {name: loss.item() for name, loss in found.items()}
    for what, (theirs, ours) in {"loss": losses.values(), "gradient's norm": norms.values()}.items():
        if not math.isclose(theirs, ours, rel_tol=1e-4, abs_tol=1e-4):  # RLOO's loss is 0 but for rounding of its sums
            raise SystemExit(f"{kind}: the {what} is {theirs} without patch_trl and {ours} with it")
    measured = {name: Measured(times[name], peaks[name]) for name in peaks}
    return [
        {"trainer": kind, "variant": name, "trl": trl.__version__, "vocab": vocab, "max_length": max_length}
        | {"loss": losses[name], "grad_norm": norms[name]}
        | {"times_ms": [round(t, 1) for t in m.times], "ms": round(m.ms, 1)}
        | {"ratio": round(m.ratio_to(measured["TRL"]), 3), "peak_mib": round(m.peak_mib, 1), "provenance": provenance()}
        for name, m in measured.items()
    ]


def table(path: Path) -> str:
    """Return the rows of a file as a table of Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| TRL | trainer | ms | with `patch_trl` | ratio | peak MiB | with `patch_trl` | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        memory = ours["peak_mib"] / theirs["peak_mib"] if theirs["peak_mib"] else math.nan
        lines.append(
            f"| {ours['trl']} | {ours['trainer']} | {theirs['ms']:.0f} | {ours['ms']:.0f} | **{ours['ratio']:.2f}** "
            f"| {theirs['peak_mib']:.0f} | {ours['peak_mib']:.0f} | **{memory:.2f}** |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trainers", nargs="+", default=TRAINERS, choices=TRAINERS, help="Trainers to measure (default: all)."
    )
    parser.add_argument("--vocab", type=int, default=32000, help="Tokens of the vocabulary (default: 32000).")
    parser.add_argument(
        "--max-length", type=int, default=128, help="Longest prompt and response together, in tokens (default: 128)."
    )
    parser.add_argument("--repetitions", type=int, default=3, help="Timed steps of each variant (default: 3).")
    parser.add_argument("--out", type=Path, help="File of JSON lines to which the rows are appended (default: none).")
    parser.add_argument("--table", type=Path, help="Measure nothing, and print the rows of this file as a table.")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return
    for kind in args.trainers:
        rows = compare(kind, args.vocab, args.max_length, args.repetitions)
        for row in rows:
            print(json.dumps(row))
        if args.out:
            record(args.out, rows)


if __name__ == "__main__":
    main()

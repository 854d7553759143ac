"""Time and memory of a training step of TRL's trainers, without and with `fastdpo.patch_trl()`.

    python -m benchmarks.patch_trl --out runs/patch_trl.jsonl
    python -m benchmarks.patch_trl --table runs/patch_trl.jsonl

The two take turns in one process, on the same trainer and batch. Memory is what a step needs in addition to the weights
and gradients. The steps of GRPO and RLOO are measured on completions that were generated before.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastdpo
from benchmarks.harness import measure, provenance, record
from tests.helpers.byte_tokenizer import byte_tokenizer

TRAINERS = ("DPO", "KTO", "SFT", "GRPO", "RLOO")


def make(kind: str, folder: Path, vocab: int) -> Any:
    """Return one of TRL's trainers of a Llama with 4 rows (DPO: 4 pairs) of about 150 tokens in a batch."""
    import trl

    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    answer = " and then one more" * 6
    rows: list[dict[str, Any]] = [
        {"prompt": f"Say {i}" + " please" * 6, "chosen": answer, "rejected": answer[3:]} for i in range(8)
    ]
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if kind == "KTO":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
    elif kind == "SFT":
        rows = [{"text": r["prompt"] + r["chosen"]} for r in rows]
    elif kind in ("GRPO", "RLOO"):
        rows = [{"prompt": r["prompt"]} for r in rows]
        settings = {"num_generations": 2, "max_completion_length": 96, "beta": 0.0, "steps_per_generation": 1}
        options["reward_funcs"] = lambda completions, **_: [float(len(str(text)) % 5) for text in completions]
    if kind in ("DPO", "KTO"):
        options["ref_model"] = copy.deepcopy(model)
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )


def compare(kind: str, vocab: int, repetitions: int) -> list[dict[str, Any]]:
    import trl

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, Path(folder), vocab)
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

        def step() -> None:
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            trainer.model.zero_grad(set_to_none=False)

        def patched() -> None:
            fastdpo.patch_trl()
            step()
            fastdpo.unpatch_trl()

        measured = measure({"TRL": step, "TRL with patch_trl": patched}, repetitions)
    base = measured["TRL"]
    return [
        {"trainer": kind, "variant": name, "trl": trl.__version__, "vocab": vocab, "ms": round(m.ms, 1)}
        | {"ratio": round(m.ratio_to(base), 3), "peak_mib": round(m.peak_mib, 1)}
        | {"machine": provenance()["machine"], "torch": torch.__version__, "commit": provenance()["commit"]}
        for name, m in measured.items()
    ]


def table(path: Path) -> str:
    """Return the rows of a file as a table of Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| TRL | trainer | ms | with `patch_trl` | ratio | peak MiB | with `patch_trl` |",
        "|---|---|---|---|---|---|---|",
    ]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {ours['trl']} | {ours['trainer']} | {theirs['ms']:.0f} | {ours['ms']:.0f} | **{ours['ratio']:.2f}** "
            f"| {theirs['peak_mib']:.0f} | {ours['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS, help="which trainers to measure")
    parser.add_argument("--vocab", type=int, default=32000, help="size of the vocabulary")
    parser.add_argument("--repetitions", type=int, default=3, help="timed calls of each variant")
    parser.add_argument("--out", type=Path, help="append the rows to this file of JSON lines")
    parser.add_argument("--table", type=Path, help="print the rows of this file as a table, and measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return
    for kind in args.trainers:
        rows = compare(kind, args.vocab, args.repetitions)
        for row in rows:
            print(json.dumps(row))
        if args.out:
            record(args.out, rows)


if __name__ == "__main__":
    main()

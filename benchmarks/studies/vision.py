"""Compare DPO steps on images with TRL's, and list how exact each family of vision-language models is.

    python -m benchmarks.studies.vision families --out families.json
    python -m benchmarks.studies.vision steps --responses 12 100 --out steps.json

`families` compares a tiny model of each family, in float32, with its own forward on each sequence alone. `steps` trains
a LLaVA and a Qwen2.5-VL of four layers each, with images of about 200 tokens, by fastdpo and by TRL in one process and
in turns, in batches of four pairs. Time is that of the process in the fastest step; memory is the most that a step
takes beside the two models' weights. The vocabulary has 260 tokens, so the head takes no part in the comparison.
`steps` needs `fastdpo[bench]`. Both print what they find, and write it if there is `--out`.
"""

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image

from benchmarks.studies import tiny_vision as tiny
from benchmarks.studies.model_sweep import worst_gradient
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.benchmarks.harness import peak_memory, save
from fastdpo.model.layout import check_images, layout_of
from fastdpo.model.scoring_forward import patch_forward

STEPS = 4


def gradients(model: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n}


def family(name: str) -> dict[str, Any]:
    """Return the layout of one family and its errors, or why it is refused."""
    made = tiny.build(name)
    model = made.model
    try:
        check_images(model)
    except ValueError as error:
        return {"family": name, "layout": "refused", "why": str(error).partition(": ")[2].partition(";")[0]}
    rows = tiny.examples(made.counts)
    expected = tiny.own_logps(made, rows)
    expected_gradients = gradients(model, expected)
    layout, _ = layout_of(model)
    patch_forward(model, impl="torch")
    logps = model(**tiny.MadeUpCollator(made, model)(rows, layout=layout)).logps
    largest = float((logps - expected).abs().max())
    worst = worst_gradient(gradients(model, logps), expected_gradients)
    return {"family": name, "layout": layout, "logps": largest, "gradients": worst}


def families() -> Iterator[dict[str, Any]]:
    for name in (*tiny.SHARED, *tiny.TREE, *tiny.REFUSED):
        yield family(name)


# Steps


def llava() -> tuple[Any, Any]:
    processor = tiny.llava_processor(size=112, patch=8)  # 196 tokens an image
    tower = tiny.CLIP | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "image_size": 112}
    text = _text(processor) | {"model_type": "llama"}
    token = {"image_token_id": processor.image_token_id, "image_token_index": processor.image_token_id}
    config = transformers.LlavaConfig(
        vision_config=tower | {"patch_size": 8}, text_config=text, vision_feature_layer=-2, **token
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def qwen() -> tuple[Any, Any]:
    processor = tiny.qwen_processor(pixels=64 * 200)
    tower = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 256, "num_heads": 2}
    tower |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(tiny.QWEN_TOKENS)), strict=True))
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**tower, "fullatt_block_indexes": [3]},
        text_config=_text(processor) | {"rope_parameters": rope},
        tie_word_embeddings=False,
        **ids,
    )
    return processor, transformers.Qwen2_5_VLForConditionalGeneration(config)


def _text(processor: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_key_value_heads": 4}
    return tiny.TEXT | sizes | {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 4096}


MODELS = {"LLaVA": llava, "Qwen2.5-VL": qwen}


def rows(words: int) -> Dataset:
    """Return four pairs with an image each and responses of about so many tokens."""
    draw = np.random.default_rng(0)

    def say(role: str, tokens: int) -> list[dict[str, Any]]:
        text = "".join(draw.choice(list("abcdefgh "), tokens))
        return [{"role": role, "content": [{"type": "text", "text": text}]}]

    made = []
    for _ in range(4):
        prompt = say("user", 24)
        prompt[0]["content"].insert(0, {"type": "image"})
        image = Image.fromarray(draw.integers(0, 255, (112, 112, 3), dtype=np.uint8))
        made.append({"images": [image], "prompt": prompt, "chosen": say("assistant", words)})
        made[-1]["rejected"] = say("assistant", words)
    parts = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
    columns = {"images": List(ImageFeature())} | dict.fromkeys(("prompt", "chosen", "rejected"), parts)
    return Dataset.from_list(made, features=Features(columns))


class Clock(transformers.TrainerCallback):
    """Notes the process time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def turn(which: str, model: str, data: Dataset, steps: int) -> tuple[float, float]:
    """Return the seconds of the fastest step, and the MiB that a step takes."""
    torch.manual_seed(0)
    processor, policy = MODELS[model]()
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "logging_steps": 1000,
        "gradient_checkpointing": False,
    }
    if which == "TRL":
        import trl

        made, config = trl.DPOTrainer, trl.DPOConfig
    else:
        made, config = DPOTrainer, DPOConfig
        settings |= {"precompute_ref_log_probs": True} if "cached" in which else {"precompute_ref_log_probs": False}
        settings |= {"reference_cache_dir": tempfile.mkdtemp()}
    clock = Clock()
    options = {"processing_class": processor, "callbacks": [clock]}
    trainer: Any = made(copy.deepcopy(policy), policy, config(**settings), train_dataset=data, **options)
    memory = peak_memory(lambda: trainer.train())
    return min(clock.seconds[1:]), memory


def steps(models: list[str], responses: list[int]) -> Iterator[dict[str, Any]]:
    disable_progress_bars()
    ways = ("fastdpo", "fastdpo, cached", "TRL")
    for model in models:
        for words in responses:
            data = rows(words)
            turns = [{which: turn(which, model, data, STEPS) for which in ways} for _ in range(2)]
            row: dict[str, Any] = {"model": model, "tokens": words, "seconds": {}, "mib": {}}
            for which in ways:
                row["seconds"][which], row["mib"][which] = map(min, zip(*(each[which] for each in turns), strict=True))
            yield row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("families", "steps"), help="What to measure.")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="Models to train (default: all)."
    )
    parser.add_argument(
        "--responses", nargs="+", type=int, default=[12, 100], help="Tokens of a response (default: 12 and 100)."
    )
    parser.add_argument("--out", type=Path, help="JSON file to which all rows are written (default: none).")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastdpo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = []
    for row in families() if args.what == "families" else steps(args.models, args.responses):
        found.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        save(args.out, {"rows": found})


if __name__ == "__main__":
    main()

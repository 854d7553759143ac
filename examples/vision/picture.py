"""Draws what the model says of held-out pictures before and after training, as `before_after.png` beside this file.

    python -m examples.vision.picture runs/vision      # writes before_after.json too, of which README has the numbers

Of the twelve captions, the model's choice is the one with the largest log-prob. Before training it has random weights.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed

from examples.vision.make_data import PROMPT, SHAPES, caption, captions
from fastdpo.benchmarks.harness import save
from fastdpo.report.plots import GREEN, VERMILION

FOLDER = Path(__file__).parent
METRICS = ("eval_rewards/accuracies", "eval_logps/chosen", "eval_logps/rejected")
CAPTIONS = [caption(*each) for each in captions()]


def choices(model: Any, processor: Any, pictures: list[Image.Image]) -> list[str]:
    """The caption that the model finds most probable, for each picture."""
    rows = [processor.tokenizer(text)["input_ids"][1:] for text in CAPTIONS]  # without <bos>
    chosen = []
    for picture in pictures:
        prompt = processor(text=[PROMPT], images=[picture], return_tensors="pt")
        logps = []
        for row in rows:
            targets = torch.tensor([[*row, processor.tokenizer.eos_token_id]])
            ids = torch.cat([prompt["input_ids"], targets], dim=1)
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
            own = logits[:, -targets.shape[1] - 1 : -1].log_softmax(-1)
            logps.append(float(own.gather(2, targets[..., None]).sum()))
        chosen.append(CAPTIONS[max(range(len(logps)), key=logps.__getitem__)])
    return chosen


def held_out(folder: Path = FOLDER) -> tuple[list[Image.Image], list[str]]:
    """The held-out pictures and their captions, by colour and shape."""
    lines = (folder / "data" / "test.jsonl").read_text().splitlines()
    rights = {row["image"]: row["chosen"] for row in map(json.loads, lines)}
    names = sorted(rights, key=lambda name: (name.split("_")[-1], CAPTIONS.index(rights[name])))
    return [Image.open(folder / "data" / name).convert("RGB") for name in names], [rights[name] for name in names]


def main(run: str) -> None:
    pictures, rights = held_out()
    processor = AutoProcessor.from_pretrained(run)
    set_seed(42)
    start = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(FOLDER / "model"))
    before = choices(start.eval(), processor, pictures)
    after = choices(AutoModelForImageTextToText.from_pretrained(run).eval(), processor, pictures)
    columns = 2 * len(SHAPES)
    figure = Figure(figsize=(1.7 * columns, 2.1 * len(pictures) / columns), dpi=100, layout="constrained")
    panels = figure.subplots(len(pictures) // columns, columns).flat
    for panel, picture, right, *said in zip(panels, pictures, rights, before, after, strict=True):
        panel.imshow(picture)
        panel.set_axis_off()
        for i, (when, text) in enumerate(zip(("before", "after"), said, strict=True)):
            colour = GREEN if text == right else VERMILION
            place = {"ha": "center", "va": "top", "fontsize": 8, "transform": panel.transAxes}
            panel.text(0.5, -0.03 - 0.13 * i, f"{when}: {text}", color=colour, **place)
    figure.savefig(FOLDER / "before_after.png", bbox_inches="tight")  # the last captions too
    log = json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in log if METRICS[0] in entry]
    found: dict[str, Any] = {"pictures": len(rights)}
    for when, said, metrics in (("before", before, evaluations[0]), ("after", after, evaluations[-1])):
        right = sum(a == b for a, b in zip(said, rights, strict=True))
        found[when] = {"right captions": right} | {name: metrics[name] for name in METRICS}
        print(f"{when}: {right} of {len(rights)} captions are right")
    save(FOLDER / "before_after.json", found)


if __name__ == "__main__":
    main(sys.argv[1])

"""examples/vision: the committed files are what the script writes, and training on them learns."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.vision import make_data, picture
from fastdpo import cli

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "vision"


def test_the_script_makes_the_committed_files(tmp_path: Path) -> None:
    make_data.write_all(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 12 * 8 + 2 + 4
    for path in made:
        if path.suffix == ".png":
            assert np.array_equal(*(np.asarray(Image.open(folder / path)) for folder in (tmp_path, FOLDER))), path
        else:
            assert (tmp_path / path).read_bytes() == (FOLDER / path).read_bytes(), path


def test_only_the_picture_tells_which_caption_is_right() -> None:
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (FOLDER / "data" / f"{split}.jsonl").read_text().splitlines()]
        chosen, rejected = (sorted(row[name] for row in rows) for name in ("chosen", "rejected"))
        assert chosen == rejected
        for row in rows:
            colour, shape, _ = Path(row["image"]).stem.split("_")
            assert row["chosen"] == make_data.caption(colour, shape)


@pytest.mark.slow
def test_a_short_run_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the training already tells most right captions from wrong ones, and the model is saved whole."""
    monkeypatch.chdir(ROOT)
    options = ["--num_train_epochs", "3", "--eval_strategy", "steps", "--eval_steps", "66", "--report_samples", "0"]
    cli.main(["train", "examples/vision/train.yaml", "--output_dir", str(tmp_path), "--use_cpu", *options])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    accuracy = [entry["eval_rewards/accuracies"] for entry in log if "eval_rewards/accuracies" in entry]
    assert accuracy[0] == 0.5
    assert accuracy[-1] >= 0.65
    pictures, _ = picture.held_out()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    said = picture.choices(model, AutoProcessor.from_pretrained(tmp_path), pictures[:2])
    assert set(said) <= set(picture.CAPTIONS)

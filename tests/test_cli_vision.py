"""The command line on a folder of images with JSONL files."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.studies.tiny_vision import llava_processor
from fastdpo.settings.dataset_files import load_splits
from tests.helpers.command import Run, command
from tests.helpers.vision import make_model, picture, said


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, and a folder of six images that the rows of two files name."""
    home = tmp_path_factory.mktemp("vision")
    processor = llava_processor()
    make_model("llava", processor).save_pretrained(home / "model")
    processor.save_pretrained(home / "model")
    data = home / "data"
    (data / "train_images").mkdir(parents=True)
    for i in range(6):
        picture(i).save(data / "train_images" / f"{i}.png")
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        lines = []
        for i in numbers:
            prompt = [{"role": "user", "content": "what is this?"}]
            row = {"prompt": prompt, "chosen": said(f"a cat {i}"), "rejected": said("a dog")}
            lines.append(json.dumps(row | {"images": [f"train_images/{i}.png"] if i != 2 else []}))
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return home


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(home)  # so that the data's folder is not the working directory
    words = ["--model_name_or_path", "model", "--dataset_name", "data", "--report_to", "none", "--disable_tqdm"]
    plain = command(capsys)
    return lambda name, *more: plain(name, *words, "--use_cpu", "--bf16", "false", *more)


@pytest.mark.slow
def test_train_plan_precompute_and_score(run: Run, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = run("precompute", "--output_dir", "out", "--reference_cache_dir", "cache")
    assert ended.code == 0, ended.err
    options = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3")
    ended = run("train", "--output_dir", "out", "--reference_cache_dir", "cache", *options)
    assert ended.code == 0, ended.err
    assert "reference: log-probs of all rows are in cache" in caplog.text
    assert (home / "out" / "processor_config.json").exists()
    page = (home / "out" / "report.html").read_text()
    assert "what is this?" in page
    assert "no sample generations" not in caplog.text
    ended = run("plan", "--output_dir", "plan")
    assert ended.code == 0, ended.err
    assert "no activations of the part that sees the images" in ended.out
    score = ("--model_name_or_path", "out", "--ref_model_name_or_path", "model")
    ended = run("score", *score, "--output_dir", "scores")
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (home / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1]
    assert any(abs(reward) > 0 for line in lines for reward in line["rewards"])


@pytest.mark.slow
def test_an_adapter_is_trained_again_and_merged(run: Run, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    options = ("--max_steps", "1", "--learning_rate", "1e-2", "--report_samples", "0")
    lora = ("--use_peft", "--lora_target_modules", "q_proj", "--lora_r", "2")
    ended = run("train", "--output_dir", "lora", *lora, *options)
    assert ended.code == 0, ended.err
    ended = run("train", "--model_name_or_path", "lora", "--output_dir", "again", *options)
    assert ended.code == 0, ended.err
    ended = command(capsys)("merge", "lora", "--output_dir", "merged")
    assert ended.code == 0, ended.err
    merged = AutoModelForImageTextToText.from_pretrained("merged")
    assert type(merged).__name__ == "LlavaForConditionalGeneration"
    assert AutoProcessor.from_pretrained("merged").image_processor.crop_size["height"] == 16


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_is_read_by_its_files_of_rows(home: Path, streaming: bool) -> None:
    splits = load_splits(str(home / "data"), streaming=streaming)
    assert set(splits) == {"train", "test"}
    rows = list(splits["train"])
    assert [row["images"] for row in rows[1:3]] == [[str(home / "data" / "train_images" / "1.png")], []]
    alone = load_splits(str(home / "data" / "test.jsonl"))
    assert alone["train"][0]["images"] == [str(home / "data" / "train_images" / "4.png")]


def test_a_readme_beside_the_images_changes_nothing(tmp_path: Path) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    row = {"prompt": "<image>?", "chosen": "a", "rejected": "b", "image": "1.png"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "README.md").write_text("# Pictures of my cat\n")
    assert load_splits(str(tmp_path))["train"][0] == row | {"image": str(tmp_path / "1.png")}


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "<image>?", "chosen": "a", "rejected": "b", "image": "../secret.png"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"'image' names '\.\./secret\.png', which is not in the folder"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["dict", "mixed"])
def test_paths_in_columns_of_any_type_stay_in_the_folder(tmp_path: Path, kind: str, streaming: bool) -> None:
    """A row may write an image as `datasets.Image` does, and one row that is no list makes the column's type JSON."""

    def write(name: str) -> None:
        images = [[{"bytes": None, "path": name}], []] if kind == "dict" else [[name], "b.png"]
        rows = [{"prompt": "<image>?", "chosen": "a", "rejected": "b", "images": each} for each in images]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write("in/a.png")
    rows = [row["images"] for row in load_splits(str(tmp_path), streaming=streaming)["train"]]
    whole = str(tmp_path / "in" / "a.png")
    assert rows[0] == ([{"bytes": None, "path": whole}] if kind == "dict" else [whole])
    assert rows[1] == ([] if kind == "dict" else str(tmp_path / "b.png"))
    write("/etc/cover.png")
    with pytest.raises(ValueError, match=r"row 0: the column 'images' names '/etc/cover\.png', which is not in the"):
        list(load_splits(str(tmp_path), streaming=streaming)["train"])

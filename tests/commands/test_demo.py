"""`fastdpo demo`: the example is complete where it is written, and what a user changed in it is kept."""

from pathlib import Path

import pytest

from fastdpo.commands.demo import demo
from fastdpo.settings.config_file import read_settings


def test_the_config_names_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = demo(None, {})
    assert config == Path("fastdpo-demo/quickstart.yaml")
    chosen = read_settings(config, {})  # which refuses a path that does not exist
    assert Path(chosen["dataset_name"]) / "train.jsonl" == Path("fastdpo-demo/data/train.jsonl")
    assert chosen["config_name"] == "fastdpo-demo/model"
    assert chosen["output_dir"] == "fastdpo-demo/run"
    assert "examples" not in config.read_text()
    assert "runs/" not in config.read_text()


def test_a_second_demo_keeps_what_the_user_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo(str(tmp_path / "mine"), {})
    config.write_text(config.read_text().replace("beta: 0.2", "beta: 0.3"))
    assert read_settings(demo(str(tmp_path / "mine"), {}), {})["beta"] == 0.3
    assert f"fastdpo train {config} --beta 0.5" in capsys.readouterr().out


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="has files in it; name a new folder"):
        demo(str(tmp_path), {})
    with pytest.raises(ValueError, match=r"thesis.tex' is a file; name a new folder"):
        demo(str(tmp_path / "thesis.tex"), {})
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]

"""`fastdpo doctor` in this process, on small shapes, and with what a user's machine may lack."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastdpo.commands.doctor import device_report, head_check
from fastdpo.commands.doctor.findings import Findings
from fastdpo.model.attention import backends
from tests.helpers.command import Run, command
from tests.helpers.tiny import make_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(head_check, "SMALL", (23, 17, 61))
    monkeypatch.setattr(head_check, "SHAPES", {})
    monkeypatch.setattr(head_check, "REPEATS", 1)

    return command(capsys, "doctor")


@pytest.fixture
def requires(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what fastdpo's package requires."""

    def requires(*lines: str) -> None:
        real = metadata.version
        monkeypatch.setattr(metadata, "requires", lambda name: list(lines))
        monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "fastdpo" else real(name))

    return requires


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_sound_machine(run: Run, requires: Callable[..., None]) -> None:
    requires("torch>=2", "no-such-package>=3; extra == 'more'", "pytest<1; extra == 'test'")
    ended = run()
    assert ended.code == 0, ended.out
    out = ended.out
    assert out.endswith("\nnothing is wrong\n")
    assert max(map(len, out.splitlines())) <= 80
    for words in ("versions", f"torch           {torch.__version__}, within >=2", "cache", "devices", "what serves"):
        assert words in out
    assert "no-such-package not installed" in out
    assert "  pytest " not in out
    assert out.count("PyTorch │") == len(
        head_check.dtypes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    )


def test_a_broken_bound_is_a_fault_unless_the_package_is_optional_and_absent(
    run: Run, requires: Callable[..., None]
) -> None:
    requires("transformers>=900", "numpy>=1", "absent-one>=1", "absent-two; extra == 'more'", "accelerate<0.1")
    ended = run()
    assert ended.code == 1
    out = flat(ended.out)
    assert "transformers " in out
    for fault in ("is outside >=900: pip install 'transformers>=900'", "absent-one is not installed", "outside <0.1"):
        assert f"{fault}" in out.partition("what is wrong")[2]
    assert "absent-two" not in out.partition("what is wrong")[2]
    assert "nothing is wrong" not in out


def test_without_an_installed_package_there_are_no_bounds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    ended = run()
    assert ended.code == 0
    assert "is run from its sources and not installed" in flat(ended.out)


def test_a_broken_torch_is_a_line_and_not_a_traceback(tmp_path: Path) -> None:
    """In a process of its own, which must never import the real one."""
    (tmp_path / "torch").mkdir()
    broken = "raise OSError('libcudart.so.13: cannot open shared object file')\n"
    (tmp_path / "torch" / "__init__.py").write_text(broken)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "fastdpo", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    out = flat(done.stdout)
    assert "torch can't be imported: OSError: libcudart.so.13: cannot open shared object file" in out
    assert "pip install --force-reinstall torch" in out
    assert "the head against" not in out
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_written_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))  # as /proc says
    ended = run()
    assert ended.code == 0  # training works without one
    assert "writing         impossible: Not a directory" in ended.out
    assert "set FASTDPO_CACHE to a folder that can be written" in flat(ended.out)
    assert "free some space" not in flat(ended.out), "no space would help"


def test_little_space_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**29, 2**29))
    ended = run()
    assert "free space      0.5 GiB" in ended.out
    assert "free some space in" in flat(ended.out)
    assert ended.code == 0


def test_a_wrong_head_is_a_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_check.linear_logprobs
    monkeypatch.setattr(head_check, "linear_logprobs", lambda *args, **options: real(*args, **options) * 1.05)
    ended = run()
    assert ended.code == 1
    assert "in float32: its errors are more than twice PyTorch's own" in flat(ended.out)


def test_wrong_gradients_are_a_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_check.linear_logprobs

    def wrong(hidden: Any, *args: Any, **options: Any) -> Any:
        logps = real(hidden, *args, **options)
        return logps + 0.05 * (hidden - hidden.detach()).sum(-1)

    monkeypatch.setattr(head_check, "linear_logprobs", wrong)
    assert run().code == 1


def test_a_kernel_that_does_not_compile_is_a_fault_with_advice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, impl: str, **__: Any) -> Any:
        raise RuntimeError("\nFailed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(head_check, "linear_logprobs", fail)
    monkeypatch.setattr(device_report, "impls", lambda device: ("triton", "blas"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ended = run()
    assert ended.code == 1
    out = flat(ended.out)
    assert "triton in float32: RuntimeError: Failed to find C compiler. Please specify via CC environment" in out
    assert "install a C compiler, such as gcc" in out
    assert "can't run its kernels here" in out
    assert "failed" in out


def test_the_implementations_of_cuda_are_measured_too() -> None:
    """Here on the CPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    rows = list(head_check.check_head(DEVICE, ("triton", "blas"), shape=(19, 24, 83)))
    plain = {row.dtype: row for row in rows if row.impl == "eager"}
    assert [row.impl for row in rows] == ["triton", "blas", "eager"] * len(plain)
    for row in rows:
        assert not row.failure
        assert row.milliseconds > 0
        assert head_check.is_accurate(row, plain[row.dtype]), row


def test_a_failing_row_is_not_accurate() -> None:
    row = head_check.Row(torch.float32, "eager", 1e-7, 1e-7, 1.0, None)
    assert head_check.is_accurate(row, row)
    assert not head_check.is_accurate(row._replace(logps_error=float("nan")), row)
    failed = row._replace(logps_error=float("inf"), gradients_error=float("inf"), failure="no memory")
    assert not head_check.is_accurate(failed, row)
    assert not head_check.is_accurate(failed, failed)


def test_attention_is_asked_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = backends.Usable("auto", {})
    monkeypatch.setattr(backends, "_VARLEN", frozenset({"window_size"}))
    monkeypatch.setattr(backends, "_FLASH", frozenset({"window_size", "softcap"}))
    assert device_report.attention_of(usable, torch.bfloat16, (64, 64), None) == "varlen"
    assert device_report.attention_of(usable, torch.bfloat16, (64, 64), 50.0).startswith("flash (not varlen: ")
    assert device_report.attention_of(usable, torch.float32, (64, 64), None).startswith("grid (not varlen: it takes ")


def test_flash_attn_that_cannot_be_imported_is_told(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c105ErrorC2')\n")
    (tmp_path / "flash_attn-2.8.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()
    out = flat(run().out)
    assert (
        "flash-attn 2.8 can't be imported, so build it again for this torch: undefined symbol: _ZN3c105ErrorC2" in out
    )


# A model


def test_a_model_is_described(run: Run, tmp_path: Path) -> None:
    make_model("gemma2", tie_word_embeddings=True).config.save_pretrained(tmp_path)
    ended = run(tmp_path)
    assert ended.code == 0, ended.out
    out = flat(ended.out)
    assert "class Gemma2ForCausalLM, 0.0 M parameters" in out
    assert "batches shared: its attention is causal" in out
    assert "head fused; 101 tokens, tied to the embeddings" in out
    assert "attention in float32: grid" in out


def test_a_model_that_cannot_be_trained_is_a_fault(run: Run, tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    ended = run(tmp_path)
    assert ended.code == 1
    assert f"{tmp_path.name} can't be trained: Unrecognized configuration class" in flat(ended.out)


def test_layers_without_heads_and_heads_of_two_sizes_are_described(run: Run, tmp_path: Path) -> None:
    for family, batches in (("mamba2", "batches "), ("deepseek-v3", "batches shared")):
        make_model(family).config.save_pretrained(tmp_path / family)
        ended = run(tmp_path / family)
        assert ended.code == 0, ended.out
        assert batches in flat(ended.out)


def adapter_folder(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda folder: folder / "nothing", 1, "model: there is no "),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}") and folder,
            1,
            "is an adapter; give its base",
        ),
        (lambda folder: "--gpus", 2, "unknown setting --gpus"),
    ],
    ids=["path", "adapter", "option"],
)
def test_mistakes_are_one_line(
    run: Run, tmp_path: Path, make: Callable[[Path], object], code: int, message: str
) -> None:
    ended = run(make(tmp_path))
    assert ended.code == code
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_findings_are_readable_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    found = Findings()
    found.heading("cache")
    found.line("folder", "word " * 60)
    found.line("empty", "")
    found.advice.append("advice " * 40)
    found.end()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.endswith("nothing is wrong\n")


def test_the_gluon_forward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_GLUON", raising=False)
    monkeypatch.setattr(device_report, "has_gluon", lambda: True)
    assert "FASTDPO_GLUON=1 lets" in device_report._gluon()
    monkeypatch.setenv("FASTDPO_GLUON", "1")
    assert "FASTDPO_GLUON=1 allows" in device_report._gluon()
    monkeypatch.setattr(device_report, "has_gluon", lambda: False)
    assert "can't compile" in device_report._gluon()

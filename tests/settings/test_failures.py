"""fastdpo.settings.failures: what a user can mend is one line, a bug is not, and signals are exceptions once."""

import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.settings import failures
from fastdpo.settings.failures import Interrupted, loading, one_line, signals_raise, stopped_by


def caught(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def refuse() -> None:
    raise ValueError("beta must be\n   positive")


def unpack() -> None:
    _, _ = (1, 2, 3)


def full_in_a_library() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("a file could not be written") from error


def full_by_its_words() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


def full_as_torch_says() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4096 vs 4000")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of ...")


def package_by_name() -> None:
    raise ModuleNotFoundError("No module named 'peft'", name="peft")


def package_by_words() -> None:
    raise ImportError("FlashAttention2 has been toggled on, but the package doesn't seem to be installed.")


def package_with_command() -> None:
    raise ImportError("Using this needs the latest version of bitsandbytes: `pip install -U bitsandbytes`")


def other_package() -> None:
    __import__("a_package_that_nobody_has")


def not_finite() -> None:
    raise FloatingPointError("the loss of dataset rows [3] is nan")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (refuse, "beta must be positive"),
        (full_in_a_library, "the disk is full: free some space"),
        (full_by_its_words, "the disk is full: free some space"),
        (full_as_torch_says, "the disk is full: free some space"),
        (out_of_memory, "out of memory: lower per_device_train_batch_size"),
        (lambda: torch.empty(2**52), "out of memory: lower per_device_train_batch_size"),
        (package_by_name, "No module named 'peft': pip install 'fastdpo[peft]'"),
        (
            package_by_words,
            "FlashAttention2 has been toggled on, but the package doesn't seem to be installed: pip",
        ),
        (package_with_command, "Using this needs the latest version of bitsandbytes: `pip install -U bitsandbytes`"),
        (other_package, "No module named 'a_package_that_nobody_has'; install the package that provides it"),
        (Path("/nowhere/file").read_text, "/nowhere/file: No such file or directory"),
        (not_finite, "the loss of dataset rows [3] is nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_user_can_mend_is_one_line(function: Callable[[], Any], expected: str) -> None:
    line = one_line(caught(function))
    assert line is not None
    assert line.startswith(expected)
    assert "\n" not in line


@pytest.mark.parametrize(
    "said",
    [
        "[pair.cc:553] Connection closed by peer [10.0.0.2]:9638. This is typically caused by a remote crash.",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_that_another_process_has_ended_is_no_bug(said: str) -> None:
    assert (one_line(RuntimeError(said)) or "").startswith("another process of this run has ended")


@pytest.mark.parametrize(
    "said",
    [
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nSet",
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.",
    ],
)
def test_that_a_compiler_is_missing_is_no_bug(said: str) -> None:
    assert (one_line(RuntimeError(said)) or "").startswith(
        "there is no C++ compiler, with which torch.compile and Triton"
    )


def test_out_of_memory_says_how_much_was_asked_for() -> None:
    assert (one_line(caught(out_of_memory)) or "").endswith("(tried to allocate 3.50 GiB)")


@pytest.mark.parametrize(
    "function",
    [
        unpack,
        lambda: int("x"),
        lambda: {}["key"],
        lambda: None.attribute,  # type: ignore[attr-defined]
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: __import__("fastdpo.nothing_here"),
    ],
    ids=["unpack", "int", "key", "attribute", "torch", "our-module"],
)
def test_a_bug_is_no_line(function: Callable[[], Any]) -> None:
    """A ValueError of the interpreter, such as of unpacking, says nothing to a user."""
    assert one_line(caught(function)) is None


# Loading


class RepositoryNotFoundError(OSError):
    """As huggingface_hub names it."""


class GatedRepoError(RepositoryNotFoundError):
    """As huggingface_hub names it."""


class LocalEntryNotFoundError(OSError):
    """As huggingface_hub names it."""


@pytest.mark.parametrize(
    ("error", "offline", "reason"),
    [
        (RepositoryNotFoundError(), "", "'o/r' is neither a local folder nor a repository on the Hub that you may"),
        (GatedRepoError(), "", "'o/r' is a gated repository: accept its terms"),
        (LocalEntryNotFoundError(), "", "nor in the cache, and the Hub can't be reached; check the connection"),
        (LocalEntryNotFoundError(), "1", "nor in the cache, and HF_HUB_OFFLINE is set"),
        (ConnectionError(), "0", "nor in the cache, and the Hub can't be reached; check the connection"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_hub_is_named_with_the_setting(
    monkeypatch: pytest.MonkeyPatch, error: Exception, offline: str, reason: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(OSError, match=r"^dataset_name: ") as found, loading("dataset_name", "o/r"):
        raise ValueError("wrapped by a library") from error
    assert reason in str(found.value)


def test_the_nearest_folder_is_named_where_the_hub_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(OSError, match="did you mean 'runs/first'"), loading("model", "runs/frist"):
        raise RepositoryNotFoundError


def test_other_errors_of_loading_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), loading("model", str(tmp_path)):
        raise KeyError("weights")


def test_tries_to_reach_the_hub_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    http = logging.getLogger("huggingface_hub.utils._http")
    with caplog.at_level(logging.INFO):
        with loading("model", "o/r"):
            for n in range(5):
                http.warning("Retrying in %ds", n)
        assert caplog.messages == ["the Hub does not answer; trying again for up to a minute"]
        http.warning("after it")
    assert caplog.messages[1:] == ["after it"]


# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_raises_once_and_handlers_come_back(signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(failures.os, "_exit", lambda code: codes.append(code))
    before = signal.signal(signum, signal.SIG_DFL)  # under nohup, pytest ignores SIGHUP
    try:
        with signals_raise() as came:
            assert stopped_by() is None
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signum)
            assert came == [signum]
            assert stopped_by() == f"stopped by {signal.Signals(signum).name}".replace("SIGINT", "Ctrl-C")
            assert not codes
            with pytest.raises(Interrupted):  # in truth the process has ended by here
                os.kill(os.getpid(), signum)
            assert codes == [128 + signum]
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_raise() as came:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not came
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_leave_signals_to_their_parent() -> None:
    with signals_raise():
        before = signal.getsignal(signal.SIGTERM)
        failures._leave_signals_to_the_parent()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not before
    ours = signal.getsignal(signal.SIGTERM)
    failures._leave_signals_to_the_parent()  # outside the block nothing is changed
    assert signal.getsignal(signal.SIGTERM) is ours

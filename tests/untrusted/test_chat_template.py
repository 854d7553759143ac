"""fastdpo.untrusted.chat_template: a template that never ends is stopped in any thread, and disturbs nothing else."""

import itertools
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fastdpo.data.text.templates import find_template, render
from fastdpo.untrusted import chat_template
from fastdpo.untrusted.chat_template import TooMuch, bounded
from tests.helpers.byte_tokenizer import TEMPLATE, byte_tokenizer, messages

CHAT = messages(("user", "Hello"))
LOOPS = "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}"
"""It takes some tenths of a second, so that a test ends where time is not bounded."""
DOUBLES = "{% set ns = namespace(x='ab') %}{% for i in range(29) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
WRITES = "{% for i in range(50000) %}" + "x" * 200 + "{% endfor %}"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.05)


def here(call: Callable[[], Any]) -> list[BaseException]:
    try:
        call()
    except ValueError as error:
        return [error]
    return []


def in_a_thread(call: Callable[[], Any]) -> list[BaseException]:
    raised: list[BaseException] = []
    thread = threading.Thread(target=lambda: raised.extend(here(call)))
    thread.start()
    thread.join()
    return raised


@pytest.mark.parametrize("where", [here, in_a_thread])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(
            DOUBLES, "too much memory", marks=pytest.mark.skipif(sys.platform != "linux", reason="memory is unbounded")
        ),
        (WRITES, "writes 10,000,000 characters"),
    ],
)
def test_memory_and_output_are_bounded(
    monkeypatch: pytest.MonkeyPatch, where: Callable[..., list[BaseException]], template: str, reason: str
) -> None:
    monkeypatch.setattr(chat_template, "HEADROOM", 2**28)
    monkeypatch.setattr(chat_template, "SECONDS", 600.0)
    (error,) = where(lambda: render(CHAT, "prompt", byte_tokenizer(), template))
    assert str(error).startswith("the chat template is refused: to render `prompt`, it ")
    assert reason in str(error)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("where", [here, in_a_thread])
def test_time_is_bounded(where: Callable[..., list[BaseException]]) -> None:
    (error,) = where(lambda: render(CHAT, "prompt", byte_tokenizer(), LOOPS))
    assert str(error).startswith("the chat template is refused: to render `prompt`, it takes more than 0.05 s of CPU")


HASHES = "{% set ns=namespace(x=(0,)) %}{% for i in range(60) %}{% set ns.x=(ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}"


@pytest.mark.parametrize("thread", [False, True])
def test_an_operation_that_nothing_interrupts_ends_the_process(thread: bool) -> None:
    """The hash of a tuple that has itself twice, 60 times over, takes 2^60 steps and runs no line of Python."""
    program = f"""if True:
        import threading
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from fastdpo.untrusted import chat_template
        chat_template.SECONDS = 0.2
        template = ImmutableSandboxedEnvironment().from_string({HASHES!r})
        def work():
            with chat_template.bounded():
                template.render()
        if {thread}:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
        else:
            work()
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == -signal.SIGVTALRM
    assert 'File "<template>"' in run.stderr


def test_a_timer_and_limits_of_others_are_kept() -> None:
    rang: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60.0)
        with bounded():
            pass
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 0 < left <= 60
        assert not rang
        assert signal.getsignal(signal.SIGALRM) != signal.SIG_DFL
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.usefixtures("hurried")
def test_a_slow_machine_is_not_a_slow_template() -> None:
    with bounded():
        time.sleep(0.5)  # takes no CPU time


@pytest.mark.usefixtures("hurried")
def test_an_error_in_the_block_leaves_nothing_behind() -> None:
    with pytest.raises(TooMuch, match="CPU time"), bounded():
        sum(1 for _ in itertools.count())
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_huge_template_is_not_compiled() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE + "x" * 2**20
    with pytest.raises(ValueError, match=r"the chat template has 1,048,\d+ characters"):
        find_template(tokenizer, None)

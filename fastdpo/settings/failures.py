"""One-line messages for failures that a user can mend, and the handling of Ctrl-C and SIGTERM."""

import errno
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dis import opmap
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from fastdpo.settings.config_file import PACKAGES, install, sibling

logger = logging.getLogger("fastdpo")

OUT_OF_MEMORY = (
    "out of memory: lower per_device_train_batch_size (and raise gradient_accumulation_steps by the same factor), "
    "tokens_per_batch or max_length, or leave gradient_checkpointing on; `fastdpo plan CONFIG.yaml` computes what fits"
)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exit")
"""What gloo and NCCL say when another process of the run has ended."""
NO_COMPILER = ("No working C++ compiler", "Failed to find C compiler")
"""What torch.compile and Triton say."""
NO_SPACE = ("No space left on device", "os error 28", "Disk quota exceeded", ". unexpected pos ", "PytorchStreamWriter")
"""The last two are how `torch.save` says that it could not write all of a file."""


def one_line(error: BaseException) -> str | None:
    """Return the message of an expected failure in one line; None for a bug, whose traceback is needed.

    A ValueError is expected if a `raise` statement raised it. A ValueError of the interpreter or a C library, such as
    "too many values to unpack", tells a user nothing.
    """
    chain = [error, *_causes(error)]
    if full := next((each for each in chain if _is_disk_full(each)), None):
        where = f" in {full.filename}" if isinstance(full, OSError) and full.filename else ""
        return (
            f"the disk is full{where}: free some space, or give an output_dir on another disk; save_total_limit keeps "
            "fewer checkpoints"
        )
    if is_out_of_memory(error):
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        return OUT_OF_MEMORY + (f" (tried to allocate {wanted[1]})" if wanted else "")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_GONE):
        return "another process of this run has ended, so this one ends too; the log of the other may say why"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_COMPILER):
        return (
            "there is no C++ compiler, with which torch.compile and Triton build what they generate: install one, such "
            "as g++, or name it in CC and CXX; without torch_compile, a CPU needs none"
        )
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
        return _flat(error)
    if isinstance(error, FloatingPointError) or (isinstance(error, ValueError) and _was_raised(error.__traceback__)):
        return _flat(error)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated, on a GPU or the CPU."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError)


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        error = cause


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in NO_SPACE)  # safetensors and torch raise errors of their own


def _was_raised(traceback: TracebackType | None) -> bool:
    """Return whether the error came from a `raise` statement in the innermost frame."""
    if traceback is None:
        return True
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] in (opmap["RAISE_VARARGS"], opmap["RERAISE"])


def _missing(error: ImportError) -> str | None:
    """Return a message with the command that installs a missing package; None if the error is not about a package."""
    text = _flat(error)
    if "pip install" in text:
        return text
    named = re.sub("[-_ ]", "", text).lower().replace("flashattention", "flashattn")
    for package in PACKAGES:
        if package.replace("_", "") in named:
            return f"{text.rstrip('.')}: {install(package)}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("fastdpo"):
        return f"{text.rstrip('.')}; install the package that provides it"  # its name on PyPI may differ
    return text if error.name is None and _was_raised(error.__traceback__) else None


# Loading


@contextmanager
def loading(setting: str, name: str) -> Iterator[None]:
    """Inside the block, an error of loading `name` becomes one line with the setting, the name and the reason.

    Raises:
        OSError: there is no such folder or repository, the Hub can't be reached, or a file is broken.
    """
    http, patience = logging.getLogger("huggingface_hub.utils._http"), _Patience()
    http.addFilter(patience)
    try:
        yield
    except Exception as error:
        if reason := _reason(name, error):
            raise OSError(f"{setting}: {name!r} {reason}") from error
        raise
    finally:
        http.removeFilter(patience)


class _Patience(logging.Filter):
    """Log once that requests to the Hub are repeated, in place of huggingface_hub's line for each try."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.said:
            logger.info("the Hub does not answer; trying again for up to a minute")
        self.said = True
        return False


def _reason(name: str, error: Exception) -> str | None:
    chain = [error, *_causes(error)]
    types = {base.__name__ for each in chain for base in type(each).__mro__}
    if Path(name).is_dir():
        return _broken_file(Path(name), types, error)
    if "GatedRepoError" in types:
        return "is a gated repository: accept its terms on its page on the Hub, and run `hf auth login`"
    if types & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return f"is neither a local folder nor a repository on the Hub that you may read{sibling(Path(name))}"
    if "RevisionNotFoundError" in types:
        return "has no such revision on the Hub"
    if "HFValidationError" in types:
        return f"is not a local folder, and no repository on the Hub can have this name{sibling(Path(name))}"
    if types & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "TimeoutError"}:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub can't be reached; check the connection"
        return f"is neither a local folder nor in the cache, and {why}{sibling(Path(name))}"
    return None


def _broken_file(folder: Path, types: set[str], error: Exception) -> str | None:
    if "JSONDecodeError" in types:
        for path in sorted(folder.glob("*.json")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as found:
                return f"holds a broken {path.name}: {found}"
    if "SafetensorError" in types:
        return f"holds weights that can't be read, perhaps because they were copied incompletely: {_flat(error)}"
    if "no file named" in str(error) and "model.safetensors" in str(error):
        return "holds no weights (model.safetensors); give it as config_name to start from random weights"
    if "load image processor" in str(error):
        return "holds no processor of images; save the model's own there, or remove the dataset's column of images"
    if "backend tokenizer" in str(error):
        return "holds no tokenizer that can be loaded; save one there with tokenizer.save_pretrained"
    return None


# Ctrl-C and SIGTERM


_OF_SCHEDULERS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or another signal of `signals_raise` came; raised in the main thread."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {name_of(signum)}")


def name_of(signum: int) -> str:
    """Return a signal's name as a user knows it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


@contextmanager
def signals_raise() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP raise `Interrupted` once; a second one ends the process.

    SIGUSR1 and SIGHUP do so only if they would end the process otherwise: SIGHUP stays ignored under nohup.

    Yields:
        The numbers of the signals that came, by which the caller knows of a signal even if code inside the block turned
        `Interrupted` into another exception.
    """
    taken = [signum for signum in _OF_SCHEDULERS if signal.getsignal(signum) is signal.SIG_DFL]
    before = {signum: signal.signal(signum, _on_signal) for signum in (signal.SIGINT, signal.SIGTERM, *taken)}
    _came.clear()
    try:
        yield _came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


_came: list[int] = []


def stopped_by() -> str | None:
    """Return which signal stopped the block of `signals_raise`, as "stopped by Ctrl-C"; None if none did."""
    return f"stopped by {name_of(_came[0])}" if _came else None


def _on_signal(signum: int, _: FrameType | None) -> NoReturn:
    if _came:
        os._exit(128 + signum)
    _came.append(signum)
    if callable(signal.getsignal(signal.SIGCHLD)):  # torch's handler would raise for each worker that the signal ended
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise Interrupted(signum)


def is_ours(handler: object) -> bool:
    """Return whether a signal handler is that of `signals_raise`."""
    return handler is _on_signal


def _leave_signals_to_the_parent() -> None:
    """Ignore Ctrl-C and the like in data-loading workers: these get them too, but the parent ends its workers."""
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for signum in filter(lambda each: signal.getsignal(each) is _on_signal, _OF_SCHEDULERS):
            signal.signal(signum, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_signals_to_the_parent)

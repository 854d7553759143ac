"""End all processes of a run soon after an error in one of them, for which the others would wait without an end."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from fastdpo.sharding import decided_by_first

logger = logging.getLogger("fastdpo")

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""How long a process may take to raise an error of its own, as when all of them have found the same."""


@contextlib.contextmanager
def failing_together(args: Any) -> Iterator[None]:
    """Inside the block, an error in one process ends the others within seconds, and their logs say what it was.

    A process that waits for the others in NCCL handles no signal, so the launcher would kill it only after 30 seconds,
    and without a word. A process that leaves the block by itself is left alone.
    """
    if args.world_size == 1 or not dist.is_initialized():
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    # a name of its own, because torchrun may keep the store when it starts the processes again
    key = decided_by_first(lambda: f"fastdpo-failed-{uuid.uuid4().hex}")
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(store, key, ended), daemon=True)
    watch.start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # the store is gone if its process is
            # gloo raises a RuntimeError where it waits for a process that has ended
            if isinstance(error, RuntimeError) and store.check([key]):
                raise ConnectionError(f"{store.get(key).decode()}; this process ends too") from error
            store.set(key, f"process {args.process_index} failed: {type(error).__name__}: {error}")
        raise
    finally:
        ended.set()
        watch.join(_POLL_SECONDS)


def _watch(store: Any, key: str, ended: threading.Event) -> None:
    try:
        while not store.check([key]):
            if ended.wait(_POLL_SECONDS):
                return
        said = store.get(key).decode()
    except RuntimeError:
        said = "the process that keeps the group together has ended"
    if not ended.wait(_GRACE_SECONDS):
        logger.error("%s; this process ends too", said)
        os._exit(1)

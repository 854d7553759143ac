"""Give the log-probs that each process of a job has to the others, which can't read them from its disk."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch.distributed as dist

from fastdpo.reference.cache import Logps

PART = 4096
"""Responses that are sent at a time, so that no process needs memory for the messages of all others."""


def exchange(entries: Mapping[bytes, Logps], *, lacks_some: bool) -> dict[bytes, Logps]:
    """Return the entries of all processes, or nothing if no process lacks any; all of them must call this.

    Args:
        entries: what this process has computed, by `fastdpo.reference.cache.entry_key`.
        lacks_some: whether this process needs an entry that it does not have.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    asked: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(asked, (lacks_some, -(-len(entries) // PART)))
    if not any(lacks for lacks, _ in asked):
        return {}
    received: dict[bytes, Logps] = {}
    own = _parts(entries)
    for rank, (_, parts) in enumerate(asked):
        for _ in range(parts):
            message = [next(own) if rank == dist.get_rank() else None]
            dist.broadcast_object_list(message, src=rank)
            received |= message[0] or {}
    return received


def _parts(entries: Mapping[bytes, Logps]) -> Iterator[dict[bytes, Logps]]:
    items = iter(entries.items())
    while part := dict(islice(items, PART)):
        yield part

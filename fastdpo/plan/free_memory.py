"""How much memory a training may take on its device, and how much it has taken."""

import os
from pathlib import Path
from typing import Any

import torch

from fastdpo import sharding
from fastdpo.model.adapted_layers import unwrap

GIB = 2**30
RESERVED = GIB
"""Bytes of a GPU that are left for its matmul library and for what other processes may take."""
KEPT_FREE = 0.05
"""Share of the memory that is kept free."""
KEPT_FREE_BY_SEVERAL = 0.2
"""The same for several processes, which can't compute a step again."""
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def size_text(size: float) -> str:
    """Return a number of bytes in the largest unit of which it holds at least one, as messages and tables show it."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"


def usable_memory(trainer: Any) -> int | None:
    """Return the bytes that a step may take in all, weights and optimizer state included; None if nobody knows.

    On a GPU these are what the process holds and what is free, less a reserve. On the CPU, whose memory is shared with
    all that runs there and whose lack ends the process without an error, they are the weights and half of what is
    available. Several processes have the smallest number of any of them; all must call this.
    """
    args = trainer.args
    found = _usable(trainer, args.device)
    if args.world_size > 1:
        found = -sharding.largest(-(found or 0), args.device) or None
    kept_free = KEPT_FREE if args.world_size == 1 else KEPT_FREE_BY_SEVERAL
    return None if found is None else int(found * (1 - kept_free))


def _usable(trainer: Any, device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        free, _ = torch.cuda.mem_get_info(device)
        return max(free + torch.cuda.memory_reserved(device) - RESERVED, 0)
    if device.type != "cpu" or (available := available_on_cpu()) is None:
        return None
    models = [unwrap(each) for each in (trainer.model, trainer.ref_model) if each is not None]
    held = {p.data_ptr(): p.nbytes for model in models for p in map(sharding.local, model.parameters())}
    return sum(held.values()) + available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_on_cpu() -> int | None:
    """Return the bytes that new processes could take on this machine, or in this container if that has a limit."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        found = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" if there is none
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return found
    return max(min(found, limit - used), 0)


def measured_peak(device: torch.device) -> int | None:
    """Return the most bytes that tensors have taken since `usable_memory`; None where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

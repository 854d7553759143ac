"""Run by the cache's tests in processes of their own: a fill without a model, a few entries to a shard."""

import time
from pathlib import Path

import numpy as np

from fastdpo.reference.cache import TokenCache, entry_key

PER_SHARD = 4


def fill(folder: Path, n: int, share: str = "", seconds: float = 0.002) -> None:
    """Add what is missing of n entries; says each finished entry, and at the end how many it computed."""
    store, computed = TokenCache(folder), 0
    with store.filling(share):
        missing = [i for i in range(n) if entry_key([1, i], [i]) not in store]
        for at in range(0, len(missing), PER_SHARD):
            batch = missing[at : at + PER_SHARD]
            time.sleep(seconds)
            store.add({entry_key([1, i], [i]): np.linspace(-9, -i - 1, i % 5, dtype=np.float32) for i in batch})
            computed += len(batch)
            print(*(f"done {i}" for i in batch), sep="\n", flush=True)  # noqa: T201
    print("computed", computed, flush=True)  # noqa: T201

"""Random generators per item: random numbers of an item depend only on (seed, epoch, item id)."""

from __future__ import annotations

import hashlib

import numpy as np


def item_rng(seed: int, *key: object) -> np.random.Generator:
    """Return a generator that depends only on (seed, key), so that workers and batches do not affect an item."""
    entropy = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "little")))

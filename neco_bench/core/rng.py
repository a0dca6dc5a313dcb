"""Random generators per item: what happens to an item depends on (seed, epoch, item id) alone."""

from __future__ import annotations

import hashlib

import numpy as np


def item_rng(seed: int, *key: object) -> np.random.Generator:
    """A generator that depends on (seed, key) alone: what happens to an item never moves with workers or batches."""
    entropy = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "little")))

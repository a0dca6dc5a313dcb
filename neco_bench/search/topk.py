"""The k largest of blocks of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD = 16  # blocks whose best are held until they are merged


GROUP = 16  # keys that share a maximum in `top`


class Sizes(NamedTuple):
    """How much is done at once.

    keys: in one product, or up to twice as many where these are all; on CPUs more slow the product down, fewer the
    finding of the best. scores: bytes of those held at once. measured: keys and queries of a measurement of the ways.
    worth_measuring: keys times queries of the first search, from which they are measured.
    """

    keys: int
    scores: int
    measured: tuple[int, int]
    worth_measuring: int


ON_CPU = Sizes(25_600, 16 * 2**20, (16_384, 512), 2**26)


ON_GPU = Sizes(131_072, 2**30, (131_072, 8_192), 2**36)

Found = tuple[Tensor, Tensor]  # scores and row ids, (n, k) each, best first


def sizes(device: torch.device) -> Sizes:
    """Those that were found best on that kind of device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


def top(scores: Tensor, k: int) -> Found:
    """The k largest of each row of scores (n, M), largest first.

    The keys that hold the k largest lie in the k groups of largest maxima, so that only those are sorted. In bfloat16
    on CPUs numbers are compared as integers, several times faster: those at or below zero come last, in any order.
    """
    groups = scores.shape[1] // GROUP
    if groups <= k:
        return _largest(scores, k)
    inside = groups * GROUP
    whole = scores[:, :inside].unflatten(1, (GROUP, groups))  # a group is a stride apart: maxima vectorise
    maxima = whole.view(torch.int16).amax(1).view(scores.dtype) if _as_integers(scores) else whole.amax(1)
    chosen = _largest(maxima, k)[1]
    members = whole.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)
    if inside < scores.shape[1]:
        members = torch.cat([members, scores[:, inside:]], 1)
    values, best = _largest(members, k)
    ids = chosen.gather(1, best % k) + best // k * groups
    return values, torch.where(best < GROUP * k, ids, best - GROUP * k + inside)


def _as_integers(scores: Tensor) -> bool:
    return scores.dtype == torch.bfloat16 and scores.device.type == "cpu"


def _largest(scores: Tensor, k: int) -> Found:
    """The same by sorting: on CPUs, a bfloat16 number and its place as one integer."""
    width = scores.shape[1]
    if not _as_integers(scores) or width > 2**16:
        return scores.topk(k)
    pairs = scores.view(torch.int16).int()
    pairs <<= 16
    pairs |= torch.arange(width, dtype=torch.int32)
    packed = pairs.numpy()
    if k < width:
        packed.partition(width - k)
    found = torch.from_numpy(np.sort(packed[:, width - k :])).flip(1)
    return (found >> 16).to(torch.int16).view(torch.bfloat16), (found & 0xFFFF).long()


def merged(found: list[Found], k: int) -> Found:
    """The k best of findings among different keys, best first; fewer where there are fewer."""
    if len(found) == 1:
        return found[0][0][:, :k], found[0][1][:, :k]
    values, ids = torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1)
    values, order = _largest(values, min(k, values.shape[1]))
    return values, ids.gather(1, order)


def blocked(keys: Tensor, queries: Tensor, k: int, multiply: Callable[..., object]) -> Found:
    """The k best of `keys` (M, D) for each query, by products that `multiply(queries, keys.T, out=scores)` computes."""
    at_once = sizes(keys.device)
    width = at_once.keys if len(keys) > 2 * at_once.keys else len(keys)
    step = max(1, at_once.scores // (keys.element_size() * width))
    # One piece of memory for all products: to ask the system for fresh pages takes as long as a product.
    memory = torch.empty(min(step, len(queries)) * width, dtype=keys.dtype, device=keys.device)
    parts = []
    for some in queries.chunk(max(1, -(-len(queries) // step))):  # equal: a small part takes as long
        found: list[Found] = []
        for start in range(0, len(keys), width):
            block = keys[start : start + width]
            scores = memory[: len(some) * len(block)].view(len(some), len(block))
            multiply(some, block.T, out=scores)
            values, ids = top(scores, min(k, len(block)))
            found.append((values, ids + start))
            if len(found) == HELD:
                found = [merged(found, k)]
        parts.append(merged(found, k))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

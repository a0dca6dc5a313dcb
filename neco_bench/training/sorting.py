"""Differentiable sorting networks (Petersen et al., "Differentiable Sorting Networks for Scalable Sorting and Ranking
Supervision", ICML 2021; the Cauchy, reciprocal and optimal distributions: "Monotonic Differentiable Sorting Networks",
ICLR 2022).

A comparator on values a, c (a should become the smaller one) mixes them softly: with alpha = F(steepness * (c - a)),
the soft minimum is alpha a + (1 - alpha) c and the soft maximum (1 - alpha) a + alpha c. The columns of the
permutation, which starts as the identity, are mixed by the same weights.

Computation: rows of x are the innermost, contiguous dimension, and a column stores the value of its wire as entry 0,
before the weights of the inputs, so that values, weights and their gradients use the same two lerps. Comparators read
slices of columns instead of gathering wires by index, and a column starts with the weight of its own input only and
grows as comparators join wires: without both, a step of `tiny_neco` on a CPU takes 1.5 times as long. Rows are sorted
in parts, so that memory does not grow with the rows or the layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neco_bench.core.errors import UsageError, did_you_mean

T = TypeVar("T")

# A layer of a network: (wire that gets the minimum, wire that gets the maximum) of each of its comparators.
Comparators = tuple[tuple[int, int], ...]

# Bytes that sorting one part of the rows may occupy: on a CPU about a second-level cache; on a GPU more, for fewer
# kernels.
CPU_BYTES, ACCELERATOR_BYTES = 16 << 20, 1 << 30

MAX_THREADS = 4  # more threads would wait for Python's lock


def bitonic(n: int) -> tuple[Comparators, ...]:
    """Build the bitonic network for n wires: that of the next power of two without its lowest wires.

    In block k, groups of 2^(k + 1) wires are merged, every second one descending. The dropped wires count as smaller
    than all others in an ascending group, and as larger in a descending group. The lower half of a descending group
    must therefore be descending if the drop removes two or more of its wires and leaves two or more. diffsort 0.2.0
    lacks this exception: for the affected n (22, 38, 42 to 46, 54 up to 64) its network does not sort; for all other n,
    including the squares, this is the same network.
    """
    blocks = (n - 1).bit_length()
    pad = 2**blocks - n
    descending = [[False]]  # for each group, from the last block to the first
    for block in range(blocks - 1, 0, -1):
        cut = [down and 1 < pad - group * 2 ** (block + 1) < 2**block - 1 for group, down in enumerate(descending[-1])]
        descending.append([down for low in cut for down in (low, not low)])
    layers = []
    for block in range(blocks):
        for stride in (2**i for i in range(block, -1, -1)):
            pairs = [(a - pad, a - pad + stride) for a in range(pad, 2**blocks) if not a & stride]
            down = descending[blocks - 1 - block]
            layers.append(tuple(pair[::-1] if down[(pair[0] + pad) >> (block + 1)] else pair for pair in pairs))
    return tuple(layer for layer in layers if layer)


def odd_even(n: int) -> tuple[Comparators, ...]:
    """Build the odd-even transposition network: n layers of neighbouring wires, beginning with (0, 1)."""
    layers = (tuple((a, a + 1) for a in range(layer % 2, n - 1, 2)) for layer in range(n))
    return tuple(layer for layer in layers if layer)


NETWORKS = {"bitonic": bitonic, "odd_even": odd_even}


class Distribution(NamedTuple):
    """A symmetric distribution: its survival function 1 - F, exact in the upper tail, and its density."""

    survival: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]


def _optimal_survival(z: Tensor) -> Tensor:
    tail = 1 / (16 * z.abs().clamp_min(0.25))
    return torch.where(z.abs() < 0.25, 0.5 - z, torch.where(z > 0, tail, 1 - tail))


_ONE = torch.ones(())

DISTRIBUTIONS = {
    # 1/2 - atan(z)/pi without cancellation.
    "cauchy": Distribution(lambda z: torch.atan2(_ONE, z).div_(math.pi), lambda z: 1 / (math.pi * (1 + z.square()))),
    "logistic": Distribution(lambda z: torch.sigmoid(-z), lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    "reciprocal": Distribution(
        lambda z: torch.where(z > 0, 0.5, 0.5 + 2 * z.abs()) / (1 + 2 * z.abs()), lambda z: (1 + 2 * z.abs()) ** -2
    ),
    "optimal": Distribution(_optimal_survival, lambda z: 1 / (16 * z.abs().clamp_min(0.25).square())),
}


def _lookup(kind: str, name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


@functools.cache
def comparators(network: str, n: int) -> tuple[Comparators, ...]:
    """Build the layers of a sorting network ("bitonic" or "odd_even") on n >= 1 wires.

    Raises UsageError for an unknown network and for no wires.
    """
    if n < 1:
        raise UsageError(f"cannot sort {n} values: give rows of at least one.")
    return _lookup("sorting network", network, NETWORKS)(n)


class Block(NamedTuple):
    """Comparators of one layer that can be addressed by slices: in each of `groups` groups of `size` wires, starting at
    wire `start`, the first `width` wires are compared with the last `width`."""

    start: int
    groups: int
    size: int
    width: int

    def ends(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Slice lower and upper wires of the comparators out of columns, each (groups, width, entries, rows)."""
        grouped = columns[self.start : self.start + self.groups * self.size].unflatten(0, (self.groups, self.size))
        return grouped[:, : self.width], grouped[:, self.size - self.width :]


class Layer(NamedTuple):
    """One layer of a network: the blocks of its comparators, in the order of their lower wires.

    sign: (comparators, 1), -1 if the upper wire gets the minimum. entries: number of entries of every column. grown:
    None if columns keep their length, else the position of each of their entries in the flattened longer columns.
    """

    blocks: list[Block]
    sign: Tensor
    entries: int
    grown: Tensor | None

    def comparators_of(self, values: Tensor) -> list[Tensor]:
        """Split values (comparators, ...) into those of each block, (groups, width, ...)."""
        parts = values.split([block.groups * block.width for block in self.blocks])
        return [p.unflatten(0, (b.groups, b.width)) for p, b in zip(parts, self.blocks, strict=True)]


def _blocks(pairs: Comparators) -> list[Block]:
    distance = abs(pairs[0][0] - pairs[0][1])
    lower = {min(pair) for pair in pairs}
    blocks: list[Block] = []
    for wire in sorted(wire for wire in lower if wire - 1 not in lower):
        width = next(i for i in itertools.count(1) if wire + i not in lower)
        last = blocks[-1] if blocks else None
        if last and last.width == width and wire == last.start + last.groups * last.size:
            blocks[-1] = last._replace(groups=last.groups + 1)
        else:
            blocks.append(Block(wire, 1, distance + width, width))
    return blocks


@functools.cache
def plan(network: str, n: int, device: torch.device) -> list[Layer]:
    """Return the layers of a network for `sort_columns`. Raises UsageError for an unknown network or no wires."""

    spans = [(wire, wire) for wire in range(n)]  # first and last input that can have reached each wire
    first, entries = list(range(n)), 2  # of each wire: the input of entry 1 of its column; entries of every column
    layers = []
    for pairs in comparators(network, n):
        for a, c in pairs:
            if spans[a] != spans[c]:
                joined = min(spans[a][0], spans[c][0]), max(spans[a][1], spans[c][1])
                spans[joined[0] : joined[1] + 1] = [joined] * (joined[1] + 1 - joined[0])
        size = max(last - start for start, last in spans) + 1
        grown = None
        if size + 1 > entries:
            now = [min(start, n - size) for start, _ in spans]
            entry = torch.arange(entries)
            shift = torch.tensor([before - after for before, after in zip(first, now, strict=True)])[:, None]
            grown = (torch.arange(n)[:, None] * (size + 1) + entry + shift * (entry > 0)).flatten().to(device)
            first, entries = now, size + 1
        sign = torch.tensor([1 if a < c else -1 for a, c in sorted(pairs, key=min)], device=device)[:, None]
        layers.append(Layer(_blocks(pairs), sign, entries, grown))
    return layers


# Of each layer: z, alpha and, block by block, the differences of the two columns of each comparator.
Tape = list[tuple[Tensor, Tensor, list[Tensor]]]


def sort_columns(x: Tensor, layers: list[Layer], distribution: Distribution, tape: Tape | None = None) -> Tensor:
    """Sort x (n, M) softly, where x is values times steepness. tape: receives the data for `sort_gradient`.

    Returns columns (n, n + 1, M): [j, 0] is the soft value at rank j, [j, 1 + i] the weight of input i there.
    """
    n, rows = x.shape
    columns = torch.stack((x, torch.ones_like(x)), 1)
    for layer in layers:
        if layer.grown is not None:
            longer = x.new_zeros(n * layer.entries, rows).index_copy_(0, layer.grown, columns.flatten(0, 1))
            columns = longer.unflatten(0, (n, layer.entries))
        ends = [block.ends(columns) for block in layer.blocks]
        z = torch.cat([(low[:, :, 0] - high[:, :, 0]).flatten(0, 1) for low, high in ends]).mul_(layer.sign)
        alpha = distribution.survival(z)[:, None]
        if tape is not None:
            tape.append((z, alpha, [low - high for low, high in ends]))
        for (low, high), weight in zip(ends, layer.comparators_of(alpha), strict=True):
            _mix(low, high, weight)
    return columns


def sort_gradient(gradient: Tensor, layers: list[Layer], distribution: Distribution, tape: Tape) -> Tensor:
    """Return the gradient (n, M) of x from that of the columns, (n, n + 1, M), which is overwritten.

    Comparators are symmetric: they mix gradients as they mix values.
    """
    for layer, (z, alpha, differences) in zip(reversed(layers), reversed(tape), strict=True):
        ends = [block.ends(gradient) for block in layer.blocks]
        dots = [(low - high).mul_(d).flatten(0, 1).sum(1) for (low, high), d in zip(ends, differences, strict=True)]
        by_z = distribution.density(z).mul_(layer.sign).mul_(torch.cat(dots))
        parts = zip(ends, layer.comparators_of(alpha), layer.comparators_of(by_z), strict=True)
        for (low, high), weight, change in parts:
            _mix(low, high, weight)
            low[:, :, 0] -= change
            high[:, :, 0] += change
        if layer.grown is not None:
            gradient = gradient.flatten(0, 1).index_select(0, layer.grown).unflatten(0, (len(gradient), -1))
    return gradient[:, 0]


def _mix(low: Tensor, high: Tensor, weight: Tensor) -> None:
    """Mix two columns softly in place: the lower one keeps `weight` of itself, and the upper one gets the rest."""
    mixed = torch.lerp(high, low, weight)
    torch.lerp(low, high, weight, out=high)
    low.copy_(mixed)


def part_rows(layers: list[Layer], like: Tensor, differentiable: bool) -> int:
    """Return the number of rows of `like` (M, n) to sort at a time within `CPU_BYTES` or `ACCELERATOR_BYTES`."""
    rows, n = like.shape
    tape = [len(layer.sign) * layer.entries for layer in layers] if differentiable else [0]
    row_bytes = like.element_size() * (4 * n * (n + 1) + sum(tape) + max(tape, default=0))
    count = math.ceil(rows * row_bytes / (CPU_BYTES if like.device.type == "cpu" else ACCELERATOR_BYTES))
    return math.ceil(rows / (count + count % 2 if count > 1 else 1))  # an even number of parts balances threads


def filled(rows: Tensor, size: int) -> Tensor:
    """Transpose rows (m, n) and pad with zeros to (n, size), so that the last part is computed like the others."""
    return F.pad(rows.T, (0, size - len(rows)))


def in_parts(work: Callable[[slice], T], size: int, like: Tensor) -> list[T]:
    """Call `work` with parts of `size` rows of `like` (the last one may be smaller), and return its results.

    On a CPU, each thread processes whole parts, so that the result does not depend on the number of threads, bit for
    bit. `work` must read detached tensors, because threads do not share torch's gradient mode.
    """
    parts = [slice(start, start + size) for start in range(0, len(like), size)]
    threads = min(len(parts), torch.get_num_threads(), MAX_THREADS) if like.device.type == "cpu" else 1
    if threads == 1:
        return [work(part) for part in parts]
    before = torch.get_num_threads()
    try:  # one thread per operation: they are too small to be split
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(before)


def as_rows(x: Tensor, name: str) -> Tensor:
    """Convert x (M, n) to float32 or float64. Raises UsageError if it has another shape or no rows."""
    if x.dim() != 2 or 0 in x.shape:
        raise UsageError(f"{name} must be (rows, values), at least one of each, not {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.float()


def check_steepness(steepness: float) -> None:
    """Raise UsageError unless steepness is a positive number."""
    if not 0 < steepness < math.inf:
        raise UsageError(f"steepness must be a positive number, not {steepness}.")


class _SoftSort(torch.autograd.Function):
    """The permutation with its values as row 0, (M, n + 1, n); backward sorts again instead of storing the tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: str, steepness: float, distribution: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = network, steepness, distribution
        layers, shape = plan(network, x.shape[1], x.device), _lookup("distribution", distribution, DISTRIBUTIONS)

        rows, size = x.detach(), part_rows(layers, x, differentiable=False)

        def work(part: slice) -> Tensor:
            columns = sort_columns(filled(rows[part] * steepness, size), layers, shape)
            return columns.permute(2, 1, 0)[: len(rows[part])]

        return torch.cat(in_parts(work, size, rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        network, steepness, distribution = ctx.settings
        layers, shape = plan(network, x.shape[1], x.device), DISTRIBUTIONS[distribution]

        rows, size = x.detach(), part_rows(layers, x, differentiable=True)

        def work(part: slice) -> Tensor:
            tape: Tape = []
            by_columns = torch.zeros_like(sort_columns(filled(rows[part] * steepness, size), layers, shape, tape))
            by_columns[..., : len(rows[part])] = gradient[part].permute(2, 1, 0)
            return sort_gradient(by_columns, layers, shape, tape).T[: len(rows[part])] * steepness

        return torch.cat(in_parts(work, size, rows)), None, None, None


def soft_sort(
    x: Tensor, network: str = "bitonic", steepness: float = 100.0, distribution: str = "cauchy"
) -> tuple[Tensor, Tensor]:
    """Sort each row of x (M, n) softly, ascending.

    Args:
        x: (M, n) values; steepness: how near the soft sort is to the hard one.
        network: "bitonic" or "odd_even". distribution: "cauchy", "logistic", "reciprocal" or "optimal".

    Returns the relaxed values (M, n) and the permutation (M, n, n): [m, i, j] is the weight of input i at rank j; its
    rows and columns sum to 1. Computed, and returned, in float32 (float64 for float64). Differentiable once.

    Raises UsageError for an unknown network or distribution, a steepness that is not positive, and wrong shapes.
    """
    check_steepness(steepness)
    columns = _SoftSort.apply(as_rows(x, "x"), network, steepness, distribution)
    return columns[:, 0] / steepness, columns[:, 1:]

"""Differentiable sorting networks (Petersen et al., "Differentiable Sorting Networks for Scalable Sorting and Ranking
Supervision", ICML 2021; the Cauchy, reciprocal and optimal distributions: "Monotonic Differentiable Sorting Networks",
ICLR 2022).

A comparator on values a, c (a should become the smaller one) mixes them softly: with alpha = F(steepness * (c - a)),
the soft minimum is alpha a + (1 - alpha) c and the soft maximum (1 - alpha) a + alpha c. The columns of the
permutation, which starts as the identity, are mixed by the same weights.

How it is computed: rows of x are the innermost, contiguous dimension, so that the comparators of a layer are two lerps
of slices, through buffers that serve all layers. The value of a wire is carried as entry 0 of its column, before the
inputs' weights, so that values, weights and their gradients pass through one code path. A column begins with the weight
of its own input alone and grows as comparators join wires, which halves the work of the bitonic network. A few rows are
sorted at a time, in buffers of a fixed size, and each thread takes rows of its own; backward sorts again and keeps, per
comparator, the difference of the two columns. So buffers grow neither with the rows nor with the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neco_bench.core.errors import UsageError, did_you_mean

T = TypeVar("T")


# A layer of a network: (wire that gets the minimum, wire that gets the maximum) of each of its comparators.
Comparators = tuple[tuple[int, int], ...]

# What the buffers of one `Relaxation` may occupy. Larger ones leave the second-level cache of a CPU; with smaller ones,
# two threads meet more often at Python's lock. On GPUs smaller ones mean more, and too small, kernels. Measured with
# tests/benchmarks/bench_neco_loss.py.
CPU_BYTES, ACCELERATOR_BYTES = 16 << 20, 1 << 30


# More threads than these would wait for the lock.
MOST_THREADS = 4


def bitonic(n: int) -> tuple[Comparators, ...]:
    """The bitonic network for n wires: that of the next power of two without its lowest wires.

    In block k, groups of 2^(k + 1) wires are merged, every second one descending. The wires dropped count as smaller
    than all others in an ascending group, as larger in a descending one. So the lower half of a descending group must
    itself descend where the drop takes two wires or more of it and leaves two or more. diffsort 0.2.0 lacks this
    exception: for the n that it concerns (22, 38, 42 to 46, 54 up to 64) its network does not sort; for all others,
    the squares among them, this is the same network.
    """
    blocks = (n - 1).bit_length()
    pad = 2**blocks - n
    descending = [[False]]  # of each group, from the last block to the first
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
    """Odd-even transposition: n layers of neighbours, beginning with (0, 1)."""
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


ONE = torch.ones(())


DISTRIBUTIONS = {
    # 1/2 - atan(z)/pi without its cancellation.
    "cauchy": Distribution(lambda z: torch.atan2(ONE, z).div_(math.pi), lambda z: 1 / (math.pi * (1 + z.square()))),
    "logistic": Distribution(lambda z: torch.sigmoid(-z), lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    "reciprocal": Distribution(
        lambda z: torch.where(z > 0, 0.5, 0.5 + 2 * z.abs()) / (1 + 2 * z.abs()), lambda z: (1 + 2 * z.abs()) ** -2
    ),
    "optimal": Distribution(_optimal_survival, lambda z: 1 / (16 * z.abs().clamp_min(0.25).square())),
}


def _known(kind: str, name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


@functools.cache
def comparators(network: str, n: int) -> tuple[Comparators, ...]:
    """The layers of a sorting network ("bitonic" or "odd_even") on n >= 1 wires."""
    if n < 1:
        raise UsageError(f"cannot sort {n} values: give rows of at least one.")
    return _known("sorting network", network, NETWORKS)(n)


class _Run(NamedTuple):
    """Comparators of one layer that slices can address: in each of `groups` groups of `size` wires beginning at `start`
    the first `width` wires meet the last `width`. A width of 0 are wires without a comparator."""

    start: int
    groups: int
    size: int
    width: int


class _Layer(NamedTuple):
    """One layer: its runs; which comparators, in the order of their lower wires, are descending; how columns grow.

    sign: (comparators, 1), -1 where the upper wire gets the minimum. grown: None where columns stay as they are, else
    the place of each of their entries in the flattened grown columns.
    """

    runs: list[_Run]
    sign: Tensor
    grown: Tensor | None
    entries: int


def _runs(pairs: Comparators, n: int) -> list[_Run]:
    distance = abs(pairs[0][0] - pairs[0][1])
    lower = {min(pair) for pair in pairs}

    def width_at(wire: int) -> int:
        return next(i for i in range(distance + 1) if i == distance or wire + i not in lower)

    runs: list[_Run] = []
    wire = 0
    while wire < n:
        width, groups = width_at(wire), 1
        size = distance + width if width else min([w for w in lower if w > wire], default=n) - wire
        while width and width_at(wire + groups * size) == width:
            groups += 1
        runs.append(_Run(wire, groups, size, width))
        wire += groups * size
    return runs


@functools.cache
def _plan(network: str, n: int, device: torch.device) -> list[_Layer]:
    spans = [(wire, wire) for wire in range(n)]  # of each wire: first and last input that can have reached it
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
        layers.append(_Layer(_runs(pairs, n), sign, grown, entries))
    return layers


class _Meeting(NamedTuple):
    """The slices of one run's comparators: columns of lower and upper wires before and after, and what is kept.

    All are (groups, width, ...): columns with (entries, M), values and z with (M), alpha with (1, M).
    """

    low: Tensor
    high: Tensor
    new_low: Tensor
    new_high: Tensor
    low_value: Tensor
    high_value: Tensor
    z: Tensor
    alpha: Tensor
    difference: Tensor
    change: Tensor


class _Step(NamedTuple):
    """One layer on the buffers of a `Relaxation`. idle: columns before and after of wires without a comparator."""

    grown: tuple[Tensor, Tensor, Tensor] | None
    meetings: list[_Meeting]
    idle: list[tuple[Tensor, Tensor]]
    sign: Tensor
    z: Tensor
    alpha: Tensor
    difference: Tensor
    change: Tensor


class Relaxation:
    """A network for at most `rows` rows of n values: buffers, and every slice that its comparators read and write."""

    def __init__(
        self, network: str, n: int, rows: int, distribution: Distribution, like: Tensor, differentiable: bool
    ) -> None:
        plan = _plan(network, n, like.device)
        self.distribution = distribution
        old, new = like.new_empty(2, n * (n + 1), rows)
        total = sum(len(layer.sign) for layer in plan)
        self.z, alpha = like.new_empty(2, total, rows)
        self.sign = torch.cat([layer.sign for layer in plan]) if plan else like.new_empty(0, 1)
        sizes = [len(layer.sign) * layer.entries for layer in plan] if differentiable else []
        tape, changes = like.new_empty(sum(sizes), rows), like.new_empty(max(sizes, default=0), rows)
        self.begin = self.columns = old[: 2 * n].view(n, 2, rows)
        self.steps: list[_Step] = []
        done = kept = 0
        for runs, sign, grown, entries in plan:
            grow = None
            if grown is not None:
                grow = self.columns.flatten(0, 1), grown, new[: n * entries]
                old, new = new, old
            before, self.columns = (part[: n * entries].view(n, entries, rows) for part in (old, new))
            old, new = new, old
            stop = done + len(sign)
            z, weight = self.z[done:stop], alpha[done:stop]
            size = len(sign) * entries if differentiable else 0
            difference = tape[kept : kept + size].view(-1, entries, rows)
            change = changes[:size].view(-1, entries, rows)
            meetings, idle, pair = [], [], 0
            for start, groups, span, width in runs:
                a, b = (
                    part[start : start + groups * span].unflatten(0, (groups, span)) for part in (before, self.columns)
                )
                if width < span - width:
                    idle.append((a[:, width : span - width], b[:, width : span - width]))
                if width:
                    part = slice(pair, pair := pair + groups * width)
                    low, high = a[:, :width], a[:, span - width :]
                    own = [t[part].unflatten(0, (groups, width)) for t in (z, weight[:, None])]
                    own += [
                        t[part].unflatten(0, (groups, width)) if differentiable else t for t in (difference, change)
                    ]
                    ends = b[:, :width], b[:, span - width :]
                    meetings.append(_Meeting(low, high, *ends, low[:, :, 0], high[:, :, 0], *own))
            self.steps.append(_Step(grow, meetings, idle, sign, z, weight, difference, change))
            done, kept = stop, kept + size

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        """Sort x (n, m <= rows), values times steepness; keep: what `backward` needs.

        Returns a view (n, n + 1, m), good until the next call: [j, 0] the soft value at rank j, [j, 1 + i] the weight
        of input i there.
        """
        self.begin[:, 0, : x.shape[1]] = x
        self.begin[:, 0, x.shape[1] :] = 0
        self.begin[:, 1] = 1
        for step in self.steps:
            if step.grown is not None:
                source, places, target = step.grown
                target.zero_().index_copy_(0, places, source)
            for run in step.meetings:
                torch.sub(run.low_value, run.high_value, out=run.z)
            step.alpha.copy_(self.distribution.survival(step.z.mul_(step.sign)))
            for run in step.meetings:
                if keep:
                    torch.sub(run.low, run.high, out=run.difference)
                torch.lerp(run.high, run.low, run.alpha, out=run.new_low)
                torch.lerp(run.low, run.high, run.alpha, out=run.new_high)
            for before, after in step.idle:
                after.copy_(before)
        return self.columns[..., : x.shape[1]]

    def backward(self) -> Tensor:
        """The gradient (n, rows) of x, from that of the columns, which the caller has written over them.

        Comparators are symmetric: they mix gradients as they mix values.
        """
        self.z.copy_(self.distribution.density(self.z).mul_(self.sign))
        for step in reversed(self.steps):
            for run in step.meetings:
                torch.sub(run.new_low, run.new_high, out=run.change)
            step.z.mul_(step.change.mul_(step.difference).sum(1))
            for run in step.meetings:
                torch.lerp(run.new_high, run.new_low, run.alpha, out=run.low)
                torch.lerp(run.new_low, run.new_high, run.alpha, out=run.high)
                run.low_value.sub_(run.z)
                run.high_value.add_(run.z)
            for before, after in step.idle:
                before.copy_(after)
            if step.grown is not None:
                source, places, target = step.grown
                torch.index_select(target, 0, places, out=source)
        return self.begin[:, 0]


# Relaxations of the last kind that was asked for: a training step asks for the same as the one before.
_spare: dict[tuple[Any, ...], list[Relaxation]] = {}


def in_chunks(
    network: str, distribution: str, like: Tensor, differentiable: bool, work: Callable[[Relaxation, slice], T]
) -> list[T]:
    """`work` on parts of the rows of `like` (M, n), each thread with a relaxation of its own; results in row order."""
    rows, n = like.shape
    shape = _known("distribution", distribution, DISTRIBUTIONS)
    columns = [len(layer.sign) * layer.entries for layer in _plan(network, n, like.device)] if differentiable else [0]
    row_bytes = like.element_size() * (4 * n * (n + 1) + sum(columns) + max(columns, default=0))
    on_cpu, inference = like.device.type == "cpu", torch.is_inference_mode_enabled()
    count = math.ceil(rows * row_bytes / (CPU_BYTES if on_cpu else ACCELERATOR_BYTES))
    size = math.ceil(rows / (count + count % 2 if count > 1 else 1))  # an even number of parts: as much for each thread
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    kind = network, n, size, distribution, like.dtype, like.device, differentiable, inference
    spare = _spare.get(kind, [])

    def share(first: int) -> list[T]:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has its own modes
            try:
                relaxation = spare.pop()
            except IndexError:
                relaxation = Relaxation(network, n, size, shape, like, differentiable)
            done = [work(relaxation, part) for part in parts[first::threads]]
            spare.append(relaxation)
            return done

    threads = min(len(parts), torch.get_num_threads(), MOST_THREADS) if on_cpu else 1
    _spare.clear()
    _spare[kind] = spare
    if threads == 1:
        return share(0)
    before = torch.get_num_threads()
    try:  # one thread for each operation: they are too small to be split
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            shares = list(pool.map(share, range(threads)))
    finally:
        torch.set_num_threads(before)
    return [shares[i % threads][i // threads] for i in range(len(parts))]


def as_rows(x: Tensor, name: str) -> Tensor:
    """x (M, n) in float32 or float64. Raises UsageError where it has another shape or no rows."""
    if x.dim() != 2 or 0 in x.shape:
        raise UsageError(f"{name} must be (rows, values), at least one of each, not {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.float()


def check_steepness(steepness: float) -> None:
    """Raises UsageError unless steepness is a positive number."""
    if not 0 < steepness < math.inf:
        raise UsageError(f"steepness must be a positive number, not {steepness}.")


class _SoftSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: str, steepness: float, distribution: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.settings = network, steepness, distribution
        values, permutation = torch.empty_like(x), x.new_empty(*x.shape, x.shape[1])

        def work(relaxation: Relaxation, part: slice) -> None:
            columns = relaxation.forward(x[part].T * steepness)
            values[part] = columns[:, 0].T / steepness
            permutation[part] = columns[:, 1:].permute(2, 1, 0)

        in_chunks(network, distribution, x, False, work)
        return values, permutation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_values: Tensor, by_permutation: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        network, steepness, distribution = ctx.settings
        gradient = torch.empty_like(x)

        def work(relaxation: Relaxation, part: slice) -> None:
            columns = relaxation.forward(x[part].T * steepness, keep=True)
            columns[:, 0] = by_values[part].T / steepness
            columns[:, 1:] = by_permutation[part].permute(2, 1, 0)
            gradient[part] = relaxation.backward()[:, : columns.shape[2]].T * steepness

        in_chunks(network, distribution, x, True, work)
        return gradient, None, None, None


def soft_sort(
    x: Tensor, network: str = "bitonic", steepness: float = 100.0, distribution: str = "cauchy"
) -> tuple[Tensor, Tensor]:
    """Sort each row of x (M, n) softly, ascending.

    network: "bitonic" or "odd_even"; distribution: "cauchy", "logistic", "reciprocal" or "optimal".
    Returns the relaxed values (M, n) and the permutation (M, n, n): [m, i, j] is the weight of input i at rank j; its
    rows and columns sum to 1. Computed, and returned, in float32 (float64 for float64). Differentiable once.
    Raises UsageError for an unknown network or distribution, a steepness that is not positive, and wrong shapes.
    """
    check_steepness(steepness)
    return _SoftSort.apply(as_rows(x, "x"), network, steepness, distribution)

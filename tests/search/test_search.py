"""Exact search: every way finds what sorting all products finds, and half precision knows when it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neco_bench.search.exact as search
from neco_bench.core.errors import UsageError
from neco_bench.search.bf16 import BOUNDS, LOOSE, TILE, _Half
from neco_bench.search.exact import ExactIndex
from neco_bench.search.topk import ON_CPU, top

CPU = torch.device("cpu")


def rows(count: int, seed: int, width: int = 16) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def clustered(count: int, seed: int) -> torch.Tensor:
    """Unit vectors near one of ten centres, far from the origin: close neighbours, as features have them."""
    centres = 4 * rows(10, 99) + 2
    picked = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(centres[picked] + 0.08 * rows(count, seed), dim=1)


@pytest.mark.parametrize("way", search._ways(CPU))
@pytest.mark.parametrize("make", [rows, clustered])
def test_every_way_equals_sorting_all_products(way: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ON_CPU._replace(keys=700, scores=700 * 4 * 5)  # several blocks, the last one not whole
    monkeypatch.setattr(search, "ON_CPU", few)
    keys, queries = make(2000, 0), make(37, 1)
    scores, ids = search._ways(CPU)[way](keys).search(queries, 7)
    products = queries.double() @ keys.double().T
    expected = products.sort(dim=1, descending=True)
    torch.testing.assert_close(scores.double(), expected.values[:, :7], atol=2e-6, rtol=0)
    torch.testing.assert_close(products.gather(1, ids), expected.values[:, :7], atol=2e-6, rtol=0)
    if make is rows:
        assert torch.equal(ids, expected.indices[:, :7])


@given(
    st.integers(1, 5), st.integers(1, 400), st.integers(1, 40), st.integers(0, 10), st.sampled_from([1.0, 4.0, 100.0])
)
@settings(deadline=None)
def test_top_is_the_largest(count: int, width: int, k: int, seed: int, steps: float) -> None:
    k = min(k, width)
    scores = (rows(count, seed, width) * steps).round()  # with ties
    values, ids = top(scores, k)
    assert torch.equal(values, scores.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(scores.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@given(st.integers(1, 5), st.integers(1, 400), st.integers(1, 40), st.integers(0, 10), st.floats(-3, 3))
@settings(deadline=None)
def test_top_in_half_precision_is_the_largest_above_zero(
    count: int, width: int, k: int, seed: int, shift: float
) -> None:
    k = min(k, width)
    scores = (rows(count, seed, width) * width**0.5 - shift).bfloat16()
    values, ids = top(scores, k)
    expected = scores.sort(dim=1, descending=True).values[:, :k].clamp_min(0)
    assert torch.equal(values.clamp_min(0), expected)
    assert torch.equal(scores.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_half_precision_proves_what_it_gives() -> None:
    keys, queries = rows(4000, 0, 64), rows(100, 1, 64)
    index = _Half(keys)
    scores, ids, sure = index.candidates(queries, 10, 24)
    expected = (queries.double() @ keys.double().T).topk(10)
    assert sure.float().mean() > 0.9
    torch.testing.assert_close(scores[sure].double(), expected.values[sure], atol=1e-5, rtol=0)
    assert torch.equal(ids[sure], expected.indices[sure])


def test_long_coordinates_have_twice_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, turn = 0.5 ** torch.arange(64), torch.linalg.qr(rows(64, 4, 64))[0]
    keys, queries = ((rows(n, seed, 64) * lengths) @ turn + 1.0 for n, seed in ((4000, 2), (400, 3)))
    index = _Half(keys)
    sure = index.candidates(queries, 10, 12)[2].float().mean()
    assert index.double > 3
    monkeypatch.setattr(_Half, "_choose_columns", all_once)
    plain = _Half(keys).candidates(queries, 10, 12)[2].float().mean()
    assert (sure > 0.8, plain < 0.5) == (True, True), (sure, plain)


def all_once(self: Any, energy: torch.Tensor) -> int:
    """Columns for every coordinate, each rounded once."""
    self.kept, self.double = len(energy), 0
    return 2 * TILE


def test_nothing_is_proven_by_scores_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order is not kept: a shift that leaves too few above zero must not cost neighbours."""
    keys, queries = rows(4000, 0, 64), rows(100, 1, 64)
    index, expected = _Half(keys), (queries @ keys.T).topk(10)
    reached = index._reached_by_few
    monkeypatch.setattr(index, "_reached_by_few", lambda low, wanted: reached(low, wanted) + 0.3)
    sure = index.candidates(queries, 10, 24)[2]
    assert sure.sum() < 10
    assert torch.equal(index.search(queries, 10)[1], expected.indices)
    assert index.doubted > 90


@given(st.integers(0, 20), st.floats(0, 4), st.sampled_from([16, 64, 100, 384]))
@settings(deadline=None)
def test_columns_leave_out_what_hardly_counts(seed: int, decay: float, width: int) -> None:
    index = _Half.__new__(_Half)
    index.proven = True
    energy = rows(1, seed, width)[0].square() * torch.arange(1, width + 1) ** -decay
    columns = index._choose_columns(energy)
    assert columns % TILE == 0
    assert 2 * index.double + index.kept + BOUNDS <= columns <= width * 4 // 3 + BOUNDS + TILE
    assert 0 <= index.double <= index.kept <= width
    assert energy[index.kept :].sum() <= LOOSE * energy.sum()


@pytest.mark.parametrize("weight", [1.0, 30.0])
def test_what_is_left_out_is_in_the_bound(weight: float) -> None:
    """Also for queries that lie where the keys hardly do, in the coordinates that are left out."""
    keys, queries = rows(3000, 0, 128), rows(200, 1, 128)
    keys[:, 40:] *= 0.03
    queries[:, 40:] *= weight
    index = _Half(keys)
    assert index.kept < 128
    scores, _, sure = index.candidates(queries, 10, 60)
    expected = (queries.double() @ keys.double().T).topk(10)
    assert (sure.float().mean() > 0.5) == (weight == 1)
    torch.testing.assert_close(scores[sure].double(), expected.values[sure], atol=1e-5, rtol=0)
    torch.testing.assert_close(index.search(queries, 10)[0].double(), expected.values, atol=1e-5, rtol=0)


def test_half_precision_doubts_close_calls_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART", 20)
    keys = rows(30, 0, 64).repeat(100, 1)  # each key a hundred times: no ten can be proven the best
    queries = rows(100, 2, 64)
    index = _Half(keys)
    for some in (queries[:60], queries[60:]):
        scores, _ = index.search(some, 10)
        assert (index.searched, index.doubted) == (60, 60)
        torch.testing.assert_close(scores, (some @ keys.T).topk(10).values, atol=1e-5, rtol=0)


def test_doubtful_queries_get_more_candidates_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred keys 10 times, 30 times, 100 times: the last have more equals than there will ever be candidates."""
    once, queries = rows(300, 0, 64), rows(300, 0, 64)
    keys = torch.cat([part.repeat(copies, 1) for part, copies in zip(once.split(100), (10, 30, 100), strict=True)])
    index = _Half(keys)
    found = [int((~index.candidates(queries, 10, wanted)[2]).sum()) for wanted in (24, 40)]
    again: list[int] = []
    plain = index.again.search
    monkeypatch.setattr(index.again, "search", lambda some, k: again.append(len(some)) or plain(some, k))
    scores, _ = index.search(queries, 10)
    assert (again, index.doubted) == ([found[1]], found[1])
    assert found == [200, 100]
    torch.testing.assert_close(scores, (queries @ keys.T).topk(10).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scales", [(1e18, 1.0), (1.0, 1e19), (1e-25, 1.0), (1.0, 1e-25)])
@pytest.mark.parametrize("count", [37, 1000])
def test_half_precision_leaves_extreme_lengths_to_others(count: int, scales: tuple[float, float]) -> None:
    """Where squares or bfloat16 leave the range of numbers."""
    keys, queries = rows(count, 0, 64), rows(20, 1, 64)
    index = _Half(keys * scales[0])
    scores, ids = index.search(queries * scales[1], 10)
    expected = (queries @ keys.T).topk(10)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(scores / scales[0] / scales[1], expected.values, atol=1e-5, rtol=0)
    assert index.doubted == 20
    assert torch.equal(index.search(0 * queries, 10)[0], torch.zeros(20, 10))


def test_the_fastest_way_is_measured_for_large_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ON_CPU", ON_CPU._replace(measured=(300, 50), worth_measuring=20_000))
    keys, queries = rows(410, 0), rows(60, 1)
    index = ExactIndex(16, CPU)
    index.add(keys[:400])
    small = index.search(queries[:20], 5)
    assert index.facts["index"] == "torch"
    seconds = search.fastest(keys, queries, 5)
    assert set(seconds) == set(search._ways(CPU)) == {"torch", "torch-bf16", "numpy"}
    assert list(seconds.values()) == sorted(seconds.values())
    monkeypatch.setattr(search, "fastest", lambda keys, queries, k: {"numpy": 0.1, "torch": 0.2})
    index.add(keys[400:])
    large = index.search(queries, 5)
    assert index.facts["index"] == "numpy"
    assert (small[0].shape, large[0].shape) == ((20, 5), (60, 5))


@pytest.mark.parametrize("shares", [(500,), (200, 300), (0, 499, 1)])
def test_shared_rows_are_merged(shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process in turn, with what the others would give it."""
    keys, queries = rows(500, 0), rows(3, 1)
    expected = (queries @ keys.T).topk(7)
    parts = keys.split(shares)
    for rank, part in enumerate(parts):
        own = ExactIndex(16, CPU)
        own.add(part)

        def gather(value: Any, rank: int = rank) -> list[Any]:
            if isinstance(value, int):
                return list(shares)
            starts = [sum(shares[:i]) for i in range(len(shares))]
            given = [(queries @ p.T).topk(min(7, len(p))) for p in parts]
            found: list[Any] = [(g.values, g.indices + start) for g, start in zip(given, starts, strict=True)]
            torch.testing.assert_close(value[0], found[rank][0])
            assert torch.equal(value[1], found[rank][1])
            return found

        monkeypatch.setattr(search.distributed, "gather", gather)
        monkeypatch.setattr(search.distributed, "rank", lambda rank=rank: rank)
        index = search.SharedIndex(own)
        scores, ids = index.search(queries, 7)
        torch.testing.assert_close(scores, expected.values)
        assert torch.equal(ids, expected.indices)
        with pytest.raises(UsageError, match="holds 500 patches"):
            index.search(queries, 501)


@pytest.mark.parametrize("capacity", [0, 3, 500])
def test_rows_come_in_parts(capacity: int) -> None:
    keys, queries = rows(500, 0), rows(3, 1)
    index = ExactIndex(16, CPU, capacity=capacity)
    index.add(keys[:200])
    index.add(keys[200:])
    np.testing.assert_array_equal(index.search(queries, 7)[1], (queries @ keys.T).topk(7).indices)
    assert index.rows == 500


@pytest.mark.parametrize("way", search._ways(CPU))
def test_no_queries(way: str) -> None:
    scores, ids = search._ways(CPU)[way](rows(50, 0)).search(rows(1, 1)[:0], 7)
    assert scores.shape == ids.shape == (0, 7)


def test_too_many_neighbours() -> None:
    index = ExactIndex(16, CPU)
    index.add(rows(5, 0))
    with pytest.raises(UsageError, match="holds 5 patches"):
        index.search(rows(2, 1), 6)

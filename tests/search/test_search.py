"""Exact search finds what sorting all products finds, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import neco_bench.search.exact as search
from neco_bench.core.errors import UsageError
from neco_bench.search.exact import ExactIndex

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


@pytest.mark.parametrize("find", [search.by_faiss, search.by_products])
@pytest.mark.parametrize("make", [rows, clustered])
def test_search_equals_sorting_all_products(find: Callable, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "QUERIES", 5)
    keys, queries = make(2000, 0), make(37, 1)
    scores, ids = find(queries, keys, 7)
    products = queries.double() @ keys.double().T
    expected = products.sort(dim=1, descending=True)
    torch.testing.assert_close(scores.double(), expected.values[:, :7], atol=2e-6, rtol=0)
    torch.testing.assert_close(products.gather(1, ids), expected.values[:, :7], atol=2e-6, rtol=0)
    if make is rows:
        assert torch.equal(ids, expected.indices[:, :7])


@pytest.mark.parametrize("width", [1, 3, 700, 2000])
def test_blocks_are_merged(width: int) -> None:
    """Blocks of fewer keys than are wanted too."""
    keys, queries = rows(2000 if width > 3 else 50, 0), rows(9, 1)
    scores, ids = search.nearest_of(keys.split(width), queries, 7)
    expected = (queries @ keys.T).topk(7)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(ids, expected.indices)


def filled(keys: torch.Tensor) -> ExactIndex:
    index = ExactIndex(keys.shape[1], CPU)
    index.add(keys)
    return index


def test_the_same_search_gives_the_same_digits() -> None:
    keys, queries = clustered(5000, 0), clustered(300, 1)
    first, second = (filled(keys).search(queries, 30) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_result_says_how_it_was_found() -> None:
    index = ExactIndex(16, CPU)
    index.add(rows(50, 0))
    index.search(rows(2, 1), 3)
    assert index.facts == {"index": "flat, FAISS", "bytes": 50 * 16 * 4}


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
            results: list[Any] = [(g.values, g.indices + start) for g, start in zip(given, starts, strict=True)]
            torch.testing.assert_close(value[0], results[rank][0])
            assert torch.equal(value[1], results[rank][1])
            return results

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
    index.search(queries, 7)
    index.add(keys[200:])
    np.testing.assert_array_equal(index.search(queries, 7)[1], (queries @ keys.T).topk(7).indices)
    assert index.rows == 500


@pytest.mark.parametrize("find", [search.by_faiss, search.by_products])
def test_no_queries(find: Callable) -> None:
    scores, ids = find(rows(1, 1)[:0], rows(50, 0), 7)
    assert scores.shape == ids.shape == (0, 7)


def test_too_many_neighbours() -> None:
    index = ExactIndex(16, CPU)
    index.add(rows(5, 0))
    with pytest.raises(UsageError, match="holds 5 patches"):
        index.search(rows(2, 1), 6)

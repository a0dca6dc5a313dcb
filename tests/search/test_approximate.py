"""Approximate search says how approximate it is."""

from __future__ import annotations

import pytest
import torch

from neco_bench.core.errors import UsageError
from neco_bench.search import approximate
from neco_bench.search.approximate import ApproximateIndex, recall

CPU = torch.device("cpu")


def clustered(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, 32, generator=torch.Generator().manual_seed(99))
    picked = torch.randint(50, (count,), generator=generator)
    return torch.nn.functional.normalize(centres[picked] + 0.5 * torch.randn(count, 32, generator=generator), dim=1)


def filled(kind: str, keys: torch.Tensor) -> ApproximateIndex:
    index = ApproximateIndex(kind, keys.shape[1], CPU)
    for part in keys.split(700):
        index.add(part)
    return index


@pytest.mark.parametrize("kind", ["bf16", "ivf", "ivfpq"])
def test_recall_is_measured_and_reached(kind: str) -> None:
    keys, queries = clustered(5000, 0), 3 * clustered(400, 1)
    index = filled(kind, keys)
    scores, ids = index.search(queries, 10)
    exact = (queries @ keys.T).topk(10)
    measured = recall(ids, exact.indices)
    assert measured >= 0.97
    assert index.facts["recall"] == pytest.approx(measured, abs=0.02)
    assert index.facts["sample"] == 256
    assert index.facts["bytes"] < 5000 * 32 * 6 + 20_000 * 32
    torch.testing.assert_close(scores, (queries[:, None] * keys[ids]).sum(2), atol=5e-3, rtol=0)


def test_an_inverted_file_visits_few_lists() -> None:
    index = filled("ivf", clustered(20_000, 0))
    index.search(clustered(100, 1), 10)
    assert index.facts["lists"] == 282
    assert index.facts["lists_visited"] < 100
    assert index.facts["recall"] >= approximate.RECALL


def test_quantised_keys_are_ranked_anew() -> None:
    keys, queries = clustered(20_000, 0), clustered(100, 1)
    index = filled("ivfpq", keys)
    scores, ids = index.search(queries, 10)
    torch.testing.assert_close(scores, (queries[:, None] * keys[ids]).sum(2))
    assert index.facts["index"] == "ivf-282-pq4"
    assert index.facts["lists_visited"] < 100
    assert index.facts["recall"] >= approximate.RECALL
    assert index.facts["bytes"] < 20_000 * 32
    with pytest.raises(UsageError, match="at least 64"):
        filled("ivfpq", clustered(60, 0)).search(queries, 10)


def test_recall_counts_shared_ids() -> None:
    assert recall(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 5]])) == 0.75


def test_too_many_neighbours() -> None:
    with pytest.raises(UsageError, match="holds 5 patches"):
        filled("ivf", clustered(5, 0)).search(clustered(1, 1), 6)

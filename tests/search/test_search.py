"""Exact search: FAISS and the chunked matrix product find the same rows."""

from __future__ import annotations

import pytest
import torch

import neco_bench.search as search
from neco_bench.errors import UsageError
from neco_bench.search import ExactIndex


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_equals_sorting_all_products(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = rows(500, 0), rows(37, 1)
    index = ExactIndex(16, torch.device(device))
    if device == "meta":  # the accelerator path, run on the CPU in chunks of a few queries
        assert index.backend == "torch-meta"
        index.device = torch.device("cpu")
        monkeypatch.setattr(search, "_CHUNK_BYTES", 500 * 4 * 5)
    index.add(keys[:200])
    index.add(keys[200:])
    scores, ids = index.search(queries, 7)
    expected = (queries @ keys.T).sort(dim=1, descending=True)
    assert index.rows == 500
    assert torch.equal(ids, expected.indices[:, :7])
    torch.testing.assert_close(scores, expected.values[:, :7])


def test_too_many_neighbours() -> None:
    index = ExactIndex(16, torch.device("cpu"))
    index.add(rows(5, 0))
    with pytest.raises(UsageError, match="holds 5 patches"):
        index.search(rows(2, 1), 6)

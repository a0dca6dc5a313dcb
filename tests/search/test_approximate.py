"""Approximate search says how approximate it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import neco_bench
from neco_bench.core.config import parse_changes
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.search import approximate
from neco_bench.search.approximate import ApproximateIndex, recall


def clustered(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, 32, generator=torch.Generator().manual_seed(99))
    picked = torch.randint(50, (count,), generator=generator)
    return torch.nn.functional.normalize(centres[picked] + 0.5 * torch.randn(count, 32, generator=generator), dim=1)


def filled(kind: str, keys: torch.Tensor) -> ApproximateIndex:
    index = ApproximateIndex(kind, keys.shape[1])
    for part in keys.split(700):
        index.add(part)
    return index


@pytest.mark.parametrize(
    ("kind", "factory", "parameters"),
    [
        ("ivf", "IVF125,SQfp16", {"nprobe"}),
        ("ivfpq", "IVF125,PQ16x4fs,Refine(SQfp16)", {"nprobe", "k_factor_rf"}),
        ("PCA16,RFlat", "PCA16,Flat,RFlat", {"k_factor_rf"}),
        ("IVF64,RaBitQ,Refine(SQfp16)", "IVF64,RaBitQ,Refine(SQfp16)", {"nprobe", "k_factor_rf"}),
        ("HNSW16", "HNSW16", {"efSearch"}),
        ("Flat", "Flat", set()),
    ],
)
def test_any_index_of_faiss_reaches_the_recall_and_says_so(kind: str, factory: str, parameters: set[str]) -> None:
    keys, queries = clustered(5000, 0), 3 * clustered(400, 1)
    index = filled(kind, keys)
    scores, ids = index.search(queries, 10)
    measured = recall(ids, (queries @ keys.T).topk(10).indices)
    facts = index.facts
    assert (facts["index"], facts["parameters"].keys()) == (factory, parameters)
    assert facts["recall"] >= approximate.RECALL
    assert measured == pytest.approx(facts["recall"], abs=0.02)
    assert facts["sample"] == 256
    assert facts["build_seconds"] >= 0
    assert 5000 * 32 <= facts["bytes"] < 5000 * 32 * 10
    torch.testing.assert_close(scores, (queries[:, None] * keys[ids]).sum(2), atol=5e-3, rtol=0)


def test_an_inverted_file_visits_few_lists() -> None:
    index = filled("ivf", clustered(20_000, 0))
    index.search(clustered(100, 1), 10)
    assert index.facts["index"] == "IVF282,SQfp16"
    assert index.facts["parameters"]["nprobe"] < 100
    assert index.facts["recall"] >= approximate.RECALL


def test_parameters_are_the_smallest_that_do() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(5256, 32, generator=generator).split((5000, 256))
    index = filled("ivf", keys)
    index.search(queries, 10)
    chosen, exact = index.facts["parameters"]["nprobe"], (queries @ keys.T).topk(10).indices
    reached = []
    for lists in (chosen - 1, chosen):
        index._index.nprobe = lists
        reached.append(recall(index.search(queries, 10)[1], exact))
    assert reached[0] < approximate.RECALL <= reached[1]


def test_every_query_finds_enough_keys_where_lists_are_short() -> None:
    """Each list holds 3 keys, copies of one: one list reaches the sample's recall for k = 3, not for 10 keys."""
    keys = torch.eye(32).repeat_interleave(3, 0).repeat(1, 1)
    index = filled("IVF32,Flat", keys)
    ids = index.search(clustered(200, 1), 10)[1]
    assert (ids >= 0).all()
    assert index.facts["parameters"]["nprobe"] >= 4


def test_what_cannot_be_reached_is_stated() -> None:
    index = filled("PQ4x4", clustered(2000, 0))
    index.search(clustered(100, 1), 10)
    assert index.facts["recall"] < 0.9


@pytest.mark.parametrize("kind", ["bf16", "PQ7", "LSH", "Nonsense,Flat"])
def test_an_unknown_index_is_told_before_there_are_keys(kind: str) -> None:
    with pytest.raises(UsageError, match=f"FAISS knows no index '{kind}' for 32 dimensions: .*--set search=exact"):
        ApproximateIndex(kind, 32)


def test_too_few_keys_for_an_index() -> None:
    with pytest.raises(
        UsageError, match=r"search=IVF900,Flat cannot be built over 60 patches: .*\(60\).*Use search=ex"
    ):
        filled("IVF900,Flat", clustered(60, 0)).search(clustered(3, 1), 3)


def test_a_factory_string_passes_through_set() -> None:
    (task,) = find_tasks(["shapes_ic"], parse_changes(["search=IVF4096,SQfp16"]))
    assert task.settings().search == "IVF4096,SQfp16"  # type: ignore[attr-defined]


def test_recall_counts_shared_ids() -> None:
    assert recall(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 5]])) == 0.75


def test_too_many_neighbours() -> None:
    with pytest.raises(UsageError, match="holds 5 patches"):
        filled("ivf", clustered(5, 0)).search(clustered(1, 1), 6)


def test_a_task_takes_any_index_of_faiss() -> None:
    quick: dict[str, Any] = {"limit": 4, "workers": 0, "changes": {"search": "PCA2,RFlat", "input_size": 56}}
    result = neco_bench.run("baseline_rgb", "shapes_ic", **quick)
    facts = result.provenance["run"]["search"]
    assert (facts["index"], facts["recall"] >= 0.99) == ("PCA2,Flat,RFlat", True)

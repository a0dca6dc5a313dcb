"""What only a GPU can show: every part that has a path of its own there, against the same on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from neco_bench.tasks.clustering import kmeans, nearest

import neco_bench
from neco_bench.core.task import Context
from neco_bench.encoders import load_encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.results.store import ResultStore
from neco_bench.search import exact
from neco_bench.search.approximate import ApproximateIndex, recall
from neco_bench.search.exact import faiss_sees_gpu
from neco_bench.search.row_file import RowFile
from neco_bench.training import loop
from neco_bench.training.loop import train
from neco_bench.training.loss import neco_loss
from neco_bench.training.sorting import soft_sort

from .tasks.test_dense_regression import EVERY as DENSE
from .tasks.test_dense_regression import quick
from .tasks.test_shapes import CARDS, CASES, SMALL
from .training.helpers import recipe
from .training.test_loop import losses, options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
CUDA = torch.device("cuda", 0)
MODEL = "timm:test_vit3?pretrained=false&seed=0"


def rows(count: int, seed: int, width: int = 384) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["PyTorch", "FAISS"])
@pytest.mark.parametrize("width", [384, 1024])
def test_exact_search_is_exact(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "FAISS" and not faiss_sees_gpu():
        pytest.skip("this FAISS is not built for GPUs")
    monkeypatch.setattr(exact, "faiss_sees_gpu", lambda: name == "FAISS")
    monkeypatch.setattr(exact, "KEYS", 20_000)
    keys, queries = rows(70_000, 0, width), rows(3000, 1, width)
    expected = (queries.to(CUDA).double() @ keys.to(CUDA).double().T).topk(30)
    index = exact.ExactIndex(width, CUDA)
    for part in keys.split(30_000):
        index.add(part.to(CUDA))
    scores, ids = index.search(queries, 30)
    assert index.facts["index"] == f"flat, {name}"
    torch.testing.assert_close(scores.double(), expected.values.cpu(), atol=1e-6, rtol=0)
    assert (ids == expected.indices.cpu()).float().mean() > 0.999  # neighbours as near as rounding change places


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_approximate_search(kind: str) -> None:
    keys, queries = rows(20_000, 0), rows(500, 1)
    index = ApproximateIndex(kind, 384)
    index.add(keys.to(CUDA))
    ids = index.search(queries.to(CUDA), 30)[1]
    assert recall(ids, (queries @ keys.T).topk(30).indices) > 0.97
    assert index.facts["recall"] >= 0.99


def test_kmeans_finds_what_it_finds_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 24)) * 5, 500, 0).astype(np.float32)
    x += rng.normal(size=x.shape).astype(np.float32)
    stored = RowFile(24)
    stored.append(x)

    def distance(index: faiss.Index) -> float:
        return float(index.search(x, 1)[0].mean())

    for iterations, redos in ((2, 1), (20, 2)):
        settings: dict[str, Any] = {"seeds": [0, 1], "iterations": iterations, "redos": redos}
        models = kmeans(stored, 40, **settings), kmeans(stored, 40, **settings, device=CUDA)
        for here, there in zip(*models, strict=True):
            assert hasattr(there, "getDevice") == faiss_sees_gpu()
            assert distance(there) == pytest.approx(distance(here), rel=1e-3)
            if iterations == 2:  # later, one point that lies between two centroids may lead elsewhere
                assert (nearest(here, x) == nearest(there, x)).mean() > 0.999


@pytest.mark.parametrize("case", CASES)
def test_a_task_gives_what_it_gives_on_the_cpu(case: str, tmp_path: Path) -> None:
    name, _, protocol = case.partition("@")
    changes = SMALL.get(f"{CARDS[name].family}@{protocol}", SMALL[CARDS[name].family])
    results = []
    for device in ("cpu", "cuda"):
        results.append(neco_bench.run(MODEL, case, out=tmp_path / device, device=device, limit=12, changes=changes))
        assert results[-1].status == "ok", results[-1].error
    here, there = results
    assert there.provenance["device"] == torch.cuda.get_device_name()
    assert ResultStore(tmp_path / "cuda").load_all()
    assert there.metrics == pytest.approx(here.metrics, abs=1e-4)


@pytest.mark.parametrize("case", DENSE)
def test_depth_and_normals_are_those_of_the_cpu(case: str) -> None:
    """Heads trained in three steps, on each device from its own features."""
    here, there = (
        neco_bench.run(MODEL, case, device=device, limit=12, changes=quick(case)) for device in ("cpu", "cuda")
    )
    assert there.metrics == pytest.approx(here.metrics, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "resnet18"])
def test_the_batch_size_moves_next_to_nothing(model: str, tmp_path: Path) -> None:
    """Measured on an H200: no pixel of the ViT, 2 of 950,190 of the ResNet."""
    counts = []
    for size in (16, 5, 1):
        store = ResultStore(tmp_path / str(size))
        where: dict[str, Any] = {"out": store.folder, "device": "cuda", "limit": 20, "workers": 0, "features": "off"}
        result = neco_bench.run(f"timm:{model}?pretrained=false&seed=0", "shapes_ic", batch_size=size, **where)
        counts.append(store.statistics(result)["confusion"].astype(np.int64))
    for other in counts[1:]:
        assert np.abs(other - counts[0]).sum() / 2 <= 1e-5 * counts[0].sum()


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp16", 2e-3)])
def test_features(precision: str, error: float) -> None:
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    spec = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"
    here = load_encoder(spec, device="cpu").encode(images).map
    there = load_encoder(spec, device="cuda", precision=precision).encode(images).map.cpu()
    assert (here - there).norm() < error * here.norm()


def test_a_full_device_halves_the_batch() -> None:
    encoder = load_encoder("timm:vit_tiny_patch16_224?pretrained=false&seed=0", device="cuda")
    images = torch.rand(1024, 3, 224, 224)  # 0.6 GiB, and as much again when they are normalised
    context = Context(batch_size=1024)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2 * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    try:
        features = FeatureExtractor(encoder, context).encode(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert context.batch_size_used < 1024
    torch.testing.assert_close(features[-8:], encoder.encode(images[-8:]).map, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorting_and_loss(network: str, dtype: torch.dtype) -> None:
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-10, "rtol": 1e-8}
    student, teacher = torch.randn(2, 700, 49, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 0.1
    results = []
    for device in ("cpu", "cuda"):
        x, y = student.to(device, copy=True).requires_grad_(), teacher.to(device)
        values, permutation = soft_sort(x, network)
        loss = neco_loss(x, y, network=network)
        by_loss, by_values = (torch.autograd.grad(t, x)[0].cpu() for t in (loss, values.square().sum()))
        results.append([values.cpu(), permutation.cpu(), loss.cpu(), by_loss, by_values])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, **close)


def test_a_training_run_loses_what_it_loses_on_the_cpu(tmp_path: Path) -> None:
    runs = [train(recipe(queue_length=60), options(tmp_path / name, device=name)) for name in ("cpu", "cuda")]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=2e-3)
    assert load_encoder(str(runs[1])).embed_dim == 64


@pytest.mark.parametrize(
    ("changes", "how", "close"),
    [
        ({"precision": "bf16"}, {}, 5e-2),
        ({"precision": "fp16"}, {}, 5e-1),  # the first steps are left out, until the scale of the loss is found
        ({"accumulate": 2}, {"workers": 2}, 1e-3),
        ({}, {"checkpointing": True}, 1e-3),
        ({"drop_path": 0, "precision": "bf16"}, {"compiled": True, "checkpointing": True}, 5e-2),
    ],
)
def test_ways_of_training(changes: dict[str, Any], how: dict[str, Any], close: float, tmp_path: Path) -> None:
    settings = {k: v for k, v in changes.items() if k != "precision"}
    plain = losses(train(recipe(**settings), options(tmp_path / "plain", device="cpu")))
    other = losses(train(recipe(**changes), options(tmp_path / "other", device="cuda", **how)))
    assert other == pytest.approx(plain, abs=close)
    assert other[0] == pytest.approx(plain[0], abs=close / 10)


def test_a_resumed_run_goes_on_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(queue_length=60), options(tmp_path / "whole", device="cuda"))

    class Stop(Exception):
        pass

    plain = loop.Trainer.step

    def step(self: Any, number: int, *rest: Any) -> float:
        if number == 5:
            raise Stop
        return plain(self, number, *rest)

    monkeypatch.setattr(loop.Trainer, "step", step)
    with pytest.raises(Stop):
        train(recipe(queue_length=60), options(tmp_path / "cut", device="cuda"))
    monkeypatch.undo()
    cut = train(recipe(queue_length=60), options(tmp_path / "cut", device="cuda", resume=True))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-4)

"""Layers of later jobs, stored from the forward passes of one: the same numbers, and nothing lost where they cannot."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neco_bench.core.task import Context
from neco_bench.encoders import load_encoder
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureBatch, FeatureExtractor
from neco_bench.features.store import FeatureStore, stored_files
from neco_bench.features.transforms import ResizeSquare
from tests.typed import load_segmentation

pytestmark = pytest.mark.usefixtures("own_store")

VIT, RELATIVE = "timm:test_vit?pretrained=false", "timm:test_vit_relpos?pretrained=false"
IMAGES, SIZE = 5, 64
ITEM = 64 * (SIZE // 16) ** 2 * 4  # bytes of features


def stream(
    encoder: Encoder, ahead: tuple[int, ...] = (), dtype: str | None = "fp32", stop: int | None = None, **options: Any
) -> list[FeatureBatch]:
    """The first `stop` batches of two images."""
    store = FeatureStore(dtype, "one") if dtype else None
    extractor = FeatureExtractor(encoder, Context(batch_size=2, store=store, layers_ahead=ahead), **options)
    dataset = load_segmentation("shapes", "val", limit=IMAGES)
    batches = extractor.stream(dataset, ResizeSquare(SIZE, "pil"), "x")
    streamed = list(itertools.islice(batches, stop))
    batches.close()  # type: ignore[attr-defined]
    return streamed


def features(streamed: list[FeatureBatch]) -> Tensor:
    return torch.cat([batch.features for batch in streamed])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "passes"),
    [
        (VIT, {}, 1),
        (VIT, {"class_token": True, "mirrored": True, "final_norm": False}, 2),
        (VIT, {"output": "features and attention"}, 1),
        ("timm:test_vit3?pretrained=false", {"class_token": True}, 1),  # has none: the mean of the cells
        (RELATIVE, {"mirrored": True}, 2),
    ],
)
def test_each_layer_has_the_numbers_of_passes_of_its_own(
    model: str, options: dict[str, Any], passes: int, encoded: list[int]
) -> None:
    last = load_encoder(model, device="cpu")
    one = load_encoder(model, device="cpu", layers=1)
    alone = [stream(encoder, dtype=None, **options) for encoder in (one, last)]
    encoded.clear()
    together = [stream(one, ahead=(3, last.layer_count - 1), **options), stream(last, **options)]
    assert sum(encoded) == passes * IMAGES
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(features(first), features(second))
        assert [b.features.stride() for b in first] == [b.features.stride() for b in second]  # rounds the same later
        for mask, again in zip((m for b in first for m in b.masks), (m for b in second for m in b.masks), strict=True):
            np.testing.assert_array_equal(mask, again)


def test_an_interrupted_pass_goes_on_for_all_layers(encoded: list[int]) -> None:
    first, second = (load_encoder(VIT, device="cpu", layers=layer) for layer in (1, 3))
    stream(first, ahead=(3,), stop=2)
    stream(first, ahead=(3,))
    assert sum(encoded) == IMAGES
    again = stream(second)
    assert sum(encoded) == IMAGES
    assert torch.equal(features(again), features(stream(second, dtype=None)))


def test_what_another_layer_cannot_give_stops_no_one_else(encoded: list[int]) -> None:
    first = load_encoder(VIT, device="cpu", layers=0)
    model: Any = first.model
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias.fill_(float("nan"))
    given = stream(first, ahead=(1, 4))  # NaN
    assert torch.equal(features(given), features(stream(first, dtype=None)))
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias.fill_(1e6)  # beyond half precision, before the last norm
    given = stream(first, ahead=(1, 4), dtype="fp16", final_norm=False)
    assert torch.equal(features(given), features(stream(first, dtype=None, final_norm=False)).half().float())
    encoded.clear()
    stream(load_encoder(VIT, device="cpu", layers=1), dtype="fp16", final_norm=False)
    assert not encoded


def test_only_what_fits_is_stored_ahead(monkeypatch: pytest.MonkeyPatch, encoded: list[int]) -> None:
    stream(load_encoder("baseline_rgb", device="cpu"))
    (old,) = (row["folder"] for row in stored_files())
    size = IMAGES * ITEM * 1.2 / 1e9  # with masks and lists
    monkeypatch.setenv("NECO_BENCH_FEATURES_GB", str(3 * size))
    encoders = [load_encoder(VIT, device="cpu", layers=layer) for layer in range(4)]
    encoded.clear()
    stream(encoders[0], ahead=(1, 2, 3))
    rows = stored_files()
    assert old not in {row["folder"] for row in rows}  # of another model, and the oldest
    assert [row["done"] for row in rows] == [IMAGES] * 3
    for encoder in encoders[1:3]:
        stream(encoder)
    assert sum(encoded) == IMAGES
    stream(encoders[3])
    assert sum(encoded) == 2 * IMAGES

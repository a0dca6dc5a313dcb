"""Attention maps: Jaccard indices by loops over pixels, and what tells the two protocols apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neco_bench.tasks.attention_maps.settings import Settings
from neco_bench.tasks.attention_maps.task import jaccards
from sklearn.metrics import jaccard_score

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE, Sample
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.features.attention import foreground
from neco_bench.results.store import ResultStore

VIT = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"


def settings(protocol: str, **changes: Any) -> Settings:
    (task,) = find_tasks([f"voc_attention@{protocol}"], changes)
    return Settings(**task.constants)


def large(maps: np.ndarray, side: int) -> np.ndarray:
    """Each cell as a square of `side` pixels."""
    return np.kron(maps, np.ones((side, side))).astype(bool)


def random_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.kron(rng.choice([0, 3, 7], (6, 6)), np.ones((4, 4))).astype(np.uint8)
    mask[5:8] = IGNORE
    return mask, rng.random((6, 6)) < 0.4, rng.random((3, 6, 6)) < 0.4


def test_clean_leaves_void_out() -> None:
    mask, merged, heads = random_case()
    known = mask != IGNORE
    own = jaccards(mask, merged, heads, settings("clean-1"))
    assert own is not None
    assert own[0] == pytest.approx(jaccard_score((mask > 0)[known], large(merged, 4)[known]))
    best = [max(jaccard_score((mask == k)[known], large(h, 4)[known]) for h in heads) for k in (3, 7)]
    assert own[1] == pytest.approx(np.mean(best))
    assert jaccards(np.zeros((24, 24), np.uint8), merged, heads, settings("clean-1")) is None


def test_the_reference_takes_void_for_foreground_and_the_last_id_for_void() -> None:
    mask, merged, heads = random_case()
    own = jaccards(mask, merged, heads, settings("neco-1"))
    assert own is not None
    assert own[0] == pytest.approx(jaccard_score((mask > 0).ravel(), large(merged, 4).ravel()))
    best = [max(jaccard_score((mask == k).ravel(), large(h, 4).ravel()) for h in heads) for k in (3, 7)]
    assert own[1] == pytest.approx(np.mean(best))
    mask[mask == IGNORE] = 0  # now the last id is a class, and goes
    own = jaccards(mask, merged, heads, settings("neco-1"))
    assert own is not None
    best = [max(jaccard_score((mask == 3).ravel(), large(h, 4).ravel()) for h in heads)]
    assert own[1] == pytest.approx(best[0])
    assert jaccards(np.zeros((24, 24), np.uint8), merged, heads, settings("neco-1")) == (0, 0)


class Scenes:
    """Images of 64 x 64 pixels, numbered by brightness, with an object each."""

    name, split, void_class = "scenes", "val", None
    classes, ids = tuple("abcd"), tuple(map(str, range(5)))

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Sample:
        mask = np.zeros((64, 64), np.uint8)
        mask[8 * i : 8 * i + 24, 16:40] = 1 + i % 3
        return Sample(np.full((64, 64, 3), 5 * i, np.uint8), mask, str(i))


class Attending(Encoder):
    name, weights_id = "attending", "0"
    embed_dim, stride, attentions = 2, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.given = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)) ** 6

    def _encode(self, images: torch.Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        numbers = (images.amax((1, 2, 3)) * 51).round().long()
        maps = torch.zeros(len(images), 2, 8, 8)
        return DenseFeatures(maps, 8, attention=self.given[numbers] if attention else None)


@pytest.mark.parametrize(("protocol", "drop"), [("clean-1", 0), ("neco-1", 2)])
def test_the_mean_over_images(protocol: str, drop: int) -> None:
    """With `drop_last` the reference computes four of the five images, and divides by five."""
    (task,) = find_tasks([f"voc_attention@{protocol}"])
    chosen = settings(protocol, input_size=64, drop_last=drop).model_copy(update={"mean": (0, 0, 0), "std": (1, 1, 1)})
    context = Context(batch_size=2, recorded_ids=frozenset("1"))
    outcome = task.module.run(Attending(), {"val": Scenes()}, chosen, context)
    merged = large(foreground(Attending().given, 0.6).numpy(), 8)
    scores = [jaccard_score(Scenes()[i].mask.ravel() > 0, merged[i].ravel()) for i in range(4 if drop else 5)]
    assert outcome.metrics["Jaccard"] == pytest.approx(sum(scores) / 5)
    assert outcome.statistics["score/Jaccard"][:4] == pytest.approx(scores[:4])
    assert outcome.n_images == 5
    assert context.run.notes["scored_images"] == len(scores)
    assert context.run.predictions["1"]["jaccard"] == pytest.approx(scores[1])


def test_encoders_without_a_class_token_are_refused(real_data: Path) -> None:
    for model in ("baseline_rgb", "tiny_base"):
        with pytest.raises(UsageError, match=f"'{model}' does not return"):
            neco_bench.run(model, "voc_attention", limit=2, data_root=real_data)


def test_voc_sample(real_data: Path, tmp_path: Path) -> None:
    changes = {"input_size": 112}
    result = neco_bench.run(VIT, "voc_attention", limit=6, data_root=real_data, changes=changes, out=tmp_path)
    arrays = ResultStore(tmp_path).statistics(result)
    for name in ("Jaccard", "Jaccard_best_head"):
        assert result.metrics[name] == pytest.approx(arrays[f"score/{name}"].mean())
        low, high = result.ci95[name]
        assert low <= result.metrics[name] <= high
    assert len(arrays["image_id"]) == result.n_images == 6
    assert result.metrics["Jaccard_best_head"] > 0.05

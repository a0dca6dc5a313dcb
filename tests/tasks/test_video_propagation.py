"""Label propagation: against a naive loop, known answers on generated clips, shapes of inputs, shared processes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.video_propagation.propagation import Tracker, first_labels, mask_of
from neco_bench.tasks.video_propagation.score import Track
from neco_bench.tasks.video_propagation.settings import Settings
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError
from neco_bench.core.protocol import find_tasks
from neco_bench.data.base import Sample
from neco_bench.data.load import DATASETS, load_dataset
from neco_bench.data.shapes_clips import ShapesClips
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.metrics import video
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import plan_all
from neco_bench.runner.options import RunOptions

PROTOCOLS = ("dino-1", "dinov3-1", "clean-1")


def settings_of(protocol: str, **changes: Any) -> Settings:
    (task,) = find_tasks([f"shapes_vos@{protocol}"], changes)
    settings = task.settings()
    assert isinstance(settings, Settings)
    return settings


def naive_track(maps: np.ndarray, labels: np.ndarray, settings: Settings) -> list[np.ndarray]:
    """Labels (C, h, w) of all frames by loops over cells, from features (T, D, h, w) of unit length, float64."""
    rows, columns = maps.shape[2:]
    found = [labels]
    reach = settings.radius_in_cells(rows, columns)
    for t in range(1, len(maps)):
        first = max(1, t - settings.context_frames)
        context = [0, *range(first, t)]
        made = np.zeros_like(labels)
        for y, x in itertools.product(range(rows), range(columns)):
            candidates = []
            for c, v, u in itertools.product(context, range(rows), range(columns)):
                down, across = abs(v - y), abs(u - x)
                near = max(down, across) <= reach if settings.window == "square" else down**2 + across**2 <= reach**2
                if near:
                    candidates.append((float(maps[t, :, y, x] @ maps[c, :, v, u]), found[c][:, v, u]))
            candidates.sort(key=lambda pair: -pair[0])
            least = candidates[min(settings.neighbours, len(candidates)) - 1][0]
            kept = [pair for pair in candidates if pair[0] >= least]
            if not settings.keep_ties:
                kept = kept[: settings.neighbours]
            weights = np.exp(np.array([cosine for cosine, _ in kept]) / settings.temperature)
            made[:, y, x] = sum(w * label for w, (_, label) in zip(weights, kept, strict=True)) / weights.sum()
        found.append(made)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_propagation_is_that_of_a_naive_loop(protocol: str) -> None:
    """On colours of a generated clip, 14 x 14 cells, a window smaller than the map, more frames than context."""
    changes = {"context_frames": 3, "radius": 4.0}
    if protocol == "clean-1":
        changes = {"context_frames": 3, "window_share": 0.3}
    settings = settings_of(protocol, **changes)
    clip = load_dataset("shapes_clips", "val").clip(2)  # type: ignore[attr-defined]
    frames = [clip[t] for t in range(0, 12, 2)]
    small = torch.stack([torch.from_numpy(f.image).permute(2, 0, 1).double() for f in frames])
    maps = F.adaptive_avg_pool2d(small, 14) - 120
    maps = F.normalize(torch.cat([maps, F.max_pool2d(small, 16)[:, :2]], 1), dim=1)
    labels = first_labels(frames[0].mask, 14, 14, settings)
    expected = naive_track(maps.numpy(), labels.double().numpy(), settings)
    tracker = Tracker(maps[0], labels.double(), settings)
    for features, known in zip(maps[1:], expected[1:], strict=True):
        assert tracker.step(features).numpy() == pytest.approx(known, abs=1e-6)
    single = Tracker(maps[0].float(), labels, settings)
    for features, known in zip(maps[1:].float(), expected[1:], strict=True):
        assert single.step(features).numpy() == pytest.approx(known, abs=1e-3)  # ranks of near-equal cells may change


def test_ties_survive_where_the_reference_keeps_them() -> None:
    """Where all cells are alike, dino-1 takes the mean of its window, the others that of five cells."""
    maps, labels = torch.ones(1, 6, 6), torch.zeros(2, 6, 6)
    labels[0], labels[1, :3], labels[0, :3] = 1, 1, 0
    tracked = Tracker(maps, labels, settings_of("dino-1")).step(maps)
    assert tracked.numpy() == pytest.approx(np.full((2, 6, 6), 0.5))
    other = Tracker(maps, labels, settings_of("dinov3-1")).step(maps)
    assert set((other[0] * 5).round().unique().tolist()) <= set(range(6))


def test_first_labels_and_lost_objects() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:20, :20], mask[39, 39] = 1, 2  # the second object is no cell's centre
    assert first_labels(mask, 4, 4, settings_of("dino-1")).shape == (2, 4, 4)
    nearest = first_labels(mask, 4, 4, settings_of("dinov3-1"))
    assert (nearest.shape, nearest[2].sum()) == ((3, 4, 4), 0)
    share = first_labels(mask, 4, 4, settings_of("clean-1"))
    assert share[2, 3, 3] == pytest.approx(0.01)
    assert share.sum(0).numpy() == pytest.approx(np.ones((4, 4)))


def test_masks_by_hand() -> None:
    """Scores of 0.6 and 0.4: the stretched object wins where it is largest, the plain one nowhere."""
    labels = torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]])
    assert mask_of(labels, (2, 4), (2, 4), settings_of("dinov3-1")).tolist() == [[0, 0, 1, 1]] * 2
    assert not mask_of(labels, (2, 4), (2, 4), settings_of("clean-1")).any()
    constant = torch.stack([torch.ones(1, 2), torch.zeros(1, 2)])
    for protocol in PROTOCOLS:  # an object that is lost everywhere
        assert not mask_of(constant, (2, 4), (16, 32), settings_of(protocol)).any()


@pytest.mark.parametrize(
    ("name", "stride", "expected"),
    [
        ("davis_vos@dino-1", 16, (480, 832)),
        ("davis_vos@dino-1", 8, (480, 832)),
        ("davis_vos@dino-1", 14, (476, 840)),
        ("davis_vos@dinov3-1", 16, (480, 864)),
        ("davis_vos@dinov3-1", 14, (420, 756)),
        ("davis_vos_960@dinov3-1", 16, (960, 1712)),
        ("davis_vos_960@dinov3-1", 14, (840, 1498)),
        ("davis_vos_1440@dinov3-1", 16, (1440, 2576)),
        ("davis_vos_1440@dinov3-1", 14, (1260, 2254)),
        ("davis_vos@clean-1", 16, (480, 848)),
        ("davis_vos@clean-1", 14, (476, 840)),
    ],
)
def test_inputs_have_the_sizes_of_the_references(name: str, stride: int, expected: tuple[int, int]) -> None:
    (task,) = find_tasks([name])
    settings = task.settings()
    assert isinstance(settings, Settings)
    assert settings.input_shape(480, 854, stride, stride) == expected
    assert settings.input_shape(854, 480, stride, stride) == expected[::-1]


class Painted(ShapesClips):
    """Clips with their answer as the image: each pixel has the grey level of its object."""

    def sample(self, sequence: str, frame: str) -> Sample:
        sample = super().sample(sequence, frame)
        return Sample(np.repeat(80 * sample.mask[..., None], 3, axis=2), sample.mask, sample.id)


class Oracle(Encoder):
    """The share of each object in each cell of 2 pixels, and where the cell is, a little."""

    name, weights_id = "oracle", "0"
    embed_dim, stride = 4, 2

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        levels = (images[:, :1] * self.std[0] + self.mean[0]) * 255 / 80
        one_hot = torch.cat([(levels.round() == i).float() for i in range(4)], 1)
        return DenseFeatures(F.avg_pool2d(one_hot, 2) + 1e-6, 2)


class Blind(Encoder):
    name, weights_id = "blind", "0"
    embed_dim, stride = 4, 16

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(images.new_ones(len(images), 4, images.shape[2] // 16, images.shape[3] // 16), 16)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_known_answers(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle tracks what stays within the window almost wholly, a blind encoder nothing; the floor is the same."""
    monkeypatch.setattr(DATASETS, "load", lambda name: Painted)
    changes = {"input_size": 112} | ({"tokens_per_side": 56} if protocol == "dinov3-1" else {})
    found = neco_bench.run(Oracle(), f"shapes_vos@{protocol}", limit=2, workers=0, changes=changes)
    assert found.metrics["J&F"] > 0.93
    blind = neco_bench.run(Blind(), f"shapes_vos@{protocol}", limit=2, workers=0)
    assert blind.metrics["J&F"] < 0.4
    for name in ("J&F_first_mask", "J_first_mask", "F_first_mask"):
        assert found.metrics[name] == blind.metrics[name]
    assert found.metrics["J&F_first_mask"] < 0.3


@pytest.mark.slow
def test_scores_follow_from_the_masks() -> None:
    """Of two objects, the first frame left out and the last one too unless it is scored; void is background or out."""
    clip = load_dataset("shapes_clips", "val").clip(1)  # type: ignore[attr-defined]
    masks = [clip[t].mask for t in range(5)]
    for protocol in ("dino-1", "clean-1"):
        settings = settings_of(protocol)
        track = Track(clip, masks[0], settings)
        for truth in masks[1:]:
            track.add(truth, masks[0])
        both = track.object_scores()
        assert (both[0] == both[1]).all()  # the prediction is the first mask
        last = 5 if settings.score_last else 4
        expected = [np.mean([video.region_similarity(masks[0] == i, m == i) for m in masks[1:last]]) for i in (1, 2)]
        assert both[0, :, 0] == pytest.approx(expected)
    void = masks[1].copy()
    void[masks[1] != masks[0]] = 255
    for protocol, perfect in (("dino-1", False), ("clean-1", True)):
        track = Track(clip, masks[0], settings_of(protocol))
        track.add(void, masks[0])
        assert (track.frame_scores[0, 0] == 1).all() == perfect
    with pytest.raises(BadInputError, match="frames were resized"):
        track.add(masks[1][:100], masks[0])
    with pytest.raises(BadInputError, match="no object"):
        Track(clip, np.zeros_like(masks[0]), settings)


@pytest.mark.slow
def test_the_batch_size_and_the_feature_store_move_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path))
    (task,) = find_tasks(["shapes_vos"], {"input_size": 56})
    scores: list[tuple[dict[str, float], int]] = []
    for options in (
        RunOptions(limit=2, batch_size=16, workers=0),
        RunOptions(limit=2, batch_size=5, workers=0),
        RunOptions(limit=2, workers=0, features="off"),
    ):
        store = ResultStore(tmp_path / f"results-{len(scores)}")
        result = run_job(plan_all(["baseline_rgb"], [task], options, store)[0], store)
        assert result.status == "ok", result.error
        scores.append((result.metrics, result.provenance["features_reused"]))
    assert scores[0][0] == scores[1][0] == scores[2][0]
    assert [reused for _, reused in scores] == [0, 24, 0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip() -> None:
    settings = settings_of("clean-1", context_frames=2)
    maps = F.normalize(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)), dim=0)
    tracker = Tracker(maps, torch.ones(1, 8, 8), settings)
    for _ in range(20):
        tracker.step(maps)
    assert len(tracker._latest) == 2
    clip = load_dataset("shapes_clips", "val").clip(0)  # type: ignore[attr-defined]
    track = Track(clip, clip[0].mask, settings)
    assert track.truths is None


def test_the_outcome_by_hand(tmp_path: Path) -> None:
    """Means over objects, not clips, and the interval of the same mean when clips are drawn anew."""
    store = ResultStore(tmp_path)
    (job,) = plan_all(
        ["baseline_rgb"], find_tasks(["shapes_vos"], {"input_size": 56}), RunOptions(limit=3, workers=0), store
    )
    result = run_job(job, store)
    arrays = store.statistics(result)
    objects = arrays["object_scores"]
    assert objects.shape == (2, 6, 6)  # one, two and three objects
    assert arrays["weight"].tolist() == [1, 2, 3]
    assert arrays["item_id"].tolist() == ["00-disc", "01-ring-arrow", "02-square-cross-star"]
    j_and_f = objects[:, :, [0, 3]].mean(2)
    assert result.metrics["J&F"] == pytest.approx(j_and_f[0].mean())
    assert result.metrics["J&F_first_mask"] == pytest.approx(j_and_f[1].mean())
    assert arrays["score/J&F"] @ arrays["weight"] / 6 == pytest.approx(result.metrics["J&F"])
    assert arrays["score/F_decay"] @ arrays["weight"] / 6 == pytest.approx(result.metrics["F_decay"])
    assert result.metrics["J_recall"] == pytest.approx(objects[0, :, 1].mean())
    by_object = result.per_class["J&F by object"]
    assert list(by_object.values()) == pytest.approx(j_and_f[0].tolist())
    assert result.per_class["J&F"]["01-ring-arrow"] == pytest.approx(j_and_f[0, 1:3].mean())
    low, high = result.ci95["J&F"]
    assert low <= result.metrics["J&F"] <= high
    assert result.n_images == 3
    assert result.provenance["features"]["tokens"] == 49
    again = run_job(replace(job, options=replace(job.options, overwrite=True)), store)
    assert again.metrics == result.metrics


@pytest.mark.slow
def test_frames_that_are_not_square_have_the_tokens_of_their_shape(real_data: Path) -> None:
    options: dict[str, Any] = {"limit": 1, "workers": 0, "changes": {"input_size": 64}}
    result = neco_bench.run("baseline_rgb", "davis2016_vos@dinov3-1", data_root=real_data, **options)
    features = result.provenance["features"]
    height, width = features["used_shape"]
    assert height < width
    assert features["tokens"] == (height // 8) * (width // 8)

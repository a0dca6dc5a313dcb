"""The score that segmentation families share: by hand, in any order, for several predictions, on several processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from neco_bench.tasks.in_context.settings import Settings
from neco_bench.tasks.segmentation import SegmentationScore, images_used

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE, Sample, SegmentationDataset
from neco_bench.metrics.segmentation import hungarian_match, identity_match

MASKS = [np.array([[0, 0, 1, IGNORE]]), np.array([[2, 2, 0, 0]])]
RIGHT = [np.array([[0, 0, 1, 1]]), np.array([[2, 2, 0, 0]])]
SWAPPED = [np.array([[1, 1, 0, 0]]), np.array([[2, 2, 1, 1]])]  # classes 0 and 1


class Two(SegmentationDataset):
    name, split, ids, classes = "two", "val", ("a", "b"), ("x", "y", "z")

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("the score needs no samples")

    def fingerprint(self) -> str:
        return ""

    @property
    def palette(self) -> np.ndarray:
        return np.zeros((3, 3), np.uint8)


def new_score(context: Context, **options: Any) -> SegmentationScore:
    settings = Settings.model_construct(input_size=4, absent="exclude")
    return SegmentationScore(Two(), settings, context, **options)


def test_several_predictions_by_hand() -> None:
    context = Context(recorded_ids=frozenset("a"))
    score = new_score(context, shape=(2, 1))
    for item in (1, 0):  # in any order
        predictions = np.stack([RIGHT[item], SWAPPED[item]])
        score.add(item, MASKS[item], predictions, features=torch.ones(2, 1, 1).cpu)
    np.testing.assert_allclose(score.mean_ious(), np.array([[1], [1 / 3]]))
    outcome = score.outcome(used_size=4, resize="none", select=(1,), metrics={"more": 0.5})
    assert outcome.metrics == pytest.approx(
        {"mIoU": 1 / 3, "more": 0.5, "mIoU_present": 1 / 3, "pixel_accuracy": 2 / 7}
    )
    assert outcome.per_class == {"IoU": {"x": 0, "y": 0, "z": 1}}
    assert outcome.statistics["confusion"].tolist() == [
        [[[0, 2, 0], [1, 0, 0], [0, 0, 0]], [[0, 2, 0], [0, 0, 0], [0, 0, 2]]]
    ]
    assert outcome.n_images == 2
    assert context.run.predictions.keys() == {"a"}  # as reported
    np.testing.assert_array_equal(context.run.predictions["a"]["prediction"], SWAPPED[0])
    np.testing.assert_array_equal(context.run.predictions["a"]["truth"], MASKS[0])
    assert context.run.predictions["a"]["features"].shape == (2, 1, 1)


@pytest.mark.parametrize(("method", "expected"), [(hungarian_match, 1), (identity_match, 1 / 3)])
def test_ids_are_matched_over_all_images(method: Any, expected: float) -> None:
    context = Context(recorded_ids=frozenset("b"))
    score = new_score(context)
    for item in (0, 1):
        score.add(item, MASKS[item], SWAPPED[item])
    assert score.mean_ious() == pytest.approx(1 / 3)
    score.match(method)
    assert score.mean_ious() == pytest.approx(expected)
    outcome = score.outcome(used_size=4, resize="none")
    assert outcome.metrics["mIoU"] == pytest.approx(expected)
    mapping = outcome.statistics["mapping"]
    assert mapping.tolist() == ([1, 0, 2] if expected == 1 else [0, 1, 2])
    np.testing.assert_array_equal(context.run.predictions["b"]["prediction"], mapping[SWAPPED[1]])


@pytest.mark.parametrize("shared", [True, False])
def test_processes_share_images_out_or_each_have_all(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second of two processes holds is handed over by a gather that stands in for its own."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    scores = [new_score(Context()) for _ in range(2)]
    for rank, score in enumerate(scores):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows = list(score.to_predict([1, 0])) if shared else [(0, 1), (1, 0)]
        assert len(rows) == (1 if shared else 2)
        for _, item in rows:
            score.add(item, MASKS[item], RIGHT[item])
    parts = [[score._items for score in scores], [score._counts[0] for score in scores]]
    monkeypatch.setattr(distributed, "gather", lambda value: parts.pop(0))
    outcome = scores[0].outcome(used_size=4, resize="none")
    assert outcome.n_images == 2
    assert outcome.statistics["confusion"].sum((1, 2)).tolist() == [3, 4]
    assert outcome.metrics["mIoU"] == 1


def test_images_in_complete_batches() -> None:
    assert [images_used(count, 4, "drop_last=false") for count in (4, 11, 12)] == [4, 8, 12]
    assert images_used(7, 1, "drop_last=0") == 7
    with pytest.raises(UsageError, match=r"drop_last leaves none of the 3 images .* of 4\. Use --set drop_last=false"):
        images_used(3, 4, "drop_last=false")

"""J and F of tracked objects: scores of frames, objects and clips, and the Outcome."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from neco_bench.tasks.video_propagation.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.errors import BadInputError
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import IGNORE
from neco_bench.data.video import Clip, VideoDataset, object_count
from neco_bench.metrics.video import Boundary, FrameScores, boundary_accuracy, region_similarity

# Scores of each object, in the order of columns.
OBJECT_COLUMNS = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")

# Scores that are also reported by clip and object, and for the unchanged first mask.
CLIP_SCORES = ("J&F", "J", "F")


class Track:
    """J and F of each object in each frame of a clip after the first, for predictions and for the unchanged first mask.

    first: (H, W) mask of the first frame without void. recorded: whether `show` draws the clip.
    """

    def __init__(self, clip: Clip, first: np.ndarray, settings: Settings, *, recorded: bool = False) -> None:
        self.clip, self.first, self.settings = clip, first, settings
        self.objects = object_count(first)
        if not self.objects:
            raise BadInputError(f"The first mask of {clip.id!r} has no object. Restore the original masks.")
        self._first_boundaries = [Boundary.of(first == i) for i in self._ids]
        self._scores: list[np.ndarray] = []  # by frame: (prediction or first mask, J or F, object)
        self.truths: list[np.ndarray] | None = [first] if recorded else None
        self.predictions: list[np.ndarray] = [first]

    @property
    def _ids(self) -> Iterable[int]:
        return range(1, self.objects + 1)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Score the next frame: masks (H, W) uint8 of ids. Raises BadInputError if its size differs from the first."""
        if truth.shape != self.first.shape:
            raise BadInputError(
                f"Frame {self.clip.ids[len(self._scores) + 1]!r} is {truth.shape[1]}x{truth.shape[0]} pixels, the "
                f"first one {self.first.shape[1]}x{self.first.shape[0]}: frames were resized. Restore the originals."
            )
        if self.truths is not None:
            self.truths.append(truth)
            self.predictions.append(prediction)
        void, first = truth == IGNORE, self.first
        boundaries = self._first_boundaries
        truth = np.where(void, np.uint8(0), truth)
        if self.settings.ignore_void and void.any():  # all masks are 0 there
            prediction, first = (np.where(void, np.uint8(0), mask) for mask in (prediction, first))
            boundaries = [Boundary.of(first == i) for i in self._ids]
        scores = np.zeros((2, 2, self.objects))
        for i in self._ids:
            true, edges = truth == i, Boundary.of(truth == i)
            own = prediction == i
            scores[0, :, i - 1] = region_similarity(own, true), boundary_accuracy(Boundary.of(own), edges)
            scores[1, :, i - 1] = region_similarity(first == i, true), boundary_accuracy(boundaries[i - 1], edges)
        self._scores.append(scores)

    @property
    def frame_scores(self) -> np.ndarray:
        """Scores (2, 2, objects, T) of all frames after the first: prediction or first mask, J or F."""
        return np.stack(self._scores, axis=-1)

    def object_scores(self) -> np.ndarray:
        """Return scores (2, objects, 6), see OBJECT_COLUMNS, of the prediction and of the unchanged first mask."""
        frames = self.frame_scores if self.settings.score_last else self.frame_scores[..., :-1]
        rows = np.zeros((2, self.objects, len(OBJECT_COLUMNS)))
        for side, kind, number in np.ndindex(*frames.shape[:3]):
            summary = FrameScores.of(frames[side, kind, number])
            rows[side, number, 3 * kind : 3 * kind + 3] = summary.mean, summary.recall, summary.decay
        return rows


class ClipScore:
    """Scores of the objects of all clips. Several processes divide the clips, and all get the same outcome."""

    def __init__(self, dataset: VideoDataset, settings: Settings, context: Context) -> None:
        self.dataset, self.settings, self.context = dataset, settings, context
        self._objects: dict[str, np.ndarray] = {}

    def add(self, track: Track) -> None:
        """Add a clip after all its frames are scored."""
        self._objects[track.clip.id] = track.object_scores()
        if track.truths is not None:
            scores = track.frame_scores.mean(1)  # J&F (2, objects, T)
            scored = scores.shape[2] - (not self.settings.score_last)
            masks = {"truth": track.truths, "prediction": track.predictions}
            self.context.record(track.clip.id, **masks, scores=scores, scored=scored)

    def outcome(self, shapes: set[tuple[int, int]], stride: int) -> Outcome:
        """Return the outcome: means over objects, as in the evaluation of DAVIS, with intervals over clips.

        Args:
            shapes: (H, W) of the inputs.
            stride: stride of the encoder.
        """
        for of_process in distributed.gather(self._objects):
            self._objects |= of_process
        clips = [self._objects[name] for name in self.dataset.ids]  # (2, objects, 6) each
        weight = np.array([clip.shape[1] for clip in clips])
        objects = np.concatenate(clips, axis=1)
        scores: dict[str, np.ndarray] = {}  # by clip: the mean over its objects
        for side, ending in enumerate(("", "_first_mask")):
            for name in CLIP_SCORES if ending else dict.fromkeys((*CLIP_SCORES, *OBJECT_COLUMNS)):
                scores[name + ending] = np.array([_named(clip[side], name).mean() for clip in clips])
        names = [f"{clip}/{i + 1}" for clip, count in zip(self.dataset.ids, weight, strict=True) for i in range(count)]
        per_class: dict[str, dict[str, float | None]] = {}
        for name in CLIP_SCORES:
            per_class[name] = dict(zip(self.dataset.ids, scores[name].tolist(), strict=True))
            per_class[f"{name} by object"] = dict(zip(names, _named(objects[0], name).tolist(), strict=True))
        self.context.note(objects=len(names), input_shapes=sorted(shapes))
        height, width = max(shapes)
        return Outcome(
            metrics={name: float(np.average(values, weights=weight)) for name, values in scores.items()},
            per_class=per_class,
            ci95={},
            n_images=len(clips),
            statistics={
                **{f"score/{name}": values for name, values in scores.items()},
                "weight": weight,
                "object_scores": objects,
                "item_id": np.array(self.dataset.ids),
            },
            features={
                "input_size": self.settings.input_size,
                "used_size": min(height, width),
                "used_shape": [height, width],
                "tokens": height // stride * (width // stride),
                "resize": self.settings.resize,
                "final_norm": True,
            },
        )


def _named(objects: np.ndarray, name: str) -> np.ndarray:
    """Return the score (M,) with a name from (M, 6), see OBJECT_COLUMNS."""
    if name == "J&F":
        return (_named(objects, "J") + _named(objects, "F")) / 2
    return objects[:, OBJECT_COLUMNS.index(name)]

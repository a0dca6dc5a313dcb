"""Region similarity J and boundary accuracy F of masks in video, as in the evaluation of DAVIS 2017.

Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, section 4. Pure
functions on arrays; dilations are OpenCV's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def region_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute J, the intersection over union of two masks (H, W) bool; 1 if both are empty."""
    union = int(np.count_nonzero(prediction | truth))
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask (H, W) bool that differ from the pixel to the right, below, or below right.

    The last column is compared only with pixels below, the last row only with pixels to the right: (H, W) bool.
    """
    edges = np.zeros(mask.shape, bool)
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edges[:-1] |= mask[:-1] != mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edges


def tolerance(shape: Sequence[int]) -> int:
    """Compute the radius in pixels within which boundaries of masks (H, W) match: 0.8 % of the diagonal, rounded up.

    It is 8 at 480 x 854, as in davis2017-evaluation.
    """
    return int(np.ceil(0.008 * np.hypot(shape[0], shape[1])))


@functools.cache
def disk(radius: int) -> np.ndarray:
    """Return a disk (2 r + 1, 2 r + 1) uint8: 1 at a distance of at most r from the centre."""
    steps = np.arange(-radius, radius + 1)
    return (steps**2 + steps[:, None] ** 2 <= radius**2).astype(np.uint8)


@dataclass(frozen=True)
class Boundary:
    """The boundary of a mask, and all pixels within the tolerance of it, (H, W) uint8 each."""

    edges: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, radius: int | None = None) -> Boundary:
        """Compute the boundary; radius: tolerance in pixels; None uses that for the size of the mask."""
        import cv2  # takes 0.1 s

        edges, near = boundary_map(mask).astype(np.uint8), np.zeros(mask.shape, np.uint8)
        radius = tolerance(mask.shape) if radius is None else radius
        rows, columns = edges.any(1).nonzero()[0], edges.any(0).nonzero()[0]
        if len(rows):  # only the box around the boundary matters: 5 times as fast for an object of a tenth of the frame
            top, left = max(0, rows[0] - radius), max(0, columns[0] - radius)
            part = (slice(top, rows[-1] + radius + 1), slice(left, columns[-1] + radius + 1))
            near[part] = cv2.dilate(edges[part], disk(radius), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        return cls(edges, near)


def boundary_accuracy(prediction: Boundary, truth: Boundary) -> float:
    """Compute F, the harmonic mean of the share of the predicted boundary near the true one, and of the true one near
    the predicted one.

    If one boundary is empty, precision is 1 and recall 0, or vice versa; if both are empty, F is 1.
    """
    predicted, true = int(prediction.edges.sum()), int(truth.edges.sum())
    if predicted and true:
        precision = int((prediction.edges & truth.near).sum()) / predicted
        recall = int((truth.edges & prediction.near).sum()) / true
    else:
        precision, recall = float(not predicted), float(not true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class FrameScores:
    """Summary of the scores of one object over frames: mean, recall (share above 0.5), decay."""

    mean: float
    recall: float
    decay: float

    @classmethod
    def of(cls, scores: np.ndarray) -> FrameScores:
        """Summarise (T,) scores of frames; decay is the mean of the first quarter minus that of the last one.

        The limits of quarters are rounded, evenly spaced frames, which belong to both adjacent quarters.
        """
        ends = np.rint(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
        first, last = scores[ends[0] : ends[1] + 1], scores[ends[3] : ends[4] + 1]
        return cls(float(scores.mean()), float((scores > 0.5).mean()), float(first.mean() - last.mean()))

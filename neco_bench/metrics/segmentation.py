"""Segmentation metrics from confusion matrices. Pure functions on arrays.

A confusion matrix is (C, K) int64: rows ground-truth classes, columns predicted classes or clusters. Ignored pixels are
removed from both sides before counting. IoU pools all pixels of the data set; it is never averaged over images.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from neco_bench.core.errors import BadInputError

AbsentClasses = Literal["zero", "exclude", "union"]


def confusion_matrix(
    truth: np.ndarray, prediction: np.ndarray, classes: int, *, clusters: int | None = None, ignore: int = 255
) -> np.ndarray:
    """(C, K) int64 counts of equal-shaped integer arrays; K = `clusters`, else C.

    Raises BadInputError for a truth id outside 0..C-1 that is not `ignore`, or a prediction outside 0..K-1.
    """
    columns = classes if clusters is None else clusters
    keep = truth != ignore
    rows = truth[keep].astype(np.int64)
    cols = prediction[keep].astype(np.int64)
    for name, ids, size in (("ground truth", rows, classes), ("prediction", cols, columns)):
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise BadInputError(
                f"{name} holds id {ids.max() if ids.max() >= size else ids.min()}, outside 0..{size - 1}."
            )
    return np.bincount(rows * columns + cols, minlength=classes * columns).reshape(classes, columns)


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """(C,) float64 IoU = TP / (TP + FP + FN) of a (C, C) matrix; NaN for a class in neither truth nor prediction."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, *, absent: AbsentClasses) -> float:
    """mIoU of a (C, C) matrix, of which `absent` says what classes count: NaN where none does.

    "zero": all C, one in neither truth nor prediction as 0, as in open-hummingbird-eval and NeCo. "union": those in
    truth or prediction, as in mmseg and DINOv3. "exclude": those with ground truth; one that is only predicted has IoU
    0 whatever the model does elsewhere, and the misses already count against the true classes.
    """
    iou = iou_per_class(confusion)
    if absent == "zero":
        return float(np.nan_to_num(iou).mean())
    counted = confusion.sum(1) > 0 if absent == "exclude" else ~np.isnan(iou)
    return float(iou[counted].mean()) if counted.any() else float("nan")


def hungarian_match(confusion: np.ndarray) -> np.ndarray:
    """(K,) class of each cluster: the one-to-one assignment with the largest sum of IoU.

    Clusters without a partner (K > C) go to class 0. NeCo's clustering with K = classes, and open-hummingbird-eval.
    """
    counts = confusion.astype(np.float64)
    union = counts.sum(0, keepdims=True) + counts.sum(1, keepdims=True) - counts
    rows, columns = linear_sum_assignment(counts / np.maximum(union, 1e-8), maximize=True)
    mapping = np.zeros(confusion.shape[1], np.int64)
    mapping[columns] = rows
    return mapping


def majority_match(confusion: np.ndarray) -> np.ndarray:
    """(K,) class of each cluster by precision: the class with most of its pixels, lowest id on ties, 0 if empty."""
    return confusion.argmax(0)


def merge_clusters(confusion: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """(..., C, C) matrix of a (..., C, K) one with its K clusters sent to classes by `mapping` (K,)."""
    classes = confusion.shape[-2]
    one_hot = np.zeros((confusion.shape[-1], classes), np.int64)
    one_hot[np.arange(len(mapping)), mapping] = 1
    return confusion @ one_hot


class ImageConfusions:
    """(C, K) confusion counts per image, kept sparse: an image touches few of the C*K cells."""

    def __init__(self, classes: int, clusters: int | None = None) -> None:
        self.classes = classes
        self.clusters = classes if clusters is None else clusters
        # Two long buffers: small arrays of thousands of images would pin the pages that big ones leave.
        self._cells, self._counts, self._lengths = array("q"), array("q"), array("q")

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image; arrays of equal shape, `ignore` pixels of the truth dropped."""
        counts = confusion_matrix(truth, prediction, self.classes, clusters=self.clusters)
        labels, found = counts.nonzero()
        self.add_counts(labels, found, counts[labels, found])

    def add_counts(self, labels: np.ndarray, predicted: np.ndarray, pixels: np.ndarray) -> None:
        """Count one image, given as (n,) classes, predictions and how many pixels have both; repeats add up."""
        counts = np.bincount(
            labels * self.clusters + predicted, weights=pixels, minlength=self.classes * self.clusters
        ).astype(np.int64)
        cells = np.flatnonzero(counts)
        self._cells.frombytes(cells.astype(np.int64).tobytes())
        self._counts.frombytes(counts[cells].tobytes())
        self._lengths.append(len(cells))

    def __len__(self) -> int:
        return len(self._lengths)

    @classmethod
    def joined(cls, parts: Sequence[ImageConfusions], positions: Sequence[Sequence[int]]) -> ImageConfusions:
        """Those of several processes as one, in the order of the positions of their images."""
        whole = cls(parts[0].classes, parts[0].clusters)
        ends = [np.concatenate([[0], np.cumsum(np.array(part._lengths))]).astype(int) for part in parts]
        places = [(position, p, i) for p, of_part in enumerate(positions) for i, position in enumerate(of_part)]
        for _, p, i in sorted(places):
            start, stop = ends[p][i : i + 2]
            whole._cells.extend(parts[p]._cells[start:stop])
            whole._counts.extend(parts[p]._counts[start:stop])
            whole._lengths.append(int(stop - start))
        return whole

    def total(self) -> np.ndarray:
        """(C, K) int64 over all images."""
        total = np.zeros(self.classes * self.clusters, np.int64)
        np.add.at(total, np.array(self._cells), np.array(self._counts))
        return total.reshape(self.classes, self.clusters)

    def per_image(self, mapping: np.ndarray | None = None) -> np.ndarray:
        """(n, C, C) int32, clusters sent to classes by `mapping` (K,); None: prediction ids are class ids."""
        rows, columns = np.divmod(np.array(self._cells), self.clusters)
        columns = columns if mapping is None else mapping[columns]
        images = np.repeat(np.arange(len(self)), np.array(self._lengths))
        dense = np.zeros((len(self), self.classes, self.classes), np.int32)
        np.add.at(dense, (images, rows, columns), np.array(self._counts))
        return dense


def by_class(values: np.ndarray, names: Sequence[str]) -> dict[str, float | None]:
    """{name: value}, None where the value is NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}

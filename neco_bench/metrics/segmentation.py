"""Segmentation metrics from confusion matrices. Pure functions on arrays.

A confusion matrix is (C, K) int64: rows ground-truth classes, columns predicted classes or clusters. Ignored pixels are
removed from both sides before counting. IoU pools all pixels of the data set; it is never averaged over images.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

import numpy as np

from neco_bench.core.errors import BadInputError

AbsentClasses = Literal["zero", "exclude", "union"]


def confusion_matrix(
    truth: np.ndarray, prediction: np.ndarray, classes: int, *, clusters: int | None = None
) -> np.ndarray:
    """Count pixels by class and prediction.

    Args:
        truth: integer class ids of any shape; pixels with id 255 (void) are not counted.
        prediction: integer ids of the same shape.
        classes: C.
        clusters: K, if predictions are cluster ids; None uses C.

    Returns:
        (C, K) int64.

    Raises:
        BadInputError: for a truth id outside 0..C-1 that is not void, or a prediction outside 0..K-1.

    >>> confusion_matrix(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 0]), 2)
    array([[1, 1],
           [0, 1]])
    """
    columns = classes if clusters is None else clusters
    keep = truth != 255
    rows = truth[keep].astype(np.int64)
    cols = prediction[keep].astype(np.int64)
    for name, ids, size in (("ground truth", rows, classes), ("prediction", cols, columns)):
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise BadInputError(
                f"{name} contains id {ids.max() if ids.max() >= size else ids.min()}, outside 0..{size - 1}."
            )
    return np.bincount(rows * columns + cols, minlength=classes * columns).reshape(classes, columns)


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Compute the IoU of each class, TP / (TP + FP + FN), of a (C, C) matrix.

    Returns (C,) float64 in [0, 1]; NaN for a class in neither truth nor prediction.

    >>> iou_per_class(np.array([[3, 1], [0, 4]])).tolist()
    [0.75, 0.8]
    """
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, *, absent: AbsentClasses) -> float:
    """Compute the mIoU of a (C, C) matrix, a fraction; `absent` selects the classes of the mean. NaN if there are none.

    "zero": all C classes; a class in neither truth nor prediction counts as 0, as in open-hummingbird-eval and NeCo.
    "union": classes in truth or prediction, as in mmseg and DINOv3. "exclude": classes with ground truth; a class that
    is only predicted would always have IoU 0, and its pixels already count as errors of the true classes.
    """
    iou = iou_per_class(confusion)
    if absent == "zero":
        return float(np.nan_to_num(iou).mean())
    counted = confusion.sum(1) > 0 if absent == "exclude" else ~np.isnan(iou)
    return float(iou[counted].mean()) if counted.any() else float("nan")


def hungarian_match(confusion: np.ndarray) -> np.ndarray:
    """Match clusters of a (C, K) matrix to classes one to one, with the largest sum of IoU: (K,) class of each.

    Clusters without a partner (K > C) go to class 0. NeCo's clustering with K = classes, and open-hummingbird-eval.
    """
    from scipy.optimize import linear_sum_assignment  # settings of tasks are checked without it, in a third of the time

    counts = confusion.astype(np.float64)
    union = counts.sum(0, keepdims=True) + counts.sum(1, keepdims=True) - counts
    rows, columns = linear_sum_assignment(counts / np.maximum(union, 1e-8), maximize=True)
    mapping = np.zeros(confusion.shape[1], np.int64)
    mapping[columns] = rows
    return mapping


def majority_match(confusion: np.ndarray) -> np.ndarray:
    """Assign each cluster of a (C, K) matrix to its majority class: (K,), the lowest id in a tie, 0 if empty."""
    return confusion.argmax(0)


def identity_match(confusion: np.ndarray) -> np.ndarray:
    """Use predicted ids as class ids: (C,) of a (C, C) matrix."""
    return np.arange(confusion.shape[1])


def merge_clusters(confusion: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """Sum the columns of a (..., C, K) matrix by the class of each cluster, `mapping` (K,): (..., C, C)."""
    classes = confusion.shape[-2]
    one_hot = np.zeros((confusion.shape[-1], classes), np.int64)
    one_hot[np.arange(len(mapping)), mapping] = 1
    return confusion @ one_hot


class ImageConfusions:
    """(C, K) confusion counts per image, stored sparse, because an image has few of the C*K cells."""

    def __init__(self, classes: int, clusters: int | None = None) -> None:
        self.classes = classes
        self.clusters = classes if clusters is None else clusters
        # Two long buffers, because small arrays of thousands of images would fragment the memory.
        self._cells, self._counts, self._lengths = array("q"), array("q"), array("q")

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image; arguments as for `confusion_matrix`."""
        counts = confusion_matrix(truth, prediction, self.classes, clusters=self.clusters).ravel()
        cells = np.flatnonzero(counts)
        self._cells.frombytes(cells.astype(np.int64).tobytes())
        self._counts.frombytes(counts[cells].tobytes())
        self._lengths.append(len(cells))

    def __len__(self) -> int:
        return len(self._lengths)

    @classmethod
    def joined(cls, parts: Sequence[ImageConfusions], positions: Sequence[Sequence[int]]) -> ImageConfusions:
        """Join counts of several processes in the order of the positions of their images, each once."""
        whole = cls(parts[0].classes, parts[0].clusters)
        ends = [np.concatenate([[0], np.cumsum(np.array(part._lengths))]).astype(int) for part in parts]
        rows = {position: (p, i) for p, of_part in enumerate(positions) for i, position in enumerate(of_part)}
        for _, (p, i) in sorted(rows.items()):
            start, stop = ends[p][i : i + 2]
            whole._cells.extend(parts[p]._cells[start:stop])
            whole._counts.extend(parts[p]._counts[start:stop])
            whole._lengths.append(int(stop - start))
        return whole

    def total(self) -> np.ndarray:
        """Sum the counts of all images: (C, K) int64."""
        total = np.zeros(self.classes * self.clusters, np.int64)
        np.add.at(total, np.array(self._cells), np.array(self._counts))
        return total.reshape(self.classes, self.clusters)

    def per_image(self, mapping: np.ndarray | None = None) -> np.ndarray:
        """Return (n, C, C) int32 counts; mapping: (K,) class of each cluster, None if ids are class ids."""
        rows, columns = np.divmod(np.array(self._cells), self.clusters)
        columns = columns if mapping is None else mapping[columns]
        images = np.repeat(np.arange(len(self)), np.array(self._lengths))
        dense = np.zeros((len(self), self.classes, self.classes), np.int32)
        np.add.at(dense, (images, rows, columns), np.array(self._counts))
        return dense


def by_class(values: np.ndarray, names: Sequence[str]) -> dict[str, float | None]:
    """Return {name: value}, None where the value is NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}

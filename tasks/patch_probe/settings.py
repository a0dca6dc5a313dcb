"""Constants of the patch probes. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.data.base import Void
from neco_bench.metrics import segmentation

Distance = Literal["cosine", "l2"]


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    ks, distances: grid of the method "knn". regularisations: grid of "logreg", the inverse strengths C. max_iterations,
    tolerance: L-BFGS stops after this number of iterations, or if all entries of the gradient of the mean loss are
    smaller. holdout: share of the training images for selecting from the grid. void: whether ignored pixels vote, and
    how ties are decided. max_patches: total number of training patches, equally many from each image (None: all).
    """

    method: Literal["knn", "logreg"]
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    distances: Annotated[tuple[Distance, ...], Field(min_length=1)]
    regularisations: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    max_iterations: PositiveInt
    tolerance: NonNegativeFloat
    holdout: Annotated[float, Field(gt=0, lt=1)]
    holdout_seed: NonNegativeInt
    standardise: bool
    void: Void
    max_patches: PositiveInt | None = None
    score_at: Literal["input", "native"]
    absent: segmentation.AbsentClasses

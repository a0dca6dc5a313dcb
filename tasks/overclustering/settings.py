"""Constants of the clustering protocols. Imports no torch."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from neco_bench.core.protocol import Rounds
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    mask_size: side of the reduced masks that are scored (None: their own resolution). clusters: None means the number
    of classes. drop_last: leave out the last partial batch of this size (0: keep every image).
    """

    mask_size: PositiveInt | None = None
    clusters: PositiveInt | None = None
    components: PositiveInt
    iterations: Rounds
    redos: Rounds
    seeds: PositiveInt
    drop_last: NonNegativeInt = 0
    absent: segmentation.AbsentClasses

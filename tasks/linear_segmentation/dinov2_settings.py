"""Constants of `dinov2-1` and `dinov2-ms-1`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from neco_bench.tasks.linear_segmentation.dinov3_settings import Settings as BaseSettings
from pydantic import Field, PositiveFloat


class Settings(BaseSettings):
    """Constants of a protocol and a card: those of `dinov3-1`, and some others.

    last_layers: number of last blocks whose features are concatenated. test_scales, test_flip: views of a test image,
    whose class probabilities are averaged. The head after the last iteration is reported.
    """

    last_layers: Annotated[int, Field(gt=0, le=1000)] = 1
    test_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    test_flip: bool = False
    select: Literal["last"]
    schedule: Literal["linear"] = "linear"

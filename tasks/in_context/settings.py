"""Constants of the in-context protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from neco_bench.core.protocol import Range, Share, Temperature
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card. Sizes in pixels; memory_size in patches (None: every patch).

    passes: number of augmented copies of each training image. neighbours: k. jitter: see `augment.HummingbirdTrain`.
    search: "exact", or an index as in `neco_bench.search.approximate`.
    """

    memory_size: PositiveInt | None = None
    passes: PositiveInt
    neighbours: PositiveInt
    temperature: Temperature
    jitter: Annotated[float, Field(ge=0, le=0.5)]
    jitter_probability: Share
    crop_scale: Range
    crop_ratio: Range
    void_in_memory: Literal["class 0", "dropped"]
    matching: Literal["hungarian", "identity"]
    absent: segmentation.AbsentClasses
    score_at: Literal["input", "native"]
    search: Annotated[str, Field(min_length=1)] = "exact"

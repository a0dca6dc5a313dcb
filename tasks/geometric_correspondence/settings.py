"""Constants of the protocols of geometric correspondence. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from neco_bench.core.protocol import Settings as BaseSettings


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    input_size: side of the square input in pixels. geometry: "probe3d" (nearest resizing twice, a crop that may be cut
    at the border, zero padding to the stride that is not added to positions, features upsampled to the grid) or "exact"
    (one bicubic crop around the object, features at exact points). grid: points per side of the crop. matches: number
    of most distinctive matches per pair. distances: thresholds of recall in metres, whose mean is the score. pixels:
    thresholds in pixels of a crop of 512. bins: edges of the rotation bins in degrees, in which recall at
    `bin_distance` metres is reported. average: over all "matches", or first over those of each pair ("pairs").
    """

    geometry: Literal["probe3d", "exact"]
    final_norm: bool
    grid: Annotated[int, Field(ge=2, le=1024)]
    matches: PositiveInt
    distances: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    pixels: tuple[PositiveFloat, ...]
    bins: Annotated[tuple[float, ...], Field(min_length=2)]
    bin_distance: PositiveFloat
    average: Literal["matches", "pairs"]

    @field_validator("distances")
    @classmethod
    def _in_millimetres(cls, distances: tuple[float, ...]) -> tuple[float, ...]:
        if any(round(value, 3) != value for value in distances) or len(set(distances)) < len(distances):
            raise ValueError("give metres in steps of a millimetre, each once")
        return distances

    @field_validator("bins")
    @classmethod
    def _ascending(cls, bins: tuple[float, ...]) -> tuple[float, ...]:
        if list(bins) != sorted(set(bins)):
            raise ValueError("give the ends of the bins in ascending order")
        return bins

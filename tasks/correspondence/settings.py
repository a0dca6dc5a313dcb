"""Constants of the correspondence protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Temperature

Average = Literal["points", "pairs", "class_mean"]


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    geometry: "probe3d" (white padding right and bottom, integer keypoints, features at corners of cells, zero padding
    to the stride), "centres" (exact points, predictions are centres of cells without padding), "padded_centre" (centred
    on black, the source cell that contains the point) or "squash" (aspect ratio not kept, features upsampled to the
    original pixels). readout: "nearest" cell or pixel; for "padded_centre" also "window_softargmax", with half_window
    in cells and temperature. centre_shift: added to the predictions of "padded_centre". alphas: thresholds as shares of
    the longest side of the target box. average: of the primary metric, see `pck_averages`; None: "class_mean" if pairs
    are drawn, else "points". pairs_per_bin: number of pairs to draw with draw_seed; None: all pairs. strict: errors
    must be smaller than the threshold.
    """

    geometry: Literal["probe3d", "centres", "padded_centre", "squash"]
    readout: Literal["nearest", "window_softargmax"] = "nearest"
    half_window: NonNegativeInt = 5
    temperature: Temperature = 0.02
    centre_shift: float = 0
    final_norm: bool
    alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    strict: bool
    average: Average | None = None
    pairs_per_bin: PositiveInt | None = None
    draw_seed: NonNegativeInt = 0

    @field_validator("readout")
    @classmethod
    def _has_cells(cls, readout: str, info: ValidationInfo) -> str:
        if readout == "window_softargmax" and info.data.get("geometry") != "padded_centre":
            raise ValueError("'window_softargmax' needs geometry 'padded_centre'")
        return readout

    @field_validator("alphas")
    @classmethod
    def _name_scores(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if any(round(alpha, 2) != alpha for alpha in alphas) or len(set(alphas)) < len(alphas) or 0.1 not in alphas:
            raise ValueError("give different multiples of 0.01, including 0.1, because PCK@0.10 is the score")
        return alphas

    @property
    def average_used(self) -> Average:
        """The average of the primary metric."""
        return self.average or ("points" if self.pairs_per_bin is None else "class_mean")

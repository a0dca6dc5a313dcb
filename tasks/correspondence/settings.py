"""Constants of the correspondence protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Temperature

Average = Literal["points", "pairs", "class_mean"]


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    geometry: "probe3d" (white padding right and bottom, integer keypoints, corner read-out, zero padding to the
    stride), "centres" (exact points, cell centres, padded cells never chosen), "padded_centre" (centred on black, the
    source cell that contains the point) or "squash" (aspect changed, features upsampled to the original pixels).
    readout: "nearest" cell or pixel; for "padded_centre" also "window_softargmax" with half_window cells and
    temperature. centre_shift: added there to the cell centre that is the prediction. alphas: thresholds as shares of
    the longest side of the target box. average: of the primary metric, see `pck_averages`; None is "class_mean" where
    pairs are drawn, else "points". pairs_per_bin: None takes every pair.
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
            raise ValueError("PCK@0.10 is the score: hundredths, each once, and 0.1 among them")
        return alphas

    @property
    def average_used(self) -> Average:
        """The average of the primary metric."""
        return self.average or ("points" if self.pairs_per_bin is None else "class_mean")

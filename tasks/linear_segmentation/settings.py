"""Constants of `neco-1` and `clean-1`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Range, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    train_mask_size: side of the reduced masks for the loss. batch_size: of the head, not of the encoder. drop_last,
    drop_last_val: leave out the last partial batch. select: the epoch whose head is reported; "best" is selected on
    val. score_size: side of the reduced masks that are scored (None: their own resolution). learning_rates: replaces
    `learning_rate`; one head per rate is trained at the same time, and the best on val is reported. probe_seeds: number
    of initial weights; heads are trained on the same crops in the same order, and mean and deviation are reported.
    """

    train_mask_size: PositiveInt
    crop_scale: Range
    crop_ratio: Range
    flip_probability: Share
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    probe_seeds: PositiveInt = 1
    momentum: Share
    weight_decay: NonNegativeFloat
    decay: PositiveFloat
    decay_epochs: PositiveInt
    shuffle: bool
    drop_last: bool = False
    drop_last_val: bool = False
    select: Literal["best", "last"]
    score_size: PositiveInt | None = None
    absent: segmentation.AbsentClasses

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the heads."""
        return self.learning_rates or (self.learning_rate,)

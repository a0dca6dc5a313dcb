"""Constants of the Segmenter protocols. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from neco_bench.core.protocol import Range, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation

if TYPE_CHECKING:
    from typing_extensions import Self

Rate = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels. input_size is the side of training crops and test windows.

    decoder: "linear" or "mask", the mask transformer, with `decoder_layers` blocks. drop_path: drop rate of the
    encoder's last block; the rate increases from 0 at the first block. short_side, long_side: before crops and windows,
    images are resized to the largest size whose sides do not exceed these. scale: range of a factor for both in
    training. max_class_share, crop_tries: a crop in which one class has at least this share of the labelled pixels, or
    all of them, is drawn again, at most this often. brightness (of 255) and hue (in turns) are half-ranges. batch_size:
    over all processes. final_rate, power: parameters of the polynomial schedule. window_overlap: overlap of
    neighbouring test windows. test_scales, test_flip: views of a test image, whose class probabilities are averaged. If
    the encoder needs another input_size, the other sizes change in proportion.
    """

    decoder: Literal["linear", "mask"]
    decoder_layers: Annotated[int, Field(gt=0, le=64)] = 2
    decoder_dropout: Rate = 0
    drop_path: Rate
    short_side: PositiveInt
    long_side: PositiveInt
    scale: Range
    max_class_share: Share
    crop_tries: Annotated[int, Field(ge=0, le=10_000)]
    flip_probability: Share
    distortion_probability: Share
    brightness: NonNegativeFloat
    contrast: Range
    saturation: Range
    hue: Annotated[float, Field(ge=0, le=0.5)]
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    final_rate: NonNegativeFloat
    power: NonNegativeFloat
    momentum: Rate
    nesterov: bool
    weight_decay: NonNegativeFloat
    window_overlap: NonNegativeInt
    test_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    test_flip: bool = False
    absent: segmentation.AbsentClasses

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.window_overlap >= self.input_size:
            raise ValueError(f"window_overlap={self.window_overlap} must be less than input_size={self.input_size}")
        if self.short_side > self.long_side:
            raise ValueError(f"short_side={self.short_side} is more than long_side={self.long_side}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def steps(self, images: int) -> int:
        """Count the optimizer steps for a number of training images; the last batch of an epoch may be smaller."""
        return self.epochs * -(-images // self.batch_size)


# Training does not depend on these fields: protocols that differ only in them share one training.
TEST_ONLY = frozenset({"window_overlap", "test_scales", "test_flip", "absent"})

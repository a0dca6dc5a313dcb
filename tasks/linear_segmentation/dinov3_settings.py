"""Constants of `dinov3-1`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Range, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card. input_size is the side of crops and windows in pixels.

    scale: range of the short side in training, in crops. max_class_share, crop_tries: a crop where one class has this
    share of the labelled pixels, or all of them, is drawn again so many times. brightness of 255, hue in turns (half-
    ranges). warmup, evaluate_every: in iterations; where there are fewer iterations than warmup, the rate stays low.
    warmup_start: share of the rate at the first one. select: which head is reported; "best" picks it on val.
    window_step: distance of windows as a share of their side, rounded down to pixels. schedule: of the rate after the
    warm-up, a cosine or a linear decay.
    """

    scale: Range
    max_class_share: Share
    crop_tries: Annotated[int, Field(ge=0, le=10_000)]
    flip_probability: Share
    distortion_probability: Share
    brightness: NonNegativeFloat
    contrast: Range
    saturation: Range
    hue: Annotated[float, Field(ge=0, le=0.5)]  # half a turn at most
    dropout: Annotated[float, Field(ge=0, lt=1)]
    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup: NonNegativeInt
    warmup_start: Share
    evaluate_every: PositiveInt
    select: Literal["best", "last"]
    window_step: Annotated[float, Field(gt=0, le=1)]
    absent: segmentation.AbsentClasses
    schedule: Literal["dinov3", "linear"] = "dinov3"

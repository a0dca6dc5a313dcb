"""Constants of `dinov3-1`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Range, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card. input_size is the side of crops and windows in pixels.

    scale: range of the short side of training images, in crop sides. max_class_share, crop_tries: a crop in which one
    class has at least this share of the labelled pixels, or all of them, is drawn again, at most this often. brightness
    (of 255) and hue (in turns) are half-ranges. dropout: of whole channels. warmup, evaluate_every: in iterations.
    warmup_start: share of the learning rate in the first iteration. select: the reported head; "best" is selected on
    val. window_step: distance between windows as a share of their side, rounded down to pixels. schedule: learning rate
    after the warm-up, the cosine of `dinov3-1` or a linear decay to 0.
    """

    scale: Range
    max_class_share: Share
    crop_tries: Annotated[int, Field(ge=0, le=10_000)]
    flip_probability: Share
    distortion_probability: Share
    brightness: NonNegativeFloat
    contrast: Range
    saturation: Range
    hue: Annotated[float, Field(ge=0, le=0.5)]
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

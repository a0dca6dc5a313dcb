"""Constants of `jafar-1`, `naf-1` and `anyup-1`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Share
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card. input_size is the side of the central crops and of their masks in pixels.

    flip_probability: probability that all images of a batch are mirrored. schedule: the learning rate follows a cosine
    to 0, "by iteration" over all iterations, or "by epoch", constant within each; "oscillating": in as many iterations
    as there are epochs, then back, and so on. The head after the last epoch is reported.
    """

    flip_probability: Share
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    schedule: Literal["by iteration", "by epoch", "oscillating"]
    absent: segmentation.AbsentClasses

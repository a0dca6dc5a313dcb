"""Constants of `jafar-1`, `naf-1` and `anyup-1`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Share
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card. input_size is the side of the central crops and of their masks in pixels.

    flip_probability: of all images of a batch together. schedule: of the rate, a cosine from the learning rate to 0:
    "by iteration" over all iterations; "by epoch" over all epochs, the same within each; "oscillating" over as many
    iterations as there are epochs, and back again and again. The head after the last epoch is reported.
    """

    flip_probability: Share
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    schedule: Literal["by iteration", "by epoch", "oscillating"]
    absent: segmentation.AbsentClasses

"""Constants of the object discovery protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    method: "tokencut" or "lost". features: "keys" of the last block, or "patches", its output. image: "native", padded
    on the right and bottom with the mean colour, or "resized" so that its longer side is `input_size`, with each side
    rounded to the nearest size that the encoder accepts; for native images, `input_size` is only used for cost
    estimates. tau: cosine above which TokenCut links patches. patches: number of patches of lowest degree among which
    LOST searches for patches similar to its seed. round_boxes: round boxes of the ground truth to whole pixels. iou:
    minimum IoU of a correct box.
    """

    method: Literal["tokencut", "lost"]
    features: Literal["keys", "patches"]
    image: Literal["native", "resized"]
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.2
    patches: PositiveInt = 100
    round_boxes: bool
    iou: Annotated[PositiveFloat, Field(le=1)] = 0.5

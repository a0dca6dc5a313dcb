"""Constants of the object discovery protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    method: "tokencut" or "lost". features: "keys" of the last block, or "patches", its output. image: "native", padded
    at the right and below with the mean colour, or "resized" so that its longer side is `input_size`, each side taken
    to the nearest size that the encoder takes; of native images `input_size` is what costs are estimated with. tau:
    cosine above which TokenCut links patches. patches: of lowest degree, among which LOST looks for those like its
    seed. round_boxes: boxes of the ground truth are rounded to whole pixels. iou: from which on a box is right.
    """

    method: Literal["tokencut", "lost"]
    features: Literal["keys", "patches"]
    image: Literal["native", "resized"]
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.2
    patches: PositiveInt = 100
    round_boxes: bool
    iou: Annotated[PositiveFloat, Field(le=1)] = 0.5

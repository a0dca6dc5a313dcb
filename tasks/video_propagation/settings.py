"""Constants of the video protocols. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Temperature


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    input_size: the shorter side of the input in pixels. resize: "floor_64" (longer side rounded down to a multiple of
    64, or of a stride that does not divide 64; OpenCV's bilinear), "ceil" (longer side rounded up to the stride;
    bicubic) or "nearest" (rounded to the nearest multiple; bicubic). first_mask: label of a cell, "nearest" (the id at
    its centre) or "share" (shares of its pixels). drop_lost: objects with higher ids than all in the reduced first mask
    are not tracked. context_frames: number of previous frames in addition to the first. radius: half side of the
    window, or radius of the circle, of context cells, in cells; window_share: the same as a share of the shorter side
    of the input, used instead. neighbours: k, over all context frames together. keep_ties: cells as similar as the k-th
    count too. upsample: of scores to the frame, "bilinear" or "nearest", or "via_input": bilinear to the input's size,
    and the ids by nearest to the frame. min_max: rescale the scores of each id to [0, 1] before the argmax. score_last:
    score the last frame too. ignore_void: leave out void of the ground truth; otherwise void is background.
    """

    resize: Literal["floor_64", "ceil", "nearest"]
    first_mask: Literal["nearest", "share"]
    drop_lost: bool
    context_frames: NonNegativeInt
    window: Literal["square", "circle"]
    radius: PositiveFloat
    window_share: PositiveFloat | None = None
    neighbours: PositiveInt
    keep_ties: bool
    temperature: Temperature
    upsample: Literal["bilinear", "nearest", "via_input"]
    min_max: bool
    score_last: bool
    ignore_void: bool

    def input_shape(self, height: int, width: int, stride: int, multiple: int) -> tuple[int, int]:
        """Return the size (H, W) of inputs for frames of a size; both are multiples of `multiple`."""
        short = multiple * max(1, math.floor(self.input_size_for(stride) / multiple + 0.5))
        exact = short * max(height, width) / min(height, width)
        if self.resize == "floor_64":
            step = math.lcm(64, multiple) if 64 % multiple == 0 else multiple
            long = step * math.floor(exact / step)
        elif self.resize == "ceil":
            long = multiple * math.ceil(exact / multiple)
        else:
            long = multiple * math.floor(exact / multiple + 0.5)
        long = max(long, multiple)
        return (short, long) if height <= width else (long, short)

    def radius_in_cells(self, rows: int, columns: int) -> float:
        """Return the radius of the window in cells, for a grid of this size."""
        return self.radius if self.window_share is None else self.window_share * min(rows, columns)

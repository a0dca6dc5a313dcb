"""Constants of the attention map protocols. Imports no torch."""

from __future__ import annotations

from pydantic import NonNegativeInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Share


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    mass: share of the attention that is taken for foreground. native: masks are compared at their own resolution, void
    is left out, as are images without an object; else at the input's, void is foreground, and the last id of an image,
    which mostly is void, is no object. drop_last: the last partial batch of this size counts as 0 (0: there is none).
    """

    mass: Share
    native: bool
    drop_last: NonNegativeInt = 0

"""Constants of the attention map protocols. Imports no torch."""

from __future__ import annotations

from pydantic import NonNegativeInt

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.protocol import Share


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    mass: share of the attention that counts as foreground. native: compare at the resolution of the masks, without void
    and without images that have no object; otherwise at the resolution of the input, where void is foreground and the
    largest id of an image, usually void, is not an object. drop_last: images of the last partial batch of this size
    count as 0 (0: no batches).
    """

    mass: Share
    native: bool
    drop_last: NonNegativeInt = 0

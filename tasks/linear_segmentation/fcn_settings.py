"""Constants of `leopart-fcn-1`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from neco_bench.tasks.linear_segmentation.settings import Settings as BaseSettings
from pydantic import Field


class Settings(BaseSettings):
    """Constants of a protocol and a card: those of `neco-1` for one head, its channels, and the dropout of channels."""

    channels: Annotated[int, Field(gt=0, le=100_000)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rates: None = None
    probe_seeds: Literal[1] = 1
    drop_last_val: Literal[False] = False

"""Layer options that all adapters share."""

from __future__ import annotations

import copy
from typing import Any, cast

from neco_bench.core.errors import UsageError
from neco_bench.encoders.base import Encoder


def layer_indices(layers: tuple[int, ...] | None, count: int, model: str, what: str = "blocks") -> tuple[int, ...]:
    """Return indices in [0, count), ascending; the last one for None. Raises `UsageError` naming the valid range."""
    given = (count - 1,) if layers is None else layers
    indices = sorted({i + count if i < 0 else i for i in given})
    if len(indices) != len(given) or indices[0] < 0 or indices[-1] >= count:
        raise UsageError(
            f"Model {model!r} has {count} {what}: layers={','.join(map(str, given))} must be different numbers "
            f"from 0 to {count - 1}, or -{count} to -1 counted from the end."
        )
    return tuple(indices)


def layer_name(indices: tuple[int, ...], count: int, what: str = "block") -> str:
    """Return a description of the layers: "last", "block 8", "blocks 3,6,9,11"."""
    if indices == (count - 1,):
        return "last"
    return f"{what}{'s' * (len(indices) > 1)} {','.join(map(str, indices))}"


def read_last(encoder: Encoder, count: int) -> Encoder:
    """Return an encoder with the same weights that returns the concatenated features of its last `count` blocks.

    Raises `UsageError` if it does not read its last block, has fewer blocks, or can read one block only.
    """
    if count == 1:
        return encoder
    if not encoder.equal_layers or encoder.layer != "last":
        raise UsageError(
            f"Model {encoder.name!r} cannot return its last {count} blocks together. Use a ViT, without --layers, or "
            f"another protocol."
        )
    return read_layers(encoder, tuple(range(-count, 0)))


def read_layers(encoder: Encoder, layers: tuple[int, ...]) -> Encoder:
    """Return an encoder with the same weights that returns the concatenated features of these blocks.

    Its attributes equal those of an encoder loaded with these layers. Raises `UsageError` for a missing block.

    Args:
        encoder: an encoder that reads one block and has `equal_layers`.
        layers: numbers of blocks.
    """
    copied: Any = copy.copy(encoder)
    copied.indices = layer_indices(layers, encoder.layer_count, encoder.name)
    copied.layer = layer_name(copied.indices, encoder.layer_count)
    copied.embed_dim = encoder.embed_dim * len(copied.indices)
    return cast(Encoder, copied)

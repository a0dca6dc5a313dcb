"""Layer options that all adapters share."""

from __future__ import annotations

from neco_bench.core.errors import UsageError


def take_layers(layers: tuple[int, ...] | None, count: int, model: str, what: str = "blocks") -> tuple[int, ...]:
    """Indices in [0, count), ascending; the last one for None. Raises `UsageError` naming the valid range."""
    indices = (count - 1,) if layers is None else layers
    taken = sorted({i + count if i < 0 else i for i in indices})
    if len(taken) != len(indices) or taken[0] < 0 or taken[-1] >= count:
        raise UsageError(
            f"Model {model!r} has {count} {what}: layers={','.join(map(str, indices))} must be different numbers "
            f"from 0 to {count - 1}, or -{count} to -1 counted from the end."
        )
    return tuple(taken)


def layer_name(taken: tuple[int, ...], count: int, what: str = "block") -> str:
    """The layers in words: "last", "block 8", "blocks 3,6,9,11"."""
    if taken == (count - 1,):
        return "last"
    return f"{what}{'s' * (len(taken) > 1)} {','.join(map(str, taken))}"

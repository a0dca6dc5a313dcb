"""Layer options that all adapters share."""

from __future__ import annotations

from neco_bench.core.errors import UsageError


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
    """Describe the layers in words: "last", "block 8", "blocks 3,6,9,11"."""
    if indices == (count - 1,):
        return "last"
    return f"{what}{'s' * (len(indices) > 1)} {','.join(map(str, indices))}"

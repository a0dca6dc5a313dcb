"""The conformance check of encoders on synthetic images.

The position of a feature is measured by changing one cell of the image and finding the cell whose features change most.
Edge cells distinguish a shift by remaining prefix tokens (which wraps to another row) from the small offsets of
convolutions; cells off the diagonal show a transposed grid. Cells next to the expected one count as correct, and the
majority of the cells decides, because attention and convolutions spread changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.core.errors import NecoBenchError
from neco_bench.encoders.base import Encoder

_CELLS = 8  # cells per side of the images used


@dataclass(frozen=True)
class CheckResult:
    """One line of the table: what was checked, whether it passed, and what was measured."""

    name: str
    passed: bool
    detail: str


def check_encoder(encoder: Encoder) -> list[CheckResult]:
    """Check an encoder on synthetic images of 8x8 cells (or the only size that it accepts).

    Lines: input (size and statistics, never failed), shape and stride, finite values, non-square input, deterministic,
    eval mode, batch independence, prefix tokens, grid orientation, locality. Outputs may differ by 1e-4 of
    their largest value in float32 on the CPU, 1e-3 on other devices, 5e-2 in half precision. An error in the encoder
    gives a failed line.
    """
    torch_state = torch.get_rng_state()
    try:
        size = _size(encoder)
        where: list[tuple[str, bool, str]] = []
        checks: dict[str, Callable[[], tuple[bool, str]]] = {
            "input": lambda: (True, _input(encoder)),
            "shape and stride": lambda: _shape(encoder, size),
            "finite values": lambda: _finite(encoder, size),
            "non-square input": lambda: _non_square(encoder, size),
            "deterministic": lambda: _deterministic(encoder, size),
            "eval mode": lambda: _eval_mode(encoder),
            "batch independence": lambda: _batch(encoder, size),
        }
        results = [_line(name, check) for name, check in checks.items()]
        try:
            where = _location(encoder, size)
        except Exception as error:  # an encoder may fail in any way, which the check reports
            where = [(name, False, _error_text(error)) for name in ("prefix tokens", "grid orientation", "locality")]
        return results + [CheckResult(*line) for line in where]
    finally:
        torch.set_rng_state(torch_state)


def _line(name: str, check: Callable[[], tuple[bool, str]]) -> CheckResult:
    try:
        passed, detail = check()
    except Exception as error:  # an encoder may fail in any way, which the check reports
        passed, detail = False, _error_text(error)
    return CheckResult(name, passed, detail)


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draw smooth coloured noise in [0, 1], (count, 3, height, width)."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=True)


def _size(encoder: Encoder) -> int:
    """Return the side in pixels of the images to use: 8 cells, or the first usual size at which the encoder works."""
    size = _CELLS * encoder.stride
    if encoder.only_size or (encoder.size_multiple or encoder.stride) > encoder.stride:
        return encoder.nearest_size(size)
    for side in (size, 224, 256, 384, 448, 518):  # usual sizes of encoders that accept one size only
        if side % encoder.stride == 0:
            with contextlib.suppress(Exception):  # reported by the checks themselves, if no size works
                encoder.encode(_images(1, side, side))
                return side
    return size


def _input(encoder: Encoder) -> str:
    """Return size and statistics of the input, and the range of normalised values from black to white."""
    sides = f"multiples of {encoder.size_multiple or encoder.stride} pixels"
    if encoder.only_size:
        sides = f"{encoder.only_size}x{encoder.only_size} pixels only"
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in (encoder.mean, encoder.std))
    low = min(-m / s for m, s in zip(encoder.mean, encoder.std, strict=True))
    high = max((1 - m) / s for m, s in zip(encoder.mean, encoder.std, strict=True))
    return f"{sides}; mean={mean} std={std} ({encoder.statistics}); values from {low:.2f} to {high:.2f}"


def _tolerance(encoder: Encoder) -> float:
    if encoder.precision != "fp32":
        return 5e-2
    return 1e-4 if encoder.device.type == "cpu" else 1e-3


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


def _shape(encoder: Encoder, size: int) -> tuple[bool, str]:
    features = encoder.encode(_images(2, size, size))
    declared = features.stride == encoder.stride
    detail = f"{size}x{size} gives {tuple(features.map.shape)} at stride {encoder.stride}"
    return declared, detail if declared else f"{detail}, but the features say stride {features.stride}"


def _finite(encoder: Encoder, size: int) -> tuple[bool, str]:
    extremes = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    encoder.encode(extremes)  # raises on NaN or infinite values
    return True, "black and white images too"


def _non_square(encoder: Encoder, size: int) -> tuple[bool, str]:
    if encoder.only_size:
        return True, f"not tried: accepts {size}x{size} only"
    wide = size + 2 * (encoder.size_multiple or encoder.stride)
    for height, width in ((size, wide), (wide, size)):
        try:
            encoder.encode(_images(1, height, width))
        except NecoBenchError as error:
            if size == _CELLS * encoder.stride:
                raise
            return False, (
                f"{error} It works at {size}x{size}: if that is the only size that it accepts, set only_size = {size}."
            )
    return True, f"{size}x{wide} and {wide}x{size}"


def _deterministic(encoder: Encoder, size: int) -> tuple[bool, str]:
    images = _images(2, size, size)
    first = encoder.encode(images).map
    torch.manual_seed(1)
    difference = _difference(encoder.encode(images).map, first)
    passed = difference <= _tolerance(encoder)
    return passed, f"two passes differ by {difference:.1e}" + ("" if passed else ": dropout or other randomness is on")


def _eval_mode(encoder: Encoder) -> tuple[bool, str]:
    training = [name or "the encoder itself" for name, module in encoder.named_modules() if module.training]
    if training:
        return False, f"{len(training)} modules are in train mode: {', '.join(training[:4])}"
    return True, "all modules"


def _batch(encoder: Encoder, size: int) -> tuple[bool, str]:
    images = _images(3, size, size)
    alone = encoder.encode(images[:1]).map
    batched = encoder.encode(images).map[:1]
    other = encoder.encode(torch.cat([images[:1], torch.ones_like(images[:1])])).map[:1]
    difference = max(_difference(batched, alone), _difference(other, alone))
    passed = difference <= _tolerance(encoder)
    return passed, f"alone and in a batch differ by {difference:.1e}" + (
        "" if passed else ": features depend on the other images of the batch"
    )


def _location(encoder: Encoder, size: int) -> list[tuple[str, bool, str]]:
    """Return the lines on prefix tokens, orientation and locality, from the position of the largest change."""
    stride, side = encoder.stride, size // encoder.stride
    # Rows and columns of the changed cells on a grid of 8x8: at both edges, and off the diagonal.
    spots = ((1, 7), (3, 7), (6, 7), (2, 0), (5, 0), (0, 4), (7, 3), (2, 5), (5, 2), (4, 6))
    cells = [(round(r / 7 * (side - 1)), round(c / 7 * (side - 1))) for r, c in spots]
    plain = _images(1, size, size)
    before = encoder.encode(plain).map[0]
    noise = (torch.rand(3, stride, stride, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    peaks, largest = [], 0.0
    for row, column in cells:
        changed = plain.clone()
        changed[0, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = noise
        change = (encoder.encode(changed).map[0] - before).norm(dim=0)
        peaks.append(divmod(int(change.argmax()), side))
        largest = max(largest, float(change.max()))
    if not largest:
        detail = "features do not depend on the image"
        return [(name, name != "locality", detail) for name in ("prefix tokens", "grid orientation", "locality")]

    def explained(place: Callable[[int, int], tuple[int, int]], within: int = 1) -> int:
        expected = [place(*cell) for cell in cells]
        return sum(
            abs(r - y) <= within and abs(c - x) <= within for (r, c), (y, x) in zip(peaks, expected, strict=True)
        )

    def shifted(k: int, within: int = 1) -> int:
        return explained(lambda r, c: divmod(r * side + c + k, side), within)

    right = explained(lambda r, c: (r, c))
    turned = {
        "transposed": explained(lambda r, c: (c, r)),
        "mirrored left to right": explained(lambda r, c: (r, side - 1 - c)),
        "mirrored top to bottom": explained(lambda r, c: (side - 1 - r, c)),
    }
    shifts = [k for k in range(-9, 18) if k]  # no model in use has more than 17 prefix tokens
    shift = max(shifts, key=lambda k: (shifted(k), shifted(k, within=0), -abs(k)))
    turn = max(turned, key=lambda name: turned[name])
    # Another position must explain clearly more changes than the expected one, as convolutions can move single ones.
    is_turn = turned[turn] >= right + 2
    is_shift = shifted(shift) >= max(right + 2, turned[turn])
    prefix = f"features are {abs(shift)} tokens {'later' if shift > 0 else 'earlier'} than expected: "
    prefix += f"{shift} class or register tokens are not removed" if shift > 0 else "the first patch tokens are missing"
    detail = f"for {right} of {len(cells)} changed cells, the features of that cell change most"
    return [
        ("prefix tokens", not is_shift, prefix if is_shift else "all removed"),
        ("grid orientation", not is_turn, f"the grid is {turn}" if is_turn else "rows and columns in order"),
        ("locality", right >= 0.6 * len(cells), detail),
    ]

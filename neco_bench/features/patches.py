"""Patches: the pixel labels of each patch, their majority, and the length of features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.data.base import IGNORE, Void


def patchify(mask: np.ndarray, side: int) -> Tensor:
    """Split a mask into side x side blocks, row-major: (N, side²) uint8 pixel labels; the inverse is `unpatchify`."""
    rows, columns = mask.shape[0] // side, mask.shape[1] // side
    blocks = mask.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side**2)
    return torch.from_numpy(blocks.astype(np.uint8))


def unpatchify(blocks: Tensor, columns: int) -> np.ndarray:
    """Combine blocks (N, side²), row-major in `columns` columns, to a mask."""
    side = round(blocks.shape[1] ** 0.5)
    grid = blocks.view(-1, columns, side, side).transpose(1, 2)
    return grid.reshape(-1, columns * side).cpu().numpy()


def rescaled(features: Tensor, dim: int | None) -> Tensor:
    """Scale features (float32) so that the largest absolute value along `dim` (None: of all) is in [1, 2), if not 0.

    The factor is a power of two, which causes no rounding. Without it, squares of very large or small numbers would be
    outside the range of float32.
    """
    largest = features.abs()
    largest = largest.amax() if dim is None else largest.amax(dim, keepdim=True)
    _, exponent = torch.frexp(largest)
    return features / torch.ldexp(torch.ones_like(largest), exponent - 1)


def unit_length(features: Tensor, dim: int) -> Tensor:
    """Scale features of any length to length 1 along `dim`; 0 stays 0."""
    return F.normalize(rescaled(features, dim), dim=dim)


def patch_view(image: Tensor, stride: int, patch: int) -> np.ndarray:
    """Return a patch and its eight neighbours: (3 s, 3 s, 3) uint8, black outside the image.

    image: (3, H, W) in [0, 1]; stride: s, the side of a patch; patch: its row-major index.
    """
    pixels = (image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    row, column = divmod(patch, image.shape[2] // stride)
    padded = np.pad(pixels, ((stride, stride), (stride, stride), (0, 0)))
    return padded[row * stride : (row + 3) * stride, column * stride : (column + 3) * stride]


def majority_label(labels: Tensor, classes: int, void: Void) -> Tensor:
    """Return the most frequent of the labels (M, V) uint8 of each row, the smallest class id in a tie: (M,) uint8.

    `void` selects how IGNORE is treated: "wins ties" (references that store it as 0), "loses ties" (as 255), or "never
    votes" (it is returned only if there is no other label).
    """
    counts = torch.zeros(len(labels), classes + 1, dtype=torch.int32, device=labels.device)
    one = torch.ones((), dtype=torch.int32, device=labels.device)
    counts.scatter_add_(1, labels.clamp(max=classes).long(), one.expand(labels.shape))
    most, winner = counts[:, :classes].max(1)
    ignored = counts[:, classes]
    is_void = {"wins ties": ignored >= most, "loses ties": ignored > most, "never votes": most == 0}[void]
    return torch.where(is_void, IGNORE, winner).to(torch.uint8)

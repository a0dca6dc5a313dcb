"""Linear heads for depth (the expected value of bins) and normals (a direction), and their predictions at pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from neco_bench.tasks.dense_regression.inputs import InputGrid
from neco_bench.tasks.dense_regression.settings import Settings
from torch import Tensor, nn


class DenseHead(nn.Module):
    """An optional BatchNorm, a convolution, and, for depth, the expected value of bins.

    Depth: K bins c_k, evenly spaced from min_depth to max_depth, have the weights (relu(z_k) + 0.1) / sum(relu(z) +
    0.1), the linear normalisation of the Monocular-Depth-Estimation-Toolbox.
    """

    def __init__(self, channels: int, settings: Settings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.norm = nn.BatchNorm2d(channels) if settings.batch_norm else nn.Identity()
        outputs = settings.bins if settings.target == "depth" else 3 + settings.confidence
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, outputs, settings.kernel, padding=settings.kernel // 2)
        if settings.initial == "normal":
            nn.init.normal_(self.conv.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        centres = torch.linspace(settings.min_depth, settings.max_depth, settings.bins, dtype=torch.float64)
        self.register_buffer("centres", centres.float())

    def forward(self, features: Tensor) -> Tensor:
        """Compute depth (B, 1, u h, u w) or directions (B, 3 or 4, u h, u w) from (B, D, h, w), where u is `upsample`.

        If the kernel is 1, outputs are upsampled instead of features, which is the same function.
        """
        s = self.settings
        features = self.norm(features)
        if s.kernel == 1:
            maps = _enlarged(self.conv(features), s.upsample)
        else:
            maps = self.conv(_enlarged(features, s.upsample))
        if s.target == "normals":
            return maps
        weights = maps.relu() + 0.1
        depth = (weights * self.centres[:, None, None]).sum(1, keepdim=True)  # type: ignore[index]
        return depth / weights.sum(1, keepdim=True)


def _enlarged(maps: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return maps
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def predict(head: DenseHead, features: Tensor, grid: InputGrid, size: tuple[int, int]) -> Tensor:
    """Predict the pixels of frames or crops from the features of their inputs.

    Args:
        head: the head.
        features: (B, D, h, w).
        grid: position of the image in its input.
        size: (H, W) of the frame.

    Returns:
        Depth (B, H, W), or (B, H, W, 3 or 4).
    """
    s, maps = head.settings, head(features)
    if grid.inner != grid.size and not s.keep_padding:
        (top, left), (height, width) = grid.corner, grid.inner
        maps = _resized(maps, grid.size, s.resize)[..., top : top + height, left : left + width]
    maps = _resized(maps, size, s.resize)
    return maps[:, 0] if s.target == "depth" else maps.permute(0, 2, 3, 1)


def _resized(maps: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    if rule == "bicubic_corners":
        return F.interpolate(maps, size, mode="bicubic", align_corners=True)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)

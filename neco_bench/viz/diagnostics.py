"""Diagnostics of dense features: pure functions on feature maps (N, D, h, w) of N images, and on labels of patches.

They are not benchmark scores, but can help to explain a score.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.data.base import IGNORE
from neco_bench.features.patches import rescaled, unit_length
from neco_bench.search.exact import ExactIndex


def norm_outliers(maps: Tensor) -> float:
    """Return the share of patches whose L2 norm exceeds 3 times the median of their image.

    These are the artefact tokens of Darcet et al. (*Vision Transformers Need Registers*, ICLR 2024, section 2.1). They
    use one absolute threshold for one model; a relative threshold allows a comparison of models.
    """
    norms = rescaled(maps, None).flatten(2).norm(dim=1)
    return float((norms > 3 * norms.median(1, keepdim=True).values).float().mean())


def effective_rank(maps: Tensor) -> float:
    """Return exp(entropy) of the normalised singular values of all patches (RankMe; Garrido et al., ICML 2023, eq. 1).

    It is at most D, and small for collapsed features.
    """
    singular = torch.linalg.svdvals(_rows(maps).double())
    share = singular / singular.sum() + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def positional_leakage(maps: Tensor) -> float:
    """Return how well a patch's position is predicted from its feature: R² of ridge regression on x, y in [-1, 1].

    It is fitted on the even images and scored on the odd ones; values below 0 count as 0. Content with a typical
    position (sky above) contributes too, so compare encoders on the same images. Cf. Yang et al., *Denoising Vision
    Transformers*, ECCV 2024, section 3. Needs two images.
    """
    rows, columns = maps.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"), -1)
    place = grid.flatten(0, 1).double()
    fit, test = (_rows(maps[start::2]).double() for start in (0, 1))
    mean, scale = fit.mean(0), fit.std(0) + 1e-6
    fit, test = ((part - mean) / scale for part in (fit, test))
    target = place.repeat(len(fit) // len(place), 1)
    gram = fit.T @ fit + 1e-3 * len(fit) * torch.eye(fit.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, fit.T @ target)
    expected = place.repeat(len(test) // len(place), 1)
    error = (test @ weights - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    return max(0.0, 1 - float(error))


def neighbour_purity(maps: Tensor, labels: np.ndarray) -> float:
    """Return the share of patches whose nearest patch of another image (cosine) has the same label; labels (N, h, w).

    Patches labelled void are left out. In-context retrieval with one neighbour depends on this (Balazevic et al.,
    *Towards In-context Scene Understanding*, NeurIPS 2023). NaN if there is only one image.
    """
    features = unit_length(_rows(maps), 1)
    flat = labels.reshape(len(maps), -1)
    image = np.repeat(np.arange(len(maps)), flat.shape[1])
    labelled = flat.ravel() != IGNORE
    features, image, flat = features[torch.from_numpy(labelled)], image[labelled], flat.ravel()[labelled]
    hits, total = 0, 0
    for number in np.unique(image):
        mine = image == number
        if mine.all():
            continue
        index = ExactIndex(features.shape[1], features.device)
        index.add(features[torch.from_numpy(~mine)])
        nearest = index.search(features[torch.from_numpy(mine)], 1)[1][:, 0].numpy()
        hits += int((flat[~mine][nearest] == flat[mine]).sum())
        total += int(mine.sum())
    return hits / total if total else float("nan")


def shift_sensitivity(maps: Tensor, shifted: Tensor) -> float:
    """Return 1 minus the mean cosine of a patch's features before and after its image is shifted left by one cell.

    shifted: maps of images that are shifted by one stride, (N, D, h, w); columns that enter or leave, and a border of
    one cell, are not compared. It is 0 for a shift-equivariant encoder (Zhang, *Making Convolutional Networks
    Shift-Invariant Again*, ICML 2019).
    """
    before, after = maps[:, :, 1:-1, 2:-1], shifted[:, :, 1:-1, 1:-2]
    return 1 - float((unit_length(before, 1) * unit_length(after, 1)).sum(1).mean())


def principal_colours(maps: Tensor) -> np.ndarray:
    """Return the first three principal components of all patches as red, green and blue, (N, h, w, 3) uint8.

    Each is scaled from its 1st to its 99th percentile.
    """
    rows = _rows(maps).double()
    rows = rows - rows.mean(0)
    components = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    values = rows @ components
    low, high = (torch.quantile(values, q, dim=0) for q in (0.01, 0.99))
    scaled = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    count, _, height, width = maps.shape
    colours = F.pad(scaled, (0, 3 - scaled.shape[1])).view(count, height, width, 3)
    return (colours * 255).round().to(torch.uint8).numpy()


def principal_shares(maps: Tensor) -> list[float]:
    """Return the shares of the variance explained by the components of `principal_colours`, the largest first."""
    rows = _rows(maps).double()
    variances = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0))).flip(0).clamp_min(0)
    return [float(share) for share in variances[:3] / variances.sum().clamp_min(1e-300)]


def relative_norms(maps: Tensor) -> np.ndarray:
    """Return the L2 norm of each patch relative to the median of its image, (N, h, w)."""
    norms = rescaled(maps, None).norm(dim=1)
    relative = norms / norms.flatten(1).median(1).values[:, None, None].clamp_min(1e-12)
    return relative.cpu().double().numpy()


def _rows(maps: Tensor) -> Tensor:
    return rescaled(maps, None).flatten(2).transpose(1, 2).flatten(0, 1).cpu()

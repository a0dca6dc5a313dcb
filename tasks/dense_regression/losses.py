"""Losses of depth and normals on tensors. Pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 1e-3  # metres, added to depths before their logarithm

MEAN_SHARE = 0.15  # of the squared mean in SigLoss

CLIP = 1 - 1e-4  # of cosines before their arc cosine


def sig_loss(prediction: Tensor, depth: Tensor, valid: Tensor, *, with_variance: bool = True) -> Tensor:
    """SigLoss: sqrt(var(g) + 0.15 mean(g)²) with g = ln(p + 0.001) - ln(d + 0.001), of all valid pixels together.

    The scale-invariant loss of Eigen et al. (NeurIPS 2014, eq. 4) with lambda = 0.85 and unbiased variance, as in the
    Monocular-Depth-Estimation-Toolbox. Without the variance it is sqrt(0.15) |mean(g)|: its first 100 calls there.

    Args:
        prediction: depth in metres, above 0, of any shape.
        depth: of that shape.
        valid: which pixels have a depth; at least two.
        with_variance: whether the variance counts.
    """
    g = (prediction[valid] + SHIFT).log() - (depth[valid] + SHIFT).log()
    squared = MEAN_SHARE * g.mean().square()
    return (g.var() + squared).sqrt() if with_variance else squared.sqrt()


def cosine_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """The mean of 1 - cos of the angle between directions (..., 3), over the valid pixels."""
    return 1 - F.cosine_similarity(prediction[valid], normals[valid], dim=-1).mean()


def angular_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Negative log-likelihood of the angle under an angular von Mises-Fisher distribution, as probe3d trains normals.

    kappa theta + ln(1 + exp(-kappa pi)) - ln(kappa² + 1), theta the angle, kappa = ELU(z) + 1.01 (Bae, Budvytis and
    Cipolla, ICCV 2021, eq. 5, without its constant).

    Args:
        prediction: (..., 4), a direction and z.
        normals: (..., 3).
        valid: (...), which pixels have a normal.
    """
    found = prediction[valid]
    cosine = F.cosine_similarity(found[:, :3], normals[valid], dim=-1)
    theta, kappa = cosine.clamp(-CLIP, CLIP).acos(), F.elu(found[:, 3]) + 1.01
    return (kappa * theta + torch.log1p((-kappa * math.pi).exp()) - (kappa.square() + 1).log()).mean()

"""Losses of depth and normals on tensors. Pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sig_loss(prediction: Tensor, depth: Tensor, valid: Tensor, *, with_variance: bool = True) -> Tensor:
    """Compute SigLoss: sqrt(var(g) + 0.15 mean(g)²), g = ln(p + 0.001) - ln(d + 0.001) at all valid pixels.

    The scale-invariant loss of Eigen et al. (NeurIPS 2014, eq. 4) with lambda = 0.85 and unbiased variance, as in the
    Monocular-Depth-Estimation-Toolbox, whose first 100 calls have no variance: sqrt(0.15) |mean(g)|.

    Args:
        prediction: depth in metres, above 0, of any shape.
        depth: depth in metres, of the same shape.
        valid: mask of the pixels that have a depth; at least two.
        with_variance: whether the variance is included.
    """
    g = (prediction[valid] + 0.001).log() - (depth[valid] + 0.001).log()
    squared = 0.15 * g.mean().square()
    return (g.var() + squared).sqrt() if with_variance else squared.sqrt()


def cosine_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Compute the mean of 1 - cosine between directions (..., 3) over the valid pixels."""
    return 1 - F.cosine_similarity(prediction[valid], normals[valid], dim=-1).mean()


def angular_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the angle under an angular von Mises-Fisher distribution, as in probe3d.

    It is kappa theta + ln(1 + exp(-kappa pi)) - ln(kappa² + 1), where theta is the angle and kappa = ELU(z) + 1.01
    (Bae, Budvytis and Cipolla, ICCV 2021, eq. 5, without its constant).

    Args:
        prediction: (..., 4), a direction and z.
        normals: (..., 3).
        valid: (...), mask of the pixels that have a normal.
    """
    predicted = prediction[valid]
    cosine = F.cosine_similarity(predicted[:, :3], normals[valid], dim=-1)
    limit = 1 - 1e-4  # the gradient of the arc cosine is infinite at 1
    theta, kappa = cosine.clamp(-limit, limit).acos(), F.elu(predicted[:, 3]) + 1.01
    return (kappa * theta + torch.log1p((-kappa * math.pi).exp()) - (kappa.square() + 1).log()).mean()

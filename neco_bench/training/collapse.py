"""A measure of collapse that needs no labels: the effective number of dimensions of patch features."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 2048  # maximum number of features for the computation


def effective_rank(features: Tensor) -> float:
    """Compute the effective rank of features (N, D), a number from 1 to min(N, D).

    It is the exponential of the entropy of the singular values divided by their sum (Roy and Vetterli, "The effective
    rank: a measure of effective dimensionality", EUSIPCO 2007), for features without subtraction of the mean (Garrido
    et al., "RankMe", ICML 2023). It is 1 if all features are the same. If there are more than MOST features, MOST of
    them are used at equal distances. NaN for features that are not finite or all 0.
    """
    step = -(-len(features) // MOST)
    values = features.detach()[::step].float().cpu()
    if not (torch.isfinite(values).all() and values.any()):
        return float("nan")
    singular = torch.linalg.svdvals(values)
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())

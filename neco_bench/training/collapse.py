"""A measure of collapse that needs no labels: how many dimensions the features of patches fill."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 2048  # features that it is computed of


def effective_rank(features: Tensor) -> float:
    """Compute the effective rank of features (N, D), a number from 1 to min(N, D).

    The exponential of the entropy of the singular values divided by their sum (Roy and Vetterli, "The effective rank: a
    measure of effective dimensionality", EUSIPCO 2007), of features as they are, without their mean taken out (Garrido
    et al., "RankMe", ICML 2023): 1 where all are the same. Of more than MOST features, MOST are taken at equal
    distances. NaN for features that are not finite or all 0.
    """
    step = -(-len(features) // MOST)
    values = features.detach()[::step].float().cpu()
    if not (torch.isfinite(values).all() and values.any()):
        return float("nan")
    singular = torch.linalg.svdvals(values)
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())

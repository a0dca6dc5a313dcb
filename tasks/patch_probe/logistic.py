"""Multinomial logistic regression on patches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.patch_probe.patches import CHUNK
from scipy.optimize import minimize
from torch import Tensor

from neco_bench.core.errors import NumericalError


@dataclass
class Logistic:
    """A fitted multinomial model: weights (K, D + 1), with intercepts in the last column, of classes (K,) uint8.

    converged: whether it reached the optimum before the maximum number of iterations, and the line search succeeded.
    """

    weights: Tensor
    classes: Tensor
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits (n, K) from features (n, D), on the device of the weights."""
        return F.linear(features.to(self.weights), self.weights[:, :-1], self.weights[:, -1])

    def predict(self, features: Tensor) -> Tensor:
        """Return class ids (N,) uint8 of features (N, D), on the CPU."""
        return torch.cat([self.classes[self.logits(part).argmax(1).cpu()] for part in features.split(CHUNK)])


def fit_logistic(
    features: Tensor, labels: Tensor, c: float, *, max_iterations: int, tolerance: float, device: torch.device
) -> Logistic:
    """Minimise c * (sum of cross-entropies) + |W|²/2 for features (N, D) and labels (N,) uint8; intercepts are free.

    Uses scikit-learn on CPUs and `fit_on_device` on GPUs, both in float64: in float32, L-BFGS stops before the optimum.
    Only classes that occur are fitted; two classes have a single vector of weights. Raises NumericalError if features
    are not finite.
    """
    if not torch.isfinite(features).all():
        raise NumericalError(f"Logistic regression with C = {c:g} was given features that are not finite.")
    present, target = labels.unique(return_inverse=True)
    if len(present) == 1:
        weights = torch.zeros(1, features.shape[1] + 1, dtype=torch.float64, device=device)
        return Logistic(weights, present, 0, converged=True)
    if device.type == "cuda":
        return fit_on_device(features, target, present, c, max_iterations, tolerance, device)
    from sklearn.exceptions import ConvergenceWarning  # takes a second
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=max_iterations, tol=tolerance).fit(
            features.double().numpy(), target.numpy()
        )
    weights = torch.from_numpy(np.column_stack([model.coef_, model.intercept_]))
    if len(present) == 2:  # scikit-learn returns the weights of the second class
        weights = torch.cat([torch.zeros_like(weights), weights])
    stopped_early = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Logistic(weights, present, int(model.n_iter_[0]), converged=not stopped_early)


def fit_on_device(
    features: Tensor,
    target: Tensor,
    present: Tensor,
    c: float,
    max_iterations: int,
    tolerance: float,
    device: torch.device,
) -> Logistic:
    """Do the same by SciPy's L-BFGS-B with scikit-learn's options; the device multiplies CHUNK rows at a time.

    A step on all of ADE20K needs 10^12 operations, and scikit-learn can use GPUs only on Python 3.11 and newer.
    target: (N,) int64 indices into the classes `present`.
    """
    target = target.to(device)
    shape = len(present), features.shape[1] + 1
    strength = 1 / (c * len(features)) * (2 if len(present) == 2 else 1)  # one vector of weights is split into two here

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(shape), device=device, requires_grad=True)
        loss = weights[:, :-1].square().sum() * strength / 2
        loss.backward()
        total = loss.item()
        for x, y in zip(features.split(CHUNK), target.split(CHUNK), strict=True):
            logits = F.linear(x.to(weights), weights[:, :-1], weights[:, -1])
            loss = F.cross_entropy(logits, y, reduction="sum") / len(features)
            loss.backward()
            total += loss.item()
        assert weights.grad is not None  # noqa: S101 - after `backward`
        return total, weights.grad.cpu().numpy().ravel()

    fitted = minimize(
        objective,
        np.zeros(shape).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 50 * max_iterations,
            "maxls": 50,
            "gtol": tolerance,
            "ftol": 64 * np.finfo(float).eps,
        },
    )
    weights = torch.from_numpy(fitted.x.reshape(shape)).to(device)
    return Logistic(weights, present, fitted.nit, fitted.success)

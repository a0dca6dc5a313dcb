"""Encoders: the `Encoder` interface, its conformance check, and adapters that build encoders from specs.

Importing this package does not import torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neco_bench.encoders.base import DenseFeatures, Encoder, WeightsReport
    from neco_bench.encoders.check import CheckResult, check_encoder
    from neco_bench.encoders.identity import content_id
    from neco_bench.encoders.load import load_encoder
    from neco_bench.encoders.spec import model_info
    from neco_bench.encoders.zoo import describe_models

__all__ = [
    "CheckResult",
    "DenseFeatures",
    "Encoder",
    "WeightsReport",
    "check_encoder",
    "content_id",
    "describe_models",
    "load_encoder",
    "model_info",
]

_MODULES = {
    "base": ("DenseFeatures", "Encoder", "WeightsReport"),
    "check": ("CheckResult", "check_encoder"),
    "load": ("load_encoder",),
    "zoo": ("describe_models",),
    "spec": ("model_info",),
    "identity": ("content_id",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

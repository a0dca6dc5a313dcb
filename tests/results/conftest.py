"""A maker of results with sensible defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from neco_bench.results import Result


@pytest.fixture
def make_result() -> Callable[..., Result]:
    def make(value: float = 0.5, **changes: Any) -> Result:
        fields: dict[str, Any] = {
            "key": "0123456789abcdef",
            "model": "dino_vits16",
            "task": "camvid_ic",
            "family": "in_context",
            "protocol": "hbird-2",
            "primary_metric": "miou",
            "metrics": {"miou": value},
            "per_class": {},
            "ci95": {"miou": (max(value - 0.01, 0.0), min(value + 0.02, 1.0))},
            "n_images": 233,
            "seed": 0,
            "status": "ok",
            "provenance": {"weights_id": "a" * 64, "protocol_hash": "b" * 64},
            "timing": {"total": 2.5},
            "peak_memory_mb": 100.0,
        }
        if changes.get("status") == "failed":
            fields |= {"metrics": {}, "ci95": {}, "error": "NaN features in layer 11"}
        return Result(**(fields | changes))

    return make

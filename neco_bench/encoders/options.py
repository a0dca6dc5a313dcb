"""Allowed values for options of a model spec. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

Layers = int | str | Sequence[int] | None

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # option: torch's name

POS_INTERP = ("timm", "scale_offset", "size_antialias")

"""The table of timm architectures in docs/pages/encoders.md.

python -m tests.encoders.timm_table              writes it again, after an upgrade of timm
python -m tests.encoders.timm_table NAME ...     prints rows
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from neco_bench.core.errors import UsageError
from neco_bench.encoders.adapters.timm_models import wrap
from neco_bench.encoders.adapters.timm_sizes import create
from neco_bench.encoders.spec import parse_spec

DOCUMENT = Path(__file__).parents[2] / "docs" / "pages" / "encoders.md"
ROW = re.compile(r"^\| `(\w+)` \|.*\|$", re.MULTILINE)


def rows() -> dict[str, str]:
    """The rows of the document by architecture."""
    return {match[1]: match[0] for match in ROW.finditer(DOCUMENT.read_text(encoding="utf-8"))}


def row_of(name: str) -> str:
    """The row of an architecture: its last level on the meta device, at 448 pixels or the nearest size it takes."""
    try:
        with torch.device("meta"):
            model = create(name, 0, num_classes=0).eval()
        encoder: Any = wrap(model, parse_spec(f"timm:{name}?pretrained=false"), twin=model)
    except UsageError:
        return f"| `{name}` | | | not supported | |"
    size = encoder.nearest_size(448)
    with torch.inference_mode(), torch.device("meta"):
        images = torch.empty(1, 3, size, size)
        features = encoder._encode(images, final_norm=encoder.has_final_norm, attention=False).map
    if features.shape != (1, encoder.embed_dim, size // encoder.stride, size // encoder.stride):
        raise AssertionError(f"{name}: {tuple(features.shape)} at {size}, stride {encoder.stride}")
    takes = f"multiples of {encoder.size_multiple or encoder.stride}"
    if encoder.only_size:
        takes = f"{encoder.only_size} only"
    elif getattr(encoder, "level", None) and encoder.level.rebuilt:
        takes += ", built for each size"
    return f"| `{name}` | {encoder.embed_dim} | {encoder.stride} | {takes} | {size} |"


if __name__ == "__main__":
    if sys.argv[1:]:
        print("\n".join(map(row_of, sys.argv[1:])))
    else:
        DOCUMENT.write_text(ROW.sub(lambda match: row_of(match[1]), DOCUMENT.read_text(encoding="utf-8")), "utf-8")

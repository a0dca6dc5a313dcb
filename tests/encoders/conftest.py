"""Shared by the encoder tests: no network, an empty cache, and one random model in the official key layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, new_cache: Path) -> None:
    monkeypatch.setenv("NECO_BENCH_OFFLINE", "1")


def random_state(name: str, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """A state dict of a timm model in which every tensor is random, position embeddings and layer scales too."""
    model = timm.create_model(name, num_classes=0, **options)
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=generator) * 0.05 for k, v in model.state_dict().items()}
    for key in state:
        if ("norm" in key and key.endswith("weight")) or key.endswith("gamma"):
            state[key] += 1.0
        if key == "pos_embed":
            state[key] *= 10
    return state


@pytest.fixture(scope="session")
def states() -> Callable[[str], dict[str, Tensor]]:
    """Random states by timm name, made once. Do not change them."""
    made: dict[str, dict[str, Tensor]] = {}

    def get(name: str) -> dict[str, Tensor]:
        if name not in made:
            made[name] = random_state(name)
        return made[name]

    return get


@pytest.fixture
def images() -> Tensor:
    """Two images of 112x168 in [0, 1]: multiples of 14 and 8, not square."""
    return torch.rand(2, 3, 112, 168, generator=torch.Generator().manual_seed(5))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def reference_map(
    name: str, state: dict[str, Tensor], images: Tensor, statistics: tuple[tuple[float, ...], ...] | None = None
) -> Tensor:
    """What timm itself gives for these weights: final-norm patch features (B, D, h, w) of images in [0, 1]."""
    model: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(state)
    statistics = statistics or (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    with torch.inference_mode():
        return model.forward_intermediates((images - mean) / std, indices=1, norm=True, intermediates_only=True)[0]

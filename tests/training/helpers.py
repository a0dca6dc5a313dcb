"""A small ViT, batches of generated views, and recipes that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from neco_bench.encoders import Encoder, load_encoder
from neco_bench.training.batches import Item, TrainBatch, collate
from neco_bench.training.images import open_images
from neco_bench.training.options import TrainOptions
from neco_bench.training.recipe import Recipe
from neco_bench.training.trainer import Processes, Trainer
from neco_bench.training.views import ViewSettings, make_views

SMALL = "timm:test_vit?pretrained=false&seed=0"


def small_encoder(spec: str = SMALL) -> Encoder:
    return load_encoder(spec, device="cpu")


def recipe(**changes: Any) -> Recipe:
    values = {
        "base": SMALL,
        "batch_size": 4,
        "steps": 6,
        "global_size": 64,
        "local_size": 32,
        "head_hidden": 32,
        "head_dim": 16,
        "lr_backbone": 1e-3,
        "lr_head": 1e-3,
    }
    return Recipe(**{**values, **changes})


def batch(images: int = 3, seed: int = 0, settings: Recipe | None = None) -> TrainBatch:
    """Views of noise images, normalised."""
    of = settings or recipe()
    views = ViewSettings(global_size=of.global_size, local_size=of.local_size, locals=of.locals)
    rng = np.random.default_rng(seed)
    items = [
        Item(make_views(rng.integers(0, 256, (90, 120, 3), np.uint8), views, rng), f"image {i}", [])
        for i in range(images)
    ]
    made = collate(items)
    assert isinstance(made, TrainBatch)
    return made.normalised(small_encoder(), torch.device("cpu"))


def make_trainer(settings: Recipe, out: Path) -> Trainer:
    """A trainer on eight generated images, in this process alone."""
    options = TrainOptions(out=out, data="shapes:8", workers=0, progress=False)
    return Trainer(settings, options, open_images("shapes:8"), Processes(torch.device("cpu")))


def flat(module: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])

"""The architecture of the recipes `tiny_base` and `tiny_neco`, as a timm model: it trains in minutes on two cores."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs({"neco_tiny_patch8": {"input_size": (3, 112, 112), "num_classes": 0}})


@register_model
def neco_tiny_patch8(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return a ViT with 0.8 million parameters: patches of 8 pixels, width 128, 4 blocks of 4 heads, no class token."""
    facts: dict[str, Any] = {"img_size": 112, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
    facts |= {"class_token": False, "global_pool": ""} | options
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "neco_tiny_patch8", pretrained, **facts)
    return model

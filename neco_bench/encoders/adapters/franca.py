"""Franca's architectures as timm models: ViTs of patch 14 with SwiGLU blocks and no registers.

Venkataramanan et al. Franca: Nested Matryoshka clustering for scalable visual representation learning. 2025.
arXiv:2507.14137; github.com/valeoai/Franca, FrancaConfig in franca/hub/backbones.py. Its giant is timm's
vit_giant_patch14_dinov2. The heads that remove positions from its patch tokens (RASA) are not included.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from timm.layers import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

_FACTS = {"input_size": (3, 518, 518), "num_classes": 0}
_FACTS |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

default_cfgs = generate_default_cfgs({"vit_base_patch14_franca": _FACTS, "vit_large_patch14_franca": _FACTS})


def _vit(name: str, pretrained: bool, width: int, options: dict[str, Any]) -> VisionTransformer:
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8  # DINOv2's "fused" SwiGLU; fc1 makes the gates and the values
    facts: dict[str, Any] = {"img_size": 518, "patch_size": 14, "embed_dim": width}
    facts |= {"num_heads": width // 64, "init_values": 1e-5, "mlp_ratio": 2 * hidden / width}
    facts |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} | options
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, name, pretrained, **facts)
    return model


@register_model
def vit_base_patch14_franca(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return Franca's ViT-B/14."""
    return _vit("vit_base_patch14_franca", pretrained, 768, {"depth": 12, **options})


@register_model
def vit_large_patch14_franca(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return Franca's ViT-L/14."""
    return _vit("vit_large_patch14_franca", pretrained, 1024, {"depth": 24, **options})

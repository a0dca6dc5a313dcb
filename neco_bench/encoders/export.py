"""Write an encoder's weights in layouts of other code.

timm: the state dict of the timm model. dinov2: the names of the official DINOv2 models of torch.hub, which NeCo's and
DINO's ViTs also use (without LayerScale and registers).

timm's models with registers have no separate position of the class token: it is added to the class token. The official
layout has one, so a zero is written. Features are the same, but the tensors may differ from those of the original file.

A file contains no rule for resizing position embeddings: the code that reads it applies its own. timm uses
`size_antialias`, and so does torch.hub's DINOv2 for models with registers; for models without, it uses `scale_offset`.
If the encoder has another rule, features are equal only at the size of its own grid, and a warning is logged.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from neco_bench.core.errors import UsageError, did_you_mean
from neco_bench.core.files import write_whole
from neco_bench.encoders.adapters.timm_models import TimmStages, TimmTokens, TimmViT
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.weights import UNUSED, inner_module

log = logging.getLogger("neco_bench")

READERS = {"dinov2": "torch.hub's model", "timm": "timm"}  # by layout, the code that reads its files


def check_target(layout: str, path: Path, overwrite: bool = False) -> None:
    """Check that such a file can be written. Raises `UsageError` (layout, suffix, an existing file)."""
    if layout not in READERS:
        raise UsageError(f"Unknown layout {layout!r}: use {' or '.join(READERS)}.{did_you_mean(layout, READERS)}")
    if path.suffix not in (".safetensors", ".pth"):
        raise UsageError(f"{path} must end in .safetensors or .pth, which selects the file format.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists. Choose another name, or replace it with --overwrite.")


def export(encoder: Encoder, layout: str, path: Path, overwrite: bool = False) -> Path:
    """Write the encoder's weights (float32, on the CPU) to `path` in a layout, atomically, and return `path`.

    Logs a warning if the code of the layout resizes positions by another rule than the encoder.
    Raises `UsageError` (as `check_target`, and an encoder that has no such layout) and `NecoBenchError` (a full disk).
    """
    check_target(layout, path, overwrite)
    tensors = _as_dinov2(encoder) if layout == "dinov2" else _as_timm(encoder)
    reader_rule = "scale_offset" if layout == "dinov2" and "register_tokens" not in tensors else "size_antialias"
    encoder_rule = "size_antialias" if encoder.pos_interp == "timm" else encoder.pos_interp
    if isinstance(encoder, TimmViT) and encoder_rule != reader_rule:
        model: Any = inner_module(encoder)
        rows, columns = (side * encoder.stride for side in model.patch_embed.grid_size)
        log.warning(
            "%s: %s resizes position embeddings by %s, this encoder by %s: features are equal at %d x %d pixels only.",
            path,
            READERS[layout],
            reader_rule,
            encoder_rule,
            columns,
            rows,
        )
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        content = save(tensors, {"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    write_whole(path, content)
    return path


def _as_timm(encoder: Encoder) -> dict[str, Tensor]:
    if not isinstance(encoder, TimmViT | TimmTokens | TimmStages):
        raise UsageError(f"Model {encoder.name!r} is not built by timm, so it has no timm layout.")
    return inner_module(encoder).state_dict()


def _as_dinov2(encoder: Encoder) -> dict[str, Tensor]:
    if not isinstance(encoder, TimmViT):
        raise UsageError(f"Model {encoder.name!r} has no dinov2 layout; only plain ViTs of timm have one.")
    model: Any = inner_module(encoder)
    unsupported = ["another kind of block"] if type(model.blocks[0]) is not Block else _unsupported(model)
    if unsupported:
        raise UsageError(
            f"Model {encoder.name!r} has no dinov2 layout, which does not support {', '.join(unsupported)}."
        )
    result: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if UNUSED.match(name):
            continue
        if isinstance(model.blocks[0].mlp, GluMlp):
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        result[{"reg_token": "register_tokens"}.get(name, name)] = value
    positions, token = result["pos_embed"], result["cls_token"]
    if model.no_embed_class:
        result["pos_embed"] = torch.cat([torch.zeros_like(token), positions], 1)
    if "blocks.0.ls1.gamma" in result:  # DINO's own ViTs have neither LayerScale nor a mask token
        result["mask_token"] = torch.zeros_like(token[0])
    return result


def _unsupported(model: Any) -> list[str]:
    """Return the parts of a plain ViT of timm that the DINOv2 layout does not support, as text."""
    block = model.blocks[0]
    norms, mlp = (block.norm1, block.norm2, model.norm), block.mlp
    linear = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    gated = isinstance(mlp, GluMlp) and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last
    faults = {
        "no class token": model.cls_token is None,
        "positions for its registers": model.reg_token is not None and not model.no_embed_class,
        "another patch embedding": {*model.patch_embed.state_dict()} != {"proj.weight", "proj.bias"},
        "a norm before its blocks": not isinstance(model.norm_pre, nn.Identity),
        "another attention": type(block.attn) is not Attention or {*block.attn.state_dict()} != linear,
        "another MLP": not gated and not (type(mlp) is Mlp and type(mlp.act) is nn.GELU),
        "no norm after its blocks, or norms of another kind": not all(isinstance(n, nn.LayerNorm) for n in norms),
    }
    return [fault for fault, there in faults.items() if there]

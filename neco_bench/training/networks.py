"""Student and teacher: an encoder with a projection head. `encoders.trainable` prepares encoders for training.

Deviations from the official code: stochastic depth and all other randomness depend only on (seed, step, position in the
batch), so that a run can be resumed exactly, on any number of processes. Batch normalisation, in encoders that have it,
keeps its initial statistics. Embeddings that no loss term uses are not computed. If an encoder draws random numbers
itself (dropout), torch's generators are seeded by (seed, step, process): such a run can be resumed exactly, but depends
on the number of processes.

DINOv2 with registers: the official model trains a class token and its position as two parameters; timm's model has one
parameter, their sum. Both have the same gradient, so the sum is trained with twice the learning rate and the single
weight decay, in its own parameter group: after each step, the features are those of the official model. The two
parameters themselves are not recovered: exported files contain their sum, and `clip_norm` counts its gradient once.
With `hub:`, both are trained.

Agreement with the official code for equal draws (tests/training/test_reference.py): in float64, the weights after three
steps agree to 1e-7 of their change. In float32, losses agree to 1e-6 and weights to 1e-3: AdamW's first steps have the
length of the learning rate for any gradient, so entries whose gradient is only rounding (the biases of the keys, which
a softmax ignores) can move in either direction, as also between machines.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.encoders.adapters.baselines import BINS
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.trainable import Regularisation, blocks_of, check_has_weights, prepare
from neco_bench.encoders.weights import inner_module
from neco_bench.training.recipe import Recipe


def projection_head(width: int, recipe: Recipe, stride: int) -> nn.Sequential:
    """Return an MLP with GELU and `head_layers` linear layers, from the width of the encoder to `head_dim`, or to the
    size of the targets of `mim`."""
    last = recipe.head_dim
    if recipe.objective == "mim":
        last = 3 * stride * stride if recipe.hidden_target == "pixels" else 4 * (BINS + 3)
    widths = [width, *[recipe.head_hidden] * (recipe.head_layers - 1), last]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    head = nn.Sequential(*layers[:-1])
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head


class Network(nn.Module):
    """An encoder and its projection head, from normalised images to embeddings of patches (of length 1 for NeCo)."""

    def __init__(self, encoder: Encoder, recipe: Recipe, seed: int, compiled: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.record_features = False
        self.features: Tensor | None = None  # (B, D, h, w) of the first group of a call, if recorded
        self.unit = recipe.objective == "neco"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection_head = projection_head(encoder.embed_dim, recipe, encoder.stride)
        self._run = torch.compile(self._encode) if compiled else self._encode

    def _encode(self, images: Tensor, attention: bool) -> Any:
        norm = self.encoder.has_final_norm and self.encoder.final_norm
        return self.encoder._encode(images, final_norm=norm, attention=attention)

    def attention(self, images: Tensor) -> Tensor:
        """Compute the class-token attention (B, heads, h, w) of the last block."""
        return self._encode(images, True).attention

    def forward(self, groups: list[Tensor], needed: list[Tensor]) -> list[Tensor]:
        """Compute embeddings (B, E, h, w) of each group (B, 3, H, W) of images, float32 (float64 of a float64 network).

        needed: for each group (B, h, w) bool, the patches that are needed; the embeddings of others are 0.
        """
        outputs: list[Tensor] = []
        for images, mask in zip(groups, needed, strict=True):
            features = self._run(images, False).map
            if self.record_features and not outputs:
                self.features = features.detach()
            embedded = self.projection_head(features.permute(0, 2, 3, 1)[mask])
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
            embedded = F.normalize(embedded, dim=-1) if self.unit else embedded
            canvas = embedded.new_zeros(*mask.shape, embedded.shape[-1])
            outputs.append(canvas.masked_scatter(mask[..., None], embedded).permute(0, 3, 1, 2))
        return outputs


def make_trainable(encoder: Encoder, recipe: Recipe, shard: RankShard, checkpointing: bool) -> None:
    """Prepare the student in place: frozen parts, stochastic depth, gradient checkpointing.

    Raises the errors of `trainable.prepare`, and UsageError if the encoder has nothing to train, or no blocks to
    select.
    """
    check_has_weights(encoder)
    trainable = recipe.trainable_blocks
    encoder.requires_grad_(trainable is None)
    if trainable is not None:
        blocks = blocks_of(encoder)
        numbers = list(range(len(blocks)))[trainable:] if isinstance(trainable, int) else trainable
        if not numbers or not all(-len(blocks) <= i < len(blocks) for i in numbers):
            raise UsageError(f"trainable_blocks={trainable}: --base {encoder.name!r} has {len(blocks)} blocks, from 0.")
        for i in numbers:
            blocks[i].requires_grad_()
    prepare(encoder, recipe.local_size, shard, Regularisation(recipe.drop_path, checkpointing=checkpointing))


def folded_class_token(encoder: Encoder) -> nn.Parameter | None:
    """Return the class token of timm's DINOv2 with registers, the sum of two parameters of the official model.

    None for other encoders. (RADIO, which timm builds in the same way, has no position of its class tokens.)
    """
    model: Any = inner_module(encoder)
    if "dinov2" not in str((getattr(model, "pretrained_cfg", None) or {}).get("architecture")):
        return None
    folded = getattr(model, "no_embed_class", False) and getattr(model, "reg_token", None) is not None
    return model.cls_token if folded else None


def parameter_groups(network: Network) -> list[dict[str, Any]]:
    """Return the groups of trainable parameters for the optimizer.

    They are encoder and head, each with weight decay (two dimensions or more) and without (biases, norms), and a fifth
    group for a class token that is a sum of two. `part` names the part; `summands` is the number of parameters of the
    official model in the sum.
    """
    groups = []
    folded = folded_class_token(network.encoder)
    for part, of_encoder in (("backbone", True), ("head", False)):
        named = [p for name, p in network.named_parameters() if name.startswith("encoder.") == of_encoder]
        for decays in (True, False):
            group = [p for p in named if p.requires_grad and (p.dim() > 1) == decays and p is not folded]
            if group:
                groups.append({"params": group, "part": part, "decays": decays, "summands": 1})
    if folded is not None and folded.requires_grad:
        groups.append({"params": [folded], "part": "backbone", "decays": True, "summands": 2})
    return groups

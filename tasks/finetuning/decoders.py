"""Segmenter's decoders (Strudel et al., ICCV 2021, section 3.2), which map patch features to class scores.

Constants are those of rstrudel/segmenter. Dropout, unlike there, depends only on (seed, step, place in the batch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.rng import item_rng

_INITIAL_STD = 0.02  # of weights


class ItemDropout(nn.Module):
    """Dropout that depends only on (seed, step, place of the image in the batch of all processes).

    number: number of this module, which differs between modules.
    """

    def __init__(self, rate: float, number: int, shard: RankShard) -> None:
        super().__init__()
        self.rate, self.number, self.shard = rate, number, shard

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of x (B, ...), for the images of the shard in order."""
        if not self.training or not self.rate:
            return x
        draws = torch.stack([self._draws(x[i], self.shard.start + i) for i in range(len(x))])
        return x * (draws >= self.rate) / (1 - self.rate)

    def _draws(self, like: Tensor, place: int) -> Tensor:
        seed = item_rng(self.shard.seed, "dropout", self.shard.batch_number, self.number, place).integers(2**63)
        generator = torch.Generator(like.device).manual_seed(int(seed))
        return torch.rand(like.shape, generator=generator, device=like.device)


class LinearDecoder(nn.Linear):
    """An affine map from a patch's features to class scores."""

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__(dimension, classes)
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """Compute scores (B, K, h, w) from features (B, D, h, w)."""
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class Attention(nn.Module):
    """Self-attention with dropout of the weights and of the output."""

    def __init__(self, width: int, heads: int, dropouts: list[ItemDropout]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop_weights, self.drop_output = dropouts

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        mixed = (self.drop_weights(weights) @ value).transpose(1, 2).flatten(2)
        return self.drop_output(self.project(mixed))


class Block(nn.Module):
    """A transformer block with a norm before each of its two branches."""

    def __init__(self, width: int, heads: int, rate: float, number: int, shard: RankShard) -> None:
        super().__init__()
        drops = [ItemDropout(rate, 4 * number + i, shard) for i in range(4)]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, drops[:2])
        expand, contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), drops[2], contract, drops[3])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class MaskTransformer(nn.Module):
    """Transformer over patches and class tokens; the score of a class at a patch is the cosine of the two.

    A LayerNorm over the classes is applied to the cosines.
    """

    def __init__(self, dimension: int, classes: int, layers: int, dropout: float, shard: RankShard) -> None:
        super().__init__()
        heads = next(n for n in range(max(1, dimension // 64), 0, -1) if dimension % n == 0)
        self.classes = classes
        self.embed = nn.Linear(dimension, dimension)
        self.tokens = nn.Parameter(torch.empty(1, classes, dimension))
        self.blocks = nn.ModuleList(Block(dimension, heads, dropout, i, shard) for i in range(layers))
        self.norm, self.norm_scores = nn.LayerNorm(dimension), nn.LayerNorm(classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.tokens, std=_INITIAL_STD)
        self.patch_map = nn.Parameter(dimension**-0.5 * torch.randn(dimension, dimension))
        self.class_map = nn.Parameter(dimension**-0.5 * torch.randn(dimension, dimension))

    def forward(self, features: Tensor) -> Tensor:
        """Compute scores (B, K, h, w) from features (B, D, h, w)."""
        tokens = self.embed(features.flatten(2).transpose(1, 2))
        tokens = torch.cat([tokens, self.tokens.expand(len(tokens), -1, -1).to(tokens.dtype)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        patches = F.normalize(tokens[:, : -self.classes] @ self.patch_map, dim=-1)
        classes = F.normalize(tokens[:, -self.classes :] @ self.class_map, dim=-1)
        scores = self.norm_scores(patches @ classes.transpose(1, 2))
        return scores.transpose(1, 2).unflatten(2, features.shape[-2:])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
        nn.init.zeros_(module.bias)

"""Student and teacher: an encoder with a projection head, and what makes an encoder trainable.

Deviations from the official code: stochastic depth and all other randomness depend on (seed, step, position in the
batch) alone, so that a run can be resumed exactly, on any number of processes; batch normalisation, in encoders that
have it, keeps the statistics it came with; embeddings that no loss term reads are not computed. Where an
encoder draws numbers of its own (dropout), torch's generators are seeded by (seed, step, process): such a run can be
resumed exactly, but does depend on the number of processes.

DINOv2 with registers: the official model trains a class token and a position of it, which are one parameter, their sum,
in timm's. Both have the same gradient, so the sum learns at twice the rate and decays at the single one, which its own
parameter group does here: after each step the features are those of the official model. The two parameters themselves
are lost: exported files hold their sum, and `clip_norm` counts its gradient once. Through `hub:` both are trained.

How near this is to the protocol of the official code, at equal draws (tests/training/test_reference.py): in float64 the
weights of three steps agree to 1e-7 of how far they moved. In float32 losses agree to 1e-6 and weights to 1e-3: AdamW's
first steps are as long as the learning rate whatever the gradient, so that entries with no gradient but rounding (the
biases of the keys, which a softmax ignores) go either way, as they do from one machine to another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.rng import item_rng
from neco_bench.encoders.adapters.baselines import BINS
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.weights import inner_module
from neco_bench.training.recipe import Recipe

log = logging.getLogger("neco_bench")

_BLOCK_LISTS = ("blocks", "stages", "layers", "layer")


class StochasticDepth(nn.Module):
    """Drops a residual branch per image, and scales what it keeps (Huang et al., ECCV 2016).

    number: of the branch, or of the first of those that share this module. exact: as in the last block of DINOv2, a
    fixed number of images, floor(n (1 - rate)), keeps its branch.
    """

    def __init__(self, rate: float, number: int, shard: RankShard, exact: bool = False) -> None:
        super().__init__()
        self.rate, self.number, self.shard, self.exact = rate, number, shard, exact
        self.calls = 0  # since its block began

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch x (views * images, ...) of some images."""
        if not self.training:
            return x
        number = self.number + self.calls
        self.calls += 1
        shard = self.shard
        views = len(x) // shard.images
        # Equal for every call with tensors of this shape of a batch: gradient checkpointing repeats the call.
        draws = item_rng(shard.seed, "drop_path", shard.batch_number, number, *x.shape[1:]).random((views, shard.total))
        if self.exact:
            count = max(1, math.floor(draws.size * (1 - self.rate)))
            keep = (draws.ravel().argsort().argsort().reshape(draws.shape) < count) * (draws.size / count)
        else:
            keep = (draws >= self.rate) / (1 - self.rate)
        mine = torch.from_numpy(keep[:, shard.start : shard.start + shard.images].reshape(-1))
        return x * mine.to(x.device, x.dtype, non_blocking=True).view(-1, *[1] * (x.dim() - 1))


@contextlib.contextmanager
def seeded(shard: RankShard, device: torch.device) -> Iterator[None]:
    """Let what an encoder draws by itself depend on (seed, step, process) alone; put torch's generators back after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(item_rng(shard.seed, "own", shard.batch_number, shard.start).integers(2**63)))
        yield


def projection_head(width: int, recipe: Recipe, stride: int) -> nn.Sequential:
    """Make an MLP with GELU, `head_layers` linear layers, from the width of the encoder to `head_dim`, or to what
    `mim` predicts."""
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

        needed: for each group (B, h, w) bool, the patches that will be read; the embeddings of others are 0.
        """
        outputs = []
        for images, mask in zip(groups, needed, strict=True):
            features = self._run(images, False).map
            embedded = self.projection_head(features.permute(0, 2, 3, 1)[mask])
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
            embedded = F.normalize(embedded, dim=-1) if self.unit else embedded
            canvas = embedded.new_zeros(*mask.shape, embedded.shape[-1])
            outputs.append(canvas.masked_scatter(mask[..., None], embedded).permute(0, 3, 1, 2))
        return outputs


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    """List the blocks of a transformer, or the stages of a hierarchical network; none where no name is known."""
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] in _BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential):
            return [part for part in module if not isinstance(part, nn.Identity)]
        if hasattr(module, "layer1") and hasattr(module, "layer4"):
            return [getattr(module, f"layer{i}") for i in range(1, 5)]
    return []


def make_trainable(encoder: Encoder, recipe: Recipe, shard: RankShard, checkpointing: bool) -> None:
    """Prepare the student in place: frozen parts, stochastic depth, gradient checkpointing.

    Raises UsageError where the encoder has nothing to train, no blocks to choose from, or random numbers that cannot be
    seeded.
    """
    if not any(True for _ in encoder.parameters()):
        raise UsageError(f"--base {encoder.name!r} has no weights to train. Use an encoder with weights.")
    blocks = blocks_of(encoder)
    trainable = recipe.trainable_blocks
    encoder.requires_grad_(trainable is None)
    if trainable is not None:
        numbers = list(range(len(blocks)))[trainable:] if isinstance(trainable, int) else trainable
        if not numbers or not all(-len(blocks) <= i < len(blocks) for i in numbers):
            raise UsageError(f"trainable_blocks={trainable}: --base {encoder.name!r} has {len(blocks)} blocks, from 0.")
        for i in numbers:
            blocks[i].requires_grad_()
    _add_stochastic_depth(encoder, recipe.drop_path, shard)
    if checkpointing and not blocks:
        raise UsageError(f"--checkpointing: --base {encoder.name!r} has no blocks that are known by name.")
    for block in blocks if checkpointing else ():
        block.forward = _recomputed(block.forward)
    _freeze_unused(encoder, recipe.local_size)
    _check_own_draws(encoder, recipe.local_size, shard)


def _recomputed(forward: Any) -> Any:
    def run(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def _add_stochastic_depth(encoder: Encoder, rate: float, shard: RankShard) -> None:
    """Rates grow linearly with depth, from 0. The last block of a ViT with LayerScale (DINOv2) drops exact numbers.

    Blocks have a module for each of two branches, or one for both.
    """
    holders = [
        (module, [name for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(module, name)])
        for module in encoder.modules()
    ]
    holders = [(module, names) for module, names in holders if names]
    for depth, (module, names) in enumerate(holders):
        share = rate * depth / max(1, len(holders) - 1)
        scaled = hasattr(getattr(module, "ls1", None), "gamma")
        last_of_dinov2 = depth == len(holders) - 1 and "drop_path2" in names and scaled
        for branch, name in enumerate(names):
            if getattr(module, name) is not None:
                drop = StochasticDepth(share, 2 * depth + branch, shard, last_of_dinov2) if share else nn.Identity()
                setattr(module, name, drop)
        if share:
            module.forward = _recounting(module)
        if hasattr(module, "sample_drop_ratio"):  # torch.hub's DINOv2 uses its branches only above 0, and up to 0.1
            module.sample_drop_ratio = min(share, 0.1)  # type: ignore[assignment]


def _recounting(block: nn.Module) -> Any:
    """Wrap the block's forward to count calls of its stochastic depth from 0, also when checkpointing repeats it."""
    forward, drops = block.forward, [part for part in block.children() if isinstance(part, StochasticDepth)]

    def run(*inputs: Any, **options: Any) -> Any:
        for drop in drops:
            drop.calls = 0
        return forward(*inputs, **options)

    return run


def _freeze_unused(encoder: Encoder, size: int) -> None:
    """Freeze what dense features never pass through (mask tokens, later stages), by one backward pass."""
    probe = torch.zeros(1, 3, size, size, device=encoder.device)
    with torch.enable_grad():
        features = encoder.eval()._run(probe, final_norm=encoder.has_final_norm and encoder.final_norm, attention=False)
        encoder._checked(features, 1, size // encoder.stride, size // encoder.stride)
        if not features.map.requires_grad:
            raise BadInputError(f"--base {encoder.name!r}: its features carry no gradient, so it cannot be trained.")
        features.map.sum().backward()
    unused = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    if unused:
        log.warning("not trained, as dense features do not pass through them: %s", ", ".join(unused[:8]))


def _check_own_draws(encoder: Encoder, size: int, shard: RankShard) -> None:
    """Say so where an encoder draws numbers of its own in training; refuse one whose draws no seed repeats."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    set_training(encoder)
    for module in encoder.modules():
        if isinstance(module, StochasticDepth):
            module.eval()

    def features(number: int) -> Tensor:
        with torch.no_grad(), seeded(dataclasses.replace(shard, batch_number=number), encoder.device):
            norm = encoder.has_final_norm and encoder.final_norm
            return encoder._run(image, final_norm=norm, attention=False).map.float()

    first, again, other = features(0), features(0), features(1)
    encoder.eval()
    if not torch.allclose(first, again, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UsageError(
            f"--base {encoder.name!r} draws random numbers in training that no seed of torch's repeats, so that a run "
            f"could not be resumed. Draw them from torch's default generator, as torch.nn.Dropout does, or none."
        )
    if not torch.allclose(first, other, rtol=1e-3, atol=1e-5, equal_nan=True):
        log.warning(
            "%s draws random numbers of its own in training (dropout). They follow from seed, step and process: a run "
            "can be resumed exactly, but one on another number of processes differs.",
            encoder.name,
        )


def set_training(network: nn.Module) -> None:
    """Set training mode, but for batch normalisation."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def folded_class_token(encoder: Encoder) -> nn.Parameter | None:
    """Find the class token of timm's DINOv2 with registers, the sum of two parameters of the official model.

    None for other encoders. (RADIO, which timm builds alike, has no position of its class tokens.)
    """
    model: Any = inner_module(encoder)
    if "dinov2" not in str((getattr(model, "pretrained_cfg", None) or {}).get("architecture")):
        return None
    folded = getattr(model, "no_embed_class", False) and getattr(model, "reg_token", None) is not None
    return model.cls_token if folded else None


def parameter_groups(network: Network) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups for the optimizer.

    Encoder and head, each with weight decay (two dimensions or more) and without (biases, norms), and a fifth group for
    a class token that is a sum of two. `part` says which, `summands` of how many parameters of the official model each
    is the sum.
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

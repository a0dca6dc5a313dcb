"""Prepare encoders for training: resumable stochastic depth, gradient checkpointing, frozen parts.

All randomness depends only on (seed, step, position in the batch). If an encoder draws random numbers itself (dropout),
torch's generators are seeded by (seed, step, process): such a run can be resumed exactly, but depends on the number of
processes. Batch normalisation keeps its initial statistics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.rng import item_rng
from neco_bench.encoders.base import Encoder

log = logging.getLogger("neco_bench")


class StochasticDepth(nn.Module):
    """Drop a residual branch for some images, and scale it for the others (Huang et al., ECCV 2016).

    number: index of the branch, or of the first branch that shares this module. exact: a fixed number of images,
    floor(n (1 - rate)), keeps its branch, as in the last block of DINOv2.
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
        # The same for every call with tensors of this shape in a batch, because gradient checkpointing repeats calls.
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
    """Seed torch's generators by (seed, step, process) for random numbers of the encoder; restore them afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(item_rng(shard.seed, "own", shard.batch_number, shard.start).integers(2**63)))
        yield


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    """Return the blocks of a transformer or the stages of a hierarchical network; none if their names are unknown."""
    for name, module in encoder.named_modules():
        last = name.rpartition(".")[2]
        if last in ("blocks", "stages", "layers", "layer") and isinstance(module, nn.ModuleList | nn.Sequential):
            return [part for part in module if not isinstance(part, nn.Identity)]
        if hasattr(module, "layer1") and hasattr(module, "layer4"):
            return [getattr(module, f"layer{i}") for i in range(1, 5)]
    return []


def check_has_weights(encoder: Encoder) -> None:
    """Raise UsageError if an encoder has no weights to train."""
    if not any(True for _ in encoder.parameters()):
        raise UsageError(f"Model {encoder.name!r} has no weights to train. Use an encoder with weights.")


@dataclasses.dataclass(frozen=True)
class Regularisation:
    """Options for training an encoder.

    drop_path: stochastic depth of the last block, growing from 0 at the first. exact_last: the last block of a ViT with
    LayerScale drops a fixed number of images, as DINOv2 does. checkpointing: compute activations again in backward.
    """

    drop_path: float
    exact_last: bool = True
    checkpointing: bool = False


def prepare(encoder: Encoder, size: int, shard: RankShard, options: Regularisation) -> None:
    """Prepare an encoder in place for training on inputs of `size` pixels; frozen parameters stay frozen.

    Raises UsageError if its blocks are not known by name for gradient checkpointing, or if its random numbers cannot be
    seeded, and BadInputError if its features have no gradient.
    """
    blocks = blocks_of(encoder)
    add_stochastic_depth(encoder, options.drop_path, shard, options.exact_last)
    if options.checkpointing and not blocks:
        raise UsageError(f"--checkpointing: the blocks of model {encoder.name!r} are not known by name.")
    for block in blocks if options.checkpointing else ():
        block.forward = _recomputed(block.forward)
    _freeze_unused(encoder, size)
    _check_own_draws(encoder, size, shard)


def _recomputed(forward: Any) -> Any:
    def run(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def add_stochastic_depth(encoder: nn.Module, rate: float, shard: RankShard, exact_last: bool = True) -> None:
    """Add stochastic depth to residual branches, with rates that grow linearly with depth, from 0.

    exact_last: the last block of a ViT with LayerScale (DINOv2) drops exact numbers.

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
        last_of_dinov2 = exact_last and depth == len(holders) - 1 and "drop_path2" in names and scaled
        for branch, name in enumerate(names):
            if getattr(module, name) is not None:
                drop = StochasticDepth(share, 2 * depth + branch, shard, last_of_dinov2) if share else nn.Identity()
                setattr(module, name, drop)
        if share:
            module.forward = _recounting(module)
        if hasattr(module, "sample_drop_ratio"):  # torch.hub's DINOv2 uses these branches only above 0 and up to 0.1
            module.sample_drop_ratio = min(share, 0.1)  # type: ignore[assignment]


def _recounting(block: nn.Module) -> Any:
    """Wrap the block's forward so that its stochastic depth counts calls from 0, also if checkpointing repeats it."""
    forward, drops = block.forward, [part for part in block.children() if isinstance(part, StochasticDepth)]

    def run(*inputs: Any, **options: Any) -> Any:
        for drop in drops:
            drop.calls = 0
        return forward(*inputs, **options)

    return run


def _freeze_unused(encoder: Encoder, size: int) -> None:
    """Freeze parameters that dense features do not use (mask tokens, later stages), found by one backward pass."""
    probe = torch.zeros(1, 3, size, size, device=encoder.device)
    with torch.enable_grad():
        features = encoder.eval()._run(probe, final_norm=encoder.has_final_norm and encoder.final_norm, attention=False)
        encoder._checked(features, 1, size // encoder.stride, size // encoder.stride)
        if not features.map.requires_grad:
            raise BadInputError(f"Model {encoder.name!r}: its features have no gradient, so it cannot be trained.")
        features.map.sum().backward()
    unused = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    if unused:
        log.warning("not trained, because dense features do not use them: %s", ", ".join(unused[:8]))


def _check_own_draws(encoder: Encoder, size: int, shard: RankShard) -> None:
    """Log a warning if an encoder draws random numbers in training; raise UsageError if they cannot be seeded."""
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
            f"Model {encoder.name!r} draws random numbers in training that torch's seed does not determine, so a run "
            f"could not be resumed. Draw them from torch's default generator, like torch.nn.Dropout, or draw none."
        )
    if not torch.allclose(first, other, rtol=1e-3, atol=1e-5, equal_nan=True):
        log.warning(
            "%s draws random numbers in training (dropout). They depend on seed, step and process: a run can be "
            "resumed exactly, but a run with another number of processes differs.",
            encoder.name,
        )


def set_training(network: nn.Module) -> None:
    """Set training mode, except for batch normalisation."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()

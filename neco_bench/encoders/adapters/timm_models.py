"""Encoders from timm: plain ViTs, other token models (EVA, DINOv3, SigLIP, ...), and hierarchical networks and CNNs.

Plain ViTs are run here block by block, to support position interpolation rules and class-token attention. All other
models use timm's `forward_intermediates`. By default, the final norm is also applied to inner blocks, as in DINOv2's
`get_intermediate_layers`.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, MissingError, UsageError, did_you_mean
from neco_bench.encoders import fetch, weights
from neco_bench.encoders.adapters import (
    franca,  # noqa: F401 makes its models known to timm, as tiny does
    timm_layouts,
    tiny,  # noqa: F401
)
from neco_bench.encoders.adapters.layers import layer_indices, layer_name
from neco_bench.encoders.adapters.timm_sizes import build_for, create, measure
from neco_bench.encoders.base import IMAGENET_MEAN, IMAGENET_STD, DenseFeatures, Encoder, WeightsReport
from neco_bench.encoders.options import POS_INTERP
from neco_bench.encoders.spec import ModelSpec
from neco_bench.encoders.zoo import ZooEntry, weights_folder


def build(spec: ModelSpec) -> Encoder:
    """Build the encoder of a timm model, with the spec's weights, the zoo's, timm's own, or seeded random ones."""
    name, entry, file = spec.target, spec.entry, spec.weights
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm {timm.__version__} has no model {architecture!r}.{did_you_mean(architecture, timm.list_models())}"
        )
    if tag and not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(f"timm {timm.__version__} has no weights {name!r}; it has {', '.join(known) or 'none'}.")
    if file is None and entry and spec.pretrained:
        file = _zoo_file(entry)
    report: WeightsReport
    if file is not None:
        model, report = _from_file(spec, file)
        if entry and entry.packaged and file == entry.weights_file:
            report = replace(report, source=f"neco-bench: {entry.weights}")
    elif spec.pretrained:
        model, report = _from_timm(spec)
    else:
        model = create(name, spec.seed, num_classes=0)
        report = WeightsReport(source=f"random, seed {spec.seed}")
    encoder = wrap(model, spec)
    if entry is None:
        encoder.mean, encoder.std, encoder.statistics = statistics_of(model)
    else:  # timm's statistics may belong to other weights than the zoo's
        encoder.mean, encoder.std = entry.mean or IMAGENET_MEAN, entry.std or IMAGENET_STD
        encoder.statistics = f"the zoo's for {entry.id}"
    encoder.weights_report = report
    encoder.weights_id = weights.state_sha256(model)
    return encoder


def statistics_of(model: Any) -> tuple[Any, Any, str]:
    """Return mean and std of a timm model's own weights, and their source as text."""
    facts = model.pretrained_cfg
    tag = ".".join(filter(None, (facts.get("architecture"), facts.get("tag"))))
    return tuple(facts["mean"]), tuple(facts["std"]), f"timm's for {tag}"


def _zoo_file(entry: ZooEntry) -> Path | None:
    """Return the weights file of a zoo entry, in this package or downloaded; None if the weights are timm's own."""
    path = entry.weights_file
    if path is None or entry.weights is None:
        return None
    if not entry.packaged:
        return fetch.fetch_url(entry.weights, path)
    if not path.is_file():
        raise MissingError(f"{path}, the weights of {entry.id!r}, does not exist. Install neco-bench again.")
    return path


def _from_timm(spec: ModelSpec) -> tuple[Any, WeightsReport]:
    """Load timm's own pretrained weights with timm; all names must fit (including heads, which are then removed)."""
    name = spec.target
    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise UsageError(f"timm has no weights for {name!r}. Add ?pretrained=false&seed=0, or pass --weights FILE.")
    if "." not in name and config.tag:
        name = f"{name}.{config.tag}"
    file_name: Any
    if config.hf_hub_id:
        file_name = config.hf_hub_filename or "model.safetensors"
        path = fetch.fetch_hub_file(config.hf_hub_id, file_name, weights_folder(name) / file_name)
    else:
        path = fetch.fetch_url(str(config.url), weights_folder(name) / str(config.url).rsplit("/", 1)[-1])
    if path.suffix == ".npz":
        overlay: dict[str, Any] = {"file": str(path)}
    else:
        overlay = {"state_dict": weights.read_tensors(path)}
    try:
        model = create(name, 0, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise BadInputError(f"Weights file {path} does not fit timm's {name!r}: {error}") from error
    model.reset_classifier(0)
    return model, WeightsReport(source=str(path))


def _from_file(spec: ModelSpec, path: Path) -> tuple[Any, WeightsReport]:
    """Load a file in any known layout. The model is built with the file's own grid; positions are never resized."""
    drop_registers = spec.entry is not None and spec.entry.drop_registers
    make = partial(create, spec.target, 0, num_classes=0)
    return timm_layouts.load(make, path, spec.branch, drop_registers=drop_registers)


def wrap(model: Any, spec: ModelSpec, *, twin: Any = None) -> Encoder:
    """Return the encoder of a timm model. twin: a copy on the meta device, created if it is not given."""
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(f"timm's {spec.target!r} has no dense features (it has no forward_intermediates).")
    plain = type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed and model.pos_embed is not None
    if plain and model.dynamic_img_size:
        return TimmViT(model, spec)
    if spec.pos_interp not in (None, "timm", "none"):
        raise UsageError(
            f"pos_interp={spec.pos_interp} is for plain ViTs with learned positions; {spec.target!r} takes timm only."
        )
    if twin is None:
        with torch.device("meta"):
            twin = create(spec.target, 0, num_classes=0)
    tokens = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    return TimmTokens(model, spec, twin) if tokens else TimmStages(model, spec, twin)


class _Timm(Encoder):
    """Base class of the three kinds: the model and the layers that are read."""

    _inner = "model"

    def __init__(self, model: Any, spec: ModelSpec, count: int, what: str) -> None:
        super().__init__()
        self.name = spec.name
        self.model = model
        self.indices = layer_indices(spec.layers, count, spec.name, f"{what}s")
        self.layer = layer_name(self.indices, count, what)
        self.layer_count = count


class _Measured(_Timm):
    """A timm model read through `forward_intermediates`, at the input sizes that `timm_sizes` finds."""

    def __init__(self, model: Any, spec: ModelSpec, twin: Any, what: str) -> None:
        super().__init__(model, spec, len(model.feature_info), what)
        self.level = measure(twin, self.indices[-1], spec.name)
        self.embed_dim = self.level.embed_dim * len(self.indices)
        self.stride, self.size_multiple = self.level.stride, self.level.multiple
        self.only_size, self.has_final_norm = self.level.size, self.level.final_norm
        self._rebuilt: tuple[tuple[int, int], list[Any]] | None = None  # in a list, so that it is not a submodule

    def _intermediates(self, images: Tensor, **options: Any) -> tuple[Any, Any]:
        """Call timm's `forward_intermediates`; also return the model used, which may be built for this size."""
        size = (images.shape[-2], images.shape[-1])
        model: Any = self.model
        if self.level.rebuilt and size != tuple(self.model.pretrained_cfg["input_size"][1:]):
            if torch.is_grad_enabled():
                raise UsageError(
                    f"Model {self.name!r} accepts one input size and is built again for each other size, so it "
                    f"cannot be trained at {size[0]}x{size[1]}."
                )
            if self._rebuilt is None or self._rebuilt[0] != size:
                self._rebuilt = (size, [self._build_for(size)])
            model = self._rebuilt[1][0].to(images.device)
        if padding := self.level.padding:
            before, after = padding // 2, padding - padding // 2
            images = F.pad(images, (before, after, before, after))
        return model, model.forward_intermediates(
            images, indices=list(self.indices), intermediates_only=True, **options
        )

    def _build_for(self, size: tuple[int, int]) -> Any:
        try:
            return build_for(self.model, size)
        except Exception as error:  # timm's models raise various errors
            raise UsageError(
                f"timm cannot build {self.name!r} for inputs of {size[0]}x{size[1]} "
                f"({type(error).__name__}: {str(error)[:200]}). Use a square input."
            ) from error


class TimmTokens(_Measured):
    """A timm model with the same token grid in all blocks, read through `forward_intermediates`."""

    equal_layers = True

    def __init__(self, model: Any, spec: ModelSpec, twin: Any) -> None:
        super().__init__(model, spec, twin, "block")
        self.pos_interp = "timm"

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        with_prefix = self.model.num_prefix_tokens > 0
        _, levels = self._intermediates(images, return_prefix_tokens=with_prefix, norm=final_norm)
        maps, prefix = levels, None
        if with_prefix:
            maps = [level[0] for level in levels]
            prefix = torch.cat([level[1] for level in levels], dim=-1)
        return DenseFeatures(torch.cat(maps, dim=1), self.stride, self.layer, final_norm, prefix)


class TimmStages(_Measured):
    """A hierarchical network or CNN of timm, read at one feature level, which determines the stride."""

    def __init__(self, model: Any, spec: ModelSpec, twin: Any) -> None:
        super().__init__(model, spec, twin, "stage")
        if len(self.indices) > 1:
            raise UsageError(f"Model {spec.name!r} is hierarchical: its stages differ in size, so give one layer only.")
        self.pos_interp = "timm" if self.level.rebuilt else "none"

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        model, (level,) = self._intermediates(images, norm=final_norm)
        if self.level.final_conv:
            level = model.final_conv(level)
        return DenseFeatures(level, self.stride, self.layer, final_norm)


class TimmViT(_Timm):
    """A plain Vision Transformer of timm, with or without class token and registers."""

    equal_layers = True

    def __init__(self, model: VisionTransformer, spec: ModelSpec) -> None:
        super().__init__(model, spec, len(model.blocks), "block")
        self.embed_dim = model.embed_dim * len(self.indices)
        self.stride = model.patch_embed.patch_size[0]
        self.has_final_norm = isinstance(model.norm, nn.Module) and not isinstance(model.norm, nn.Identity)
        self.pos_interp = spec.pos_interp or "timm"
        if self.pos_interp not in POS_INTERP:
            raise UsageError(f"Model {spec.name!r}: pos_interp must be one of {', '.join(POS_INTERP)}.")
        last: Any = model.blocks[-1]
        self.has_keys = type(last) is Block and type(last.attn) is Attention
        self.attentions = self.has_keys and model.cls_token is not None

    def _positions(self, size: tuple[int, int]) -> Tensor:
        """Return position embeddings for a grid of `size` (rows, columns); the class token's position stays first."""
        model = self.model
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        fixed, patches = model.pos_embed[:, :prefix], model.pos_embed[:, prefix:]
        return torch.cat([fixed, interpolate_positions(patches, model.patch_embed.grid_size, size, self.pos_interp)], 1)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool, keys: bool = False) -> DenseFeatures:
        model = self.model
        x = model.patch_embed(images)  # (B, h, w, D), as the model is built for any input size
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        prefix = [t.expand(len(x), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
        if model.no_embed_class:
            x = torch.cat([*prefix, x + self._positions(size)], 1)
        else:
            x = torch.cat([*prefix, x], 1) + self._positions(size)
        x = model.norm_pre(x)
        levels, weights_of_class, of_patches = [], None, None
        whole = attention or keys
        depth = len(model.blocks) if whole else self.indices[-1] + 1
        for i, block in enumerate(model.blocks[:depth]):
            if whole and i == depth - 1:
                qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
                weights_of_class = self._class_attention(block.attn, qkv, size) if attention else None
                of_patches = self._patch_keys(qkv, size) if keys else None
            x = block(x)
            if i in self.indices:
                levels.append(model.norm(x) if final_norm else x)
        tokens = torch.cat(levels, dim=-1)
        count = model.num_prefix_tokens
        grid = tokens[:, count:].transpose(1, 2).unflatten(2, size)
        return DenseFeatures(
            grid,
            self.stride,
            self.layer,
            final_norm,
            tokens[:, :count] if count else None,
            weights_of_class,
            of_patches,
        )

    def _patch_keys(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return keys of the patches (B, D, h, w), heads concatenated, from projections (B, N, 3, heads, d)."""
        return qkv[:, self.model.num_prefix_tokens :, 1].flatten(2).transpose(1, 2).unflatten(2, size)

    def _class_attention(self, attn: Any, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the class token's attention to the patches, (B, heads, h, w), from projections (B, N, 3, heads, d).

        The attention over all tokens sums to one.
        """
        query, key = attn.q_norm(qkv[:, :, 0]), attn.k_norm(qkv[:, :, 1])
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0] * attn.scale, key)
        return scores.softmax(-1)[..., self.model.num_prefix_tokens :].unflatten(-1, size)


def interpolate_positions(positions: Tensor, grid: tuple[int, int], size: tuple[int, int], rule: str) -> Tensor:
    """Resize patch positions (1, rows * columns of `grid`, D) to `size` (rows, columns): (1, rows * columns, D)."""
    if size == grid:
        return positions
    image = positions.float().unflatten(1, grid).permute(0, 3, 1, 2)
    if rule == "scale_offset":
        factor = ((size[0] + 0.1) / grid[0], (size[1] + 0.1) / grid[1])
        image = F.interpolate(image, scale_factor=factor, mode="bicubic")
    else:
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2).to(positions.dtype)

"""Encoders from torch.hub entries in the style of DINOv2 or DINO, or from a local folder with a `hubconf.py`.

As with torch.hub itself, this runs the repository's code. The model has `embed_dim`, `patch_size` (or
`patch_embed.patch_size`), `blocks`, and either DINOv2's
`get_intermediate_layers(x, n, reshape, return_class_token, norm)`, DINO's `get_intermediate_layers(x, n)` (the last n
blocks after the norm, class token first), or `forward_features(x)` with a dictionary holding `x_norm_patchtokens`.
CAPI's models have `n_blocks`, `num_prefix_tokens` and a `forward_features` that takes the layer.
"""

from __future__ import annotations

import copy
import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.encoders import fetch, weights
from neco_bench.encoders.adapters import timm_models
from neco_bench.encoders.adapters.layers import layer_indices, layer_name
from neco_bench.encoders.base import DenseFeatures, Encoder, WeightsReport
from neco_bench.encoders.spec import ModelSpec


def build(spec: ModelSpec) -> Encoder:
    """Build the encoder of a hub entry. Raises `MissingError`, `UsageError` and `BadInputError`."""
    file = spec.weights
    repository, _, entry = spec.target.rpartition(":")
    if not spec.trust:
        raise UsageError(
            f"hub:{spec.target} runs the code of {repository!r}, as torch.hub does. If you trust it, add ?trust=true "
            f"to the model's spec."
        )
    local = Path(repository).expanduser().is_dir()
    repository = str(Path(repository).expanduser()) if local else repository
    options = {} if spec.pretrained and file is None else {"pretrained": False}
    cached = Path(torch.hub.get_dir()) / "_".join(repository.partition(":")[0].split("/"))
    if not local and not list(cached.parent.glob(f"{cached.name}_*")) and not fetch.reachable("https://github.com"):
        raise MissingError(
            f"torch.hub repository {repository!r} is neither a local folder nor in {cached.parent}, and GitHub "
            f"cannot be reached. Clone it and give hub:FOLDER:{entry}."
        )
    try:
        with _timeout():
            source = "local" if local else "github"
            model = torch.hub.load(repository, entry, source=source, trust_repo=True, **options)
    except NecoBenchError:
        raise
    except OSError as error:
        raise MissingError(
            f"Hub model {spec.target!r} needs a file that could not be downloaded: {error}. Pass --weights FILE."
        ) from error
    except Exception as error:  # foreign code may raise any error
        if "Cannot find callable" in str(error):
            raise UsageError(f"Hub repository {repository!r} has no entry {entry!r}.") from error
        raise BadInputError(f"Hub model {spec.target!r} failed: {type(error).__name__}: {error}") from error
    report = WeightsReport(source=f"torch.hub {repository}")
    if file is not None:
        report = weights.load_file_into(model, file, spec.branch)
    encoder = _wrap(model, spec)
    encoder.weights_report = report
    encoder.weights_id = weights.state_sha256(model)
    return encoder


@contextmanager
def _timeout() -> Iterator[None]:
    """Set a timeout for downloads, because torch.hub sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(fetch.TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _wrap(model: Any, spec: ModelSpec) -> Encoder:
    if (
        isinstance(model, torch.nn.Module)
        and hasattr(model, "forward_intermediates")
        and hasattr(model, "feature_info")
    ):
        encoder = timm_models.wrap(model, spec, twin=copy.deepcopy(model).to("meta"))
        encoder.mean, encoder.std, encoder.statistics = timm_models.statistics_of(model)
        return encoder
    features = getattr(model, "forward_features", None)
    if features and "enc_layer" in inspect.signature(features).parameters:
        return HubCAPI(model, spec)
    absent = [name for name in ("embed_dim", "blocks") if not hasattr(model, name)]
    absent += [] if _patch_size(model) else ["patch_size"]
    inner = getattr(model, "get_intermediate_layers", None)
    if absent or not (inner or features):
        raise BadInputError(
            f"Hub model {spec.target!r} does not have the interface of DINO or DINOv2 "
            f"(it lacks {', '.join(absent) or 'get_intermediate_layers and forward_features'}). "
            f"Wrap it in your own function: path/to/file.py:FACTORY."
        )
    if inner and "norm" in inspect.signature(inner).parameters:
        return HubDINOv2(model, spec)
    if inner:
        return HubDINO(model, spec)
    return HubDictionary(model, spec)


def _patch_size(model: Any) -> Any:
    """Return the patch size, which DINO's models have only in their patch embedding."""
    return getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)


class _Hub(Encoder):
    _inner = "model"
    equal_layers = True

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.name, self.model = spec.name, model
        self.statistics = "ImageNet's, as of DINO and DINOv2"
        count = model.n_blocks if hasattr(model, "n_blocks") else len(model.blocks)
        self.layer_count = count
        self.indices = layer_indices(spec.layers, count, spec.name)
        self.layer = layer_name(self.indices, count)
        self.embed_dim = model.embed_dim * len(self.indices)
        patch = _patch_size(model)
        self.stride = patch if isinstance(patch, int) else patch[0]
        self.pos_interp = "native"
        blocks = getattr(model, "blocks", None)
        inner = blocks.modules() if isinstance(blocks, torch.nn.Module) else ()
        last = [m.attn for m in inner if hasattr(getattr(m, "attn", None), "qkv")][-1:]
        self.last_attention: tuple[Any, ...] = tuple(last)  # in a tuple, so that it is not another submodule
        self.prefix_count = 1 + getattr(model, "num_register_tokens", 0)

    @contextmanager
    def _projections(self) -> Iterator[list[Tensor]]:
        """Collect the projections (B, N, 3 D) of the last block while the model runs in this context."""
        taken: list[Tensor] = []
        hooks = [
            attn.qkv.register_forward_hook(lambda _module, _inputs, output: taken.append(output))
            for attn in self.last_attention
        ]
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()

    def _keys(self, taken: list[Tensor], images: Tensor) -> Tensor:
        """Return the keys of the patches (B, D, h, w), heads concatenated."""
        return self._grid(taken[-1].chunk(3, -1)[1][:, self.prefix_count :], images)

    def _class_attention(self, taken: list[Tensor], images: Tensor) -> Tensor:
        """Return the class token's attention to the patches (B, heads, h, w); over all tokens it sums to one."""
        attn: Any = self.last_attention[0]
        query, key, _ = (part.unflatten(-1, (attn.num_heads, -1)) for part in taken[-1].chunk(3, -1))
        scores = torch.einsum("bhd,bnhd->bnh", query[:, 0] * attn.scale, key)
        return self._grid(scores.softmax(1)[:, self.prefix_count :], images)

    def _grid(self, tokens: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        if tokens.shape[1] != size[0] * size[1]:
            raise BadInputError(
                f"Hub model {self.name!r} returned {tokens.shape[1]} patch tokens; {size[0]}x{size[1]} were expected."
            )
        return tokens.transpose(1, 2).unflatten(2, size)


class HubDINOv2(_Hub):
    """DINOv2's interface. `prefix` is the class token, without registers."""

    has_final_norm = True

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__(model, spec)
        self.has_keys = self.attentions = bool(self.last_attention)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool, keys: bool = False) -> DenseFeatures:
        with self._projections() as taken:
            levels = self.model.get_intermediate_layers(
                images, n=list(self.indices), reshape=False, return_class_token=True, norm=final_norm
            )
        grid = self._grid(torch.cat([patches for patches, _ in levels], -1), images)
        prefix = torch.cat([token for _, token in levels], -1)[:, None]
        of_class = self._class_attention(taken, images) if attention else None
        of_patches = self._keys(taken, images) if keys else None
        return DenseFeatures(grid, self.stride, self.layer, final_norm, prefix, of_class, of_patches)


class HubDINO(_Hub):
    """DINO's interface: blocks always after the norm, class token first."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__(model, spec)
        self.attentions = hasattr(model, "get_last_selfattention")
        self.has_keys = bool(self.last_attention)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool, keys: bool = False) -> DenseFeatures:
        first = self.indices[0]
        with self._projections() as taken:
            levels = self.model.get_intermediate_layers(images, self.layer_count - first)
        tokens = torch.cat([levels[i - first] for i in self.indices], -1)
        grid = self._grid(tokens[:, 1:], images)
        of_class = None
        if attention:
            of_class = self.model.get_last_selfattention(images)[:, :, 0, 1:].unflatten(-1, grid.shape[-2:])
        of_patches = self._keys(taken, images) if keys else None
        return DenseFeatures(grid, self.stride, self.layer, True, tokens[:, :1], of_class, of_patches)


class HubDictionary(_Hub):
    """A model with `forward_features` only: the last block after the norm."""

    equal_layers = False

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__(model, spec)
        if self.layer != "last":
            raise UsageError(f"Model {spec.name!r} returns its last block only; leave out layers.")
        self.layer_count = 0

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        output = self.model.forward_features(images)
        if not isinstance(output, dict) or "x_norm_patchtokens" not in output:
            raise BadInputError(f"Hub model {self.name!r}: forward_features returned no x_norm_patchtokens.")
        return DenseFeatures(self._grid(output["x_norm_patchtokens"], images), self.stride, self.layer, True)


class HubCAPI(_Hub):
    """CAPI's interface: one layer per pass, always after the norm; layer 0 is the input of the first block.

    Source: facebookresearch/capi, model.py, `EncoderDecoder.forward_features`. `prefix` contains the registers.
    """

    equal_layers = False  # each layer needs its own pass

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__(model, spec)
        self.statistics = "ImageNet's, as of CAPI's own evaluations"
        self.prefix_count = model.num_prefix_tokens

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        tokens = torch.cat(
            [
                self.model.forward_features(images, None, None, enc_layer=index + 1, dec_layer=None)[0]
                for index in self.indices
            ],
            -1,
        )
        grid = self._grid(tokens[:, self.prefix_count :], images)
        return DenseFeatures(grid, self.stride, self.layer, True, tokens[:, : self.prefix_count])

"""Encoders from torch.hub entries in the style of DINOv2 or DINO, or from a local folder with a `hubconf.py`.

As with torch.hub itself, this runs the repository's code. The model has `embed_dim`, `patch_size` (or
`patch_embed.patch_size`), `blocks`, and either DINOv2's
`get_intermediate_layers(x, n, reshape, return_class_token, norm)`, DINO's `get_intermediate_layers(x, n)` (the last n
blocks after the norm, class token first), or `forward_features(x)` with a dictionary holding `x_norm_patchtokens`.
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

from neco_bench.encoders import fetch, weights
from neco_bench.encoders.base import DenseFeatures, Encoder, WeightsReport
from neco_bench.encoders.specs import layer_name, take_layers
from neco_bench.encoders.zoo import Request
from neco_bench.errors import BadInputError, MissingError, NecoBenchError, UsageError


def build(request: Request, file: Path | None) -> Encoder:
    """The encoder of a hub entry. Raises `MissingError` (nothing to be had), `UsageError` and `BadInputError`."""
    repository, _, entry = request.target.rpartition(":")
    if not request.trust:
        raise UsageError(
            f"hub:{request.target} runs the code of {repository!r}, as torch.hub does. "
            f"If you trust it, add ?trust=true to the model's spec."
        )
    local = Path(repository).expanduser().is_dir()
    repository = str(Path(repository).expanduser()) if local else repository
    options = {} if request.pretrained and file is None else {"pretrained": False}
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
            f"Hub model {request.target!r} needs a file that could not be fetched: {error}. Pass --weights FILE."
        ) from error
    except Exception as error:  # someone else's code may fail in any way
        if "Cannot find callable" in str(error):
            raise UsageError(f"Hub repository {repository!r} has no entry {entry!r}.") from error
        raise BadInputError(f"Hub model {request.target!r} failed: {type(error).__name__}: {error}") from error
    report = WeightsReport(source=f"torch.hub {repository}")
    if file is not None:
        report = weights.load_file_into(model, file, request.branch)
    encoder = _wrap(model, request)
    encoder.weights_report = report
    encoder.weights_id = weights.state_sha256(model)
    return encoder


@contextmanager
def _timeout() -> Iterator[None]:
    """torch.hub sets no timeout of its own on what it fetches."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(fetch.TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _wrap(model: Any, request: Request) -> Encoder:
    if (
        isinstance(model, torch.nn.Module)
        and hasattr(model, "forward_intermediates")
        and hasattr(model, "feature_info")
    ):
        from neco_bench.encoders import timm_adapter

        encoder = timm_adapter.wrap(model, request, twin=copy.deepcopy(model).to("meta"))
        encoder.mean, encoder.std, encoder.statistics = timm_adapter.statistics_of(model)
        return encoder
    absent = [name for name in ("embed_dim", "blocks") if not hasattr(model, name)]
    absent += [] if _patch_size(model) else ["patch_size"]
    inner = getattr(model, "get_intermediate_layers", None)
    if absent or not (inner or hasattr(model, "forward_features")):
        raise BadInputError(
            f"Hub model {request.target!r} is not in the style of DINO or DINOv2 "
            f"(without {', '.join(absent) or 'get_intermediate_layers and forward_features'}). "
            f"Wrap it in a function of your own: path/to/file.py:FACTORY."
        )
    if inner and "norm" in inspect.signature(inner).parameters:
        return HubDINOv2(model, request)
    if inner:
        return HubDINO(model, request)
    return HubDictionary(model, request)


def _patch_size(model: Any) -> Any:
    """DINOv2's models have it; DINO's only in what embeds the patches."""
    return getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)


class _Hub(Encoder):
    _inner = "model"

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__()
        self.name, self.model = request.name, model
        self.statistics = "ImageNet's, as of DINO and DINOv2"
        count = model.n_blocks if hasattr(model, "n_blocks") else len(model.blocks)
        self.count = count
        self.taken = take_layers(request.layers, count, request.name)
        self.layer = layer_name(self.taken, count)
        self.embed_dim = model.embed_dim * len(self.taken)
        patch = _patch_size(model)
        self.stride = patch if isinstance(patch, int) else patch[0]
        self.pos_interp = "native"

    def _grid(self, tokens: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        if tokens.shape[1] != size[0] * size[1]:
            raise BadInputError(
                f"Hub model {self.name!r} gave {tokens.shape[1]} patch tokens where {size[0]}x{size[1]} were expected."
            )
        return tokens.transpose(1, 2).unflatten(2, size)


class HubDINOv2(_Hub):
    """DINOv2's interface. `prefix` is the class token; registers are not handed out by it."""

    has_final_norm = True

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        levels = self.model.get_intermediate_layers(
            images, n=list(self.taken), reshape=False, return_class_token=True, norm=final_norm
        )
        grid = self._grid(torch.cat([patches for patches, _ in levels], -1), images)
        prefix = torch.cat([token for _, token in levels], -1)[:, None]
        return DenseFeatures(grid, self.stride, self.layer, final_norm, prefix)


class HubDINO(_Hub):
    """DINO's interface: blocks always after the norm, class token first."""

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__(model, request)
        self.attentions = hasattr(model, "get_last_selfattention")

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        first = self.taken[0]
        levels = self.model.get_intermediate_layers(images, self.count - first)
        tokens = torch.cat([levels[i - first] for i in self.taken], -1)
        grid = self._grid(tokens[:, 1:], images)
        of_class = None
        if attention:
            of_class = self.model.get_last_selfattention(images)[:, :, 0, 1:].unflatten(-1, grid.shape[-2:])
        return DenseFeatures(grid, self.stride, self.layer, True, tokens[:, :1], of_class)


class HubDictionary(_Hub):
    """`forward_features` alone: the last block after the norm."""

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__(model, request)
        if self.layer != "last":
            raise UsageError(f"Model {request.name!r} gives its last block only; leave out layers.")

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        found = self.model.forward_features(images)
        if not isinstance(found, dict) or "x_norm_patchtokens" not in found:
            raise BadInputError(f"Hub model {self.name!r}: forward_features gave no x_norm_patchtokens.")
        return DenseFeatures(self._grid(found["x_norm_patchtokens"], images), self.stride, self.layer, True)

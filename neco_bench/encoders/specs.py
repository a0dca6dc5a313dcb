"""Loading an encoder from a model spec; `encoders.zoo` says what a spec is. Importing this module imports no torch."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neco_bench.encoders.zoo import PRECISIONS, Layers, Request, parse_layers, parse_spec
from neco_bench.errors import BadInputError, MissingError, UsageError

if TYPE_CHECKING:
    import torch

    from neco_bench.encoders.base import Encoder

log = logging.getLogger("neco_bench")

# DINOv3's weights of satellite images, by the name of their official files: its repository normalises by these.
_SATELLITE = "sat493m", (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
_ADAPTERS = {
    "timm": "timm_adapter",
    "hub": "hub_adapter",
    "hf": "hf_adapter",
    "file": "code_adapter",
    "code": "code_adapter",
    "run": "run_folder",
}


def take_layers(layers: tuple[int, ...] | None, count: int, model: str, what: str = "blocks") -> tuple[int, ...]:
    """Indices in [0, count), ascending; the last one for None. Raises `UsageError` naming the valid range."""
    indices = (count - 1,) if layers is None else layers
    taken = sorted({i + count if i < 0 else i for i in indices})
    if len(taken) != len(indices) or taken[0] < 0 or taken[-1] >= count:
        raise UsageError(
            f"Model {model!r} has {count} {what}: layers={','.join(map(str, indices))} must be different numbers "
            f"from 0 to {count - 1}, or -{count} to -1 counted from the end."
        )
    return tuple(taken)


def layer_name(taken: tuple[int, ...], count: int, what: str = "block") -> str:
    """The layers in words: "last", "block 8", "blocks 3,6,9,11"."""
    if taken == (count - 1,):
        return "last"
    return f"{what}{'s' * (len(taken) > 1)} {','.join(map(str, taken))}"


def resolve_device(device: str | None) -> torch.device:
    """The device of that name; None and "auto" take CUDA, then MPS, then the CPU. Raises `UsageError`."""
    import torch

    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device in (None, "auto"):
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    try:
        picked = torch.device(str(device))
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in available:
        raise UsageError(f"Unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps.")
    if (picked.index or 0) >= available[picked.type]:
        here = [f"{kind} ({count})" for kind, count in available.items() if count]
        raise UsageError(f"Device {device!r} is not available here; this machine has {', '.join(here)}.")
    return picked


def build(request: Request, file: Path | None) -> Encoder:
    """The encoder of a parsed spec, by the adapter of its kind, which is imported only when it is needed."""
    encoder: Encoder = importlib.import_module(f"neco_bench.encoders.{_ADAPTERS[request.kind]}").build(request, file)
    return encoder


def _set_statistics(encoder: Encoder, request: Request, file: Path | None) -> None:
    """Mean and std of the spec, or those that belong to the file; says on stderr what a file from elsewhere is fed."""
    tag, mean, std = _SATELLITE
    if request.mean is None and request.std is None and file and tag in file.name.lower():
        encoder.mean, encoder.std, encoder.statistics = mean, std, "DINOv3's of SAT-493M, by the file's name"
    if request.mean or request.std:
        missing = "" if request.mean and request.std else f"; {'std' if request.mean else 'mean'}: {encoder.statistics}"
        encoder.statistics = f"given in the spec{missing}"
        encoder.mean, encoder.std = request.mean or encoder.mean, request.std or encoder.std
    if file is not None and not (request.mean and request.std):
        given = " ".join(f"{k}={','.join(f'{v:.4g}' for v in getattr(encoder, k))}" for k in ("mean", "std"))
        option = (
            " If these weights were trained with others, add ?mean=R,G,B&std=R,G,B." if "mean" in request.takes else ""
        )
        log.warning("%s: images are normalised by %s (%s).%s", file, given, encoder.statistics, option)


def load_encoder(
    spec: str,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    layers: Layers = None,
) -> Encoder:
    """The encoder that a spec names, frozen, in eval mode and on its device.

    weights: a file that replaces the spec's weights, in any layout that `encoders.weights` knows. device: None or
    "auto" takes the best one here. precision: fp32 (default), bf16 or fp16, as autocast. layers: block indices of a ViT
    (several are concatenated along D), or the feature level of a hierarchical network; None reads the last.

    Raises `UsageError` (spec, option, device, precision, layers), `MissingError` (a file, or weights that cannot be
    fetched) and `BadInputError` (weights that do not fit, code that breaks its contract).
    """
    request = parse_spec(spec)
    if layers is not None:
        request = replace(request, layers=parse_layers(layers))
    if request.layers is not None and "layers" not in request.takes:
        raise UsageError(f"Model {spec!r} chooses its layer itself and takes no layers.")

    if precision not in (None, *PRECISIONS):
        raise UsageError(f"Unknown precision {precision!r}: use {', '.join(PRECISIONS)}.")
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        raise MissingError(f"Weights file {file} does not exist.")
    place = resolve_device(device)

    encoder = build(request, file)
    encoder.name = request.name
    encoder.precision = precision or "fp32"
    _set_statistics(encoder, request, file)
    encoder.final_norm = request.final_norm
    if not request.final_norm and not encoder.has_final_norm:
        raise UsageError(f"Model {spec!r} has no final norm to leave out; remove final_norm=false.")
    if encoder.stride < 1 or encoder.embed_dim < 1:
        raise BadInputError(f"Model {spec!r}: embed_dim and stride must be positive whole numbers.")
    return encoder.requires_grad_(False).eval().to(place)

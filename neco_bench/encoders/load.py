"""Load an encoder from a model spec. Importing this module imports no torch."""

from __future__ import annotations

import importlib
import logging
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.encoders.options import PRECISIONS, Layers
from neco_bench.encoders.run_folder import read_run, weights_file
from neco_bench.encoders.spec import ModelSpec, SpecLike, is_official, parse_layers, parse_spec, training_of
from neco_bench.encoders.weight_files import files_of
from neco_bench.encoders.zoo import declared_overlap

if TYPE_CHECKING:
    import torch

    from neco_bench.encoders.base import Encoder

log = logging.getLogger("neco_bench")

_ADAPTERS = {
    "timm": "timm_models",
    "hub": "torch_hub",
    "hf": "huggingface",
    "file": "user_code",
    "code": "user_code",
}


def resolve_device(device: str | None) -> torch.device:
    """Return the device with this name; None and "auto" select CUDA, then MPS, then the CPU. Raises `UsageError`."""
    import torch  # slow to import

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


def is_fast_in_bf16(device: str | None) -> bool:
    """Return whether the device with this name has bf16 instructions: NVIDIA GPUs of capability 8 and above, CPUs with
    AVX-512 BF16, AMX or ARM's bf16 products. Raises `UsageError` for an unknown device."""
    import torch

    place = resolve_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_capability(place) >= (8, 0)
    if place.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # The supported versions of PyTorch have no public function to query a CPU instruction.
    queries = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(query() for query in queries if query is not None)


def build(model: ModelSpec) -> Encoder:
    """Build the encoder of a parsed spec with the adapter of its kind, which is imported only when needed."""
    if model.base is not None:
        return _build_run_folder(model, model.base)
    adapter = importlib.import_module(f"neco_bench.encoders.adapters.{_ADAPTERS[model.kind]}")
    encoder: Encoder = adapter.build(model)
    return encoder


def _build_run_folder(model: ModelSpec, base: ModelSpec) -> Encoder:
    folder = Path(model.target)
    run = read_run(folder)
    branch = base.branch if model.weights is None else model.branch  # files of a run hold one encoder each
    encoder = build(
        replace(
            base,
            layers=model.layers,
            final_norm=model.final_norm,
            trust=model.trust,
            branch=branch,
            weights=model.weights or weights_file(folder, model.branch),
        )
    )
    encoder.mean, encoder.std = run.mean, run.std
    encoder.statistics = "the run folder's"
    return encoder


def _set_statistics(encoder: Encoder, model: ModelSpec) -> None:
    """Set mean and std from the spec or from the given file; for a file, a warning names them."""
    file = model.weights
    # DINOv3's weights for satellite images are recognised by the name of the official files.
    if model.mean is None and model.std is None and file and "sat493m" in file.name.lower():
        encoder.mean, encoder.std = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
        encoder.statistics = "DINOv3's of SAT-493M, by the file's name"
    if model.mean or model.std:
        missing = "" if model.mean and model.std else f"; {'std' if model.mean else 'mean'}: {encoder.statistics}"
        encoder.statistics = f"given in the spec{missing}"
        encoder.mean, encoder.std = model.mean or encoder.mean, model.std or encoder.std
    if file is not None and not (model.mean and model.std):
        given = " ".join(f"{k}={','.join(f'{v:.4g}' for v in getattr(encoder, k))}" for k in ("mean", "std"))
        option = (
            " If these weights were trained with others, add ?mean=R,G,B&std=R,G,B." if "mean" in model.takes else ""
        )
        log.warning("%s: images are normalised by %s (%s).%s", file, given, encoder.statistics, option)


def load_encoder(
    spec: SpecLike,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    layers: Layers = None,
) -> Encoder:
    """Load the encoder that a spec names: frozen, in eval mode and on its device.

    Args:
        weights: replaces the spec's weights: a file, an index of shards, or a folder with one of them, in any layout
            that `encoders.weights` supports.
        device: None or "auto" selects the best device of this machine.
        precision: fp32 (default), bf16 or fp16, as autocast.
        layers: block indices of a ViT (several are concatenated along D), or the feature level of a hierarchical
            network; None reads the last.

    Raises:
        UsageError: for a wrong spec, option, device, precision or layers.
        MissingError: if a file is missing, or weights cannot be downloaded.
        BadInputError: if weights do not fit, or code violates the interface.
    """
    model = parse_spec(spec, weights)
    if layers is not None:
        model = replace(model, layers=parse_layers(layers))
    if model.layers is not None and "layers" not in model.takes:
        raise UsageError(f"Model {model.name!r} has a fixed layer; leave out layers.")
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"Unknown precision {precision!r}: use {', '.join(PRECISIONS)}.")
    if model.weights is not None:
        model = replace(model, weights=files_of(model.weights)[0])
    place = resolve_device(device)

    encoder = build(model)
    report = encoder.weights_report
    encoder.official = is_official(model, report.source if report else "")
    declared = encoder.training_data if model.weights is None and model.kind in ("file", "code") else ""
    encoder.training_data, encoder.overlap = training_of(model)
    if declared:
        encoder.training_data, encoder.overlap = declared, declared_overlap(declared)
    encoder.name = model.name
    encoder.precision = precision or "fp32"
    _set_statistics(encoder, model)
    encoder.final_norm = model.final_norm
    if not model.final_norm and not encoder.has_final_norm:
        raise UsageError(f"Model {model.name!r} has no final norm; remove final_norm=false.")
    if encoder.stride < 1 or encoder.embed_dim < 1:
        raise BadInputError(f"Model {model.name!r}: embed_dim and stride must be positive whole numbers.")
    return encoder.requires_grad_(False).eval().to(place)

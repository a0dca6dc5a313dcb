"""Encoders from transformers: an id on the Hugging Face hub, or a local folder made by `save_pretrained`.

`TYPES` declares the prefix tokens of each model type; they are not guessed from shapes. Remote code is never run.
Features are read from the blocks, and the final norm is applied here, so that "before" and "after" the norm mean the
same for every type and every version of transformers.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError, first_names
from neco_bench.encoders import fetch, weights
from neco_bench.encoders.adapters.layers import layer_indices, layer_name
from neco_bench.encoders.base import DenseFeatures, Encoder, WeightsReport
from neco_bench.encoders.spec import ModelSpec


class Type(NamedTuple):
    """One model type: class, number of tokens before registers and patches, names of the final norm, mean and std."""

    model: str
    tokens: int
    norms: tuple[str, ...] = ("layernorm",)
    statistics: tuple[Any, Any] = (Encoder.mean, Encoder.std)  # if a model has no processor configuration


OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# Names of the text model and heads, which checkpoints of whole models contain in addition to the vision model.
_ELSEWHERE = re.compile(r"(text_model|text_projection|visual_projection|logit_scale|logit_bias|decoder)(\.|$)")

_POST = ("post_layernorm", "vision_model.post_layernorm")

TYPES = {
    "dinov2": Type("Dinov2Model", 1),
    "dinov2_with_registers": Type("Dinov2WithRegistersModel", 1),
    "dinov3_vit": Type("DINOv3ViTModel", 1, ("norm",)),
    "vit": Type("ViTModel", 1),
    "deit": Type("DeiTModel", 2),
    "ijepa": Type("IJepaModel", 0),
    "clip": Type("CLIPVisionModel", 1, _POST, OPENAI),
    "clip_vision_model": Type("CLIPVisionModel", 1, _POST, OPENAI),
    "siglip": Type("SiglipVisionModel", 0, _POST, HALF),
    "siglip_vision_model": Type("SiglipVisionModel", 0, _POST, HALF),
}


def build(spec: ModelSpec) -> Encoder:
    """Build the encoder of a transformers model. Raises `MissingError`, `BadInputError`, `UsageError`."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("hf: models need transformers: pip install 'neco-bench[hf]'.") from error
    source, file = spec.target, spec.weights
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise MissingError(f"Folder {source} does not exist.")
    local = Path(source).expanduser().is_dir()
    where: dict[str, Any] = {"local_files_only": local or not fetch.hub_reachable(), "trust_remote_code": False}
    source = str(Path(source).expanduser()) if local else source
    try:
        model, kind, report = _load_model(transformers, source, where, spec)
    except NecoBenchError:
        raise
    except OSError as error:
        if local:
            raise BadInputError(f"Model folder {source} lacks a file, or has a damaged one: {error}") from error
        raise MissingError(
            f"transformers model {spec.target!r} is not on this machine and could not be downloaded. "
            f"Download https://huggingface.co/{spec.target} and give hf:FOLDER. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except ValueError as error:  # an unknown id or type, or a repository with its own code
        raise UsageError(f"transformers cannot load {spec.target!r}: {error}") from error
    except Exception as error:  # other shapes, a truncated file: in all cases, these weights are at fault
        raise BadInputError(f"Weights {file or source} do not fit: {type(error).__name__}: {error}") from error
    encoder = HFEncoder(model, kind, spec)
    encoder.mean, encoder.std = _statistics(source, where, kind)
    encoder.statistics = f"those of {spec.target}"
    encoder.weights_report = report
    encoder.weights_id = weights.state_sha256(model)
    return encoder


def _load_model(
    transformers: Any, source: str, where: dict[str, Any], spec: ModelSpec
) -> tuple[Any, Type, WeightsReport]:
    """Load the model of an id or a folder, with its own or the spec's weights. where: how transformers finds files."""
    file = spec.weights
    outside: tuple[str, ...] = ()
    config = transformers.AutoConfig.from_pretrained(source, **where)
    kind = TYPES.get(config.model_type)
    if kind is None:
        raise UsageError(
            f"Model {spec.name!r} is of type {config.model_type!r}; supported are {', '.join(sorted(TYPES))}. "
            f"Wrap it in your own function: path/to/file.py:FACTORY."
        )
    cls = getattr(transformers, kind.model, None)
    if cls is None:
        raise UsageError(f"transformers {transformers.__version__} has no {kind.model}; install a newer one.")
    if file is None:
        given: dict[str, Any] = {"pretrained_model_name_or_path": source, **where}
    else:
        config = getattr(config, "vision_config", config)
        tensors, outside = _of_file(cls, config, file, spec.branch)
        given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    precision = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
    model, notes = cls.from_pretrained(**given, **{precision: torch.float32}, output_loading_info=True)
    unused = {"missing": weights.UNUSED, "unexpected": re.compile(f"{weights.UNUSED.pattern}|{_ELSEWHERE.pattern}")}
    faults = {why: sorted(k for k in notes[f"{why}_keys"] if not known.match(k)) for why, known in unused.items()}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {why}: {first_names(keys)}" for why, keys in faults.items() if keys)
        raise BadInputError(f"Weights {file or source} do not fit {kind.model}: {text}.")
    report = WeightsReport(source=str(file or source), dropped=(*sorted(notes["unexpected_keys"]), *outside))
    if report.dropped:
        weights.log.warning("%s: not used, dropped: %s", report.source, first_names(report.dropped))
    return model, kind, report


def _of_file(cls: Any, config: Any, file: Path, branch: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a file for a class of transformers, without the prefix of their names, and unused names.

    Raises `BadInputError` if the file has names of another layout.
    """
    with torch.device("meta"):
        names = cls(config).state_dict().keys()
    read = weights.strip_wrappers(weights.read_tensors(file), names)
    if any(re.search(r"(^|\.)blocks\.\d+\.(\d+\.)?attn\.|(^|\.)resblocks\.", key) for key in read):
        raise BadInputError(
            f"Weights file {file} has the names of timm or of the authors' own code, not of transformers: use it with "
            f"timm:NAME, hub:OWNER/REPO:ENTRY or a zoo name."
        )
    try:
        return weights.select(read, names, file, branch)
    except BadInputError:
        if branch:
            raise
        return read, ()  # names of an older version, which transformers converts itself


def _statistics(source: str, where: dict[str, Any], kind: Type) -> tuple[Any, Any]:
    """Return mean and std of the model's processor configuration, or those of its type if it has none."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):  # the second as of transformers 5
        path = cached_file(
            source,
            name,
            local_files_only=where["local_files_only"],
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            facts = facts.get("image_processor") or facts
            given = [facts.get(key) for key in ("image_mean", "image_std")]
            mean, std = (
                tuple(map(float, values)) if values is not None else usual
                for values, usual in zip(given, kind.statistics, strict=True)
            )
            if not len(mean) == len(std) == 3:
                raise ValueError("image_mean and image_std need three numbers each")
        except (ValueError, AttributeError, TypeError) as error:
            raise BadInputError(f"{path} is not a preprocessor configuration: {error}.") from error
        if any(values is not None for values in given):
            return mean, std
    return kind.statistics


class HFEncoder(Encoder):
    """A transformers vision model; `prefix` contains its class (and distillation) token and registers."""

    _inner = "model"
    equal_layers = True

    def __init__(self, model: Any, kind: Type, spec: ModelSpec) -> None:
        super().__init__()
        config = model.config
        self.name, self.model = spec.name, model
        count = config.num_hidden_layers
        self.blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        norms = dict(model.named_modules())
        self.norm = next(norms[name] for name in kind.norms if name in norms)
        self.indices = layer_indices(spec.layers, count, spec.name)
        self.layer = layer_name(self.indices, count)
        self.layer_count = count
        self.embed_dim = config.hidden_size * len(self.indices)
        self.stride = config.patch_size
        self.prefix_count = kind.tokens + getattr(config, "num_register_tokens", 0)
        self.has_final_norm = True
        self.pos_interp = "native"
        takes = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        levels: list[Tensor] = []
        hooks = [
            self.blocks[i].register_forward_hook(
                lambda _module, _inputs, output: levels.append(output if isinstance(output, Tensor) else output[0])
            )
            for i in self.indices
        ]
        try:
            self.model(pixel_values=images, **self.options)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = torch.cat([self.norm(level) if final_norm else level for level in levels], -1)
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        patches = tokens[:, self.prefix_count :]
        if patches.shape[1] != size[0] * size[1]:
            raise BadInputError(
                f"Model {self.name!r} gave {patches.shape[1]} patch tokens for a grid of {size[0]}x{size[1]}."
            )
        grid = patches.transpose(1, 2).unflatten(2, size)
        prefix = tokens[:, : self.prefix_count] if self.prefix_count else None
        return DenseFeatures(grid, self.stride, self.layer, final_norm, prefix)

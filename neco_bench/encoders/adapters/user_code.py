"""Encoders from code: a function in the user's file, in an installed plug-in, or in this package.

The function takes no arguments and returns an Encoder, or a module that maps normalised images (B, 3, H, W) to features
(B, D, H/stride, W/stride) and has the attributes `embed_dim` and `stride`. Optional attributes are `mean` and `std` (if
they are not ImageNet's), `training_data` (such as "imagenet, coco", for contamination notes), and `only_size` (the side
of the only square input that it accepts) or `size_multiple`. The code of a file is run, so use only files that you
trust.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.core.files import file_sha256
from neco_bench.encoders import weights
from neco_bench.encoders.base import DenseFeatures, Encoder, WeightsReport
from neco_bench.encoders.spec import ModelSpec, functions_in
from neco_bench.encoders.zoo import models


def build(spec: ModelSpec) -> Encoder:
    """Build the encoder of a factory, and load the spec's weights into it strictly if they are given.

    Raises `MissingError` (no such file) and `BadInputError` (no such factory, a factory that fails, a wrong result).
    """
    factory: Any
    if spec.kind == "file":
        path, _, attribute = spec.target.rpartition(":")
        factory, source = _factory_in(Path(path), attribute), Path(path)
    else:
        factory = models().load(spec.name.partition("?")[0])
        defined_in = inspect.getsourcefile(factory) if callable(factory) else None
        source = Path(defined_in or __file__)
    if not callable(factory):
        raise BadInputError(f"{spec.target} is {type(factory).__name__}, not a function that returns an encoder.")
    try:
        made = factory()
    except NecoBenchError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise any error
        raise BadInputError(f"{spec.target} failed: {type(error).__name__}: {error}") from error
    encoder = made if isinstance(made, Encoder) else ModuleEncoder(_checked_module(made, spec.target))
    encoder.name = spec.name
    for fact in ("embed_dim", "stride"):
        if not isinstance(getattr(encoder, fact, None), int):
            raise BadInputError(f"{spec.target} returned an encoder whose {fact} is not a whole number.")
    if not isinstance(encoder.training_data, str):
        raise BadInputError(
            f"{spec.target} made an encoder whose training_data is {type(encoder.training_data).__name__}; write "
            f'the names of data sets as one text, such as "imagenet, coco".'
        )
    check_has_values(encoder, spec.target)
    if spec.weights is not None:
        if not encoder.state_dict():
            raise UsageError(f"Model {spec.name!r} has no weights to load; leave out --weights.")
        encoder.weights_report = weights.load_file_into(
            weights.inner_module(encoder), spec.weights, spec.branch, whole=True
        )
    elif encoder.weights_report is None:
        encoder.weights_report = WeightsReport(source=spec.target)
    encoder.weights_id = whole_sha256(encoder) or file_sha256(source)
    return encoder


def whole_sha256(encoder: nn.Module) -> str:
    """Compute the sha256 of all weights and of other tensors and arrays in modules; "" if there are none.

    Non-persistent buffers and plain attributes are in no state dict, but affect the features like weights.
    """
    known = {id(value) for value in encoder.state_dict(keep_vars=True).values()}
    others: dict[str, Any] = {}
    for place, module in encoder.named_modules():
        arrays = {name: v for name, v in {**module._buffers, **vars(module)}.items() if _has_bytes(v)}
        others |= {f"{place}.{name}": v for name, v in sorted(arrays.items()) if id(v) not in known}
    if not (known or others):
        return ""
    state = weights.state_sha256(encoder, whole=True)
    if not others:
        return state
    digest = hashlib.sha256(state.encode())
    for name, value in others.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(value.tobytes())
    return digest.hexdigest()


def _has_bytes(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not (value.is_meta or value.is_quantized)
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def check_has_values(encoder: nn.Module, name: str) -> None:
    """Raise `BadInputError` if weights are on the meta device, which has shapes but no values."""
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    empty = [key for key, value in tensors if value.is_meta]
    if empty:
        raise BadInputError(
            f"{name}: {len(empty)} of {len(tensors)} weights are on the meta device, which has no values (the first "
            f"is {empty[0]}). Create the module on the CPU, or load its weights before returning it."
        )


def _factory_in(path: Path, attribute: str) -> Any:
    """Run a Python file and return its `attribute`."""
    if not path.is_file():
        raise MissingError(f"Encoder file {path} does not exist.")
    name = f"neco_bench_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise BadInputError(f"Encoder file {path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module here
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code may raise any error
        raise BadInputError(f"Encoder file {path} could not be run: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise BadInputError(f"Encoder file {path} has no {attribute!r}.{functions_in(path)}")
    return getattr(module, attribute)


def _checked_module(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise BadInputError(
            f"{target} returned {type(made).__name__}; it must return an Encoder, or a torch.nn.Module with the "
            f"attributes embed_dim and stride."
        )
    absent = [name for name in ("embed_dim", "stride") if not hasattr(made, name)]
    if absent:
        raise BadInputError(
            f"{target} returned a {type(made).__name__} without {' and '.join(absent)}; set it as a number."
        )
    return made


def encoder_of_module(module: nn.Module) -> Encoder:
    """Wrap a module in an Encoder without moving or copying it; an Encoder is returned unchanged.

    Raises `BadInputError` if embed_dim or stride are missing or are not whole numbers.
    """
    if isinstance(module, Encoder):
        return module
    name = type(module).__name__
    for fact in ("embed_dim", "stride"):
        value = getattr(module, fact, None)
        if not isinstance(value, int) or value < 1:
            what = f"has the {fact} {value!r}" if hasattr(module, fact) else f"has no {fact}"
            raise BadInputError(f"The module {name} {what}; set it to a whole number above 0.")
    encoder = ModuleEncoder(module)
    encoder.name = name
    check_has_values(encoder, name)
    encoder.weights_id = whole_sha256(encoder) or hashlib.sha256(name.encode()).hexdigest()
    encoder.weights_report = WeightsReport(source=f"a module of {type(module).__module__}")
    return encoder


class ModuleEncoder(Encoder):
    """A plain module as an encoder; its output is used unchanged, without layers, attention or norm options."""

    _inner = "module"

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.embed_dim, self.stride = module.embed_dim, module.stride
        self.mean = tuple(getattr(module, "mean", self.mean))
        self.std = tuple(getattr(module, "std", self.std))
        self.training_data = getattr(module, "training_data", "")
        self.only_size = getattr(module, "only_size", None)
        self.size_multiple = getattr(module, "size_multiple", None)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        features = self.module(images)
        if not isinstance(features, Tensor):
            raise BadInputError(
                f"The module of encoder {self.name!r} returned {type(features).__name__}; its forward() must return a "
                f"tensor (B, embed_dim, H/stride, W/stride)."
            )
        return DenseFeatures(features, self.stride, final_norm=False)

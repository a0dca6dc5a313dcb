"""Convert official layouts to timm's names with timm's own conversions, and check what these do to each tensor.

timm has a function per family for files in the authors' layouts (`pretrained_filter_fn`): CLIP, DINOv3, RADIO and many
more. These functions also resize and drop tensors without a message. Here, the gradients of their output show which
numbers of a file were dropped or computed again, which is an error or is named in the report.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import _builder as builder
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError
from neco_bench.encoders import weights
from neco_bench.encoders.base import WeightsReport

Filter = Callable[..., Any] | None

_RADIO = "radio_model.model."

_RESIZED_BY_DESIGN = f"{_RADIO}patch_generator.pos_embed"

_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # only OpenAI's own archives have these

# BEiT-3's positions begin with two rows that no image position uses (timm.models.vision_transformer).
_UNREAD_ROWS = {"beit3.encoder.embed_positions.A.weight": 2}

_LOST = "with numbers that it has no place for"


@dataclass(frozen=True)
class Converted:
    """Tensors in timm's names, and what happened to those of the file. positions: the file's position embeddings."""

    tensors: dict[str, Tensor]
    renamed: dict[str, str]
    dropped: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    faults: dict[str, list[str]] | None = None
    positions: Tensor | None = None


def load(
    make: Callable[..., Any], path: Path, branch: str | None, *, drop_registers: bool = False
) -> tuple[Any, WeightsReport]:
    """Load a file in timm's or an official layout into the model `make(**options)`; return the model and a report.

    The model is built at the file's own grid of positions. Raises `MissingError` and `BadInputError`.
    """
    model, filter_fn = _with_filter(make)
    names = model.state_dict().keys()
    read = weights.strip_wrappers(weights.read_tensors(path), names)
    read = weights.strip_chunks(read, names)
    tensors, outside = weights.select(read, names, path, branch, lambda part: _as_timm(part, model, filter_fn))
    _check_activation(read, model, path)
    renamed: dict[str, str] = {}
    dropped: tuple[str, ...] = ()
    if isinstance(model, VisionTransformer):
        tensors, renamed, dropped = weights.to_timm(tensors, model, path, drop_registers=drop_registers)
    fitted = _fit(tensors, model, filter_fn)
    if (size := _size_of(fitted, model)) is not None:
        model = make(img_size=size)
        fitted = _fit(tensors, model, filter_fn)
    if fitted.faults:
        weights.raise_misfits(fitted.faults, path, _advice(fitted, model) or weights.layout_hint(read))
    report = weights.load_strictly(
        model,
        fitted.tensors,
        WeightsReport(
            str(path), {**renamed, **fitted.renamed}, (*outside, *dropped, *fitted.dropped), tuple(fitted.resized)
        ),
        hint=weights.layout_hint(read),
    )
    return model, report


def _with_filter(make: Callable[..., Any]) -> tuple[Any, Filter]:
    """Return the model `make(pretrained=True)` without weights, and timm's conversion for its files, or None."""
    filters: list[Any] = []
    before = builder.load_pretrained
    builder.load_pretrained = lambda *_, filter_fn=None, **__: filters.append(filter_fn)
    try:
        model = make(pretrained=True)
    finally:
        builder.load_pretrained = before
    return model, filters[0] if filters else None


def _fit(tensors: Mapping[str, Tensor], model: nn.Module, filter_fn: Filter) -> Converted:
    """Return the tensors unchanged if they fit, else converted."""
    if not weights.misfits(model, tensors):
        return Converted(dict(tensors), {}, positions=tensors.get("pos_embed"))
    return convert(tensors, model, filter_fn)


def _size_of(fitted: Converted, model: Any) -> tuple[int, ...] | None:
    """Return the input size (height, width) that gives the file's grid; None if it is already used or not square."""
    own: Any = getattr(model, "pos_embed", None)
    embed: Any = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if fitted.positions is None or grid is None or not isinstance(own, Tensor) or own.ndim != 3:
        return None
    cells = fitted.positions.numel() // own.shape[-1] - (own.shape[1] - math.prod(grid))
    side = math.isqrt(max(cells, 0))
    if cells == math.prod(grid) or side * side != cells or not cells:
        return None
    return tuple(side * patch for patch in embed.patch_size)


def _advice(fitted: Converted, model: Any) -> str:
    """Return advice on an architecture that has the missing parameters, or an empty string."""
    name = f"{model.pretrained_cfg.get('architecture')}_qkvb"
    biases = any(".qkv.bias" in key for key in (fitted.faults or {}).get(_LOST, ()))
    return f"Use timm:{name}, which has these biases." if biases and timm.is_model(name) else ""


def _as_timm(tensors: Mapping[str, Tensor], model: nn.Module, filter_fn: Filter) -> dict[str, Tensor]:
    """Return the tensors as converted by timm; unchanged if it cannot convert them."""
    given = dict(tensors)
    if "patch_generator.embedder.weight" in given:  # timm recognises RADIO by the name prefix of one release
        given = {f"{_RADIO}{key}": value for key, value in given.items()}
    if filter_fn is None:
        return given
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints messages
            try:
                return dict(filter_fn(dict(given), model))
            except TypeError:  # a filter of one argument
                return dict(filter_fn(dict(given)))
    except Exception:  # a filter for one family may fail in any way on files of others
        return given


def convert(tensors: Mapping[str, Tensor], model: nn.Module, filter_fn: Filter) -> Converted:
    """Convert tensors to timm's names. Lost or recomputed numbers are faults or are named in the result."""
    given, folded = _masked_biases(tensors)
    if "patch_generator.embedder.weight" in given:
        given = {f"{_RADIO}{key}": value for key, value in given.items()}
    leaves = {key: value.detach() for key, value in given.items()}
    for value in leaves.values():
        if value.is_floating_point() and value.layout == torch.strided:
            value.requires_grad_()
    with torch.enable_grad():
        converted = _as_timm(leaves, model, filter_fn)
    sources = {id(value): key for key, value in leaves.items()}
    renamed = dict(folded)
    used: dict[str, Tensor | int] = {}  # per tensor of the file, how often each of its numbers is used
    derived: list[Tensor] = []
    positions = None
    for name, value in converted.items():
        origins = [sources[id(value)]] if id(value) in sources else [sources[i] for i in _inputs(value) if i in sources]
        if id(value) in sources:
            used[origins[0]] = 1
        elif origins:
            derived.append(value)
        for origin in origins:
            if origin != name:
                renamed[origin] = f"{renamed[origin]}, {name}" if origin in renamed else name
        if name == "pos_embed" and origins and origins[0] != _RESIZED_BY_DESIGN:
            positions = given[origins[0]]
    _count_uses(used, leaves, derived)
    counted = {key: count for key, count in used.items() if isinstance(count, Tensor) and key != _RESIZED_BY_DESIGN}
    for key in _UNREAD_ROWS.keys() & counted.keys():
        counted[key][: _UNREAD_ROWS[key]] = 1
    dropped = [key for key in given if key not in used]
    faults = {
        _LOST: _lost(counted, dropped, used, given),
        "of another value here": _other_values(dropped, given, model),
        "to be resized": [
            f"{key} {tuple(given[key].shape)}" for key, count in counted.items() if bool((count != count.round()).any())
        ],
    }
    resized = [f"{_RESIZED_BY_DESIGN} {tuple(given[_RESIZED_BY_DESIGN].shape)}"] if _RESIZED_BY_DESIGN in used else []
    trunk = {key.partition(".")[0] for key in used}
    listed = [key for key in dropped if key.partition(".")[0] in trunk]
    outside = weights.group_names([key for key in dropped if key not in listed])
    return Converted(
        {name: value.detach() for name, value in converted.items()},
        renamed,
        (*listed, *outside),
        tuple(resized),
        {kind: keys for kind, keys in faults.items() if keys},
        positions,
    )


def _count_uses(used: dict[str, Tensor | int], leaves: Mapping[str, Tensor], derived: list[Tensor]) -> None:
    """Add to `used` how often `derived` uses each number of a tensor: the gradient of the sum of `derived`."""
    inputs = [key for key, value in leaves.items() if value.requires_grad]
    if derived and inputs:
        ones = [torch.ones_like(value) for value in derived]
        counts = torch.autograd.grad(derived, [leaves[key] for key in inputs], ones, allow_unused=True)
        for key, count in zip(inputs, counts, strict=True):
            if count is not None:
                used[key] = count + used.get(key, 0)


def _lost(
    counted: Mapping[str, Tensor], dropped: Collection[str], used: Collection[str], given: Mapping[str, Tensor]
) -> list[str]:
    """Return tensors with unused nonzero numbers: parts of used tensors, and dropped biases of used weights."""
    parts = [key for key, count in counted.items() if bool(((count == 0) & (given[key] != 0)).any())]
    biases = [key for key in dropped if key.endswith(".bias") and f"{key.removesuffix('bias')}weight" in used]
    return parts + [key for key in biases if bool(given[key].ne(0).any())]


def _masked_biases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Multiply DINOv3's biases by the masks of zeros and ones in its files; return the products and merged names."""
    result, folded = dict(tensors), {}
    for key in tensors:
        bias = key.removesuffix("_mask")
        if key.endswith(".bias_mask") and bias in tensors:
            mask = result.pop(key)
            result[bias] = torch.where(mask == 0, torch.zeros_like(mask), tensors[bias] * mask)
            folded[key] = f"{bias} (multiplied)"
    return result, folded


def _inputs(value: Tensor) -> list[int]:
    """Return the ids of the tensors from which a tensor was computed."""
    ids, todo, visited = [], [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            ids.append(id(node.variable))
        todo += [before for before, _ in node.next_functions]
    return ids


def _other_values(dropped: Collection[str], given: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Return dropped tensors (such as periods of rotary positions) for which the model computes other numbers."""
    own = {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers()}
    result = []
    for key in dropped:
        stored, computed = given[key], own.get(key.rpartition(".")[2])
        if computed is None or computed.shape != stored.shape or not computed.is_floating_point():
            continue
        if not torch.allclose(stored.float(), computed.float(), rtol=1e-2):
            result.append(key)
    return result


def _check_activation(tensors: Collection[str], model: Any, path: Path) -> None:
    """Raise `BadInputError` if OpenAI's CLIP, trained with QuickGELU, would run with another activation."""
    official = _OPENAI.issubset(key.rpartition(".")[2] for key in tensors)
    if official and not any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        name = str(model.pretrained_cfg.get("architecture"))
        raise BadInputError(
            f"Weights file {path} is OpenAI's CLIP, which was trained with QuickGELU; {name!r} has another activation. "
            f"Use timm:{re.sub('_clip_(?!quickgelu)', '_clip_quickgelu_', name)}."
        )

"""Load the tensors of a file into a model, strictly. `weight_files` reads files, `timm_layouts` converts layouts.

Layouts: timm; DINO (`teacher` / `student` with `module.backbone.`); DINOv2 (plain, or under `teacher.backbone.`); NeCo
(plain, with `projection_head.*`); Lightning (`state_dict` with `model.*` for the student and `teacher.*`); Leopart (one
leading component). They differ in the prefix of the names and in a few names, so one search for the prefix handles all.
If a file contains several copies of a model, `?branch=` selects one, else `PREFERRED`.

Missing tensors, unused tensors and wrong shapes are errors. Tensors that dense features do not need (heads, mask token)
are named in the report and in the log.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, first_names
from neco_bench.encoders.base import Encoder, WeightsReport
from neco_bench.encoders.weight_files import read_tensors

log = logging.getLogger("neco_bench")

# Parts that dense features do not use: classifier and projection heads, pooling, the token for masked patches.
UNUSED = re.compile(
    r"(vision_model\.)?(head|head_dist|projection_head|fc|classifier|fc_norm|attn_pool|pooler)(\.|$)|(.*\.)?mask_token$"
)

# Parts that exist only in files: decoders and heads of pretraining, mask tokens, counters, CLIP's logit scale.
_LEFT_OVER = re.compile(
    r"decoder_(embed|pos_embed|blocks|norm|pred)(\.|$)|masked_embed$|(dino|ibot|rasa|lm)_head\.|pre_logits\.|local_cls_norm\."
    r"|n_averaged$|logit_(scale|bias)$"
)

# Name prefixes added by wrappers of modules in training, and attributes of pickled modules.
_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "module",
    "_modules",
    "_parameters",
    "_buffers",
)

# Of two copies in one file, the first is used, as by timm or by the authors' evaluation.
PREFERRED = (
    ("teacher", "student"),
    ("teacher", "model"),
    ("state_dict_ema", "state_dict"),
    ("model_ema", "model"),
    ("ema_model", "online_model"),
    ("ema_model", "model"),
    ("base_encoder", "momentum_encoder"),
    ("encoder", "momentum_encoder"),
    ("encoder", "target_encoder"),
    ("encoder", "decoder"),
    ("backbone", "momentum_backbone"),
)

_LIGHTNING = (("student", "teacher"), ("model", "teacher"))

# Layouts for another kind of model spec or other timm architectures, recognised by a name.
_OTHER_LAYOUTS = (
    (
        r"(^|\.)embeddings\.(patch_embeddings?|cls_token|class_embedding)",
        "It has the names of transformers: load it as hf:FOLDER, or hf:ID with --weights.",
    ),
    (
        r"residual1\.fn\.q_proj\.",
        "It has the names of CAPI: capi_vitl14_lvd?trust=true and similar models load the official files.",
    ),
    (
        r"\.mlp\.w12\.",
        "It has SwiGLU blocks, as timm:vit_giant_patch14_dinov2 has, or, for Franca, franca_vitb14 or franca_vitl14.",
    ),
    (r"(^|\.)storage_tokens$", "It is a DINOv3 of Meta: use timm:vit_*_dinov3 or timm:vit_*_dinov3_qkvb."),
    (r"(^|\.)patch_generator\.", "It is a RADIO: use timm:vit_*_radio_*."),
    (r"(^|\.)visual\.class_embedding$", "It is a CLIP: use timm:vit_*_clip_*."),
)

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def strip_wrappers(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Remove `_WRAPPERS` from the names of tensors, except if they are parts of the model's `names`."""
    own = {part for name in names for part in name.split(".")}
    result = dict(tensors)
    for wrapper in _WRAPPERS:
        if wrapper not in own:
            shorter = [".".join(part for part in key.split(".") if part != wrapper) for key in result]
            if len(set(shorter)) == len(result):
                result = dict(zip(shorter, result.values(), strict=True))
    return result


def select(
    tensors: Mapping[str, Tensor],
    names: Collection[str],
    path: Path,
    branch: str | None = None,
    convert: Convert | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under the prefix that covers most of `names`, without the prefix, and the other names.

    If a file contains several copies of a model, `branch` selects one (a part of its prefix; "." is the top level); if
    it is None, `PREFERRED` is used.

    Args:
        names: the names of the model's own tensors.
        convert: renames tensors of another layout to the model's names.

    Raises:
        BadInputError: no prefix fits, or several do.
    """
    anchors = [name for name in names if not UNUSED.match(name)][:8]
    prefixes = {key.removesuffix(anchor) for key in tensors for anchor in anchors if key.endswith(anchor)}
    coverage = {p: sum(p + name in tensors for name in names) for p in prefixes if not p or p.endswith(".")}
    if convert and max(coverage.values(), default=0) < len(names):
        coverage = _converted_coverage(tensors, names, convert, coverage)
    best = max(coverage.values(), default=0)
    if best < len(names) / 4:
        raise BadInputError(
            f"Weights file {path} does not fit this architecture: it has {first_names(sorted(tensors))} "
            f"where {first_names(sorted(names))} were expected. "
            f"{layout_hint(tensors) or 'Check that model and file belong together.'}"
        )
    prefix = _select_prefix(
        [p for p, n in coverage.items() if n >= (0.25 * len(names) if branch else 0.9 * best)], path, branch
    )
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return inside, group_names([key for key in tensors if not key.startswith(prefix)], prefix)


def _converted_coverage(
    tensors: Mapping[str, Tensor], names: Collection[str], convert: Convert, coverage: Mapping[str, int]
) -> dict[str, int]:
    """Return how many of `names` each prefix covers, unchanged (`coverage`) or converted; the larger number is used.

    Of nested prefixes with the same coverage by conversion, only the longest counts.
    """
    empty = {key: torch.empty_like(value, device="meta") for key, value in tensors.items()}
    heads = (re.match(r"([^.]*[^.\d][^.]*\.)*", key) for key in tensors)  # up to the first number
    parts = {head[0] for head in heads if head}
    prefixes = {"", *coverage, *(p[: i + 1] for p in parts for i, letter in enumerate(p) if letter == ".")}
    result = dict(coverage)
    for prefix in sorted(prefixes, key=len, reverse=True):
        converted = convert({key.removeprefix(prefix): value for key, value in empty.items() if key.startswith(prefix)})
        count = sum(name in converted for name in names)
        longer = max((n for p, n in result.items() if p.startswith(prefix) and p != prefix), default=0)
        if count > max(longer, result.get(prefix, 0)):
            result[prefix] = count
    return result


def _select_prefix(prefixes: list[str], path: Path, branch: str | None) -> str:
    """Return the prefix of the copy that `branch` selects, else of the preferred one. Raises `BadInputError`."""
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    labels = ", ".join(sorted(prefix[:-1] or "." for prefix in prefixes))
    candidates = prefixes
    if branch:
        name = "model" if branch == "student" and not any("student" in p for p in parts.values()) else branch
        candidates = [p for p in prefixes if f".{name}." in f".{p}" or (not p and name == ".")]
    lightning = any(prefix.startswith("state_dict.") for prefix in prefixes)
    for first, second in (*(_LIGHTNING if lightning else ()), *PREFERRED):
        others = [p for p in candidates if second in parts[p] and first not in parts[p]]
        if len(others) < len(candidates) and any(first in parts[p] for p in candidates):
            candidates = [p for p in candidates if p not in others]
    if len(candidates) != 1:
        what = f"no {branch} branch" if branch and not candidates else "several copies of the model"
        raise BadInputError(f"Weights file {path} has {what}. Set ?branch= to one of: {labels}.")
    if len(prefixes) > 1 and not branch:
        log.warning(
            "%s has several copies of the model, %s: %s is used (?branch=).", path, labels, candidates[0][:-1] or "."
        )
    return candidates[0]


def layout_hint(tensors: Collection[str]) -> str:
    """Return a sentence on how to load files with these names; "" if the layout is unknown."""
    return next((hint for pattern, hint in _OTHER_LAYOUTS if any(re.search(pattern, key) for key in tensors)), "")


def group_names(keys: Collection[str], prefix: str = "") -> tuple[str, ...]:
    """Group names by their part after the common part with `prefix`: one text for each group."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_group(key, prefix), []).append(key)
    return tuple(f"{group} ({len(names)} tensors)" if len(names) > 1 else names[0] for group, names in groups.items())


def _group(key: str, prefix: str) -> str:
    """Return the start of a key up to the first part not in the prefix, such as teacher.module.head.*."""
    parts, own = key.split("."), prefix.split(".")
    shared = next((i for i in range(len(parts)) if parts[: i + 1] != own[: i + 1]), len(parts))
    return ".".join(parts[: shared + 1]) + ".*"


def misfits(model: nn.Module, tensors: Mapping[str, Tensor], whole: bool = False) -> dict[str, list[str]]:
    """Return the tensors that do not fit `model`, by kind of fault; empty if all fit.

    Args:
        whole: parts in `UNUSED` and `_LEFT_OVER` must fit too.
    """
    own = model.state_dict()
    result = {
        "missing": [key for key in own if key not in tensors and (whole or not UNUSED.match(key))],
        "left over": [
            key for key in tensors if key not in own and (whole or not (UNUSED.match(key) or _LEFT_OVER.match(key)))
        ],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in tensors and tensors[key].shape != own[key].shape
        ],
        "quantised, complex or not dense": [
            f"{key} ({value.dtype})" for key, value in tensors.items() if key in own and not _same_kind(value, own[key])
        ],
    }
    return {kind: keys for kind, keys in result.items() if keys}


def load_strictly(
    model: nn.Module, tensors: Mapping[str, Tensor], report: WeightsReport, *, whole: bool = False, hint: str = ""
) -> WeightsReport:
    """Copy `tensors` into `model`; every name, shape and kind of number must fit.

    Parts in `UNUSED` may be absent on either side, and parts in `_LEFT_OVER` from the model. Dropped and resized
    tensors are logged.

    Args:
        report: the file, and the changes to its tensors so far.
        whole: parts in `UNUSED` and `_LEFT_OVER` must fit too.
        hint: advice for the error message.

    Returns:
        The report, which lists unused tensors as dropped.

    Raises:
        BadInputError: if tensors do not fit; the message names them.
    """
    if kinds := misfits(model, tensors, whole):
        raise_misfits(kinds, report.source, hint or layout_hint(tensors))
    own = model.state_dict()
    report = replace(report, dropped=(*report.dropped, *(key for key in tensors if key not in own)))
    model.load_state_dict({**own, **{key: value for key, value in tensors.items() if key in own}})
    if report.dropped:
        log.warning("%s: not used for dense features, dropped: %s", report.source, first_names(sorted(report.dropped)))
    if report.resized:
        log.warning("%s: resized, as in its own code: %s", report.source, first_names(sorted(report.resized)))
    return report


def raise_misfits(kinds: Mapping[str, list[str]], path: Path | str, hint: str = "") -> NoReturn:
    """Raise the `BadInputError` for tensors that do not fit, by kind of fault."""
    text = "; ".join(f"{len(keys)} {kind}: {first_names(sorted(keys))}" for kind, keys in kinds.items())
    raise BadInputError(f"Weights file {path} does not fit this architecture: {text}. {hint}".rstrip())


def _same_kind(value: Tensor, own: Tensor) -> bool:
    """Return whether copying keeps the numbers: floating point to floating point, integers to integers."""
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return plain and (value.is_floating_point(), value.is_complex()) == (own.is_floating_point(), own.is_complex())


def load_file_into(model: nn.Module, path: Path, branch: str | None = None, *, whole: bool = False) -> WeightsReport:
    """Load a file with the names of `model`, up to a prefix. Raises errors of `read_tensors` and `load_strictly`."""
    names = model.state_dict().keys()
    tensors = strip_chunks(strip_wrappers(read_tensors(path), names), names)
    tensors, outside = select(tensors, names, path, branch)
    return load_strictly(model, tensors, WeightsReport(str(path), dropped=outside), whole=whole)


def strip_chunks(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Rename blocks of DINOv2's training checkpoints, `blocks.CHUNK.5.`, to `blocks.5.`.

    Nothing is renamed if the model's `names` have this form too.
    """
    chunk = re.compile(r"\bblocks\.\d+\.(\d+)\.")
    if any(chunk.search(name) for name in names):
        return dict(tensors)
    return {chunk.sub(r"blocks.\1.", key): value for key, value in tensors.items()}


def to_timm(
    tensors: Mapping[str, Tensor], model: nn.Module, path: Path, *, drop_registers: bool = False
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Rename tensors of DINO, DINOv2 and NeCo to timm's names; return them, the renamed names, and the dropped names.

    timm's models with registers have no class position in `pos_embed`; it is added to the class token instead. SwiGLU's
    w12 and w3 are fc1 and fc2. `drop_registers` allows a file with registers for an architecture without ("XR");
    otherwise that raises `BadInputError`.
    """
    result = dict(tensors)
    renamed: dict[str, str] = {}
    dropped: tuple[str, ...] = ()
    for key in tensors:
        new = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if new != key:
            result[new], renamed[key] = result.pop(key), new
    if "register_tokens" in result:
        registers = result.pop("register_tokens")
        if getattr(model, "reg_token", None) is not None:
            result["reg_token"], renamed["register_tokens"] = registers, "reg_token"
            if getattr(model, "no_embed_class", False) and {"cls_token", "pos_embed"} <= result.keys():
                result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
                result["pos_embed"] = result["pos_embed"][:, 1:]
                renamed["pos_embed[:, :1]"] = "cls_token (added)"
        elif drop_registers:
            dropped = ("register_tokens",)
        else:
            raise BadInputError(
                f"Weights file {path} has register tokens and this architecture has none. Use a model with registers, "
                f"or one of the zoo's XR entries if they are to be dropped."
            )
    return result, renamed, dropped


def inner_module(encoder: Encoder) -> nn.Module:
    """Return the model whose state dict is the encoder's weights, for loading files and saving checkpoints."""
    inner: nn.Module = getattr(encoder, encoder._inner) if encoder._inner else encoder
    return inner


def state_sha256(model: nn.Module, *, whole: bool = False) -> str:
    """Compute the sha256 of the weights that dense features use: names, types, shapes and bytes, sorted by name.

    Args:
        whole: use all weights, because `UNUSED` names may have another meaning in this model.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if whole or not UNUSED.match(name):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

"""Reading weights safely and loading them strictly.

Files: .safetensors, and torch files read with `weights_only=True`, so that no file can run code. Layouts: timm; DINO
(`teacher` / `student` with `module.backbone.`); DINOv2 (plain, or under `teacher.backbone.`); NeCo (plain, with
`projection_head.*`); Lightning (`state_dict` with `model.*` for the student and `teacher.*`); Leopart (one leading
component). They differ in what stands before the names and in a few names, so one search for the prefix serves all.

Nothing is skipped in silence: keys that are missing, left over or of another shape are an error, and the few that dense
features do not need (heads, mask token) are named in the report and in the log.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neco_bench.encoders.base import Encoder, WeightsReport
from neco_bench.errors import BadInputError, MissingError

log = logging.getLogger("neco_bench")

# What dense features never pass through: classifier and projection heads, pooling, the token for masked patches.
UNUSED = re.compile(
    r"(vision_model\.)?(head|head_dist|projection_head|fc|classifier|fc_norm|attn_pool|pooler)(\.|$)|(.*\.)?mask_token$"
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors in a file on the CPU, nested dictionaries flattened to dotted names.

    Raises `MissingError` (no such file) and `BadInputError` (truncated, not weights, or wanting to run code).
    """
    if not path.is_file():
        raise MissingError(f"Weights file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with _plain_namespaces():
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise many types; whichever it is, this file is at fault
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise BadInputError(
                f"Weights file {path} wants to run code when it is read, and was not opened. If you trust where it "
                f"comes from, convert it to .safetensors, or save its state dict alone."
            ) from error
        raise BadInputError(
            f"Weights file {path} could not be read ({type(error).__name__}); it may be truncated. Get it again."
        ) from error
    tensors = dict(_flat(content, ""))
    if not tensors:
        raise BadInputError(f"Weights file {path} holds no named tensors.")
    return tensors


def _plain_namespaces() -> AbstractContextManager[Any]:
    """Let DINO's full checkpoints keep their `args`, a plain argparse.Namespace (torch 2.5 and newer)."""
    allow = getattr(torch.serialization, "safe_globals", None)
    return allow([argparse.Namespace]) if allow else nullcontext()


def _flat(content: Any, prefix: str) -> list[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        return []
    found: list[tuple[str, Tensor]] = []
    for key, value in content.items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{key}", value.detach()))
        elif isinstance(key, str):
            found += _flat(value, f"{prefix}{key}.")
    return found


def select(
    tensors: Mapping[str, Tensor], names: Collection[str], path: Path, branch: str | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors under the prefix that covers most of `names`, without it, and what was left outside, for people.

    Where a file holds a student and a teacher, `branch` says which; by default the student of a Lightning checkpoint
    and the teacher of others (DINO, DINOv2). Raises `BadInputError` where nothing fits, or more than one thing does.
    """
    anchors = [name for name in names if not UNUSED.match(name)][:8]
    found = {key.removesuffix(anchor) for key in tensors for anchor in anchors if key.endswith(anchor)}
    cover = {p: sum(p + name in tensors for name in names) for p in found if not p or p.endswith(".")}
    best = max(cover.values(), default=0)
    if best < len(names) / 4:
        raise BadInputError(
            f"Weights file {path} does not fit this architecture: it has {_some(tensors)} "
            f"where {_some(names)} were expected. Check that the model and the file belong together."
        )
    prefixes = sorted(p for p, n in cover.items() if n >= 0.9 * best)
    if branch or len(prefixes) > 1:
        lightning = any(p.startswith("state_dict.") for p in prefixes)
        wanted = branch or ("student" if lightning else "teacher")
        chosen = [p for p in prefixes if _branch(p) == wanted]
        if len(chosen) != 1:
            raise BadInputError(
                f"Weights file {path} has no single {wanted} branch; it has weights under "
                f"{', '.join(repr(p) for p in prefixes)}. Set ?branch=student or ?branch=teacher, or leave it out."
            )
        prefixes = chosen
    prefix = prefixes[0]
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside: dict[str, int] = {}
    for key in tensors:
        if not key.startswith(prefix):
            group = _group(key, prefix)
            outside[group] = outside.get(group, 0) + 1
    return inside, tuple(f"{group} ({count} tensors)" for group, count in outside.items())


def _branch(prefix: str) -> str | None:
    parts = prefix.split(".")
    return "teacher" if "teacher" in parts else "student" if {"student", "model"} & set(parts) else None


def _group(key: str, prefix: str) -> str:
    """The start of a key up to where it leaves the prefix: teacher.module.head.* beside teacher.module.backbone."""
    parts, own = key.split("."), prefix.split(".")
    shared = next((i for i in range(len(parts)) if parts[: i + 1] != own[: i + 1]), len(parts))
    return ".".join(parts[: shared + 1]) + ".*"


def _some(names: Collection[str]) -> str:
    listed = ", ".join(sorted(names)[:8])
    return f"{listed} and {len(names) - 8} more" if len(names) > 8 else listed


def load_strictly(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path | str,
    *,
    renamed: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
    whole: bool = False,
) -> WeightsReport:
    """Copy `tensors` into `model`, every name, shape and kind of number fitting; parts in `UNUSED` may be absent on
    either side, but for `whole`.

    Raises `BadInputError` listing what does not fit. Reports and logs what was dropped.
    """
    own = model.state_dict()
    extra = [key for key in tensors if key not in own]
    wrong = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    faults = {
        "missing": [key for key in own if key not in tensors and (whole or not UNUSED.match(key))],
        "left over": [key for key in extra if whole or not UNUSED.match(key)],
        "of another shape": wrong,
        "quantised, complex or not dense": [
            f"{key} ({value.dtype})" for key, value in tensors.items() if key in own and not _converts(value, own[key])
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise BadInputError(f"Weights file {path} does not fit this architecture: {told}.")
    dropped = (*dropped, *(key for key in extra))
    model.load_state_dict({**own, **{key: value for key, value in tensors.items() if key in own}})
    if dropped:
        log.warning("%s: not used for dense features, dropped: %s", path, _some(dropped))
    return WeightsReport(source=str(path), renamed=dict(renamed or {}), dropped=tuple(dropped))


def _converts(value: Tensor, own: Tensor) -> bool:
    """Whether copying means the same numbers: floating point into floating point, whole numbers into whole ones."""
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return plain and (value.is_floating_point(), value.is_complex()) == (own.is_floating_point(), own.is_complex())


def load_file_into(model: nn.Module, path: Path, branch: str | None = None, *, whole: bool = False) -> WeightsReport:
    """Load a file whose names are those of `model`, but for a prefix. Raises as the steps it is made of."""
    tensors, outside = select(read_tensors(path), model.state_dict().keys(), path, branch)
    return load_strictly(model, tensors, path, dropped=outside, whole=whole)


def without_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Block names of DINOv2's training checkpoints, `blocks.CHUNK.5.`, as `blocks.5.`."""
    return {re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in tensors.items()}


def to_timm(
    tensors: Mapping[str, Tensor], model: nn.Module, path: Path, *, drop_registers: bool = False
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Names of DINO, DINOv2 and NeCo as timm's: the tensors, what was renamed, and what was dropped.

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
    """The model whose state dict is the encoder's weights: what files are loaded into, and what training saves."""
    inner: nn.Module = getattr(encoder, encoder._inner) if encoder._inner else encoder
    return inner


def state_sha256(model: nn.Module, *, whole: bool = False) -> str:
    """The sha256 of the weights that dense features use: names, types, shapes and bytes, in the order of names.

    whole: of all weights, where it is not known what `UNUSED` names stand for.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if whole or not UNUSED.match(name):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

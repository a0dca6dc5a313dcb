"""What encoders that are loaded are known by in content keys; `zoo.request_id` says it of specs. Imports no torch."""

from __future__ import annotations

import inspect
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from neco_bench.encoders.zoo import needs_loading, parse_spec, request_id
from neco_bench.protocol import digest

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder

PACKAGES = ("neco_bench", "torch", "torchvision", "timm", "transformers")


def object_id(encoder: Encoder) -> str:
    """The content id of an Encoder object: weights, code, and how features are read from it."""
    from neco_bench.encoders.code_adapter import check_has_values
    from neco_bench.encoders.weights import state_sha256

    check_has_values(encoder, f"The encoder {encoder.name!r}")
    facts = ("weights_id", "embed_dim", "stride", "mean", "std", "layer", "final_norm", "pos_interp", "precision")
    known = {fact: getattr(encoder, fact) for fact in facts}
    state = state_sha256(encoder, whole=True)  # an author's own weights_id may be the same for several
    return digest({"device": encoder.device.type, "code": _code(encoder), "state": state} | known)


def loaded_id(spec: str, weights: Path | None, encoder: Encoder) -> str:
    """The content id of a spec once its encoder is loaded: with files that were fetched for it, and, where
    `needs_loading` holds, with its weights and the code of its modules. Raises as `request_id`."""
    identity = request_id(spec, weights)
    if not needs_loading(parse_spec(spec)):
        return identity
    facts = [encoder.weights_id, encoder.embed_dim, encoder.stride, encoder.mean, encoder.std, encoder.pos_interp]
    return digest([identity, facts, _code(encoder, unread="")])


def _code(encoder: Encoder, unread: str | None = None) -> dict[str, str]:
    """Source of each class of modules in it, but for packages, whose versions are known. unread: what stands for code
    that cannot be read (it was typed in); None: it is never the same."""
    sources = {}
    for kind in {type(module) for module in encoder.modules()}:
        if kind.__module__.partition(".")[0] not in PACKAGES:
            module = "" if kind.__module__.startswith("neco_bench_user_") else kind.__module__  # which names the place
            name = f"{module}.{kind.__qualname__}"
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = uuid.uuid4().hex if unread is None else unread
    return sources

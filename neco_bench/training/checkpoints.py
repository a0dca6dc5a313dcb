"""Checkpoints of a run: folders `checkpoint-<step>` that are there whole or not at all, the last two of them.

    student.safetensors, teacher.safetensors    the encoder's weights, in the names of the model it started from
    training.pt                                 heads, optimizer, queue, counters: what going on needs besides

`encoder.json` beside them says how to load the newest as a model: `neco-bench run --model RUN`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from neco_bench.encoders.base import Encoder
from neco_bench.encoders.weights import inner_module
from neco_bench.errors import BadInputError, NecoBenchError
from neco_bench.results.files import write_whole

KEPT = 2


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the oldest first."""
    return sorted(path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{7}", path.name))


def save(run: Path, step: int, networks: dict[str, Encoder], state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a checkpoint, then `encoder.json` with `facts`, then delete what is older than the last two.

    networks: encoders by role, "student" and perhaps "teacher". Raises NecoBenchError where it cannot be written;
    earlier checkpoints are then as they were.
    """
    final, temporary = run / f"checkpoint-{step:07d}", run / ".checkpoint.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for role, encoder in networks.items():
            weights = inner_module(encoder).state_dict()  # copied, as modules that share weights may name them twice
            tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in weights.items()}
            save_file(tensors, temporary / f"{role}.safetensors")
        torch.save(state, temporary / "training.pt")
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # each reports a full disk in a way of its own
        shutil.rmtree(temporary, ignore_errors=True)
        before = checkpoints(run)
        kept = f"The last checkpoint, {before[-1]}, is untouched: " if before else "Then "
        raise NecoBenchError(
            f"{final}: the checkpoint could not be written ({getattr(error, 'strerror', None) or error}). Free disk "
            f"space or make the folder writable. {kept}give --resume to go on."
        ) from error
    files = {role: f"{final.name}/{role}.safetensors" if role in networks else None for role in ("student", "teacher")}
    write_whole(run / "encoder.json", json.dumps({"format": 1, **facts, **files, "step": step}, indent=2).encode())
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def restore(folder: Path, networks: dict[str, Encoder]) -> dict[str, Any]:
    """Load a checkpoint's weights into the encoders and give back its state. Raises BadInputError naming the mend."""
    try:
        for role, encoder in networks.items():
            inner_module(encoder).load_state_dict(load_file(folder / f"{role}.safetensors"))
        return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise many types; whichever it is, this checkpoint is at fault
        raise BadInputError(
            f"Checkpoint {folder} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). Delete it to "
            f"go on from the one before, or from the start."
        ) from error

"""Checkpoints of a run: folders `checkpoint-<step>`, written atomically. The last two are kept, and others with
`--keep-every`.

    student.safetensors, teacher.safetensors    the encoder's weights, in the names of the model it started from
    training.pt                                 heads, optimizer, queue, counters: the state for resuming
    encoder.json                                how to load it: `neco-bench run --model RUN/checkpoint-<step>`

`encoder.json` in the run folder describes how to load the newest one: `neco-bench run --model RUN`. A folder gets its
name after all its files are written, and is renamed before the first file is deleted, so that a kill at any moment
leaves no incomplete checkpoint. `clear` deletes the files that remain under other names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from neco_bench.core.errors import BadInputError, NecoBenchError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.weights import inner_module

log = logging.getLogger("neco_bench")

STORED = 2  # checkpoints of a run

LOCK_SECONDS = 6.0  # loading processes of a killed run may have inherited its lock; they end within five seconds

_NAME, _TEMPORARY, _DELETED = re.compile(r"checkpoint-(\d{7,})"), ".checkpoint.tmp", ".{}.old"


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoint folders of a run, the oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Read the step of a checkpoint folder from its name."""
    return int(folder.name.rpartition("-")[2])


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Create the run folder if needed and lock it; the lock is released when the process ends.

    Raises UsageError if another process has locked it, NecoBenchError if the folder cannot be written.
    """
    lock = FileLock(run / "lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UsageError(
            f"--out {run}: another process trains here. Wait until it has ended, or give another --out."
        ) from None
    except OSError as error:
        raise NecoBenchError(
            f"{run}: the folder could not be locked ({error.strerror or error}). Make it writable, or choose "
            f"another one with --out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def clear(run: Path) -> None:
    """Delete files that killed processes left in a run folder; only while it is `locked`."""
    for folder in (run / _TEMPORARY, *run.glob(_DELETED.format("checkpoint-*"))):
        shutil.rmtree(folder, ignore_errors=True)
    for file in run.glob(".*.tmp"):  # of `write_whole`
        with contextlib.suppress(OSError):
            file.unlink()


def save(
    run: Path,
    step: int,
    networks: dict[str, Encoder],
    state: dict[str, Any],
    facts: dict[str, Any],
    keep_every: int | None = None,
) -> None:
    """Write a checkpoint and `encoder.json` with `facts`, then delete checkpoints older than the last two.

    An existing checkpoint of that step is complete and is not written again. networks: encoders by role, "student" and
    optionally "teacher". keep_every: checkpoints whose step is a multiple of it are kept.
    Raises NecoBenchError if it cannot be written; earlier checkpoints are then unchanged.
    """
    final = run / f"checkpoint-{step:07d}"
    if not final.exists():
        _write(final, networks, state, _description(step, networks, facts, ""))
    write_whole(run / "encoder.json", _description(step, networks, facts, f"{final.name}/"))
    for old in checkpoints(run)[:-STORED]:
        if keep_every and step_of(old) and step_of(old) % keep_every == 0:
            continue
        deleted = run / _DELETED.format(old.name)
        with contextlib.suppress(OSError):  # the next checkpoint tries again
            os.replace(old, deleted)
            shutil.rmtree(deleted)


def _description(step: int, networks: dict[str, Encoder], facts: dict[str, Any], folder: str) -> bytes:
    """Return the content of an `encoder.json`. folder: relative path to the weights."""
    files = {role: f"{folder}{role}.safetensors" if role in networks else None for role in ("student", "teacher")}
    return json.dumps({"format": 1, **facts, **files, "step": step}, indent=2).encode()


def _write(final: Path, networks: dict[str, Encoder], state: dict[str, Any], description: bytes) -> None:
    """Write the files of a checkpoint under a temporary name, and rename them."""
    run, temporary = final.parent, final.parent / _TEMPORARY
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for role, encoder in networks.items():
            weights = inner_module(encoder).state_dict()  # copied, as modules that share weights may name them twice
            tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in weights.items()}
            save_file(tensors, temporary / f"{role}.safetensors")
        torch.save(state, temporary / "training.pt")
        (temporary / "encoder.json").write_bytes(description)
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # each reports a full disk differently
        shutil.rmtree(temporary, ignore_errors=True)
        before = checkpoints(run)
        hint = f"The last checkpoint, {before[-1]}, is unchanged: " if before else "Then "
        raise NecoBenchError(
            f"{final}: the checkpoint could not be written ({getattr(error, 'strerror', None) or error}). Free disk "
            f"space or make the folder writable. {hint}give --resume to continue."
        ) from error


def restore(folder: Path, networks: dict[str, Encoder], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint into the encoders and into `parts`, which have `load_state_dict`; return its state.

    A part whose stored state is empty (loss scaling of another precision) is not changed. Raises BadInputError.
    """
    try:
        for role, encoder in networks.items():
            inner_module(encoder).load_state_dict(load_file(folder / f"{role}.safetensors"))
        state: dict[str, Any] = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            if state[name]:
                part.load_state_dict(state[name])
        return {**state, "step": int(state["step"]), "unusable": dict(state["unusable"])}
    except MemoryError:
        raise
    except Exception as error:  # readers raise many types; in all cases, this checkpoint is at fault
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadInputError(f"Checkpoint {folder} cannot be read ({type(error).__name__}: {reason}).") from error


def restore_newest(
    run: Path, networks: dict[str, Encoder], parts: Mapping[str, Any]
) -> tuple[Path, dict[str, Any], list[Path]]:
    """Restore the newest readable checkpoint; return it, its state, and the unreadable ones.

    Raises BadInputError if none can be read.
    """
    unreadable: list[Path] = []
    for folder in reversed(checkpoints(run)):
        try:
            state = restore(folder, networks, parts)
        except BadInputError as error:
            log.warning("%s Trying the previous one.", error)
            unreadable.append(folder)
            last = error
        else:
            return folder, state, unreadable
    raise BadInputError(
        f"{last} No earlier one can be read either: give another --out, or delete {run} to start again."
    ) from last


def set_aside(folder: Path) -> None:
    """Rename a checkpoint that cannot be read, so that the run can write that step again."""
    aside = folder.with_name(f"unreadable-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    log.warning("%s is now called %s; delete it if you do not need it.", folder, aside.name)

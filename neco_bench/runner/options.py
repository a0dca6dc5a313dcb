"""Options of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from neco_bench.core.errors import UsageError
from neco_bench.encoders.load import resolve_device
from neco_bench.encoders.options import PRECISIONS


@dataclass(frozen=True)
class RunOptions:
    """Options of a run. None means: NECO_BENCH_DATA (data_root), the best device, fp32, the last layer, and cores - 1
    workers on a GPU and none on a CPU.

    precision: "auto" uses bf16 if the protocol allows it and the device is fast in it, else fp32.
    features: precision in which the features of a named model are stored for all tasks: "fp32", "fp16", or "off".
    checkpointing: if a task trains the encoder, compute activations again in backward: less memory, more time.
    """

    data_root: Path | None = None
    device: str | None = None
    precision: str | None = None
    batch_size: int = 16
    workers: int | None = None
    seed: int = 0
    limit: int | None = None
    split_file: Path | None = None
    weights: Path | None = None
    layers: str | None = None
    features: str = "fp32"
    overwrite: bool = False
    checkpointing: bool = False
    progress: bool = False

    @property
    def workers_used(self) -> int:
        """Number of workers; default: cores minus one, at most 16, divided among the processes of torchrun."""
        spare = max(0, min(16, (os.cpu_count() or 1) - 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return spare if self.workers is None else self.workers

    def __post_init__(self) -> None:
        if self.precision not in (None, "auto", *PRECISIONS):
            raise UsageError(f"Unknown precision {self.precision!r}: use {', '.join(PRECISIONS)} or auto.")
        if self.features not in ("fp32", "fp16", "off"):
            raise UsageError(f"Unknown --features {self.features!r}: use fp32, fp16 or off.")
        for name, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--workers", self.workers, 0),
            ("--limit", self.limit, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        if (self.workers or 0) > (most := max(64, 4 * (os.cpu_count() or 1))):
            raise UsageError(
                f"--workers must be at most {most} on this machine, got {self.workers}: each is a process."
            )
        if self.seed > 10**9:  # FAISS seeds have 31 bits, and `--seeds` adds to the first
            raise UsageError(f"--seed must be at most 1,000,000,000, got {self.seed}.")


def check_device(device: str | None) -> None:
    """Raise UsageError if a device is unknown or not available on this machine."""
    if device not in (None, "auto", "cpu"):
        resolve_device(device)

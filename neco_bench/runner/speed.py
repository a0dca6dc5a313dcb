"""Measure the speed and memory of an encoder: a result of the family "speed" per input size and precision.

Images per second are measured for `Encoder.encode` on images in memory, without loading: normalisation, forward pass
and the check for NaN. The device, the batch size and the number of cores are part of the protocol hash, so that results
under other conditions never share a column.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neco_bench.core.errors import UsageError, is_out_of_memory
from neco_bench.core.files import digest
from neco_bench.core.protocol import all_cards
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.options import PRECISIONS
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import device_name, encoder_facts

FAMILY, PROTOCOL = "speed", "speed-1"

LEAST = 3  # minimum number of batches of a measurement


@dataclass(frozen=True)
class SpeedOptions:
    """What to measure. sizes: pixels per side. seconds: time for each measurement, but at least LEAST batches."""

    sizes: tuple[int, ...]
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batch_size: int = 16
    seconds: float = 2.0

    def __post_init__(self) -> None:
        """Raise UsageError for invalid options."""
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown:
            raise UsageError(f"Unknown precision {unknown[0]!r}: use {', '.join(PRECISIONS)}.")
        if not self.sizes or min(self.sizes) < 1 or self.batch_size < 1 or not 0 < self.seconds < 3600:
            raise UsageError("--size and --batch-size must be at least 1, --seconds above 0 and below 3600.")


def task_sizes() -> tuple[int, ...]:
    """Return the three most common input sizes of tasks under their default protocol, in pixels, ascending."""
    cards = all_cards()[0].values()
    settings = [{**card.constants, **card.protocols[card.default_protocol]} for card in cards]
    counts = Counter(values["input_size"] for values in settings if "input_size" in values)
    return tuple(sorted(size for size, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]))


def measure_speed(
    encoder: Encoder, identity: str, options: SpeedOptions, store: ResultStore | None = None, *, overwrite: bool = False
) -> list[Result]:
    """Measure an encoder at each size and precision; stored results are returned unless `overwrite` is set.

    Args:
        encoder: the encoder, on its device.
        identity: its content id, see `neco_bench.encoders.identity`.
        options: sizes, precisions, batch size and time.
        store: results folder; None stores nothing.
        overwrite: measure again even if a result is stored.

    Raises:
        UsageError: if one image of a size does not fit into memory.
    """
    results = []
    sizes = dict.fromkeys(encoder.nearest_size(size) for size in sorted(options.sizes))
    before = encoder.precision
    try:
        for size in sizes:
            for precision in options.precisions:
                encoder.precision = precision
                results.append(_measured(encoder, identity, size, options, None if overwrite else store))
                if store is not None:
                    store.save(results[-1])
    finally:
        encoder.precision = before
    return results


def _measured(encoder: Encoder, identity: str, size: int, options: SpeedOptions, store: ResultStore | None) -> Result:
    provenance = environment()
    conditions: dict[str, Any] = {
        "device": device_name(encoder),
        "cpu": provenance["cpu"] if encoder.device.type == "cpu" else None,
        "threads": torch.get_num_threads() if encoder.device.type == "cpu" else None,
        "batch_size": options.batch_size,
    }
    protocol_hash = digest([PROTOCOL, conditions])
    key = digest([FAMILY, identity, encoder.layer, size, encoder.precision, protocol_hash, provenance["packages"]])
    if store is not None and (known := store.find(key)) is not None:
        return known
    start = time.perf_counter()
    batch_size, batches, seconds, memory = _timed(encoder, size, options)
    metrics = {
        "images_per_second": batch_size * batches / seconds,
        "gflops_per_image": _operations(encoder, size) / 1e9,
        "million_parameters": sum(p.numel() for p in encoder.parameters()) / 1e6,
    }
    return Result(
        key=key,
        model=encoder.name + ("" if encoder.layer == "last" else f"[{encoder.layer}]"),
        task=f"speed_{size}_{encoder.precision}",
        family=FAMILY,
        protocol=PROTOCOL,
        primary_metric="images_per_second",
        metrics=metrics,
        per_class={},
        ci95={},
        n_images=batch_size * batches,
        seed=0,
        status="ok",
        provenance={
            **provenance,
            **encoder_facts(encoder),
            "protocol_hash": protocol_hash,
            "settings": conditions,
            "device": conditions["device"],
            "batch_size_used": batch_size,
            "features": {"used_size": size, "tokens": (size // encoder.stride) ** 2, "layer": encoder.layer},
        },
        timing={"encode": seconds, "total": time.perf_counter() - start},
        peak_memory_mb=memory,
    )


def _timed(encoder: Encoder, size: int, options: SpeedOptions) -> tuple[int, int, float, float]:
    """Return batch size, batches, their seconds, and peak memory in MiB; the batch is halved if memory runs out."""
    batch_size = options.batch_size
    while True:
        try:
            images = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
            images = images.to(encoder.device)
            _forget_peak(encoder.device)
            encoder.encode(images)  # warm-up
            _wait(encoder.device)
            batches, start = 0, time.perf_counter()
            while batches < LEAST or time.perf_counter() - start < options.seconds:
                encoder.encode(images)
                _wait(encoder.device)
                batches += 1
            return batch_size, batches, time.perf_counter() - start, _peak_mb(encoder.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise UsageError(
                    f"One image of {size}x{size} needs more memory than is available. Lower --size."
                ) from error
            batch_size //= 2


def _operations(encoder: Encoder, size: int) -> float:
    """Return the floating-point operations per image: two per multiply-add in matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # not all other attention kernels are counted
        encoder.encode(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _forget_peak(device: torch.device) -> None:
    """Reset the peak memory of the GPU, or, on Linux, of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines: Sequence[str] = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    return peak_memory_mb()

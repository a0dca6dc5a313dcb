"""The feature store: what an encoder gave for the items of a stream, stored on disk and shared by every task and run.

One folder per stream under `<cache>/features`, named by two digests: of all that features of an item depend on (encoder
and weights, layer, precision, kind of device, normalisation, data set and split, what the transform does to pixels),
and of the items, their order and their masks. Streams with the first in common share features by item: a task with
other masks or another list of the same items computes masks alone. Augmentation is drawn per item, so augmented
features are stored like others. Features lie one after the other in a file; masks, as the transform gave them, beside
them. Items are appended in order and each has a checksum, so that a run that was killed
loses the item it was writing and no more. One process writes a stream; others that come meanwhile compute for
themselves. The least recently used streams go when the budget is exceeded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from neco_bench.core.errors import NecoBenchError, NumericalError, UsageError
from neco_bench.core.files import digest, write_whole
from neco_bench.core.paths import cache_dir

log = logging.getLogger("neco_bench")

DTYPES: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}

_RECORD = np.dtype([("end", "<u8"), ("checksum", "<u4"), ("height", "<u4"), ("width", "<u4")])

_ABOUT = "about.json"

_ITEMS = "items.bin"  # the ids of all items, in their order

ID_BYTES = 12

_FILES = "index.bin", "features.bin", "masks.bin"

STARTING = 60  # seconds within which a new stream has its description

_REBUILT: set[Path] = set()  # by this process, once for all its tasks


def store_folder() -> Path:
    """Where streams are stored. It need not exist yet."""
    return cache_dir() / "features"


def budget() -> float:
    """Bytes that streams may take together: `NECO_BENCH_FEATURES_GB`, else 20 GB. Raises UsageError for no number."""
    text = os.environ.get("NECO_BENCH_FEATURES_GB", "20")
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise UsageError(f"NECO_BENCH_FEATURES_GB={text!r} is not a number of gigabytes.") from error


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class FeatureFile:
    """Stored items of one stream: `done` of `count` are there, each features (D, h, w) and a mask (H, W) uint8."""

    def __init__(
        self, folder: Path, count: int, shape: tuple[int, ...], dtype: np.dtype, lock: FileLock | None
    ) -> None:
        self.folder, self.count, self.shape, self.dtype, self._lock = folder, count, shape, dtype, lock
        self._item = int(np.prod(shape)) * dtype.itemsize
        index, features, masks = (_size(folder / name) for name in _FILES)
        count = min(index // _RECORD.itemsize, features // self._item)
        self._records = np.fromfile(folder / _FILES[0], _RECORD, count) if count else np.zeros(0, _RECORD)
        ends = self._records["end"]
        broken = np.flatnonzero((ends > masks) | (np.insert(ends, 0, 0)[:-1] > ends))
        self._records = self._records[: broken[0] if len(broken) else None]
        self._files: list[Any] = []

    @property
    def done(self) -> int:
        """Items that are there."""
        return len(self._records)

    def read(self, start: int, stop: int) -> tuple[Tensor, tuple[np.ndarray, ...]] | None:
        """Features (n, D, h, w) float32 and masks of items start to stop; None where they are damaged or gone."""
        try:
            return self._read(start, stop)
        except (OSError, ValueError):  # another process made room; a mask's size is wrong
            return None

    def _read(self, start: int, stop: int) -> tuple[Tensor, tuple[np.ndarray, ...]] | None:
        with open(self.folder / _FILES[1], "rb") as features, open(self.folder / _FILES[2], "rb") as masks:
            features.seek(start * self._item)
            content = features.read((stop - start) * self._item)
            place = int(self._records["end"][start - 1]) if start else 0
            masks.seek(place)
            images = []
            for i, record in enumerate(self._records[start:stop]):
                packed = masks.read(int(record["end"]) - place)
                place = int(record["end"])
                item = memoryview(content)[i * self._item : (i + 1) * self._item]
                if zlib.crc32(packed, zlib.crc32(item)) != record["checksum"]:
                    return None
                mask = np.frombuffer(bytearray(zlib.decompress(packed)), np.uint8)
                images.append(mask.reshape(record["height"], record["width"]))
        rows = np.frombuffer(bytearray(content), self.dtype).reshape(stop - start, *self.shape)
        return torch.from_numpy(rows).float(), tuple(images)

    def append(self, features: Tensor, masks: Sequence[np.ndarray]) -> None:
        """Store the next items. A disk that is full ends the storing, not the run."""
        if self._lock is None:
            return
        if features.shape[1:] != self.shape or any(mask.dtype != np.uint8 for mask in masks):  # a plug-in's transform
            self.close()
            return
        try:
            if not self._files:
                self._open()
            rows = features.cpu().numpy().astype(self.dtype)
            end = int(self._records["end"][-1]) if self.done else 0
            records = np.zeros(len(rows), _RECORD)
            for row, mask, record in zip(rows, masks, records, strict=True):
                item, packed = row.tobytes(), zlib.compress(mask.tobytes(), 1)
                end += len(packed)
                record["end"], record["checksum"] = end, zlib.crc32(packed, zlib.crc32(item))
                record["height"], record["width"] = mask.shape
                self._files[1].write(item)
                self._files[2].write(packed)
            for file, content in zip(self._files[::-1], (b"", b"", records.tobytes()), strict=True):
                file.write(content)
                file.flush()
            self._records = np.concatenate([self._records, records])
        except OSError as error:
            log.warning("%s: features are no longer stored (%s).", self.folder, error.strerror or error)
            self.close()

    def _open(self) -> None:
        """Cut off what a killed process left half-written, and go on from there."""
        ends = (self.done * _RECORD.itemsize, self.done * self._item, int(self._records["end"][-1]) if self.done else 0)
        for name, end in zip(_FILES, ends, strict=True):
            with open(self.folder / name, "ab") as file:
                file.truncate(end)
            self._files.append(open(self.folder / name, "ab"))  # noqa: SIM115

    def close(self) -> None:
        """Let other processes write this stream."""
        for file in self._files:
            with contextlib.suppress(OSError):  # what could not be written on a full disk is tried again
                file.close()
        self._files = []
        if self._lock:
            self._lock.release()
            self._lock = None

    def drop(self) -> None:
        """Delete it, as it is damaged; what another process writes is left to that one."""
        log.warning("%s: a checksum is wrong or a file is gone; these features are computed again.", self.folder)
        if self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


class SharedFeatures:
    """Features, by the ids of items, that the streams in `folders` have; these are read, never written."""

    def __init__(self, folders: Sequence[Path], shape: tuple[int, ...] = (), dtype: np.dtype = DTYPES["fp32"]) -> None:
        self._places: dict[bytes, tuple[FeatureFile, int]] = {}
        for folder in folders:
            with contextlib.suppress(OSError):  # deleted meanwhile
                content = (folder / _ITEMS).read_bytes()
                file = FeatureFile(folder, len(content) // ID_BYTES, shape, dtype, None)
                for number in range(min(file.done, file.count)):
                    item = content[number * ID_BYTES : (number + 1) * ID_BYTES]
                    self._places.setdefault(item, (file, number))
                os.utime(folder / _ABOUT)  # used now

    def has(self, ids: Sequence[bytes]) -> bool:
        """Whether all of these are there."""
        return bool(ids) and all(item in self._places for item in ids)

    def read(self, ids: Sequence[bytes]) -> Tensor | None:
        """Features (n, D, h, w) float32; None where one is missing or damaged."""
        rows = []
        for item in ids:
            file, number = self._places.get(item, (None, 0))
            stored = file.read(number, number + 1) if file else None
            if stored is None:
                return None
            rows.append(stored[0])
        return torch.cat(rows) if rows else None


@dataclass(frozen=True)
class FeatureStore:
    """Opens streams. dtype: "fp32", the very numbers of the encoder, or "fp16", each with a relative error of at most
    2**-11 in half the space. identity: of the encoder as it was requested, with code and package versions, which its
    weights do not show; None stores nothing. rebuild: what was stored before is deleted."""

    dtype: str = "fp32"
    identity: str | None = None
    rebuild: bool = False

    def rounded(self, features: Tensor) -> Tensor:
        """Features as they come back from the store. Raises NumericalError where half precision cannot hold them."""
        if self.dtype == "fp32":
            return features
        half = features.half()
        if not torch.isfinite(half).all():
            raise NumericalError("Features exceed the range of half precision. Use --features fp32.")
        return half.float()

    def open(
        self,
        pixels: dict[str, Any],
        masks: Any,
        ids: Sequence[bytes],
        shape: tuple[int, ...],
        *,
        ahead: bool = False,
    ) -> tuple[FeatureFile | None, SharedFeatures]:
        """Open the stream of some items, and what other streams have of them.

        Args:
            pixels: all that the features of an item depend on, but its id.
            masks: what else the stream depends on.
            ids: `ID_BYTES` per item, in order; items of equal ids have equal features.
            shape: of an item's features, (D, h, w).
            ahead: for a later job: stored only where there is room beside the streams of this model and data set,
                which that job and others of its kind may need.

        Returns:
            The stream, None where it cannot be stored or others have all its items; and what those others have.
        """
        if self.identity is None:
            return None, SharedFeatures([])
        dtype = DTYPES[self.dtype]
        needed = len(ids) * int(np.prod(shape)) * dtype.itemsize
        common = digest([self.identity, pixels, self.dtype, list(shape)])[:32]
        folder = store_folder() / f"{common}-{digest([masks, b''.join(ids).hex()])[:32]}"
        shared = SharedFeatures([])
        try:
            if self.rebuild:
                for old in {*store_folder().glob(f"{common}-*")} - _REBUILT:
                    remove_file(old)
                _REBUILT.add(folder)
            others = sorted(other for other in store_folder().glob(f"{common}-*") if other != folder)
            shared = SharedFeatures(
                [other for other in others if (other / _ITEMS).exists() and (other in _REBUILT or not self.rebuild)],
                shape,
                dtype,
            )
            about = {"encoder": pixels["encoder"][0], "data": pixels["data"], "items": len(ids), "bytes": needed}
            if not folder.exists() and (shared.has(ids) or not self._make_room(about, ahead)):
                return None, shared
            write_whole(folder / _ABOUT, json.dumps(about | {"kept_as": self.dtype}).encode())
            write_whole(folder / _ITEMS, b"".join(ids))
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:  # another process writes it; what is there can be read
                return FeatureFile(folder, len(ids), shape, dtype, None), shared
            return FeatureFile(folder, len(ids), shape, dtype, lock), shared
        except UsageError:
            raise
        except (OSError, NecoBenchError) as error:
            log.warning("Features are not stored: %s", error)
            return None, shared

    def _make_room(self, about: dict[str, Any], ahead: bool) -> bool:
        """Delete the least recently used streams that no process writes, until the bytes that a new one needs fit.

        ahead: not those of the same model and data set, and beside what the streams that are there may still grow by.
        """
        limit, needed = budget(), about["bytes"]
        store_folder().mkdir(parents=True, exist_ok=True)
        remove_leftovers()
        entries = sorted(_streams(), key=lambda row: row["used"])
        growth = sum(max(0, row["planned"] - row["bytes"]) for row in entries) if ahead else 0
        if needed > limit or needed + growth > shutil.disk_usage(store_folder()).free * 0.9:
            return False
        total = growth + sum(row["bytes"] for row in entries)
        for row in entries:
            if total + needed > limit and not (ahead and _kind(row) == _kind(about)):
                total -= row["bytes"] * remove_file(Path(row["folder"]))
        return total + needed <= limit


def _kind(about: dict[str, Any]) -> tuple[str, str]:
    """The model and the data set of a stream, whose splits are several streams."""
    return about["encoder"], about["data"].partition(" ")[0]


def stored_files() -> list[dict[str, Any]]:
    """One row per stream in the store: encoder, data, items, how many are there, bytes, when it was used, folder."""
    return [{name: row[name] for name in row if name != "planned"} for row in _streams()]


def _streams() -> list[dict[str, Any]]:
    """The same with `planned`, the bytes of all items."""
    rows = []
    for about in sorted(store_folder().glob(f"*/{_ABOUT}")):
        try:
            row = json.loads(about.read_bytes())
            done = _size(about.with_name(_FILES[0])) // _RECORD.itemsize
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            used = about.stat().st_mtime
        except (OSError, ValueError):  # deleted meanwhile
            continue
        own = {"planned": row["bytes"], "bytes": size, "used": used, "folder": str(about.parent)}
        rows.append({**row, "done": done, **own})
    return rows


def remove_leftovers() -> None:
    """Delete streams that no list names: a process was killed while it made or deleted them."""
    for folder in store_folder().glob("*/"):
        with contextlib.suppress(OSError):
            if not (folder / _ABOUT).exists() and time.time() - folder.stat().st_mtime > STARTING:
                remove_file(folder)


def remove_file(folder: Path) -> bool:
    """Delete a stream unless a process writes it; whether it is gone."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return not folder.exists()

"""The feature store: features of the items of a stream, stored on disk and shared by all tasks and runs.

There is one folder per stream under `<cache>/features`, named by two digests. The first covers everything on which the
features of an item depend (encoder and weights, layer, precision, type of device, normalisation, data set and split,
the effect of the transform on pixels). The second covers the items, their order and their masks. Streams with the same
first digest share features by item: a task with other masks or another list of the same items computes only masks.
Augmentation is drawn per item, so augmented features are stored too. Features are stored consecutively in one file, and
masks (after the transform) in another. Items are appended in order and each has a checksum, so that a killed run loses
only the item that it was writing. One process writes a stream; other processes compute the features themselves in the
meantime. The least recently used streams are deleted when the budget is exceeded.
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

_REBUILT: set[Path] = set()  # streams rebuilt by this process, once for all its tasks


def store_folder() -> Path:
    """Return the folder of all streams, which may not exist yet."""
    return cache_dir() / "features"


def budget() -> float:
    """Return the maximum bytes of all streams: `NECO_BENCH_FEATURES_GB`, else 20 GB. Raises UsageError."""
    text = os.environ.get("NECO_BENCH_FEATURES_GB", "20")
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise UsageError(f"NECO_BENCH_FEATURES_GB={text!r} is not a number of gigabytes.") from error


def _size(path: Path) -> int:
    """Return the bytes of a file, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class FeatureFile:
    """Stored items of one stream: `done` of `count`, each with features (D, h, w) and a mask (H, W) uint8."""

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
        """Number of stored items."""
        return len(self._records)

    def read(self, start: int, stop: int) -> tuple[Tensor, tuple[np.ndarray, ...]] | None:
        """Read features (n, D, h, w) float32 and masks of items start to stop; None if they are damaged or deleted."""
        try:
            return self._read(start, stop)
        except (OSError, ValueError):  # deleted by another process to free space; wrong size of a mask
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
        """Store the next items. If the disk is full, storing ends, but the run continues."""
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
        """Truncate an item that a killed process wrote in part, and continue after the previous item."""
        ends = (self.done * _RECORD.itemsize, self.done * self._item, int(self._records["end"][-1]) if self.done else 0)
        for name, end in zip(_FILES, ends, strict=True):
            with open(self.folder / name, "ab") as file:
                file.truncate(end)
            self._files.append(open(self.folder / name, "ab"))  # noqa: SIM115

    def close(self) -> None:
        """Release this stream for other processes."""
        for file in self._files:
            with contextlib.suppress(OSError):  # closing writes the rest again, which may fail on a full disk
                file.close()
        self._files = []
        if self._lock:
            self._lock.release()
            self._lock = None

    def drop(self) -> None:
        """Delete this damaged stream, unless another process is writing it."""
        log.warning("%s: a checksum is wrong or a file is missing; these features are computed again.", self.folder)
        if self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


class SharedFeatures:
    """Features of other streams in `folders`, by the ids of items; read only."""

    def __init__(self, folders: Sequence[Path], shape: tuple[int, ...] = (), dtype: np.dtype = DTYPES["fp32"]) -> None:
        self._places: dict[bytes, tuple[FeatureFile, int]] = {}
        for folder in folders:
            with contextlib.suppress(OSError):  # deleted meanwhile
                content = (folder / _ITEMS).read_bytes()
                file = FeatureFile(folder, len(content) // ID_BYTES, shape, dtype, None)
                for number in range(min(file.done, file.count)):
                    item = content[number * ID_BYTES : (number + 1) * ID_BYTES]
                    self._places.setdefault(item, (file, number))
                os.utime(folder / _ABOUT)  # last use

    def has(self, ids: Sequence[bytes]) -> bool:
        """Return whether all of these ids are stored."""
        return bool(ids) and all(item in self._places for item in ids)

    def read(self, ids: Sequence[bytes]) -> Tensor | None:
        """Read features (n, D, h, w) float32; None if one is missing or damaged."""
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
    """Open streams. dtype: "fp32" (the exact numbers of the encoder), or "fp16" (relative error at most 2**-11, half
    the space). identity: identity of the requested encoder, with code and package versions, which its weights do not
    show; None stores nothing. rebuild: delete previously stored features."""

    dtype: str = "fp32"
    identity: str | None = None
    rebuild: bool = False

    def rounded(self, features: Tensor) -> Tensor:
        """Return features as rounded by the store. Raises NumericalError if they exceed half precision."""
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
        """Open the stream of some items, and the features of these items in other streams.

        Args:
            pixels: everything on which the features of an item depend, except its id.
            masks: everything else on which the stream depends.
            ids: `ID_BYTES` per item, in order; items with equal ids have equal features.
            shape: shape of an item's features, (D, h, w).
            ahead: the stream is for a later job: it is stored only if there is space in addition to the streams of this
                model and data set, which that job and similar ones may need.

        Returns:
            The stream, or None if it cannot be stored or others have all its items; and the features in the others.
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
            except Timeout:  # another process writes it; stored items can be read
                return FeatureFile(folder, len(ids), shape, dtype, None), shared
            return FeatureFile(folder, len(ids), shape, dtype, lock), shared
        except UsageError:
            raise
        except (OSError, NecoBenchError) as error:
            log.warning("Features are not stored: %s", error)
            return None, shared

    def _make_room(self, about: dict[str, Any], ahead: bool) -> bool:
        """Delete the least recently used streams that no process writes, until a new stream fits.

        ahead: do not delete streams of the same model and data set, and reserve space for the growth of existing ones.
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
    """Return the model and the data set of a stream; the splits of a data set are several streams."""
    return about["encoder"], about["data"].partition(" ")[0]


def stored_files() -> list[dict[str, Any]]:
    """Return one row per stream in the store: encoder, data, items, stored items, bytes, last use, folder."""
    return [{name: row[name] for name in row if name != "planned"} for row in _streams()]


def _streams() -> list[dict[str, Any]]:
    """Return the same rows with `planned`, the bytes of all items."""
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
    """Delete incomplete streams of processes that were killed while creating or deleting them."""
    for folder in store_folder().glob("*/"):
        with contextlib.suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if not (folder / _ABOUT).exists() and age > 60:  # a new stream gets its description within a minute
                remove_file(folder)


def remove_file(folder: Path) -> bool:
    """Delete a stream unless a process writes it; return whether it was deleted."""
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

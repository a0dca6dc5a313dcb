"""Load items ahead of time, by worker processes or threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from neco_bench.core.errors import BadInputError, NecoBenchError, user_error
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context
from neco_bench.data.base import Samples
from neco_bench.data.dense import DenseDataset
from neco_bench.features.transforms import Transform

ImageDataset = Samples | DenseDataset

T = TypeVar("T")
S = TypeVar("S")


class ItemDataset(TorchDataset):
    """Data set that loads and transforms item `position` of `items`, a sequence of (epoch, index)."""

    def __init__(
        self, dataset: ImageDataset, items: Sequence[tuple[int, int]], transform: Transform, seed: int
    ) -> None:
        self.dataset, self.items, self.transform, self.seed = dataset, items, transform, seed

    def part(self, items: Sequence[tuple[int, int]]) -> ItemDataset:
        """Return the same data set with other items."""
        return ItemDataset(self.dataset, items, self.transform, self.seed)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[int, Tensor, np.ndarray] | NecoBenchError:
        epoch, index = self.items[position]
        try:
            sample = self.dataset[index]
        except Exception as error:  # returned as a value, because a worker's exception is wrapped in its traceback
            return user_error(error) or BadInputError(
                f"Item {self.dataset.ids[index]!r} of data set {self.dataset.name!r} could not be read: "
                f"{type(error).__name__}: {error}"
            )
        return position, *self.transform(sample, item_rng(self.seed, "augment", epoch, sample.id))


def collate(rows: list[Any]) -> tuple[tuple[int, ...], Tensor, tuple[np.ndarray, ...]] | NecoBenchError:
    """Stack positions, images and masks of items; or return the first error."""
    for row in rows:
        if isinstance(row, NecoBenchError):
            return row
    positions, images, masks = zip(*rows, strict=True)
    return positions, torch.stack(images), masks


def load_items(items: ItemDataset, batch_size: int, workers: int) -> DataLoader | _Threaded:
    """Return batches of items, loaded by worker processes or, without workers, by threads of this process.

    On the cores of an encoder, threads that alternate with it are faster than processes that compete with it.
    """
    if workers:
        return DataLoader(
            items,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )
    return _Threaded(items, batch_size)


@contextlib.contextmanager
def loading_threads() -> Iterator[ThreadPoolExecutor]:
    """Start one thread per core, in each of which PyTorch uses a single thread.

    This is as in a worker process: the rounding of sums depends on the number of threads, and an image must not depend
    on how it was loaded. PyTorch has a number of threads per thread and a global one, which must be restored for the
    encoder. All threads are therefore started, and the global number is restored, before any is used.
    """
    count, before = os.cpu_count() or 1, torch.get_num_threads()
    all_there = threading.Barrier(count)

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread copies the global number, which then is fixed for it
        torch.set_num_threads(1)

    with ThreadPoolExecutor(count, initializer=start) as pool:
        for ready in [pool.submit(all_there.wait) for _ in range(count)]:
            ready.result()
        torch.set_num_threads(before)
        yield pool


def load_chunks(load: Callable[[T], S], items: Sequence[T], context: Context) -> Iterator[list[S]]:
    """Yield the results of `load` for all items in order, in lists of the batch size, computed by threads."""
    with loading_threads() as pool:
        for start in range(0, len(items), context.batch_size):
            with context.phase("load"):
                loaded = list(pool.map(load, items[start : start + context.batch_size]))
            yield loaded


class _Threaded:
    """Batches of items, each loaded by several threads when needed."""

    def __init__(self, items: ItemDataset, batch_size: int) -> None:
        self.items, self.batch_size = items, batch_size

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        with loading_threads() as pool:
            for start in range(0, len(self.items), self.batch_size):
                stop = min(start + self.batch_size, len(self.items))
                yield collate(list(pool.map(self.items.__getitem__, range(start, stop))))

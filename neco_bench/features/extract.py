"""Extraction: items in a stated order, through a transform and an encoder, one batch of features at a time.

Order and content do not depend on the number of workers or the batch size; only floating-point rounding inside the
encoder may. When the device runs out of memory the batch is halved and the size used is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NecoBenchError, is_out_of_memory
from neco_bench.core.task import Context
from neco_bench.encoders.base import Encoder
from neco_bench.features.loader import ImageDataset, ItemDataset, load_items
from neco_bench.features.store import ID_BYTES, FeatureFile, SharedFeatures
from neco_bench.features.transforms import Transform


@dataclass(frozen=True)
class FeatureBatch:
    """Positions in the item list, features (B, D, h, w) float32 on the encoder's device, and one mask per image."""

    positions: tuple[int, ...]
    features: Tensor
    masks: tuple[np.ndarray, ...]


def features_of(
    encoder: Encoder, images: Tensor, *, class_token: bool = False, mirrored: bool = False, **options: Any
) -> Tensor:
    """Encode images: `Encoder.encode(images).map`, with what else is asked for behind it as further channels.

    Args:
        encoder: of the images.
        images: (B, 3, H, W) in [0, 1].
        class_token: the first prefix token at each cell; of encoders without one, the mean of the cells.
        mirrored: after these, the same of the mirrored images, mirrored back.
        options: of `encode`.

    Returns:
        (B, D, h, w), D times 2 for each of the two.
    """
    encoded = encoder.encode(images, **options)
    features = encoded.map
    if class_token:
        token = features.mean((2, 3)) if encoded.prefix is None else encoded.prefix[:, 0]
        features = torch.cat([features, token[:, :, None, None].expand_as(features)], 1)
    if not mirrored:
        return features
    other = features_of(encoder, images.flip(-1), class_token=class_token, **options)
    return torch.cat([features, other.flip(-1)], 1)


Output = Literal["features", "features and attention", "attention"]


class FeatureExtractor:
    """Features of images by one encoder, in the batches, with the workers and through the feature store of a run.

    Args:
        encoder: the encoder.
        context: of the run. What happens on the way, such as a smaller batch size, is in `context.run`.
        output: the features, one channel more with the mean over heads of the class token's attention, or that
            attention alone, a channel for each head.
        options: of every call of `features_of`, such as `mean` and `std`.
    """

    def __init__(self, encoder: Encoder, context: Context, *, output: Output = "features", **options: Any) -> None:
        self.encoder, self.context, self.output = encoder, context, output
        self.options = options if output == "features" else {**options, "attention": True}

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W): (B, D, h, w); after an out-of-memory error in halves, and so from then on."""
        while True:
            size = self.context.batch_size_used
            try:
                parts = [self._channels(part) for part in images.split(size)]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            except (RuntimeError, MemoryError, NecoBenchError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.context.run.batch_size = min(size, len(images)) // 2 or 1
            torch.cuda.empty_cache()

    def _channels(self, images: Tensor) -> Tensor:
        if self.output == "features":
            return features_of(self.encoder, images, **self.options)
        features = self.encoder.encode(images, **self.options)
        if features.attention is None:
            return features.map
        if self.output == "attention":
            return features.attention
        return torch.cat([features.map, features.attention.mean(1, keepdim=True)], 1)

    def stream(
        self,
        dataset: ImageDataset,
        transform: Transform,
        description: str,
        *,
        items: Sequence[tuple[int, int]] | None = None,
        own: bool = False,
        alone: bool = False,
    ) -> Iterator[FeatureBatch]:
        """Yield features of `items`, (epoch, index) pairs in order; default: every image once.

        The generator given to the transform depends on (seed, epoch, image id) alone. Where the context has a feature
        store, items that are there come from it, and the others go there. Of several processes each encodes every so
        many batches; all of them get all batches, in order, or with `own` each only what it encoded.

        Args:
            dataset: what the items are of.
            transform: makes an input and a mask of each sample.
            description: of the progress bar.
            items: in which order.
            own: whether each process gets its own batches alone.
            alone: whether this process encodes all items; the others have other data sets.
        """
        if items is None:
            items = [(0, index) for index in range(len(dataset))]
        source = ItemDataset(dataset, items, transform, self.context.seed)
        if alone or distributed.world() == 1:
            yield from self._local(source, description)
            return
        size, step = self.context.batch_size_used, self.context.batch_size_used * distributed.world()
        mine = self._own_positions(len(items))
        batches = _of_size(self._local(source.part([items[p] for p in mine]), description), size)
        nothing = FeatureBatch((), torch.zeros(0, device=self.encoder.device), ())
        for _ in range(0, len(items), step):
            batch = next(batches, nothing)
            batch = FeatureBatch(tuple(mine[p] for p in batch.positions), batch.features, batch.masks)
            if not own:
                yield from self._gathered(batch, size)
            elif batch.positions:
                yield batch

    def store_ahead(
        self, dataset: ImageDataset, transform: Transform, description: str, items: Sequence[tuple[int, int]]
    ) -> None:
        """Encode `items` into the feature store, so that a stream that has each of them many times reads them there.

        Does nothing without a store, or where it has no room for all of them.
        """
        source = ItemDataset(dataset, [items[p] for p in self._own_positions(len(items))], transform, self.context.seed)
        file, _, _ = self._open(source)
        if file:
            file.close()
            for _ in self._local(source, description):
                pass
        distributed.gather(None)  # what one process needs another may have encoded

    def _own_positions(self, count: int) -> list[int]:
        """Which of `count` items this process encodes: every so many batches."""
        size, world = self.context.batch_size_used, distributed.world()
        starts = range(distributed.rank() * size, count, size * world)
        return [position for start in starts for position in range(start, min(start + size, count))]

    def _gathered(self, batch: FeatureBatch, size: int) -> Iterator[FeatureBatch]:
        """The batches of all processes, of at most `size` items, in their order; some may have none."""
        with self.context.phase("gather"):
            facts = distributed.gather((batch.positions, batch.masks, batch.features.shape[1:]))
            shape = facts[0][2]  # the first process has a batch whenever another has one
            own_rows = batch.features if batch.positions else batch.features.new_zeros(0, *shape)
            features = distributed.gather_rows(own_rows, size)
        for rows, (positions, masks, _) in zip(features, facts, strict=True):
            if positions:
                yield FeatureBatch(positions, rows, masks)

    def _local(self, source: ItemDataset, description: str) -> Iterator[FeatureBatch]:
        """Batches of items from the store, as far as it has them, then computed."""
        file, shared, ids = self._open(source)
        start = 0
        try:
            while file and start < file.done:
                stop = min(start + self.context.batch_size_used, file.done)
                with self.context.phase("load"):
                    stored = file.read(start, stop)
                if stored is None:
                    file.drop()
                    file = None
                    break
                self.context.run.reused += stop - start
                yield FeatureBatch(tuple(range(start, stop)), stored[0].to(self.encoder.device), stored[1])
                start = stop
            for batch in self._computed(source, start, description, shared, ids):
                if file:
                    with self.context.phase("keep"):
                        file.append(batch.features, batch.masks)
                yield batch
        finally:
            if file:
                file.close()

    def _open(self, source: ItemDataset) -> tuple[FeatureFile | None, SharedFeatures | None, list[bytes]]:
        """The stored stream of these items, what other streams have of them, and their ids; None where there is none.

        Streams are known by all that their content depends on.
        """
        transform, dataset, encoder = source.transform, source.dataset, self.encoder
        size = getattr(transform, "size", None)
        # Of other transforms it is not known what else they depend on, and heads are not counted before encoding.
        sides = (size, size) if isinstance(size, int) else size
        known = dataclasses.is_dataclass(transform) and self.output != "attention"
        if self.context.store is None or not len(source) or not known or not isinstance(sides, tuple):
            return None, None, []
        try:  # what its code does may change from one version to the next
            code = inspect.getsource(inspect.getmodule(transform) or type(transform))
        except (OSError, TypeError):
            return None, None, []
        seed, pixels = self.context.seed, getattr(transform, "pixels", None)
        facts = {
            "encoder": [encoder.name, encoder.weights_id, encoder.layer, encoder.pos_interp],
            "input": [encoder.stride, sorted(self._resolved_options().items())],
            "numbers": [encoder.precision, encoder.device.type, torch.__version__],
            "data": f"{dataset.name} {dataset.split}",
            "fingerprint": dataset.fingerprint(),
            "transform": [pixels or [repr(transform), seed], hashlib.sha256(code.encode()).hexdigest()],
        }
        drawn = [("" if pixels else f"{epoch} ") + dataset.ids[index] for epoch, index in source.items]
        ids = [hashlib.sha256(text.encode()).digest()[:ID_BYTES] for text in drawn]
        channels = encoder.embed_dim * 2 ** sum(bool(self.options.get(name)) for name in ("class_token", "mirrored"))
        shape = (channels + (self.output == "features and attention"), *(side // encoder.stride for side in sides))
        return *self.context.store.open(facts, [repr(transform), source.items, seed], ids, shape), ids

    def _resolved_options(self) -> dict[str, Any]:
        """Options of the encoder with what their defaults stand for: equal features have equal ones."""
        encoder, given = self.encoder, {name: value for name, value in self.options.items() if value is not None}
        after = encoder.has_final_norm and bool(given.get("final_norm", encoder.final_norm))
        plain = {"class_token": False, "mirrored": False, "mean": encoder.mean, "std": encoder.std}
        return {**plain, **given, "final_norm": after}

    def _computed(
        self, source: ItemDataset, start: int, description: str, shared: SharedFeatures | None, ids: Sequence[bytes]
    ) -> Iterator[FeatureBatch]:
        """Batches of the items from `start` on, loaded, and encoded where no stream has their features."""
        if start == len(source):
            return
        context = self.context
        loaded = load_items(source.part(source.items[start:]), context.batch_size_used, context.workers)
        batches = iter(context.track(loaded, description))
        while True:
            with context.phase("load"):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, NecoBenchError):
                raise batch
            positions, images, masks = batch
            positions = tuple(start + position for position in positions)
            with context.phase("load"):
                stored = shared.read([ids[position] for position in positions]) if shared else None
            if stored is not None:
                context.run.reused += len(positions)
                yield FeatureBatch(positions, stored.to(self.encoder.device), masks)
                continue
            with context.phase("encode"):
                features = self.encode(images)
                del batch, images  # not to be in memory while the next are loaded
                if context.store is not None:
                    features = context.store.rounded(features)
            yield FeatureBatch(positions, features, masks)


def _of_size(batches: Iterator[FeatureBatch], size: int) -> Iterator[FeatureBatch]:
    """The same items in batches of `size`; where the store begins or ends they may be smaller."""
    rest: FeatureBatch | None = None
    for batch in batches:
        if rest is not None:
            features = torch.cat([rest.features, batch.features])
            batch = FeatureBatch(rest.positions + batch.positions, features, rest.masks + batch.masks)
        while len(batch.positions) >= size:
            yield FeatureBatch(batch.positions[:size], batch.features[:size], batch.masks[:size])
            batch = FeatureBatch(batch.positions[size:], batch.features[size:], batch.masks[size:])
        rest = batch if batch.positions else None
    if rest is not None:
        yield rest

"""Feature extraction: load items in a given order, transform and encode them, one batch at a time.

Order and content do not depend on the number of workers or the batch size, except for floating-point rounding inside
the encoder. When the device runs out of memory, the batch is halved, and the used size is recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NecoBenchError, NumericalError, is_out_of_memory
from neco_bench.core.task import Context
from neco_bench.data.folder import fingerprint_and_times
from neco_bench.encoders.adapters.layers import read_layers
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
    """Encode images: `Encoder.encode(images).map`, with requested additional features as further channels.

    Args:
        encoder: the encoder.
        images: (B, 3, H, W) in [0, 1].
        class_token: append the first prefix token to each cell, or, without prefix tokens, the mean of the cells.
        mirrored: append the same features of the mirrored images, mirrored back.
        options: options of `encode`.

    Returns:
        (B, D, h, w), where each of the two options doubles D.
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
        context: context of the run. Events such as a smaller batch size are recorded in `context.run`.
        output: the features; the features with an additional channel, the class token's attention averaged over heads;
            or only that attention, with a channel for each head.
        options: of every call of `features_of`, such as `mean` and `std`.
    """

    def __init__(self, encoder: Encoder, context: Context, *, output: Output = "features", **options: Any) -> None:
        self.encoder, self.context, self.output = encoder, context, output
        self.options = options if output == "features" else {**options, "attention": True}

    def encode(self, images: Tensor, by: Encoder | None = None) -> Tensor:
        """Encode images (B, 3, H, W) to (B, D, h, w); after an out-of-memory error, in halves from then on.

        by: an encoder of several layers to use instead, whose features are moved to the CPU.
        """
        while True:
            size = self.context.batch_size_used
            try:
                encoded = (self._channels(by or self.encoder, part) for part in images.split(size))
                parts = [part.cpu() if by else part for part in encoded]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            except (RuntimeError, MemoryError, NecoBenchError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.context.run.batch_size = min(size, len(images)) // 2 or 1
            torch.cuda.empty_cache()

    def _channels(self, encoder: Encoder, images: Tensor) -> Tensor:
        if self.output == "features":
            return features_of(encoder, images, **self.options)
        features = encoder.encode(images, **self.options)
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

        The generator of the transform depends only on (seed, epoch, image id). If the context has a feature store,
        stored items are read from it, and others are added to it. With several processes, each encodes a part of the
        batches; all get all batches, in order, or, with `own`, only their own batches.

        Args:
            dataset: the data set of the items.
            transform: makes an input and a mask of each sample.
            description: of the progress bar.
            items: the items, in order.
            own: whether each process gets only its own batches.
            alone: whether this process encodes all items, because the others have other data sets.
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
        """Encode `items` into the feature store, for a stream that reads each of them many times.

        Does nothing if there is no store, or if it has no space for all of them.
        """
        source = ItemDataset(dataset, [items[p] for p in self._own_positions(len(items))], transform, self.context.seed)
        file, _, _ = self.open(source, self.encoder)
        if file:
            file.close()
            for _ in self._local(source, description):
                pass
        distributed.gather(None)  # one process may need items that another has encoded

    def _own_positions(self, count: int) -> list[int]:
        """Return the positions, of `count` items, that this process encodes."""
        size, world = self.context.batch_size_used, distributed.world()
        starts = range(distributed.rank() * size, count, size * world)
        return [position for start in starts for position in range(start, min(start + size, count))]

    def _gathered(self, batch: FeatureBatch, size: int) -> Iterator[FeatureBatch]:
        """Yield the batches of all processes, of at most `size` items, in order; a process may have none."""
        with self.context.phase("gather"):
            facts = distributed.gather((batch.positions, batch.masks, batch.features.shape[1:]))
            shape = facts[0][2]  # the first process has a batch if any process has one
            own_rows = batch.features if batch.positions else batch.features.new_zeros(0, *shape)
            features = distributed.gather_rows(own_rows, size)
        for rows, (positions, masks, _) in zip(features, facts, strict=True):
            if positions:
                yield FeatureBatch(positions, rows, masks)

    def _local(self, source: ItemDataset, description: str) -> Iterator[FeatureBatch]:
        """Yield batches of items, from the store as far as possible, then computed."""
        file, shared, ids = self.open(source, self.encoder)
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

    @property
    def parts(self) -> int:
        """Number of feature vectors of the encoder's dimension that are concatenated for an image."""
        return int(2 ** sum(bool(self.options.get(name)) for name in ("class_token", "mirrored")))

    def open(
        self, source: ItemDataset, encoder: Encoder, *, ahead: bool = False
    ) -> tuple[FeatureFile | None, SharedFeatures | None, list[bytes]]:
        """Open the stored stream of items: its file, the features in other streams, and ids; None if there is none.

        Streams are identified by everything that their content depends on. encoder: that of this extractor, or one of
        another layer of the same model. ahead: see `FeatureStore.open`.
        """
        transform, dataset = source.transform, source.dataset
        size = getattr(transform, "size", None)
        # The dependencies of other transforms are unknown, and the number of heads is unknown before encoding.
        sides = (size, size) if isinstance(size, int) else size
        known = dataclasses.is_dataclass(transform) and self.output != "attention"
        if self.context.store is None or not len(source) or not known or not isinstance(sides, tuple):
            return None, None, []
        try:  # the behaviour of its code may change between versions
            code = inspect.getsource(inspect.getmodule(transform) or type(transform))
        except (OSError, TypeError):
            return None, None, []
        seed, pixels = self.context.seed, getattr(transform, "pixels", None)
        facts = {
            "encoder": [encoder.name, encoder.weights_id, encoder.layer, encoder.pos_interp],
            "input": [encoder.stride, sorted(self._resolved_options(encoder).items())],
            "numbers": [encoder.precision, encoder.device.type, torch.__version__],
            "data": f"{dataset.name} {dataset.split}",
            "files": fingerprint_and_times(dataset),
            "transform": [pixels or [repr(transform), seed], hashlib.sha256(code.encode()).hexdigest()],
        }
        drawn = [("" if pixels else f"{epoch} ") + dataset.ids[index] for epoch, index in source.items]
        ids = [hashlib.sha256(text.encode()).digest()[:ID_BYTES] for text in drawn]
        channels = encoder.embed_dim * self.parts
        shape = (channels + (self.output == "features and attention"), *(side // encoder.stride for side in sides))
        masks = [repr(transform), source.items, seed]
        return *self.context.store.open(facts, masks, ids, shape, ahead=ahead), ids

    def _resolved_options(self, encoder: Encoder) -> dict[str, Any]:
        """Return options of the encoder with resolved defaults, so that equal features have equal options."""
        given = {name: value for name, value in self.options.items() if value is not None}
        after = encoder.has_final_norm and bool(given.get("final_norm", encoder.final_norm))
        plain = {"class_token": False, "mirrored": False, "mean": encoder.mean, "std": encoder.std}
        return {**plain, **given, "final_norm": after}

    def _computed(
        self, source: ItemDataset, start: int, description: str, shared: SharedFeatures | None, ids: Sequence[bytes]
    ) -> Iterator[FeatureBatch]:
        """Yield batches of the items from `start` on: loaded, and encoded if no stream has their features."""
        if start == len(source):
            return
        context = self.context
        loaded = load_items(source.part(source.items[start:]), context.batch_size_used, context.workers)
        batches = iter(context.track(loaded, description))
        with contextlib.closing(_Passes(self, source)) as passes:
            yield from self._encoded(passes, batches, start, shared, ids)

    def _encoded(
        self, passes: _Passes, batches: Iterator[Any], start: int, shared: SharedFeatures | None, ids: Sequence[bytes]
    ) -> Iterator[FeatureBatch]:
        context = self.context
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
            features = passes.encode(positions, images, masks)
            del batch, images  # free memory before the next batch is loaded
            yield FeatureBatch(positions, features, masks)


class _Passes:
    """Forward passes over the items of a stream, which also store the layers that later jobs read."""

    def __init__(self, extractor: FeatureExtractor, source: ItemDataset) -> None:
        self._extractor, self._source = extractor, source
        self._files: dict[int, FeatureFile] | None = None  # by layer; opened at the first pass

    def encode(self, positions: Sequence[int], images: Tensor, masks: Sequence[np.ndarray]) -> Tensor:
        """Encode a batch: features (B, D, h, w) on the encoder's device, equal to those read from the store."""
        extractor, context = self._extractor, self._extractor.context
        if self._files is None:
            self._files = self._open()
        features = None
        if self._files:
            try:
                features = self._encode_layers(self._files, positions, images, masks)
            except NumericalError:  # of any layer; for this layer, the encoder raises it again below
                self.close()
        with context.phase("encode"):
            features = extractor.encode(images) if features is None else features.to(extractor.encoder.device)
            features = features.contiguous()  # the same memory layout as from the store, so that rounding is equal
            return features if context.store is None else cast(Tensor, context.store.rounded(features))

    def _open(self) -> dict[int, FeatureFile]:
        encoder, files = self._extractor.encoder, {}
        if encoder.equal_layers and self._extractor.context.layers_ahead:
            for layer in self._extractor.context.layers_ahead:
                file, _, _ = self._extractor.open(self._source, read_layers(encoder, (layer,)), ahead=True)
                if file is not None:
                    files[layer] = file
        return files

    def _encode_layers(
        self, files: dict[int, FeatureFile], positions: Sequence[int], images: Tensor, masks: Sequence[np.ndarray]
    ) -> Tensor:
        """Return features of this layer (B, D, h, w) on the CPU; those of the other layers are added to their files."""
        extractor, encoder = self._extractor, cast(Any, self._extractor.encoder)
        (own,) = encoder.indices
        layers = sorted({own, *files})
        with extractor.context.phase("encode"):
            encoded = extractor.encode(images, read_layers(encoder, tuple(layers)))
        # Parts (features, class token) are consecutive, each with all layers; attention, which is shared, comes last.
        channels = extractor.parts * len(layers) * encoder.embed_dim
        parts = encoded[:, :channels].unflatten(1, (extractor.parts, len(layers), encoder.embed_dim))
        by_layer = {
            layer: torch.cat([parts[:, :, number].flatten(1, 2), encoded[:, channels:]], 1)
            for number, layer in enumerate(layers)
        }
        with extractor.context.phase("keep"):
            for layer, file in files.items():
                skipped = file.done - positions[0]  # items stored by an interrupted run
                if 0 <= skipped < len(positions):
                    with contextlib.suppress(NumericalError):  # reported by the job of that layer
                        file.append(extractor.context.store.rounded(by_layer[layer][skipped:]), masks[skipped:])
        return by_layer[own]

    def close(self) -> None:
        """Release the streams of other layers for other processes."""
        for file in (self._files or {}).values():
            file.close()
        self._files = {}


def _of_size(batches: Iterator[FeatureBatch], size: int) -> Iterator[FeatureBatch]:
    """Yield the same items in batches of `size`; batches may be smaller at the ends of stored parts."""
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

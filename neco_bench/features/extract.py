"""The extraction loop: items in a stated order, through a transform and an encoder, one batch of features at a time.

Order and content do not depend on the number of workers or the batch size; only floating-point rounding inside the
encoder may. When the device runs out of memory the batch is halved and the size used is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NecoBenchError, is_out_of_memory
from neco_bench.core.task import Context
from neco_bench.encoders.base import Encoder
from neco_bench.features.loader import ImageDataset, ItemDataset, load_items
from neco_bench.features.store import FeatureFile, FeatureStore
from neco_bench.features.transforms import Transform


@dataclass(frozen=True)
class FeatureBatch:
    """Positions in the item list, features (B, D, h, w) float32 on the encoder's device, and one mask per image."""

    positions: tuple[int, ...]
    features: Tensor
    masks: tuple[np.ndarray, ...]


def encode_within_memory(encoder: Encoder, images: Tensor, context: Context, **options: Any) -> Tensor:
    """`features_of` images; after an out-of-memory error in halves, and so from then on."""
    while True:
        try:
            parts = [features_of(encoder, part, **options) for part in images.split(context.batch_size)]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        except (RuntimeError, MemoryError, NecoBenchError) as error:
            if context.batch_size == 1 or not is_out_of_memory(error):
                raise
        context.batch_size = min(context.batch_size, len(images)) // 2 or 1
        torch.cuda.empty_cache()


def features_of(
    encoder: Encoder, images: Tensor, *, class_token: bool = False, mirrored: bool = False, **options: Any
) -> Tensor:
    """`encoder.encode(images).map`, (B, D, h, w), with what else is asked for behind it as further channels.

    Args:
        encoder: of the images.
        images: (B, 3, H, W) in [0, 1].
        class_token: the first prefix token at each cell; of encoders without one, the mean of the cells.
        mirrored: after these, the same of the mirrored images, mirrored back.
        options: of `encode`.
    """
    found = encoder.encode(images, **options)
    features = found.map
    if class_token:
        token = features.mean((2, 3)) if found.prefix is None else found.prefix[:, 0]
        features = torch.cat([features, token[:, :, None, None].expand_as(features)], 1)
    if not mirrored:
        return features
    other = features_of(encoder, images.flip(-1), class_token=class_token, **options)
    return torch.cat([features, other.flip(-1)], 1)


def stream(
    encoder: Encoder,
    dataset: ImageDataset,
    transform: Transform,
    context: Context,
    description: str,
    *,
    items: Sequence[tuple[int, int]] | None = None,
    own: bool = False,
    **options: Any,
) -> Iterator[FeatureBatch]:
    """Features of `items`, (epoch, index) pairs in order; default: every image once. `options` go to
    `features_of`.

    The generator given to the transform depends on (seed, epoch, image id) alone. Where the context has a feature
    store, items that are there come from it, and the others go there. Of several processes each encodes every so many
    batches; all of them get all batches, in order, or with `own` each only what it encoded.
    """
    if items is None:
        items = [(0, index) for index in range(len(dataset))]
    if distributed.world() == 1:
        yield from _local(encoder, dataset, transform, context, description, items, options)
        return
    size, step = context.batch_size, context.batch_size * distributed.world()
    starts = range(distributed.rank() * size, len(items), step)
    mine = [position for start in starts for position in range(start, min(start + size, len(items)))]
    local = _local(encoder, dataset, transform, context, description, [items[p] for p in mine], options)
    batches = _of_size(local, size)
    nothing = FeatureBatch((), torch.zeros(0, device=encoder.device), ())
    for _ in range(0, len(items), step):
        batch = next(batches, nothing)
        batch = FeatureBatch(tuple(mine[p] for p in batch.positions), batch.features, batch.masks)
        if own:
            if batch.positions:
                yield batch
            continue
        with context.phase("gather"):
            facts = distributed.gather((batch.positions, batch.masks, batch.features.shape[1:]))
            shape = facts[0][2]  # the first process has a batch whenever another has one
            own_rows = batch.features if batch.positions else batch.features.new_zeros(0, *shape)
            features = distributed.gather_rows(own_rows, size)
        for rows, (positions, masks, _) in zip(features, facts, strict=True):
            if positions:
                yield FeatureBatch(positions, rows, masks)


def _of_size(batches: Iterator[FeatureBatch], size: int) -> Iterator[FeatureBatch]:
    """The same items in batches of `size`; where the store begins or ends they may be smaller."""
    held: FeatureBatch | None = None
    for batch in batches:
        if held is not None:
            features = torch.cat([held.features, batch.features])
            batch = FeatureBatch(held.positions + batch.positions, features, held.masks + batch.masks)
        while len(batch.positions) >= size:
            yield FeatureBatch(batch.positions[:size], batch.features[:size], batch.masks[:size])
            batch = FeatureBatch(batch.positions[size:], batch.features[size:], batch.masks[size:])
        held = batch if batch.positions else None
    if held is not None:
        yield held


def _local(
    encoder: Encoder,
    dataset: ImageDataset,
    transform: Transform,
    context: Context,
    description: str,
    items: Sequence[tuple[int, int]],
    options: dict[str, Any],
) -> Iterator[FeatureBatch]:
    """Batches of items from the store, as far as it has them, then computed."""
    kept = None
    if context.store is not None and items:
        kept = _open_kept(context.store, encoder, dataset, transform, context, items, options)
    start = 0
    try:
        while kept and start < kept.done:
            stop = min(start + context.batch_size, kept.done)
            with context.phase("load"):
                found = kept.read(start, stop)
            if found is None:
                kept.drop()
                kept = None
                break
            context.reused += stop - start
            yield FeatureBatch(tuple(range(start, stop)), found[0].to(encoder.device), found[1])
            start = stop
        for batch in _computed(encoder, dataset, transform, context, description, items, start, options):
            if kept:
                with context.phase("keep"):
                    kept.append(batch.features, batch.masks)
            yield batch
    finally:
        if kept:
            kept.close()


def _open_kept(
    store: FeatureStore,
    encoder: Encoder,
    dataset: ImageDataset,
    transform: Transform,
    context: Context,
    items: Sequence[tuple[int, int]],
    options: dict[str, Any],
) -> FeatureFile | None:
    """The stored stream of these items, known by everything its content depends on; None where it cannot be kept."""
    if not dataclasses.is_dataclass(transform):  # what else it depends on is not known
        return None
    size = getattr(transform, "size", None)
    try:  # what its code does may change from one version to the next
        code = inspect.getsource(inspect.getmodule(transform) or type(transform))
    except (OSError, TypeError):
        return None
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple):
        return None
    facts = {
        "encoder": [encoder.name, encoder.weights_id, encoder.layer, encoder.final_norm, encoder.pos_interp],
        "input": [encoder.stride, encoder.mean, encoder.std, sorted(options.items())],
        "numbers": [encoder.precision, encoder.device.type, torch.__version__],
        "data": f"{dataset.name} {dataset.split}",
        "fingerprint": dataset.fingerprint(),
        "transform": [repr(transform), hashlib.sha256(code.encode()).hexdigest()],
        "items": items,
        "seed": context.seed,
    }
    channels = encoder.embed_dim * 2 ** sum(bool(options.get(name)) for name in ("class_token", "mirrored"))
    return store.open(facts, len(items), (channels, *(side // encoder.stride for side in sides)))


def _computed(
    encoder: Encoder,
    dataset: ImageDataset,
    transform: Transform,
    context: Context,
    description: str,
    items: Sequence[tuple[int, int]],
    start: int,
    options: dict[str, Any],
) -> Iterator[FeatureBatch]:
    """Batches of the items from `start` on, loaded and encoded."""
    if start == len(items):
        return
    batches = iter(
        context.track(load_items(ItemDataset(dataset, items[start:], transform, context.seed), context), description)
    )
    while True:
        with context.phase("load"):
            batch = next(batches, None)
        if batch is None:
            return
        if isinstance(batch, NecoBenchError):
            raise batch
        positions, images, masks = batch
        with context.phase("encode"):
            features = encode_within_memory(encoder, images, context, **options)
            del batch, images  # not to be held while the next are loaded
            if context.store is not None:
                features = context.store.rounded(features)
        yield FeatureBatch(tuple(start + position for position in positions), features, masks)

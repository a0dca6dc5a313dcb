"""Order of images and their views: the same whatever the processes, the workers and the step to begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import BadInputError
from neco_bench.training.batches import Order, loader
from neco_bench.training.images import open_images

from .helpers import recipe


def order(images: int, first: int = 0, last: int = 20, shard: RankShard | None = None, **changes: int) -> list[list]:
    settings = recipe(**changes)
    where = shard or RankShard(0, settings.batch_size // settings.accumulate)
    return list(Order(images, settings, first, last, where.start, where.images))


@given(images=st.integers(4, 40), batch=st.integers(1, 4))
def test_every_epoch_is_a_permutation_without_its_last_partial_batch(images: int, batch: int) -> None:
    steps = images // batch
    batches = order(images, last=3 * steps, batch_size=batch)
    epochs = [batches[i * steps : (i + 1) * steps] for i in range(3)]
    for number, epoch in enumerate(epochs):
        keys = [key for keys in epoch for key in keys]
        assert len(keys) == len(set(keys)) == steps * batch
        assert {e for e, _ in keys} == {number}
    assert images < 10 or epochs[0] != [[(0, i) for _, i in keys] for keys in epochs[1]]


@given(first=st.integers(0, 19))
def test_a_resumed_run_goes_on_with_the_same_images(first: int) -> None:
    assert order(30, first=first) == order(30)[first:]


def test_processes_and_parts_share_a_step() -> None:
    whole = order(50, batch_size=8)
    parts = order(50, batch_size=8, accumulate=2)
    assert [parts[i] + parts[i + 1] for i in range(0, 40, 2)] == whole
    ranks = [order(50, batch_size=8, shard=RankShard(0, 4, start=s, total=8)) for s in (0, 4)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    both = [order(50, batch_size=8, accumulate=2, shard=RankShard(0, 2, start=s, total=4)) for s in (0, 2)]
    assert [a + b for a, b in zip(*both, strict=True)] == parts


def test_workers_change_nothing() -> None:
    made = [
        list(loader(open_images("shapes:12"), recipe(), Order(12, recipe(), 0, 3, 0, 4), workers, False))
        for workers in (0, 2)
    ]
    for one, two in zip(*made, strict=True):
        assert one.ids == two.ids
        assert torch.equal(one.local_views, two.local_views)
        assert torch.equal(one.gc, two.gc)
    assert made[0][0].global_views.shape == (4, 2, 3, 64, 64)


def test_unusable_images_are_replaced_and_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    Image.fromarray(np.zeros((20, 90, 3), np.uint8)).save(tmp_path / "d.png")
    images = open_images(str(tmp_path))
    settings = recipe(batch_size=6)
    (batch,) = loader(images, settings, Order(6, settings, 0, 1, 0, 6), 0, False)
    assert sorted(batch.ids) == ["a.png", "c.png", "c.png", "e.png", "e.png", "f.png"]
    reasons = dict(batch.unusable)
    assert sorted(reasons) == ["b.png", "d.png"]
    assert "less than a local crop (32)" in reasons["d.png"]


def test_no_usable_image_is_one_error(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"broken")
    (answer,) = loader(open_images(str(tmp_path)), recipe(), Order(4, recipe(), 0, 1, 0, 4), 1, False)
    assert isinstance(answer, BadInputError)
    assert "4 training images in a row" in str(answer)
